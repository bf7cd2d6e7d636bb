"""Writes new keys and values into their cache slots."""

import triton
import triton.language as tl
from torch import Tensor

from torch_paged.kernels.vectors import effective_strides, vector_width

_VECTORS = 512  # moved by one program: 8 KiB in 16-byte vectors, four per thread


@triton.jit
def _append_tile(
    rows,
    row_strides,
    cache,
    cache_strides,
    slot_mapping,
    slot_stride,
    num_rows,
    num_slots,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    VECTOR: tl.constexpr,
    VECTORS: tl.constexpr,
):
    HEAD_VECTORS: tl.constexpr = HEAD_DIM // VECTOR
    ROW_VECTORS: tl.constexpr = NUM_HEADS * HEAD_VECTORS
    # One 64-bit division for the whole tile: the lanes then divide 32-bit numbers.
    first = tl.program_id(0).to(tl.int64) * VECTORS
    vector = (first % ROW_VECTORS).to(tl.int32) + tl.arange(0, VECTORS)
    row = first // ROW_VECTORS + vector // ROW_VECTORS
    head = (vector % ROW_VECTORS // HEAD_VECTORS).to(tl.int64)
    dim = (vector % HEAD_VECTORS * VECTOR).to(tl.int64)
    slot = tl.load(slot_mapping + row * slot_stride, mask=row < num_rows, other=-1)
    inside = (slot >= 0) & (slot < num_slots)
    slot = tl.where(inside, slot, 0)
    # [VECTORS, VECTOR]
    lane = tl.arange(0, VECTOR)[None, :]
    source = (row * row_strides[0] + head * row_strides[1])[:, None] + (dim[:, None] + lane) * row_strides[2]
    target = slot // BLOCK_SIZE * cache_strides[0] + slot % BLOCK_SIZE * cache_strides[1] + head * cache_strides[2]
    target = (target + dim)[:, None] + lane
    # Unspecialised strides hide from the compiler what the launch knows: vectors are contiguous and aligned.
    source = tl.max_contiguous(tl.multiple_of(source, (1, VECTOR)), (1, VECTOR))
    target = tl.max_contiguous(tl.multiple_of(target, (1, VECTOR)), (1, VECTOR))
    tile = tl.load(rows + source, mask=inside[:, None])
    tl.store(cache + target, tile.to(cache.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=["slot_stride", "num_rows", "num_slots"])
def _append(
    key,
    value,
    key_cache,
    value_cache,
    slot_mapping,
    key_strides,
    value_strides,
    key_cache_strides,
    value_cache_strides,
    slot_stride,
    num_rows,
    num_slots,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    VECTOR: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """
    cache[slot // BLOCK_SIZE, slot % BLOCK_SIZE] = rows[i]   where 0 <= slot = slot_mapping[i] < num_slots

                              row 0            row 1
    grid axis 0, tiles:   |vectors of rows, VECTORS to a tile| next tile |     axis 1: key, value
    """
    if tl.program_id(1) == 0:
        _append_tile(
            key, key_strides, key_cache, key_cache_strides, slot_mapping, slot_stride, num_rows, num_slots,
            NUM_HEADS, HEAD_DIM, BLOCK_SIZE, VECTOR, VECTORS,
        )  # fmt: skip
    else:
        _append_tile(
            value, value_strides, value_cache, value_cache_strides, slot_mapping, slot_stride, num_rows, num_slots,
            NUM_HEADS, VALUE_HEAD_DIM, BLOCK_SIZE, VECTOR, VECTORS,
        )  # fmt: skip


def append(
    key: Tensor, value: Tensor | None, key_cache: Tensor, value_cache: Tensor | None, slot_mapping: Tensor
) -> None:
    """Writes row i of `key` and `value` to slot `slot_mapping[i]` of the caches; slots outside them are skipped.

    Args:
        key: `[n', num_kv_heads, head_dim]`, any strides.
        value: `[n', num_kv_heads, value_head_dim]`, any strides; None together with `value_cache`.
        key_cache: `[num_blocks, block_size, num_kv_heads, head_dim]`, unit last stride. MUTATED.
        value_cache: `[num_blocks, block_size, num_kv_heads, value_head_dim]`, unit last stride. MUTATED.
        slot_mapping: int64 `[n]` with n <= n'.
    """
    num_blocks, block_size, num_heads, head_dim = key_cache.shape
    num_rows, num_slots = slot_mapping.shape[0], num_blocks * block_size
    if num_rows == 0 or num_slots == 0:
        return
    sides = 2
    if value is None or value_cache is None:  # the second half of the grid stays away, its arguments are unused
        sides, value, value_cache = 1, key, key_cache
    value_head_dim = value_cache.shape[3]
    tensors = (key, value, key_cache, value_cache)
    strides = [effective_strides(tensor) for tensor in tensors]
    vector = _vector(tensors, strides)
    row_vectors = num_heads * max(head_dim, value_head_dim) // vector
    _append[(triton.cdiv(num_rows * row_vectors, _VECTORS), sides)](
        *tensors,
        slot_mapping,
        *strides,
        slot_mapping.stride(0),
        num_rows,
        num_slots,
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        VALUE_HEAD_DIM=value_head_dim,
        BLOCK_SIZE=block_size,
        VECTOR=vector,
        VECTORS=_VECTORS,
        num_warps=4,
    )


def _vector(tensors: tuple[Tensor, ...], strides: list[tuple[int, ...]]) -> int:
    """Elements that are contiguous and aligned alike in every tensor."""
    if any(last != 1 for *_, last in strides):
        return 1
    numbers = [
        number for tensor, (*rest, _) in zip(tensors, strides, strict=True) for number in (*rest, tensor.shape[-1])
    ]
    return vector_width(tensors[0].element_size(), numbers)
