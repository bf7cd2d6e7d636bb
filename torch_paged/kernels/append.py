"""Writes new keys and values into their cache slots."""

import itertools
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from torch_paged.kernels.head_rows import (
    Scales,
    items_of_program,
    load_heads,
    magnitude,
    odd_strides,
    scale_of_heads,
    side_of,
    slots_of,
    store_heads,
)
from torch_paged.kernels.launch import Launcher, Plans, addresses, layout
from torch_paged.kernels.storage import as_bytes
from torch_paged.kernels.vectors import (
    common_vector,
    dense,
    strides_in_vectors,
    tile_vectors,
    vector_offsets,
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
    """One tile of rows into their slots."""
    row, head, dim = tile_vectors(NUM_HEADS, HEAD_DIM, VECTOR, VECTORS)
    slot, inside = slots_of(slot_mapping, row, num_rows, num_slots)
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


@triton.jit
def quantise_side(rows, cache, scale, slot_mapping, strides, num_rows, num_slots, S: tl.constexpr):
    """Rows of heads into their slots, in whatever type these have."""
    row, head = items_of_program(S)
    slot, inside = slots_of(slot_mapping, row, num_rows, num_slots)
    tile = load_heads(rows, strides[0], row, head, inside, 0, S.dim, S)
    factor = scale_of_heads(magnitude(tile), scale, strides[2], slot, head, inside, S)
    store_heads(tile, factor, cache, strides[1], slot, head, inside, 0, S.dim, S)


@triton.jit(
    do_not_specialize=["num_rows", "num_slots"],
    do_not_specialize_on_alignment=["slot_mapping", "key_scale", "value_scale"],
)
def _append_quantised(
    key, value, key_cache, value_cache, slot_mapping, key_scale, value_scale, key_strides, value_strides,
    num_rows, num_slots, KEY: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """
    cache[slot // block_size, slot % block_size, head] = rows[i, head] / scale

    grid: (items, a (row, head) pair each; key, value)
    """
    if tl.program_id(1) == 0:
        quantise_side(key, key_cache, key_scale, slot_mapping, key_strides, num_rows, num_slots, KEY)
    else:
        quantise_side(value, value_cache, value_scale, slot_mapping, value_strides, num_rows, num_slots, VALUE)


def append(
    key: Tensor,
    value: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor | None,
    slot_mapping: Tensor,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    key_scale_cache: Tensor | None = None,
    value_scale_cache: Tensor | None = None,
) -> None:
    """Writes row i of `key` and `value` to slot `slot_mapping[i]` of the caches; slots outside them are skipped.

    Args:
        key: `[n', num_kv_heads, head_dim]`, any strides.
        value: `[n', num_kv_heads, value_head_dim]`, any strides; None together with `value_cache`.
        key_cache: `[num_blocks, block_size, num_kv_heads, head_dim]`, unit last stride. MUTATED.
        value_cache: `[num_blocks, block_size, num_kv_heads, value_head_dim]`, unit last stride. MUTATED.
        slot_mapping: int64 `[n]` with n <= n'.
        key_scale, value_scale: float32, 0-dim or `[num_kv_heads]`: a quantised cache stores row / scale, or the row.
        key_scale_cache, value_scale_cache: float32 `[num_blocks, block_size, num_kv_heads]`, any strides: scales of
            tokens and heads, made here. MUTATED.
    """
    if slot_mapping.shape[0] == 0 or key_cache.shape[0] == 0:
        return
    sides = 2
    if value is None or value_cache is None:  # the second half of the grid stays away, its arguments are unused
        sides, value, value_cache = 1, key, key_cache
    tensors = (key, value, key_cache, value_cache)
    if not key.dtype == key_cache.dtype == value_cache.dtype:
        scales = Scales(key_scale, value_scale, key_scale_cache, value_scale_cache)
        return _append_quantising(tensors, slot_mapping, sides, scales)
    metadata = (key.device, sides, slot_mapping.shape[0], *map(layout, tensors))
    launcher, numbers = _plans.get(metadata) or _plans.remember(metadata, _plan(tensors, slot_mapping.shape[0], sides))
    written = *tensors, dense(slot_mapping)
    launcher(*(addresses(written) if launcher.ready else written), *numbers)


_plans: Plans[tuple[Launcher, list[int]]] = Plans()


def _plan(tensors: tuple[Tensor, ...], num_rows: int, sides: int) -> tuple[Launcher, list[int]]:
    """The launch for key, value and their caches, and the numbers among its arguments."""
    *_, key_cache, value_cache = tensors
    num_blocks, block_size, num_heads, head_dim = key_cache.shape
    value_head_dim = value_cache.shape[3]
    vector = common_vector(tensors)
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


def _append_quantising(tensors: tuple[Tensor, ...], slot_mapping: Tensor, sides: int, scales: Scales) -> None:
    metadata = tensors[0].device, sides, slot_mapping.shape[0], *map(layout, tensors), scales.metadata()
    launcher, numbers = _quantising_plans.get(metadata) or _quantising_plans.remember(
        metadata, _quantising_plan(tensors, slot_mapping.shape[0], sides, scales)
    )
    key, value, key_cache, value_cache = tensors
    launcher(key, value, as_bytes(key_cache), as_bytes(value_cache), dense(slot_mapping), *scales.arguments(), *numbers)


_quantising_plans: Plans[tuple[Launcher, list[Any]]] = Plans()


def _quantising_plan(
    tensors: tuple[Tensor, ...], num_rows: int, sides: int, scales: Scales
) -> tuple[Launcher, list[Any]]:
    key, value, key_cache, value_cache = tensors
    vector = common_vector(tensors)
    key_side = side_of(key, key_cache, vector, scales.key_scale, scales.key_scale_cache)
    value_side = side_of(value, value_cache, vector, scales.value_scale, scales.value_scale_cache)
    items = min(key_side.items, value_side.items)
    numbers = [
        odd_strides(key, key_cache, scales.key_scale_cache, vector),
        odd_strides(value, value_cache, scales.value_scale_cache, vector),
        num_rows,
        key_cache.shape[0] * key_cache.shape[1],
    ]
    grid = (triton.cdiv(num_rows * key_side.heads, items), sides, 1)
    return Launcher(_append_quantised, grid, dict(KEY=key_side, VALUE=value_side), dict(num_warps=4)), numbers
