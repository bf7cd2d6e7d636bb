"""Writes new keys and values into their cache slots."""

import itertools

import triton
import triton.language as tl
from torch import Tensor

from torch_paged.kernels.launch import Launcher, Plans, layout
from torch_paged.kernels.vectors import (
    dense,
    effective_strides,
    strides_in_vectors,
    tile_vectors,
    vector_offsets,
    vector_width,
)

_VECTORS = 512  # moved by one program: 8 KiB in 16-byte vectors, four per thread


@triton.jit
def _append_tile(
    rows,
    row_strides,
    cache,
    cache_strides,
    slot_mapping,
    num_rows,
    num_slots,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    VECTOR: tl.constexpr,
    VECTORS: tl.constexpr,
):
    row, head, dim = tile_vectors(NUM_HEADS, HEAD_DIM, VECTOR, VECTORS)
    slot = tl.load(slot_mapping + row, mask=row < num_rows, other=-1)
    inside = (slot >= 0) & (slot < num_slots)
    slot = tl.where(inside, slot, 0)
    source = row * row_strides[0] + head * row_strides[1]
    target = slot // BLOCK_SIZE * cache_strides[0] + slot % BLOCK_SIZE * cache_strides[1] + head * cache_strides[2]
    # [VECTORS, VECTOR]
    tile = tl.load(rows + vector_offsets(source, dim, row_strides[2], VECTOR), mask=inside[:, None])
    target = vector_offsets(target, dim, 1, VECTOR)
    tl.store(cache + target, tile.to(cache.dtype.element_ty), mask=inside[:, None])


_STRIDES = [f"{of}_stride{i}" for of in ("key", "value", "key_cache", "value_cache") for i in range(3)]


@triton.jit(do_not_specialize=[*_STRIDES, "num_rows", "num_slots"], do_not_specialize_on_alignment=["slot_mapping"])
def _append(
    key, value, key_cache, value_cache, slot_mapping,
    key_stride0, key_stride1, key_stride2, value_stride0, value_stride1, value_stride2,
    key_cache_stride0, key_cache_stride1, key_cache_stride2,
    value_cache_stride0, value_cache_stride1, value_cache_stride2,
    num_rows, num_slots,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    VECTOR: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """
    cache[slot // BLOCK_SIZE, slot % BLOCK_SIZE] = rows[i]   where 0 <= slot = slot_mapping[i] < num_slots

                              row 0            row 1
    grid axis 0, tiles:   |vectors of rows, VECTORS to a tile| next tile |     axis 1: key, value

    Triton would compile a tuple anew for every kind of stride in it.
    """
    if tl.program_id(1) == 0:
        _append_tile(
            key, (key_stride0, key_stride1, key_stride2),
            key_cache, (key_cache_stride0, key_cache_stride1, key_cache_stride2),
            slot_mapping, num_rows, num_slots, NUM_HEADS, HEAD_DIM, BLOCK_SIZE, VECTOR, VECTORS,
        )  # fmt: skip
    else:
        _append_tile(
            value, (value_stride0, value_stride1, value_stride2),
            value_cache, (value_cache_stride0, value_cache_stride1, value_cache_stride2),
            slot_mapping, num_rows, num_slots, NUM_HEADS, VALUE_HEAD_DIM, BLOCK_SIZE, VECTOR, VECTORS,
        )  # fmt: skip


def append(
    key: Tensor,
    value: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor | None,
    slot_mapping: Tensor,
    *scales: Tensor | None,
) -> None:
    """Writes row i of `key` and `value` to slot `slot_mapping[i]` of the caches; slots outside them are skipped.

    Args:
        key: `[n', num_kv_heads, head_dim]`, any strides.
        value: `[n', num_kv_heads, value_head_dim]`, any strides; None together with `value_cache`.
        key_cache: `[num_blocks, block_size, num_kv_heads, head_dim]`, unit last stride. MUTATED.
        value_cache: `[num_blocks, block_size, num_kv_heads, value_head_dim]`, unit last stride. MUTATED.
        slot_mapping: int64 `[n]` with n <= n'.
    """
    if any(scale is not None for scale in scales) or key_cache.dtype != key.dtype:
        raise NotImplementedError(f"not supported here yet: caches of {key_cache.dtype}")
    if slot_mapping.shape[0] == 0 or key_cache.shape[0] == 0:
        return
    sides = 2
    if value is None or value_cache is None:  # the second half of the grid stays away, its arguments are unused
        sides, value, value_cache = 1, key, key_cache
    tensors = (key, value, key_cache, value_cache)
    metadata = (key.device, sides, slot_mapping.shape[0], *map(layout, tensors))
    launcher, numbers = _plans.get(metadata) or _plans.remember(metadata, _plan(tensors, slot_mapping.shape[0], sides))
    launcher(*tensors, dense(slot_mapping), *numbers)


_plans: Plans[tuple[Launcher, list[int]]] = Plans()


def _plan(tensors: tuple[Tensor, ...], num_rows: int, sides: int) -> tuple[Launcher, list[int]]:
    """The launch for key, value and their caches, and the numbers among its arguments."""
    *_, key_cache, value_cache = tensors
    num_blocks, block_size, num_heads, head_dim = key_cache.shape
    value_head_dim = value_cache.shape[3]
    strides = [effective_strides(tensor) for tensor in tensors]
    vector = _vector(tensors, strides)
    row_vectors = num_heads * max(head_dim, value_head_dim) // vector
    constants = dict(
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        VALUE_HEAD_DIM=value_head_dim,
        BLOCK_SIZE=block_size,
        VECTOR=vector,
        VECTORS=_VECTORS,
    )
    grid = (triton.cdiv(num_rows * row_vectors, _VECTORS), sides, 1)
    numbers = [
        *itertools.chain.from_iterable(strides_in_vectors(tensor, vector)[:3] for tensor in tensors),
        num_rows,
        num_blocks * block_size,
    ]
    return Launcher(_append, grid, constants, dict(num_warps=4)), numbers


def _vector(tensors: tuple[Tensor, ...], strides: list[tuple[int, ...]]) -> int:
    """Elements that are contiguous and aligned alike in every tensor."""
    if any(last != 1 for *_, last in strides):
        return 1
    numbers = [
        number for tensor, (*rest, _) in zip(tensors, strides, strict=True) for number in (*rest, tensor.shape[-1])
    ]
    return vector_width(tensors[0].element_size(), numbers)
