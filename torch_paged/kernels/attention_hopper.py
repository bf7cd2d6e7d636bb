"""Paged attention for many query rows on Hopper: warps that copy blocks, two warpgroups that multiply.

The two share their code, where a program's units have few tiles and the code itself must be fetched again and again; or
each has its own, and while one computes weights the other has the tensor cores.

Computes what `attention` computes, dealt out in the same way, and leaves its partial results to the same `combine`.
Written in Gluon, as plain Triton cannot let the copy engine fill slices of one operand from several blocks, nor keep a
product under way during the softmax before it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from torch_paged.kernels.attention_logits import LN_2
from torch_paged.kernels.attention_rows import tiles_of_keys, visible_to
from torch_paged.kernels.hopper_loader import (
    key_positions,
    load_tiles,
    next_unit,
    piece_of,
    span_of,
    stage_of,
    unit_of,
    zero,
)

_barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # its name from Triton 3.7 on, and before

ROWS: gl.constexpr = gl.constexpr(16)  # of a warp: 64 of a warpgroup


@gluon.jit
def _lanes(PART: gl.constexpr, LAYOUT: gl.constexpr):
    """Rows of a unit that this part of the warps serves."""
    MANY: gl.constexpr = ROWS * gl.num_warps()
    return PART * MANY + gl.arange(0, MANY, LAYOUT)


@gluon.jit
def _num_programs():
    """`gl.num_programs(0)`, likewise."""
    return gl.inline_asm_elementwise("mov.b32 $0, %nctaid.x;", "=r", [], gl.int32, is_pure=False, pack=1)


@gluon.jit
def _fetch_query(query, query_strides, memory, PART: gl.constexpr, start, head, first_row, rows, V: gl.constexpr):
    """Starts copying this part's query rows of a unit: (query token, head of the group), packed."""
    DIM: gl.constexpr = V.head_dim
    THREADS: gl.constexpr = 8  # of a row, 16 bytes each time
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // THREADS, THREADS], [gl.num_warps(), 1], [1, 0])
    nothing = zero()
    lane = _lanes(PART, gl.SliceLayout(1, LAYOUT)) + nothing
    packed = first_row % V.group + lane
    column = gl.arange(0, DIM, gl.SliceLayout(0, LAYOUT))
    token_stride, head_stride = query_strides[0] + nothing, query_strides[1] + nothing
    offsets = (packed // V.group).to(gl.int64) * token_stride + (packed % V.group).to(gl.int64) * head_stride
    offsets += (start + first_row // V.group).to(gl.int64) * token_stride + (head * V.group).to(gl.int64) * head_stride
    pointers = query + offsets[:, None] + column[None, :]
    pointers = gl.max_contiguous(gl.multiple_of(pointers, [1, 16]), [1, DIM])
    _barrier()  # all warps have done with the rows before
    async_copy.async_copy_global_to_shared(memory, pointers, mask=(lane < rows)[:, None])
    async_copy.commit_group()


@gluon.jit
def _await_query():
    async_copy.wait_group(0)
    fence_async_shared()
    _barrier()


@gluon.jit
def _await(here, count, V: gl.constexpr):
    """Waits until tile number `count` has arrived."""
    stage, phase = stage_of(count, V)
    mbarrier.wait(here.index(stage), phase)


@gluon.jit
def _free(free, count, V: gl.constexpr):
    """Tells the loader that all warps of this part have read the buffer of tile number `count`: it is a barrier."""
    mbarrier.arrive(free.index(count % V.num_stages), count=1)


@gluon.jit
def _scores(query, keys, count, V: gl.constexpr):
    """Starts the product of the query rows and the keys of tile number `count`."""
    TILE: gl.constexpr = V.tile
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, TILE, 16])
    nothing = gl.zeros([ROWS * gl.num_warps(), TILE], gl.float32, LAYOUT)
    transposed = keys.index(count % V.num_stages).permute((1, 0))
    return warpgroup_mma(query, transposed, nothing, use_acc=False, is_async=True)


@gluon.jit
def _mask(scores, tile, visible, keys, V: gl.constexpr):
    """`scores` of a tile, -inf where a row does not see a key."""
    position = key_positions(tile, keys, gl.SliceLayout(0, scores.type.layout), V)
    return gl.where(position[None, :] < visible[:, None], scores, float("-inf"))


@gluon.jit
def _columns(tile):
    """`tile` with its columns apart that one thread holds, over which it shall not go one after another."""
    return gl.reshape(tile, [tile.shape[0], tile.shape[1] // 8, 8])


@gluon.jit
def _of_rows(reduced, like):
    return gl.convert_layout(reduced, like.type.layout, assert_trivial=True)


@gluon.jit
def _narrow(weights, like):
    """`weights` in the 16 bits of `like`. By itself Triton 3.6 turns each pair around, and back before the product."""
    FLOAT: gl.constexpr = "bf16x2" if like.dtype == gl.bfloat16 else "f16x2"
    return gl.inline_asm_elementwise(
        "cvt.rn." + FLOAT + ".f32 $0, $2, $1;", "=r,r,r", [weights], like.dtype, is_pure=True, pack=2
    )


@gluon.jit
def _softmax(scores, largest, total, scale, SOME_EMPTY: gl.constexpr):
    """Weights of a tile, in powers of two, with the new maximum and sum of each row and the factor of the old ones."""
    larger = gl.maximum(largest, _of_rows(gl.max(gl.max(_columns(scores), 1), 1), largest) * scale)
    # A row that has seen no key yet has no maximum to subtract: -inf - -inf would be NaN.
    shift = gl.where(larger == float("-inf"), 0.0, larger) if SOME_EMPTY else larger
    weights = gl.exp2(scores * scale - shift[:, None])
    decay = gl.exp2(largest - shift)
    return weights, larger, total * decay + _of_rows(gl.sum(gl.sum(_columns(weights), 1), 1), largest), decay


@gluon.jit
def _tiles(
    state, weights, query, buffers, barriers, first, last, count, visible, keys, scale, MASK: gl.constexpr,
    V: gl.constexpr,
):  # fmt: skip
    """Online softmax over key tiles [first, last): a tile's scores are under way while the one before is weighted.

    `weights` are those of tile `first - 1`, whose number is `count`; returned are those of tile `last - 1`.
    """
    largest, total, output = state
    _, key_buffers, value_buffers = buffers
    keys_free, keys_here, values_free, values_here = barriers
    for tile in range(first, last):
        _await(keys_here, count + 1, V)
        scores = _scores(query, key_buffers, count + 1, V)
        _await(values_here, count, V)
        output = warpgroup_mma(weights, value_buffers.index(count % V.num_stages), output, is_async=True)
        scores = warpgroup_mma_wait(1, deps=(scores,))
        _free(keys_free, count + 1, V)
        if MASK:
            scores = _mask(scores, tile, visible, keys, V)
        later, largest, total, decay = _softmax(scores, largest, total, scale, MASK)
        output, weights = warpgroup_mma_wait(0, deps=(output, weights))
        _free(values_free, count, V)
        output = output * gl.convert_layout(decay, gl.SliceLayout(1, output.type.layout))[:, None]
        weights = gl.convert_layout(_narrow(later, weights), weights.type.layout)
        count += 1
    return (largest, total, output), weights, count


@gluon.jit
def _store(base, row, values, valid, V: gl.constexpr):
    """Writes rows of `value_dim` elements that stand close behind `base`."""
    column = gl.arange(0, V.value_dim, gl.SliceLayout(0, values.type.layout))
    row = gl.convert_layout(row, gl.SliceLayout(1, values.type.layout))
    valid = gl.convert_layout(valid, gl.SliceLayout(1, values.type.layout))
    pointers = base + (row * V.value_dim)[:, None] + column[None, :]
    gl.store(pointers, values.to(base.dtype.element_ty), mask=valid[:, None])


@gluon.jit
def _write_sums(partial, largest, total, row, valid, V: gl.constexpr):
    """Writes (maximum, sum) pairs of the workspace, which stand behind all outputs."""
    sums = partial + _num_programs() * (2 * V.block_m * V.value_dim)
    gl.store(sums + 2 * row, largest, mask=valid)
    gl.store(sums + 2 * row + 1, total, mask=valid)


@gluon.jit
def _write_partial(partial, state, slot, lane, valid, V: gl.constexpr):
    """Leaves `state` in a slot of the workspace."""
    largest, total, output = state
    _write_sums(partial, largest, total, slot * V.block_m + lane, valid, V)
    _store(partial + slot * V.block_m * V.value_dim, lane, output, valid, V)


@gluon.jit
def _write_output(output_rows, lse, state, first_row, row, valid, V: gl.constexpr):
    """Writes the finished rows `first_row + row`."""
    largest, total, output = state
    gl.store(lse + first_row + row, (largest + gl.log2(total)) * LN_2, mask=valid)
    factor = gl.convert_layout(1.0 / gl.where(total != 0, total, 1.0), gl.SliceLayout(1, output.type.layout))
    _store(output_rows + first_row * V.value_dim, row, output * factor[:, None], valid, V)


@gluon.jit
def _hand_over(handoff, sequence, unit, first, last, key_tiles):
    """Says what of a unit this program leaves to others, or did for them, and returns its slot; -1 if it is whole."""
    program, programs = gl.program_id(0), _num_programs()
    slot = 2 * program + (first == 0).to(gl.int32)
    if (first == 0) & (last == key_tiles):
        slot = -1
    elif first == 0:
        gl.store(handoff + programs + program, sequence)
        gl.store(handoff + 2 * programs + program, unit)
    else:
        gl.store(handoff + program, gl.where(last == key_tiles, 2, 1))
    return slot


@gluon.jit
def _first_tile(
    query, buffers, barriers, first, count, masked, visible, keys, scale,
    ROW: gl.constexpr, OUTPUT: gl.constexpr, V: gl.constexpr,
):  # fmt: skip
    """State of the rows before a unit's first tile is added to the output, and that tile's weights."""
    _, key_buffers, _ = buffers
    keys_free, keys_here, _, _ = barriers
    LANES: gl.constexpr = ROWS * gl.num_warps()
    DIM: gl.constexpr = V.value_dim
    _await(keys_here, count, V)
    _await_query()
    scores = warpgroup_mma_wait(0, deps=(_scores(query, key_buffers, count, V),))
    _free(keys_free, count, V)
    if masked:
        scores = _mask(scores, first, visible, keys, V)
    nothing = gl.zeros([LANES], gl.float32, ROW)
    weights, largest, total, _ = _softmax(scores, nothing - float("inf"), nothing, scale, True)
    weights = gl.convert_layout(weights.to(key_buffers.dtype), gl.DotOperandLayout(0, OUTPUT, 2))
    return (largest, total, gl.zeros([LANES, DIM], gl.float32, OUTPUT)), weights


@gluon.jit
def _last_product(state, weights, buffers, barriers, count, V: gl.constexpr):
    """State of the rows with their last tile, whose number is `count`."""
    _, _, value_buffers = buffers
    _, _, values_free, values_here = barriers
    largest, total, output = state
    _await(values_here, count, V)
    output = warpgroup_mma(weights, value_buffers.index(count % V.num_stages), output, is_async=True)
    output, weights = warpgroup_mma_wait(0, deps=(output, weights))
    _free(values_free, count, V)
    return largest, total, output


@gluon.jit
def _attend(PART: gl.constexpr, arguments, V: gl.constexpr):
    """A part of the warps that multiply: attention of its rows of every unit in this program's pieces."""
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, V.value_dim, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, V.tile, 16]))
    tensors, query_strides, scale, num_kv_heads, pieces, rounds, batch, buffers, barriers = arguments
    query, output, lse, partial, handoff = tensors
    rows_here = buffers[0].index(PART)
    program = gl.program_id(0)
    lane = _lanes(PART, ROW)
    # Others may look in this program's first slot for a part: an empty one, unless it leaves one there.
    _write_sums(partial, lane * 0.0 - float("inf"), lane * 0.0, 2 * program * V.block_m + lane, lane >= 0, V)
    if PART == 0:
        gl.store(handoff + program, 0)
        gl.store(handoff + _num_programs() + program, -1)
    count = num_kv_heads * 0
    for turn in range(rounds if V.parts > 1 else 1):
        sequence, unit, begin, units, end_tile = piece_of(pieces, turn, rounds)
        start, queries, keys, tiles, head, first_row, rows = unit_of(sequence, unit, batch, V)
        if units > 0:
            _fetch_query(query, query_strides, rows_here, PART, start, head, first_row, rows, V)
        for index in range(units):
            key_tiles = tiles_of_keys(first_row, rows, queries, keys, V)
            first, last = span_of(index, begin, units, end_tile, key_tiles)
            slot = _hand_over(handoff, sequence, unit, first, last, key_tiles)
            first_token = first_row // V.group
            packed = first_row % V.group + lane
            visible = visible_to(first_token + packed // V.group, queries, keys, V)
            unmasked = visible_to(first_token, queries, keys, V) // V.tile  # tiles that every row sees whole
            masked = gl.minimum(gl.maximum(unmasked, first + 1), last)
            state, weights = _first_tile(
                rows_here, buffers, barriers, first, count, first >= unmasked, visible, keys, scale, ROW, OUTPUT, V
            )
            state, weights, count = _tiles(
                state, weights, rows_here, buffers, barriers, first + 1, masked, count, visible, keys, scale, False, V
            )  # fmt: skip
            state, weights, count = _tiles(
                state, weights, rows_here, buffers, barriers, masked, last, count, visible, keys, scale, True, V
            )  # fmt: skip

            num_heads = (num_kv_heads + zero()) * V.group
            first_output = (start + first_token).to(gl.int64) * num_heads + head * V.group
            valid = lane < rows
            sequence, unit = next_unit(sequence, unit, tiles, num_kv_heads, batch, V)
            start, queries, keys, tiles, head, first_row, rows = unit_of(sequence, unit, batch, V)
            if index < units - 1:
                _fetch_query(query, query_strides, rows_here, PART, start, head, first_row, rows, V)
            state = _last_product(state, weights, buffers, barriers, count, V)
            count += 1
            if slot < 0:
                packed += zero()
                row = packed // V.group * num_heads + packed % V.group
                _write_output(output, lse, state, first_output, row, valid, V)
            else:
                _write_partial(partial, state, slot, lane, valid, V)


@gluon.jit(
    do_not_specialize=["num_tokens", "num_seqs", "num_kv_heads", "num_blocks", "max_keys", "rounds", "table_stride"],
    do_not_specialize_on_alignment=["block_table", "seq_lens", "cu_seqlens_q"],
)
def attention_hopper(
    query, key_map, value_map, block_table, seq_lens, cu_seqlens_q, pieces, output, lse, partial, handoff, scale,
    num_tokens, num_seqs, num_kv_heads, num_blocks, max_keys, rounds, query_strides, table_stride, V: gl.constexpr,
):  # fmt: skip
    """Grid: one persistent program per multiprocessor, each with the pieces that `deal_pieces` gave it.

    key loader    | K0 | K1 | K2 | ...                                                as buffers become free
    value loader  | V0 | V1 | V2 | ...
    warpgroup     |    Q K0^T | softmax | Q K1^T, P0 V0 | softmax | Q K2^T, P1 V1 | ...       for 64 rows each
    """
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    STAGES: gl.constexpr = V.num_stages
    KEY_DIM: gl.constexpr = V.head_dim
    VALUE_DIM: gl.constexpr = V.value_dim
    dtype: gl.constexpr = key_map.dtype
    buffers = (
        gl.allocate_shared_memory(dtype, [V.parts, V.block_m // V.parts, KEY_DIM], LAYOUT),
        gl.allocate_shared_memory(dtype, [STAGES, V.tile, KEY_DIM], LAYOUT),
        gl.allocate_shared_memory(dtype, [STAGES, V.tile, VALUE_DIM], LAYOUT),
    )
    keys_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    keys_here = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    values_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    values_here = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(keys_free.index(stage), count=V.parts)
        mbarrier.init(values_free.index(stage), count=V.parts)
        mbarrier.init(keys_here.index(stage), count=1)
        mbarrier.init(values_here.index(stage), count=1)
    barriers = (keys_free, keys_here, values_free, values_here)
    batch = (seq_lens, cu_seqlens_q, num_tokens, num_seqs, max_keys)
    tensors = (query, output, lse, partial, handoff)
    work = (block_table, table_stride, num_blocks, num_kv_heads, pieces, rounds, batch)
    attend = (tensors, query_strides, scale, num_kv_heads, pieces, rounds, batch, buffers, barriers)
    load_keys = (key_map, buffers[1], keys_free, keys_here, work)
    load_values = (value_map, buffers[2], values_free, values_here, work)
    # Behind the functions: warps of all but the first, and registers of their threads. Ids of many blocks need more.
    REGISTERS: gl.constexpr = [240, 24, 24] if V.tile // V.copy_rows <= 2 else [232, 40, 40]
    if V.parts == 1:
        gl.warp_specialize(
            [
                (_attend, (0, attend, V)),
                (load_tiles, (load_keys, KEY_DIM, V)),
                (load_tiles, (load_values, VALUE_DIM, V)),
            ],
            [1, 1],
            [40, 40],
        )
    else:
        gl.warp_specialize(
            [
                (_attend, (0, attend, V)),
                (_attend, (1, attend, V)),
                (load_tiles, (load_keys, KEY_DIM, V)),
                (load_tiles, (load_values, VALUE_DIM, V)),
            ],
            [4, 1, 1],
            REGISTERS,
        )
