"""How many blocks fit into memory."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Sequence

import torch

from torch_paged.memory.arrays import as_integer


def group_limits(windows: Sequence[int | None], block_size: int, max_seqs: int, max_seq_len: int) -> list[int | None]:
    """The most blocks that the layers of each window get, the widest first; None for these: as many as there are."""
    return [None, *(window_blocks(window, block_size, max_seqs, max_seq_len) for window in windows[1:] if window)]


def window_blocks(window: int, block_size: int, max_seqs: int, max_seq_len: int) -> int:
    """As many blocks as a window's layers can make use of.

    Every sequence keeps what `BlockGroup` says, writes to one more, and has one that waits for a step in flight. On top
    comes a prompt of `max_seq_len` that is read in one piece.
    """
    width = -(-max_seq_len // block_size)
    return max_seqs * min((window - 2) // block_size + 4, width) + width


def blocks_of_groups(
    num_blocks: int | None,
    memory: int | float | None,
    block_bytes: Sequence[int],
    limits: Sequence[int | None],
    device: torch.device,
) -> list[int]:
    """How many blocks each group gets: `num_blocks`, or what fits into `memory`, but none more than its limit."""
    if (num_blocks is None) == (memory is None):
        raise ValueError(f"exactly one of num_blocks and memory must be given, got {num_blocks=}, {memory=}")
    if memory is None:
        return up_to(as_integer("num_blocks", num_blocks, at_least=1), limits)
    return blocks_in(memory, block_bytes, limits, device)


def blocks_in(
    memory: int | float, block_bytes: Sequence[int], limits: Sequence[int | None], device: torch.device
) -> list[int]:
    """How many blocks of each group fit into so many bytes, or into a share of the device's free memory.

    All groups get the same number, but none more than its limit.
    """
    if isinstance(memory, float):
        if not 0 < memory <= 1:
            raise ValueError(f"memory as a share of free memory must lie in (0, 1], got {memory}")
        budget = int(memory * _free_memory(device))
    else:
        budget = as_integer("memory", memory, at_least=1)
    if budget < sum(block_bytes):
        raise ValueError(f"memory = {memory} is {budget} bytes, less than one block of {sum(block_bytes)} bytes")

    def cost(count: int) -> int:
        return sum(bytes_ * number for bytes_, number in zip(block_bytes, up_to(count, limits), strict=True))

    most = bisect_right(range(budget // block_bytes[0] + 1), budget, key=cost) - 1
    return up_to(most, limits)


def up_to(count: int, limits: Sequence[int | None]) -> list[int]:
    """`count`, or each of the limits that is less."""
    return [count if limit is None else min(count, limit) for limit in limits]


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
