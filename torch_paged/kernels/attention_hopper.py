"""Paged attention for many query rows on Hopper: warps that copy blocks, one to three warpgroups that multiply.

Each of these is a part with its own code, and while one computes weights another has the tensor cores; if there is but
one, that of another program on its multiprocessor.

Computes what `attention` computes without ALiBi from caches of query's dtype, dealt out as `deal_pieces` says, and
leaves its partial results to the same `combine`. Written in Gluon, as plain Triton cannot let the copy engine fill
slices of one operand from several blocks, nor keep a product under way during the softmax before it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from torch_paged.kernels.attention_combine import finish
from torch_paged.kernels.attention_rows import first_seen, sinks_of, visible_to
from torch_paged.kernels.hopper_loader import columns_of, load_keys, load_values
from torch_paged.kernels.hopper_products import PART_ROWS, add_values, await_products, scaled
from torch_paged.kernels.hopper_ring import RECORD, RING, forget, keys_of_unit, left_of_unit, rows_of_unit
from torch_paged.kernels.hopper_tiles import (
    attend_tiles,
    await_tile,
    fetch_query,
    first_tile,
    free_tile,
    hide_together,
    lanes_of,
)
from torch_paged.kernels.hopper_units import zero


@gluon.jit
def _num_programs():
    """`gl.num_programs(0)`, read where it is used, as it costs a register otherwise (see `zero`)."""
    return gl.inline_asm_elementwise("mov.b32 $0, %nctaid.x;", "=r", [], gl.int32, is_pure=False, pack=1)


@gluon.constexpr_function
def _in_eights(ONCE, WIDTH):
    """A layout of rows of 16 bits in which a thread has 8 columns side by side, or `ONCE` on the way there 4.

    Warps keep their rows, and a step exchanges one bit of a column between registers and lanes: Triton 3.6 does that
    by shuffles, both at once through shared memory, of which there is none left.
    """
    FOUR, SIXTEEN = ([0, 16], [0, 4]) if ONCE else ([0, 4], [0, 16])
    REGISTERS = [[0, 1], [0, 2], FOUR, [8, 0], *([0, COLUMN] for COLUMN in (32, 64, 128) if COLUMN < WIDTH)]
    LANES = [[0, 8], SIXTEEN, [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(REGISTERS, LANES, [[16, 0], [32, 0]], [], [PART_ROWS, WIDTH])


@gluon.jit
def _store(base, row, values, valid, FIRST: gl.constexpr, V: gl.constexpr):
    """Writes columns from `FIRST` on of rows of `value_dim` elements that stand close behind `base`."""
    column = FIRST + gl.arange(0, values.shape[1], gl.SliceLayout(0, values.type.layout))
    row = gl.convert_layout(row, gl.SliceLayout(1, values.type.layout))
    valid = gl.convert_layout(valid, gl.SliceLayout(1, values.type.layout))
    pointers = base + (row * V.value_dim)[:, None] + column[None, :]
    valid = valid[:, None]
    if FIRST + values.shape[1] > V.value_dim:
        valid = valid & (column < V.value_dim)[None, :]
    gl.store(pointers, values.to(base.dtype.element_ty), mask=valid)


@gluon.jit
def _write_sums(partial, largest, total, row, valid, V: gl.constexpr):
    """Writes (maximum, sum) pairs of the workspace, which stand behind all outputs."""
    sums = partial + _num_programs() * (2 * V.block_m * V.value_dim)
    gl.store(sums + 2 * row, largest, mask=valid)
    gl.store(sums + 2 * row + 1, total, mask=valid)


@gluon.jit
def _write_partial(partial, state, slot, lane, valid, V: gl.constexpr):
    """Leaves `state` in a slot of the workspace."""
    largest, total, outputs = state
    _write_sums(partial, largest, total, slot * V.block_m + lane, valid, V)
    for i in gl.static_range(len(outputs)):
        _store(partial + slot * V.block_m * V.value_dim, lane, outputs[i], valid, i * V.value_widths[0], V)


@gluon.jit
def _write_output(output_rows, lse, state, sink, first_row, row, valid, V: gl.constexpr):
    """Writes the finished rows `first_row + row`."""
    largest, total, outputs = state
    factor, row_lse = finish(largest, total, sink, V)
    gl.store(lse + first_row + row, row_lse, mask=valid)
    outputs = scaled(outputs, factor)
    for i in gl.static_range(len(outputs)):
        numbers = outputs[i].to(output_rows.dtype.element_ty)
        numbers = gl.convert_layout(numbers, _in_eights(True, numbers.shape[1]))
        # Unknown to the compiler, which would make one step of both otherwise.
        numbers = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [numbers], numbers.dtype, is_pure=False, pack=2)
        numbers = gl.convert_layout(numbers, _in_eights(False, numbers.shape[1]))
        _store(output_rows + first_row * V.value_dim, row, numbers, valid, i * V.value_widths[0], V)


@gluon.jit
def _hand_over(handoff, sequence, unit, part):
    """Says what of a unit this program leaves to others, or did for them."""
    program, programs = gl.program_id(0), _num_programs()
    if part == 0:
        gl.store(handoff + programs + program, sequence)
        gl.store(handoff + 2 * programs + program, unit)
    else:
        gl.store(handoff + program, part)


@gluon.jit
def _write(tensors, state, ring, number, num_kv_heads, lane, PART: gl.constexpr, V: gl.constexpr):
    """Writes these rows of unit number `number`: finished, or as a part of a unit (see `left_of_unit`)."""
    output, lse, partial, handoff, sinks, num_seqs = tensors
    head, token, rows, offset = rows_of_unit(ring, number)
    sequence, unit, part = left_of_unit(ring, number)
    valid = lane < rows
    if part < 0:
        num_heads = (num_kv_heads + zero()) * V.group
        packed = offset + lane + zero()
        row = packed // V.group * num_heads + packed % V.group
        sink = sinks_of(packed, head, sequence, num_seqs, sinks, V)
        _write_output(output, lse, state, sink, token.to(gl.int64) * num_heads + head * V.group, row, valid, V)
    else:
        _write_partial(partial, state, 2 * gl.program_id(0) + (part == 0).to(gl.int32), lane, valid, V)
        if PART == 0:
            _hand_over(handoff, sequence, unit, part)


@gluon.jit
def _attend_others(state, weights, rows, buffers, barriers, first, last, count, bounds, sight, scale, V: gl.constexpr):
    """`attend_tiles` [first, last) of a unit; with no mask between the `bounds`, where every row sees every key.

    Masked tiles stand on both sides of these where there is a window, their code does not: it would not fit into the
    instruction cache.
    """
    begin, end = bounds
    masked = gl.minimum(gl.maximum(end, first), last)
    if V.has.window:
        unmasked = gl.minimum(gl.maximum(begin, first), masked)
        for side in range(2):
            # Triton 3.6 would lose a lower bound that is carried from one iteration to the next.
            from_masked = gl.where(side == 0, first, masked)
            from_unmasked = gl.where(side == 0, unmasked, last)
            until = gl.where(side == 0, masked, last)
            state, weights, count = attend_tiles(
                state, weights, rows, buffers, barriers, from_masked, from_unmasked, count, sight, scale, True, V
            )
            state, weights, count = attend_tiles(
                state, weights, rows, buffers, barriers, from_unmasked, until, count, sight, scale, False, V
            )
    else:
        state, weights, count = attend_tiles(
            state, weights, rows, buffers, barriers, first, masked, count, sight, scale, False, V
        )
        state, weights, count = attend_tiles(
            state, weights, rows, buffers, barriers, masked, last, count, sight, scale, True, V
        )
    return state, weights, count


@gluon.jit
def _attend(PART: gl.constexpr, arguments, V: gl.constexpr):
    """A part of the warps that multiply: attention of its rows of every unit of this program."""
    ROW: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, V.tile, 16]))
    query, query_strides, scale, num_kv_heads, window, tensors, ring, buffers, barriers = arguments
    queries, _, value_buffers = buffers
    _, _, values_free, values_here, _ = barriers
    rows = queries.index(PART)
    lane = lanes_of(PART, ROW)
    if V.block_m > 128:
        lane += zero()  # three parts spill without it; of two, those of head dim 256 get slower by it
    count = num_kv_heads * 0
    number = count
    head = fetch_query(query, query_strides, rows, PART, ring, number, V)
    while head >= 0:
        offset, behind, keys, first, last = keys_of_unit(ring, number)
        visible = visible_to(behind + (offset + lane) // V.group, 0, keys, V)
        end = visible_to(behind, 0, keys, V) // V.tile  # of the tiles that every row sees whole
        begin = first
        if V.has.window:
            begin = gl.cdiv(first_seen(behind + (offset + V.block_m - 1) // V.group, 0, keys, window, V), V.tile)
        sight = (visible, first_seen(behind, 0, keys, window, V), keys, window)
        state, weights = first_tile(
            rows, buffers, barriers, first, count, number, (first < begin) | (first >= end), sight, scale, PART, ROW, V
        )
        state, weights, count = _attend_others(
            state, weights, rows, buffers, barriers, first + 1, last, count, (begin, end), sight, scale, V
        )
        # The last product, and meanwhile the query rows of the next unit: the other way around is slower.
        largest, total, outputs = state
        await_tile(values_here, count, V)
        outputs = add_values(outputs, weights, value_buffers, count, V)
        head = fetch_query(query, query_strides, rows, PART, ring, number + 1, V)
        outputs, weights = await_products(outputs, weights)
        free_tile(values_free, count, V)
        count += 1
        _write(tensors, (largest, total, outputs), ring, number, num_kv_heads, lane, PART, V)
        forget(ring, number)
        number += 1


@gluon.constexpr_function
def _registers(PARTS, V):
    """Registers of a thread of all parts but the first, and of the loaders.

    The more and smaller copies, the more, and where they divide by a block size that is no power of two.
    """
    SMALL = V.copy_rows <= 8
    if PARTS == 1:
        return [40, 40]
    if PARTS == 3:
        return [160, 160, 32, 32]
    LOADER = 72 if SMALL else 40 if V.tile // V.copy_rows > 2 else 24
    if not SMALL and (V.paging == "any" or V.has.window):
        LOADER += 16
    PART = (3 * 168 - LOADER) // 16 * 8  # of three times four warps with 168 registers
    return [PART, LOADER, LOADER]


@gluon.jit(
    do_not_specialize=[
        "num_tokens", "num_seqs", "num_kv_heads", "num_blocks", "max_keys", "rounds", "table_stride", "window",
    ],
    do_not_specialize_on_alignment=["block_table", "seq_lens", "cu_seqlens_q", "sinks"],
)  # fmt: skip
def attention_hopper(
    query, key_map, value_map, block_table, seq_lens, cu_seqlens_q, pieces, output, lse, partial, handoff, scale,
    num_tokens, num_seqs, num_kv_heads, num_blocks, max_keys, rounds, query_strides, table_stride, window, sinks,
    V: gl.constexpr,
):  # fmt: skip
    """Grid: persistent programs, as many as fit on the device, each with its pieces, then listed ones (`deal_pieces`).

    key loader    | K0 | K1 | K2 | ...                                                as buffers become free
    value loader  | V0 | V1 | V2 | ...
    warpgroup     |    Q K0^T | softmax | Q K1^T, P0 V0 | softmax | Q K2^T, P1 V1 | ...       for 64 rows each
    """
    PARTS: gl.constexpr = V.block_m // PART_ROWS
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    STAGES: gl.constexpr = V.num_stages
    KEY_DIM: gl.constexpr = columns_of(V.head_dim)
    VALUE_DIM: gl.constexpr = columns_of(V.value_dim)
    dtype: gl.constexpr = key_map.dtype
    buffers = (
        gl.allocate_shared_memory(dtype, [PARTS, PART_ROWS, KEY_DIM], LAYOUT),
        gl.allocate_shared_memory(dtype, [STAGES, V.tile, KEY_DIM], LAYOUT),
        gl.allocate_shared_memory(dtype, [STAGES, V.tile, VALUE_DIM], LAYOUT),
    )
    keys_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    keys_here = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    values_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    values_here = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(keys_free.index(stage), count=PARTS)
        mbarrier.init(values_free.index(stage), count=PARTS)
        mbarrier.init(keys_here.index(stage), count=1)
        mbarrier.init(values_here.index(stage), count=1)
    units_free = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    units_here = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(RING):
        mbarrier.init(units_free.index(place), count=PARTS + 1)
        mbarrier.init(units_here.index(place), count=1)
    if V.overlap:
        gdc_launch_dependents()
        gdc_wait()
    records = gl.allocate_shared_memory(gl.int32, [RING, RECORD], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ring = (records, units_free, units_here)
    values_hidden = ()  # nobody waits: Triton's tuples hold no None
    if hide_together(V):
        values_hidden = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout()).index(0)
        mbarrier.init(values_hidden, count=PARTS)
    barriers = (keys_free, keys_here, values_free, values_here, values_hidden)
    work = (block_table, table_stride, num_blocks, num_kv_heads, window)
    tensors = (output, lse, partial, handoff, sinks, num_seqs)
    attend = (query, query_strides, scale, num_kv_heads, window, tensors, ring, buffers, barriers)
    keys_memory = (key_map, buffers[1], keys_free, keys_here)
    values_memory = (value_map, buffers[2], values_free, values_here)
    batch = (seq_lens, cu_seqlens_q, num_tokens, num_seqs, max_keys)
    REGISTERS: gl.constexpr = _registers(PARTS, V)
    if PARTS == 1:
        gl.warp_specialize(
            [
                (_attend, (0, attend, V)),
                (load_keys, (keys_memory, ring, work, pieces, rounds, batch, V)),
                (load_values, (values_memory, ring, work, V)),
            ],
            [1, 1],
            REGISTERS,
        )
    elif PARTS == 2:
        gl.warp_specialize(
            [
                (_attend, (0, attend, V)),
                (_attend, (1, attend, V)),
                (load_keys, (keys_memory, ring, work, pieces, rounds, batch, V)),
                (load_values, (values_memory, ring, work, V)),
            ],
            [4, 1, 1],
            REGISTERS,
        )
    else:
        gl.warp_specialize(
            [
                (_attend, (0, attend, V)),
                (_attend, (1, attend, V)),
                (_attend, (2, attend, V)),
                (load_keys, (keys_memory, ring, work, pieces, rounds, batch, V)),
                (load_values, (values_memory, ring, work, V)),
            ],
            [4, 4, 1, 1],
            REGISTERS,
        )
