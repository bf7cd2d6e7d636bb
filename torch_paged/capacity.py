"""How many blocks fit into memory, and the memory that they lie in."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from torch_paged.memory.arrays import as_integer


def empty_cache(
    num_blocks: int, block_size: int, num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """An uninitialised cache of the shape above, stored so that the tokens of one block and head are adjacent.

    The operators take any strides; this layout makes each head's part of a block one stretch of memory.
    """
    return torch.empty(num_blocks, num_heads, block_size, head_dim, dtype=dtype, device=device).transpose(1, 2)


def blocks_in(memory: int | float, block_bytes: int, device: torch.device) -> int:
    """How many blocks fit into so many bytes, or into a share of the device's free memory."""
    if isinstance(memory, float):
        if not 0 < memory <= 1:
            raise ValueError(f"memory as a share of free memory must lie in (0, 1], got {memory}")
        budget = int(memory * _free_memory(device))
    else:
        budget = as_integer("memory", memory, at_least=1)
    if budget < block_bytes:
        raise ValueError(f"memory = {memory} is {budget} bytes, less than one block of {block_bytes} bytes")
    return budget // block_bytes


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
