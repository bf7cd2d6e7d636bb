"""What the operators demand of their arguments' values: block ids, slots and lengths that stay inside the cache.

One function an operator, with the operator's own signature, run before anything is written: on CPU always, on a GPU
with `TORCH_PAGED_DEBUG=1`, because reading values synchronises.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,  # noqa: ARG001
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    sliding_window: int | None = None,
    **options: Any,  # noqa: ARG001
) -> None:
    """IndexError for a length or a used block id out of range.

    A block id is used when some query of its sequence sees a key of the block.
    """
    num_seqs, width = block_table.shape
    num_blocks, block_size = key_cache.shape[:2]
    limit = width * block_size
    lens = seq_lens.long()  # sums and limits may exceed 32 bits
    _all_inside(lens, (lens < 0) | (lens > limit), "seq_lens", f"0 to max_blocks_per_seq * block_size = {limit}")
    used = (lens + block_size - 1) // block_size
    counts = torch.full_like(lens, query.shape[0] // max(num_seqs, 1))
    if cu_seqlens_q is not None:
        counts = _query_counts(cu_seqlens_q, query.shape[0])
        used *= counts > 0
    if num_seqs == 0 or query.shape[0] == 0:
        return
    table = block_table[:, : int(used.max())]
    wrong = (table < 0) | (table > min(num_blocks - 1, torch.iinfo(table.dtype).max))
    columns = torch.arange(table.shape[1], device=table.device)
    wrong &= columns < used[:, None]
    if sliding_window is not None:
        first = (lens - counts).clamp(min=0) - (sliding_window - 1)  # key that the first query with any sees
        wrong &= columns >= first[:, None] // block_size
    _all_inside(table, wrong, "block_table", f"0 to num_blocks - 1 = {num_blocks - 1}")


def schedule(*tensors: Tensor, **options: Any) -> None:
    """Every value is legal here; wrong ones are found when `attention` runs."""


def merge_attention(*tensors: Tensor) -> None:
    """Every value is legal."""


def append(
    key: Tensor,  # noqa: ARG001
    value: Tensor | None,  # noqa: ARG001
    key_cache: Tensor,
    value_cache: Tensor | None,  # noqa: ARG001
    slot_mapping: Tensor,
    **options: Any,  # noqa: ARG001
) -> None:
    """IndexError for a slot past the cache; negative slots are skipped."""
    num_slots = key_cache.shape[0] * key_cache.shape[1]
    _all_inside(slot_mapping, slot_mapping >= num_slots, "slot_mapping", f"below num_blocks * block_size = {num_slots}")


def rotary_append(
    query: Tensor,  # noqa: ARG001
    key: Tensor,
    value: Tensor | None,
    cos: Tensor,
    sin: Tensor,  # noqa: ARG001
    positions: Tensor,
    key_cache: Tensor,
    value_cache: Tensor | None,
    slot_mapping: Tensor,
    **options: Any,
) -> None:
    """As for `append`, and IndexError for a position that `cos` has no row for."""
    outside = (positions < 0) | (positions >= cos.shape[0])
    _all_inside(positions, outside, "positions", f"0 to num_positions - 1 = {cos.shape[0] - 1}")
    append(key, value, key_cache, value_cache, slot_mapping, **options)


def copy_blocks(caches: Sequence[Tensor], block_pairs: Tensor) -> None:
    """IndexError for a block past the caches, ValueError where the order of the copies would matter."""
    if not caches:
        return
    kept = (block_pairs >= 0).all(1)
    _block_ids(block_pairs, kept[:, None] & (block_pairs >= caches[0].shape[0]), "block_pairs", caches)
    sources, destinations = block_pairs[kept].unbind(1)
    _distinct(destinations, "block_pairs", "destination")
    both = torch.isin(destinations, sources)
    if both.any():
        raise ValueError(f"block_pairs must not copy from a destination, got {int(destinations[both][0])} as both")


def gather_blocks(caches: Sequence[Tensor], blocks: Tensor, out: Tensor) -> None:  # noqa: ARG001
    """IndexError for a block past the caches; negative blocks are skipped."""
    if caches:
        _block_ids(blocks, blocks >= caches[0].shape[0], "blocks", caches)


def scatter_blocks(source: Tensor, blocks: Tensor, caches: Sequence[Tensor]) -> None:  # noqa: ARG001
    """IndexError for a block past the caches, ValueError for one that occurs twice."""
    if caches:
        _block_ids(blocks, blocks >= caches[0].shape[0], "blocks", caches)
        _distinct(blocks[blocks >= 0], "blocks", "block")


def _query_counts(cu_seqlens_q: Tensor, num_tokens: int) -> Tensor:
    counts = cu_seqlens_q.long().diff()
    first, last = int(cu_seqlens_q[0]), int(cu_seqlens_q[-1])
    if first != 0:
        raise IndexError(f"cu_seqlens_q must start at 0, got {first}")
    _all_inside(counts, counts < 0, "cu_seqlens_q", "non-decreasing", "a step of ")
    if last > num_tokens:
        raise IndexError(f"cu_seqlens_q must end at or before num_tokens = {num_tokens}, got {last}")
    return counts


def _block_ids(ids: Tensor, wrong: Tensor, name: str, caches: Sequence[Tensor]) -> None:
    _all_inside(ids, wrong, name, f"below num_blocks = {caches[0].shape[0]}")


def _distinct(ids: Tensor, name: str, what: str) -> None:
    ids, counts = ids.unique(return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"{name} must name each {what} once, got {int(ids[counts > 1][0])} more than once")


def _all_inside(values: Tensor, wrong: Tensor, name: str, expected: str, what: str = "") -> None:
    if wrong.any():
        where = wrong.nonzero()[0].tolist()
        raise IndexError(f"{name} must be {expected}, got {what}{int(values[tuple(where)])} at {where}")
