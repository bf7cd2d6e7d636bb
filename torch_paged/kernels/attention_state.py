"""The state of a unit's rows: how it begins, and how it is written, finished or not."""

import triton
import triton.language as tl

from torch_paged.kernels.attention_combine import finish, sums_in
from torch_paged.kernels.attention_stored import HEADROOM, static_scale
from torch_paged.kernels.attention_tiles import store_rows


@triton.jit
def nothing_seen(value_scale, head, V: tl.constexpr):
    """State of rows that have seen no key (see `attend`); an absent piece is anything."""
    BLOCK_M: tl.constexpr = V.block_m
    V0: tl.constexpr = V.value_widths[0]
    V1: tl.constexpr = V.value_widths[1]
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    output0 = tl.zeros([BLOCK_M, V0], tl.float32)
    output1 = total
    if V1 > 0:
        output1 = tl.zeros([BLOCK_M, V1], tl.float32)
    VALUE: tl.constexpr = V.has.value
    unit = 2.0**-126 if VALUE.scale == "token" else static_scale(value_scale, head, VALUE)
    return largest, total, output0, output1, unit


@triton.jit
def _in_units_of_one(state, V: tl.constexpr):
    """`state` without its unit."""
    largest, total, output0, output1, unit = state
    if V.has.value.scale == "token":
        output0 *= 1.0 / HEADROOM
        output1 *= 1.0 / HEADROOM
    if V.has.value.scale != "":
        output0 *= unit
        output1 *= unit
    return largest, total, output0, output1


@triton.jit
def _write_pieces(base, row, output0, output1, valid, V: tl.constexpr):
    """Writes rows from their two pieces: columns one after another, or every other one."""
    BLOCK_M: tl.constexpr = V.block_m
    V0: tl.constexpr = V.value_widths[0]
    V1: tl.constexpr = V.value_widths[1]
    if V.value_pairs:
        whole = tl.reshape(tl.join(output0, output1), (BLOCK_M, 2 * V0))
        store_rows(base, row, whole, valid, 0, 2 * V0, V.value_dim)
    else:
        store_rows(base, row, output0, valid, 0, V0, V.value_dim)
        if V1 > 0:
            store_rows(base, row, output1, valid, V0, V1, V.value_dim)


@triton.jit
def write_output(output, lse, state, sink, first_row, row, valid, V: tl.constexpr):
    """Writes the finished rows `first_row + row`; those that saw no key are zeros and -inf, or their sink."""
    largest, total, output0, output1 = _in_units_of_one(state, V)
    factor, row_lse = finish(largest, total, sink, V)
    tl.store(lse + first_row + row, row_lse, mask=valid)
    _write_pieces(output + first_row * V.value_dim, row, output0 * factor[:, None], output1 * factor[:, None], valid, V)


@triton.jit
def write_sums(workspace, largest, total, row, valid, V: tl.constexpr):
    """Writes (maximum, sum) pairs of the workspace."""
    sums = sums_in(workspace, tl.num_programs(0), V)
    tl.store(sums + 2 * row, largest, mask=valid)
    tl.store(sums + 2 * row + 1, total, mask=valid)


@triton.jit
def write_partial(workspace, state, slot, lane, valid, V: tl.constexpr):
    """Leaves `state` in a slot of the workspace."""
    largest, total, output0, output1 = _in_units_of_one(state, V)
    first_row = slot * V.block_m
    write_sums(workspace, largest, total, first_row + lane, valid, V)
    _write_pieces(workspace + first_row * V.value_dim, lane, output0, output1, valid, V)
