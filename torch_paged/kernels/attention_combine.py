"""Combines the partial results of the units that no single program of attention finished."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from torch_paged.kernels.attention_logits import LN_2
from torch_paged.kernels.attention_rows import sinks_of
from torch_paged.kernels.attention_schedule import is_scheduled, scheduled_handoff
from torch_paged.kernels.attention_tiles import store_rows
from torch_paged.kernels.launch import Launcher
from torch_paged.kernels.launch_config import AttentionLaunch
from torch_paged.kernels.units import query_range, query_tiles


@triton.jit
def finish(largest, total, sink, V: tl.constexpr):
    """What a row's sum of weighted values is multiplied by, and its lse: a sink, to base 2, enters here, once."""
    if V.has.sinks:
        larger = tl.maximum(largest, sink)
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        decay = tl.exp2(largest - shift)
        total = total * decay + tl.where(sink == float("inf"), 1.0, tl.exp2(sink - shift))  # inf - inf would be NaN
        factor = decay / tl.where(total != 0, total, 1.0)
        largest = larger
    else:
        factor = 1.0 / tl.where(total != 0, total, 1.0)
    return factor, (largest + tl.log2(total)) * LN_2


@triton.jit
def sums_in(workspace, V: tl.constexpr):
    """(maximum, sum) of every row of the partial results, which stand before them, two slots a program."""
    return workspace + tl.num_programs(0) * (2 * V.block_m * V.value_dim)


@triton.jit
def handoff_in(workspace, V: tl.constexpr):
    """What programs leave: of a unit that others began, 0 nothing, 1 a part, 2 the last; the unit that each began."""
    behind = workspace + tl.num_programs(0) * (2 * V.block_m * (V.value_dim + 2))
    return behind.to(tl.pointer_type(tl.int32))


@triton.jit
def _left(handoff, others):
    """What all programs leave of units that others began, and the unit that this one leaves to others."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    before = tl.load(handoff + others, mask=others < programs, other=0)
    return before, tl.load(handoff + programs + program), tl.load(handoff + 2 * programs + program)


@triton.jit
def _leave(program, V: tl.constexpr):
    """What is left to do where there is nothing: whoever waits for this kernel waits for attention, too."""
    if V.overlap:
        if program == 0:
            gdc_wait()


@triton.jit(
    do_not_specialize=["stamp", "num_tokens", "num_seqs", "num_kv_heads"],
    do_not_specialize_on_alignment=["cu_seqlens_q", "schedule", "sinks"],
)
def _combine(
    workspace, cu_seqlens_q, schedule, stamp, output, lse, sinks, num_tokens, num_seqs, num_kv_heads,
    PROGRAMS: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """output = sum_i 2^(m_i - m) acc_i / sum_i 2^(m_i - m) l_i, with m = max_i m_i, over the parts i of a unit.

    Grid: (programs of attention, rows of a unit / ROWS). Program p serves the unit that p began and did not end, if
    any: its parts are p's second slot and the first slots of the programs after p, up to the one that ended the unit.
    """
    DIM: tl.constexpr = V.value_dim
    WIDTH: tl.constexpr = V.value_width
    program = tl.program_id(0)
    others = tl.arange(0, PROGRAMS)
    if V.overlap:
        gdc_launch_dependents()
    if is_scheduled(schedule, stamp):
        left_before, sequence, unit = _left(scheduled_handoff(schedule), others)
    else:
        if V.overlap:
            gdc_wait()
        left_before, sequence, unit = _left(handoff_in(workspace, V), others)
    if sequence < 0:
        _leave(program, V)
        return
    start, queries = query_range(sequence, cu_seqlens_q, num_tokens, num_seqs, V)
    tiles = tl.maximum(query_tiles(queries, V), 1)
    first_row = unit % tiles * V.block_m
    if tl.program_id(1) * ROWS >= queries * V.group - first_row:
        _leave(program, V)
        return
    end = tl.min(tl.where((left_before == 2) & (others > program), others, PROGRAMS)) + 1
    head = tl.minimum(unit // tiles, num_kv_heads - 1)  # whatever a schedule of other lengths says
    lane = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    valid = lane < queries * V.group - first_row
    column = tl.arange(0, WIDTH)
    sums = sums_in(workspace, V)
    if V.overlap:
        gdc_wait()
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(program, end, PARTS):
        part = first + tl.arange(0, PARTS)
        used = (part < end)[:, None] & valid[None, :]
        # [PARTS, ROWS]
        slot_row = (2 * part + (part == program).to(tl.int32))[:, None] * V.block_m + lane[None, :]
        part_largest = tl.load(sums + 2 * slot_row, mask=used, other=float("-inf"))
        part_total = tl.load(sums + 2 * slot_row + 1, mask=used, other=0.0)
        # [PARTS, ROWS, WIDTH]
        inside = used[:, :, None] & (column < DIM)[None, None, :]
        part_result = tl.load(workspace + slot_row[:, :, None] * DIM + column[None, None, :], mask=inside, other=0.0)
        larger = tl.maximum(largest, tl.max(part_largest, 0))
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        factor = tl.exp2(part_largest - shift[None, :])
        decay = tl.exp2(largest - shift)
        total = total * decay + tl.sum(factor * part_total, 0)
        # A part that saw no key may have left anything for a result.
        part_result = tl.where((part_total != 0)[:, :, None], part_result, 0.0)
        result = result * decay[:, None] + tl.sum(factor[:, :, None] * part_result, 0)
        largest = larger
    num_heads = num_kv_heads * V.group
    packed = first_row % V.group + lane
    output_row = (start + first_row // V.group).to(tl.int64) * num_heads + head * V.group
    output_rows = packed // V.group * num_heads + packed % V.group
    sink = sinks_of(packed, head, sequence, num_seqs, sinks, V)
    row_factor, row_lse = finish(largest, total, sink, V)
    tl.store(lse + output_row + output_rows, row_lse, mask=valid)
    store_rows(output + output_row * DIM, output_rows, result * row_factor[:, None], valid, 0, WIDTH, DIM)


def combine_launcher(launch: AttentionLaunch) -> Launcher:
    """Launches the kernel that writes the rows which `launch` left in `workspace`.

    Its arguments: workspace, cu_seqlens_q, schedule, stamp, output, lse, sinks, num_tokens, num_seqs, num_kv_heads.
    """
    constants = dict(
        PROGRAMS=launch.padded_programs, ROWS=launch.combine_rows, PARTS=launch.combine_parts, V=launch.variant
    )
    grid = (launch.programs, launch.combine_programs, 1)
    return Launcher(_combine, grid, constants, dict(num_warps=4, **launch.overlap_option))
