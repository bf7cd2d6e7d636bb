"""Rotates queries and keys by their positions, and writes keys and values into their cache slots, in one launch."""

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from torch_paged.kernels.append import quantise_side
from torch_paged.kernels.features import Stored
from torch_paged.kernels.head_rows import (
    Scales,
    Side,
    items_of_program,
    load_heads,
    magnitude,
    odd_strides,
    scale_of_heads,
    side_of,
    slots_of,
    store_heads,
)
from torch_paged.kernels.launch import Launcher, Plans, layout
from torch_paged.kernels.storage import as_bytes
from torch_paged.kernels.vectors import common_vector, dense, effective_strides, vector_width


@dataclass(frozen=True)
class _Rotation:
    """What is compiled in of the angles."""

    half: int  # pairs of columns that are rotated
    interleaved: bool
    vector: int  # elements that rows of cos and sin have aligned alike


@triton.jit
def _angles(cos, sin, positions, stride, row, num_tokens, num_positions, R: tl.constexpr):
    """cos and sin of the rows, float32 [ITEMS, half or a little wider]."""
    column = tl.arange(0, triton.next_power_of_2(R.half))
    position = tl.load(positions + row, mask=row < num_tokens, other=0)
    position = tl.minimum(tl.maximum(position, 0), num_positions - 1)
    offsets = (position * stride * R.vector)[:, None] + column[None, :]
    mask = ((row < num_tokens) & (position >= 0))[:, None] & (column < R.half)[None, :]
    turn_cos = tl.load(cos + offsets, mask=mask, other=0.0).to(tl.float32)
    turn_sin = tl.load(sin + offsets, mask=mask, other=0.0).to(tl.float32)
    return turn_cos, turn_sin


@triton.jit
def _rotated(rows, strides, row, head, mask, turn_cos, turn_sin, S: tl.constexpr, R: tl.constexpr):
    """The turned columns, rounded to the rows' type: two halves or, interleaved, one tile twice, and those behind."""
    HALF: tl.constexpr = R.half
    if R.interleaved:
        pairs = load_heads(rows, strides, row, head, mask, 0, 2 * HALF, S)
        first, second = tl.split(tl.reshape(pairs, (S.items, pairs.shape[1] // 2, 2)))
    else:
        first = load_heads(rows, strides, row, head, mask, 0, HALF, S)
        second = load_heads(rows, strides, row, head, mask, HALF, HALF, S)
    turned = first * turn_cos - second * turn_sin
    second = (second * turn_cos + first * turn_sin).to(rows.dtype.element_ty).to(tl.float32)
    first = turned.to(rows.dtype.element_ty).to(tl.float32)
    if R.interleaved:
        first = tl.reshape(tl.join(first, second), pairs.shape)
        second = first
    rest = first
    if 2 * HALF < S.dim:
        rest = load_heads(rows, strides, row, head, mask, 2 * HALF, S.dim - 2 * HALF, S)
    return first, second, rest


@triton.jit
def _rotate_side(
    rows, cache, scale, slot_mapping, strides, cos, sin, positions, angle_stride,
    num_tokens, num_positions, num_rows, num_slots, S: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Rotated rows into their slots; without a `slot_mapping`, row i into slot i."""
    HALF: tl.constexpr = R.half
    row, head = items_of_program(S)
    if slot_mapping is None:
        slot = row
        inside = row < num_tokens
    else:
        slot, inside = slots_of(slot_mapping, row, num_rows, num_slots)
    turn_cos, turn_sin = _angles(cos, sin, positions, angle_stride, row, num_tokens, num_positions, R)
    first, second, rest = _rotated(rows, strides[0], row, head, inside, turn_cos, turn_sin, S, R)
    largest = tl.maximum(magnitude(first), magnitude(second), propagate_nan=tl.PropagateNan.ALL)
    largest = tl.maximum(largest, magnitude(rest), propagate_nan=tl.PropagateNan.ALL)
    factor = scale_of_heads(largest, scale, strides[2], slot, head, inside, S)
    if R.interleaved:
        store_heads(first, factor, cache, strides[1], slot, head, inside, 0, 2 * HALF, S)
    else:
        store_heads(first, factor, cache, strides[1], slot, head, inside, 0, HALF, S)
        store_heads(second, factor, cache, strides[1], slot, head, inside, HALF, HALF, S)
    if 2 * HALF < S.dim:
        store_heads(rest, factor, cache, strides[1], slot, head, inside, 2 * HALF, S.dim - 2 * HALF, S)


@triton.jit(
    do_not_specialize=["angle_stride", "num_tokens", "num_positions", "num_rows", "num_slots"],
    do_not_specialize_on_alignment=["positions", "slot_mapping", "key_scale", "value_scale"],
)
def _rotary_append(
    query, key, value, cos, sin, positions, rotated, key_cache, value_cache, slot_mapping, key_scale, value_scale,
    query_strides, key_strides, value_strides, angle_stride, num_tokens, num_positions, num_rows, num_slots,
    QUERY: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """
    (a, b) -> (a cos - b sin, b cos + a sin)   for each pair of columns of queries and keys

    grid: (items, a (row, head) pair each; query, key, value)
    """
    side = tl.program_id(1)
    if side == 0:
        _rotate_side(
            query, rotated, None, None, query_strides, cos, sin, positions, angle_stride,
            num_tokens, num_positions, num_rows, num_slots, QUERY, R,
        )  # fmt: skip
    elif side == 1:
        _rotate_side(
            key, key_cache, key_scale, slot_mapping, key_strides, cos, sin, positions, angle_stride,
            num_tokens, num_positions, num_rows, num_slots, KEY, R,
        )  # fmt: skip
    else:
        quantise_side(value, value_cache, value_scale, slot_mapping, value_strides, num_rows, num_slots, VALUE)


def rotary_append(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    key_cache: Tensor,
    value_cache: Tensor | None,
    slot_mapping: Tensor,
    interleaved: bool = False,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    key_scale_cache: Tensor | None = None,
    value_scale_cache: Tensor | None = None,
) -> Tensor:
    """Rotates `query` and `key`, computing in float32, and does what `append` does with the rounded key and `value`.

    Args:
        query: `[num_tokens, num_heads, head_dim]`, any strides.
        cos, sin: `[num_positions, half]`; the first 2 half columns are rotated.
        positions: int64 `[num_tokens]`; one out of range is taken for the nearest.
        key, value, key_cache, value_cache, slot_mapping, scales: as in `append`; the caches are MUTATED.
        interleaved: pairs are columns 2 j and 2 j + 1, not j and j + half.

    Returns:
        The rotated query, contiguous.
    """
    rotated = query.new_empty(query.shape)
    if query.shape[0] == 0:
        return rotated
    if cos.stride(1) != 1 or sin.stride() != cos.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    sides = 3
    if value is None or value_cache is None:  # the last third of the grid stays away, its arguments are unused
        sides, value, value_cache = 2, key, key_cache
    scales = Scales(key_scale, value_scale, key_scale_cache, value_scale_cache)
    tensors = (query, key, value, rotated, key_cache, value_cache)
    metadata = (
        query.device, sides, interleaved, slot_mapping.shape[0], *map(layout, tensors), layout(cos), layout(sin),
        scales.metadata(),
    )  # fmt: skip
    launcher, numbers = _plans.get(metadata) or _plans.remember(
        metadata, _plan(tensors, cos, slot_mapping.shape[0], interleaved, sides, scales)
    )
    launcher(
        query, key, value, cos, sin, dense(positions), rotated, as_bytes(key_cache), as_bytes(value_cache),
        dense(slot_mapping), *scales.arguments(), *numbers,
    )  # fmt: skip
    return rotated


_plans: Plans[tuple[Launcher, list[Any]]] = Plans()


def _plan(
    tensors: tuple[Tensor, ...], cos: Tensor, num_rows: int, interleaved: bool, sides: int, scales: Scales
) -> tuple[Launcher, list[Any]]:
    """The launch for queries, keys, values and what they are written to, and the numbers among its arguments."""
    query, key, value, rotated, key_cache, value_cache = tensors
    num_tokens, heads, dim = query.shape
    half = cos.shape[1]
    vector = common_vector(tensors, 2 * half if interleaved else half)
    angle_vector = vector_width(cos.element_size(), (half, effective_strides(cos)[0]))
    constants = dict(
        QUERY=Side(heads, dim, 1, vector, Stored()),
        KEY=side_of(key, key_cache, vector, scales.key_scale, scales.key_scale_cache),
        VALUE=side_of(value, value_cache, vector, scales.value_scale, scales.value_scale_cache),
        R=_Rotation(half, interleaved, angle_vector),
    )
    numbers = [
        odd_strides(query, rotated[:, None], None, vector),
        odd_strides(key, key_cache, scales.key_scale_cache, vector),
        odd_strides(value, value_cache, scales.value_scale_cache, vector),
        effective_strides(cos)[0] // angle_vector,
        num_tokens,
        cos.shape[0],
        num_rows,
        key_cache.shape[0] * key_cache.shape[1],
    ]
    programs = max(
        triton.cdiv(rows * side.heads, side.items)
        for rows, side in (
            (num_tokens, constants["QUERY"]),
            (num_rows, constants["KEY"]),
            (num_rows, constants["VALUE"]),
        )
        if isinstance(side, Side)
    )
    return Launcher(_rotary_append, (programs, sides, 1), constants, dict(num_warps=4)), numbers
