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

_COMBINING = 4  # programs for one of the Hopper kernel


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
def sums_in(workspace, programs, V: tl.constexpr):
    """(maximum, sum) of every row of the partial results, which stand before them, two slots a program."""
    return workspace + programs * (2 * V.block_m * V.value_dim)


@triton.jit
def handoff_in(workspace, programs, V: tl.constexpr):
    """What programs leave: of a unit that others began, 0 nothing, 1 a part, 2 the last; the unit that each began."""
    behind = workspace + programs * (2 * V.block_m * (V.value_dim + 2))
    return behind.to(tl.pointer_type(tl.int32))


@triton.jit
def _left(handoff, number, PROGRAMS: tl.constexpr, PADDED: tl.constexpr):
    """Sequence and number of the unit that was left as number `number`, who began it and who ended it.

    The first unit that was left is that of the first program that did, and so on; what there is not was begun by -1.
    """
    others = tl.arange(0, PADDED)
    exists = others < PROGRAMS
    ended = tl.load(handoff + others, mask=exists, other=0) == 2
    sequences = tl.load(handoff + PROGRAMS + others, mask=exists, other=-1)
    units = tl.load(handoff + 2 * PROGRAMS + others, mask=exists, other=0)
    left = (sequences >= 0).to(tl.int32)
    mine = (left == 1) & (tl.cumsum(left) == number + 1)
    begun_by = tl.max(tl.where(mine, others, -1))
    sequence = tl.max(tl.where(mine, sequences, 0))
    unit = tl.max(tl.where(mine, units, 0))
    return sequence, unit, begun_by, tl.min(tl.where(ended & (others > begun_by), others, PROGRAMS - 1))


@triton.jit
def _count_left(handoff, PROGRAMS: tl.constexpr, PADDED: tl.constexpr):
    """How many units were left."""
    others = tl.arange(0, PADDED)
    sequences = tl.load(handoff + PROGRAMS + others, mask=others < PROGRAMS, other=-1)
    return tl.sum((sequences >= 0).to(tl.int32))


@triton.jit
def _leave(program, V: tl.constexpr):
    """What is left to do where there is nothing: whoever waits for this kernel waits for attention, too."""
    if V.overlap:
        if program == 0:
            gdc_wait()


@triton.jit
def _load_part(parts, slot_row, used, V: tl.constexpr):
    """Maximum, sum and weighted values of rows of parts."""
    results, sums = parts
    column = tl.arange(0, V.value_width)[None, :]
    largest = tl.load(sums + 2 * slot_row, mask=used, other=float("-inf"))
    total = tl.load(sums + 2 * slot_row + 1, mask=used, other=0.0)
    inside = used[:, None] & (column < V.value_dim)
    return largest, total, tl.load(results + slot_row[:, None] * V.value_dim + column, mask=inside, other=0.0)


@triton.jit
def _add_parts(state, parts, first, programs, lane, valid, WAYS: tl.constexpr, COUNT: tl.constexpr, V: tl.constexpr):
    """`state` of rows with COUNT more parts, every WAYS-th from `first` on, whose loads are all under way together."""
    begun_by, ended_by = programs
    largest, total, result = state
    loaded = ()
    larger = largest
    for index in tl.static_range(COUNT):
        part = first + index * WAYS
        slot_row = (2 * part + (part == begun_by).to(tl.int32)) * V.block_m + lane
        loaded += (_load_part(parts, slot_row, valid & (part <= ended_by), V),)  # type: ignore[assignment]
        larger = tl.maximum(larger, loaded[index][0])
    shift = tl.where(larger == float("-inf"), 0.0, larger)
    decay = tl.exp2(largest - shift)
    total *= decay
    result *= decay[:, None]
    for index in tl.static_range(COUNT):
        factor = tl.exp2(loaded[index][0] - shift)
        total += factor * loaded[index][1]
        # A part that saw no key may have left anything for a result.
        result += factor[:, None] * tl.where((loaded[index][1] != 0)[:, None], loaded[index][2], 0.0)
    return larger, total, result


@triton.jit
def _combine_rows(
    parts, programs, lanes, place, tensors, ROWS: tl.constexpr, WAYS: tl.constexpr, PARTS: tl.constexpr, V: tl.constexpr
):
    """Writes the first ROWS of the `lanes` [first, end) of a unit, whose `place` among tokens and heads this is.

    Each of WAYS takes its share of the parts, PARTS of them at a time, or a few where there are no more.
    """
    WIDTH: tl.constexpr = V.value_width
    FEW: tl.constexpr = 4
    begun_by, ended_by = programs
    first_lane, end_lane = lanes
    index = tl.arange(0, WAYS * ROWS)
    lane = first_lane + index % ROWS
    valid = lane < end_lane
    first = begun_by + index // ROWS
    count = ended_by + 1 - begun_by
    largest = tl.full([WAYS * ROWS], float("-inf"), tl.float32)
    total = tl.zeros([WAYS * ROWS], tl.float32)
    state = (largest, total, tl.zeros([WAYS * ROWS, WIDTH], tl.float32))
    if FEW < PARTS and count <= FEW * WAYS:
        state = _add_parts(state, parts, first, programs, lane, valid, WAYS, FEW, V)
    else:
        for done in range(0, count, PARTS * WAYS):
            state = _add_parts(state, parts, first + done, programs, lane, valid, WAYS, PARTS, V)
    largest, total, result = state
    if WAYS > 1:
        of_ways = tl.reshape(largest, (WAYS, ROWS))
        largest = tl.max(of_ways, 0)
        shift = tl.where(largest == float("-inf"), 0.0, largest)
        factor = tl.exp2(of_ways - shift[None, :])
        total = tl.sum(tl.reshape(total, (WAYS, ROWS)) * factor, 0)
        result = tl.sum(tl.reshape(result, (WAYS, ROWS, WIDTH)) * factor[:, :, None], 0)
    output, lse, sinks = tensors
    sequence, num_seqs, head, num_heads, first_token, first_packed = place
    lane = first_lane + tl.arange(0, ROWS)
    valid = lane < end_lane
    packed = first_packed + lane
    first_row = first_token.to(tl.int64) * num_heads + head * V.group
    row = packed // V.group * num_heads + packed % V.group
    row_factor, row_lse = finish(largest, total, sinks_of(packed, head, sequence, num_seqs, sinks, V), V)
    tl.store(lse + first_row + row, row_lse, mask=valid)
    store_rows(output + first_row * V.value_dim, row, result * row_factor[:, None], valid, 0, WIDTH, V.value_dim)


@triton.jit
def _combine_share(
    parts, programs, lanes, place, tensors, rows, ROWS: tl.constexpr, PARTS: tl.constexpr, V: tl.constexpr
):
    """Writes the first `rows` of `lanes`."""
    if V.single_tile and V.block_m > 16 and rows == 1:
        _combine_rows(parts, programs, lanes, place, tensors, 1, 4, min(PARTS, 2048 // V.value_width), V)
    else:
        _combine_rows(parts, programs, lanes, place, tensors, ROWS, 1, PARTS, V)


@triton.jit(
    do_not_specialize=["stamp", "num_tokens", "num_seqs", "num_kv_heads", "rows"],
    do_not_specialize_on_alignment=["cu_seqlens_q", "schedule", "sinks"],
)
def _combine(
    workspace, cu_seqlens_q, schedule, stamp, output, lse, sinks, num_tokens, num_seqs, num_kv_heads, rows,
    PROGRAMS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """output = sum_i 2^(m_i - m) acc_i / sum_i 2^(m_i - m) l_i, with m = max_i m_i, over the parts i of a unit.

    Grid: (units that can have been left, shares of their rows); or, as the Hopper kernel seldom leaves any, programs
    that share those that there are. The parts of the unit that attention's program p began are p's second slot and the
    first slots of the programs after p, up to the one that ended the unit. A program has `rows` at a time: ROWS, or 1,
    the parts of which its warps share (see `rows_combined`).
    """
    program, number = tl.program_id(0), tl.program_id(0)
    share, shares = tl.program_id(1), tl.num_programs(1)
    if V.overlap:
        gdc_launch_dependents()
    scheduled = False
    if V.copy_rows == 0:  # the Hopper kernel's programs say themselves what they leave
        scheduled = is_scheduled(schedule, stamp)
    if scheduled:
        sequence, unit, begun_by, ended_by = _left(scheduled_handoff(schedule, PROGRAMS), number, PROGRAMS, PADDED)
    else:
        if V.overlap:
            gdc_wait()
        handoff = handoff_in(workspace, PROGRAMS, V)
        if V.copy_rows > 0:
            count = _count_left(handoff, PROGRAMS, PADDED)
            if count == 0:
                return
            number, share = program % count, program // count
            shares = tl.cdiv(tl.num_programs(0) - number, count)
        sequence, unit, begun_by, ended_by = _left(handoff, number, PROGRAMS, PADDED)
    if begun_by < 0:
        _leave(program, V)
        return
    start, queries = query_range(sequence, cu_seqlens_q, num_tokens, num_seqs, V)
    tiles = tl.maximum(query_tiles(queries, V), 1)
    first_row = unit % tiles * V.block_m
    end_lane = tl.minimum(queries * V.group - first_row, V.block_m)
    if share * rows >= end_lane:
        _leave(program, V)
        return
    head = tl.minimum(unit // tiles, num_kv_heads - 1)  # whatever a schedule of other lengths says
    place = (sequence, num_seqs, head, num_kv_heads * V.group, start + first_row // V.group, first_row % V.group)
    parts = (workspace, sums_in(workspace, PROGRAMS, V))
    if V.overlap:
        gdc_wait()
    programs = (begun_by, ended_by)
    tensors = (output, lse, sinks)
    if V.copy_rows > 0:
        for first_lane in range(share * rows, end_lane, shares * rows):
            _combine_share(parts, programs, (first_lane, end_lane), place, tensors, rows, ROWS, PARTS, V)
    else:  # a loop would spill
        _combine_share(parts, programs, (share * rows, end_lane), place, tensors, rows, ROWS, PARTS, V)


def combine_launcher(launch: AttentionLaunch, units: int) -> Launcher:
    """Launches the kernel that writes the rows which `launch`, of at most so many `units`, left in `workspace`.

    Its arguments: workspace, cu_seqlens_q, schedule, stamp, output, lse, sinks, num_tokens, num_seqs, num_kv_heads,
    `launch.rows_combined(units)`.
    """
    constants = dict(
        PROGRAMS=launch.programs,
        PADDED=launch.padded_programs,
        ROWS=launch.combine_rows,
        PARTS=launch.combine_parts,
        V=launch.variant,
    )
    if launch.variant.copy_rows:
        grid = (_COMBINING * launch.programs, 1, 1)
    else:
        grid = (max(1, min(launch.programs, units)), -(-launch.unit_rows // launch.rows_combined(units)), 1)
    return Launcher(_combine, grid, constants, dict(num_warps=4, **launch.overlap_option))
