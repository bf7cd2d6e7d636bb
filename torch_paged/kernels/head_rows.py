"""Rows of heads on their way into a cache: which they are, what of them is stored, and where.

A tile is float32 [ITEMS, WIDTH]: some columns of one (row, head) pair an item.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from torch_paged.kernels.features import Stored
from torch_paged.kernels.problem import next_power_of_two
from torch_paged.kernels.storage import stored_in
from torch_paged.kernels.vectors import dense, effective_strides, strides_in_vectors

_TILE = 2048  # elements of a program: 16 a thread
_SMALLEST: tl.constexpr = tl.constexpr(2.0**-126)  # a scale below this is none to divide by


@dataclass(frozen=True)
class Side:
    """What is compiled in of rows `[num_rows, heads, dim]` and of the cache that they go to."""

    heads: int
    dim: int
    block_size: int
    vector: int  # elements that rows and cache have aligned alike: their strides are counted in these
    stored: Stored

    @property
    def items(self) -> int:
        """(row, head) pairs of a program."""
        return max(1, _TILE // next_power_of_two(self.dim))


def odd(numbers: Sequence[int]) -> tuple[int, ...]:
    """`numbers` as Triton has no reason to compile a kernel for: in a tuple, 1 and multiples of 16 would be one."""
    return tuple(2 * number + 3 for number in numbers)


@triton.jit
def even(number):
    """The number that `odd` hides, 64 bits."""
    return (number.to(tl.int64) - 3) >> 1


def odd_strides(rows: Tensor, cache: Tensor, scale_cache: Tensor | None, vector: int) -> tuple[tuple[int, ...], ...]:
    """Strides of all that a side reads and writes, for `load_heads`, `store_heads` and `scale_of_heads`."""
    return (
        odd(strides_in_vectors(rows, vector)),
        odd(strides_in_vectors(cache, vector)[:3]),
        odd((0, 0, 0) if scale_cache is None else effective_strides(scale_cache)),
    )


class Scales(NamedTuple):
    """Scales of a quantised pair of caches, as the operators take them."""

    key_scale: Tensor | None
    value_scale: Tensor | None
    key_scale_cache: Tensor | None
    value_scale_cache: Tensor | None

    def arguments(self) -> tuple[Tensor | None, Tensor | None]:
        """The tensor that holds the key's scales, or gets them, and the value's."""
        return (
            self.key_scale_cache if self.key_scale is None else dense(self.key_scale),
            self.value_scale_cache if self.value_scale is None else dense(self.value_scale),
        )

    def metadata(self) -> tuple[Any, ...]:
        """What decides how a kernel reads and writes them."""
        return tuple(None if scale is None else (scale.shape, scale.stride()) for scale in self)


def side_of(rows: Tensor, cache: Tensor, vector: int, scale: Tensor | None, scale_cache: Tensor | None) -> Side:
    """What is compiled in of `rows` that go to `cache`."""
    _, block_size, heads, dim = cache.shape
    return Side(heads, dim, block_size, vector, stored_in(cache, rows.dtype, scale, scale_cache))


@triton.jit
def items_of_program(S: tl.constexpr):
    """Row and head, 64 bits each, of this program's items."""
    item = tl.program_id(0).to(tl.int64) * S.items + tl.arange(0, S.items)
    return item // S.heads, item % S.heads


@triton.jit
def load_heads(rows, strides, row, head, mask, COLUMN: tl.constexpr, COUNT: tl.constexpr, S: tl.constexpr):
    """float32 [ITEMS, COUNT or a little wider] of the columns from COLUMN on; zeros behind them."""
    WIDTH: tl.constexpr = triton.next_power_of_2(COUNT)
    column = tl.arange(0, WIDTH)
    # [ITEMS, WIDTH]
    offsets = ((row * even(strides[0]) + head * even(strides[1])) * S.vector + COLUMN)[:, None]
    if S.vector == 1:
        offsets = offsets + COLUMN * (even(strides[2]) - 1) + column[None, :] * even(strides[2])
    else:
        offsets = offsets + column[None, :]
    return tl.load(rows + offsets, mask=mask[:, None] & (column < COUNT)[None, :], other=0.0).to(tl.float32)


@triton.jit
def slots_of(slot_mapping, row, num_rows, num_slots):
    """The rows' slots, and whether they are inside the cache."""
    slot = tl.load(slot_mapping + row, mask=row < num_rows, other=-1)
    inside = (slot >= 0) & (slot < num_slots)
    return tl.where(inside, slot, 0), inside


@triton.jit
def magnitude(tile):
    """[ITEMS] largest magnitude of each item's columns, NaN if one of them is."""
    strange = tl.max((tile != tile).to(tl.int32), 1)
    return tl.where(strange > 0, float("nan"), tl.max(tl.abs(tile), 1))


@triton.jit
def scale_of_heads(largest, scale, strides, slot, head, inside, S: tl.constexpr):
    """[ITEMS] scales that stored numbers shall have; a token's own is made of its `largest` magnitude and WRITTEN."""
    if S.stored.scale == "scalar":
        factor = tl.load(scale + head * 0)
    elif S.stored.scale == "head":
        factor = tl.load(scale + head)
    elif S.stored.scale == "token":
        factor = tl.div_rn(largest, tl.full(largest.shape, S.stored.largest, tl.float32))
        factor = tl.where(factor < _SMALLEST, 1.0, factor)
        target = slot // S.block_size * even(strides[0]) + slot % S.block_size * even(strides[1])
        tl.store(scale + target + head * even(strides[2]), factor, mask=inside)
    else:
        factor = tl.full(largest.shape, 1.0, tl.float32)
    return factor


@triton.jit
def quantise(exact, S: tl.constexpr):
    """Codes of the numbers nearest to `exact`, ties to even, never past the largest; float8 as bytes.

    Adding 2^23 steps of the type, and taking them away again, rounds to a whole number of steps.
    """
    strange = exact != exact
    if S.dtype == "int8":
        bounded = tl.minimum(tl.maximum(exact, -128.0), 127.0)
        code = tl.where(strange, 0.0, (bounded + 1.5 * 2.0**23) - 1.5 * 2.0**23).to(tl.int8)
    else:
        bounded = tl.minimum(tl.abs(exact), S.largest)
        power = (bounded.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        steps = tl.maximum(power, S.smallest_normal) * (2.0 ** (23 - S.mantissa))
        # float16 has the exponents of e5m2, and all those of e4m3 when these are 8 lower.
        rounded = ((bounded + steps) - steps) * (2.0**-8 if S.dtype == "e4m3" else 1.0)
        bits = rounded.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) >> (7 if S.dtype == "e4m3" else 8)
        sign = (exact.to(tl.int32, bitcast=True) >> 24) & 0x80
        code = (tl.where(strange, 0x7F, bits) | sign).to(tl.uint8)
    return code


@triton.jit
def store_heads(
    tile, scale, cache, strides, slot, head, inside, COLUMN: tl.constexpr, COUNT: tl.constexpr, S: tl.constexpr
):
    """Writes columns from COLUMN on of the items' slots: `tile / scale`, or `tile` where nothing is quantised."""
    Q: tl.constexpr = S.stored
    column = tl.arange(0, tile.shape[1])
    target = slot // S.block_size * even(strides[0]) + slot % S.block_size * even(strides[1])
    offsets = ((target + head * even(strides[2])) * S.vector + COLUMN)[:, None] + column[None, :]
    if Q.dtype == "":
        stored = tile.to(cache.dtype.element_ty)
    elif Q.scale == "":
        stored = quantise(tile, Q)
    else:
        stored = quantise(tl.div_rn(tile, tl.broadcast_to(scale[:, None], tile.shape)), Q)
    tl.store(cache + offsets, stored, mask=inside[:, None] & (column < COUNT)[None, :])
