"""Paged attention for many query rows on Hopper: a warp that copies blocks, two warpgroups that multiply.

Computes what `attention` computes, dealt out in the same way, and leaves its partial results to the same `combine`.
Written in Gluon, as plain Triton cannot let the copy engine (TMA) fill slices of one operand from several blocks, nor
keep a product under way during the softmax before it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from torch_paged.kernels.attention_combine import LN_2
from torch_paged.kernels.schedule import key_count, next_sequence, query_range, query_tiles

# Names of Triton 3.6 and of what came after it.
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier
_copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared

WARPGROUPS: gl.constexpr = gl.constexpr(2)
ROWS: gl.constexpr = gl.constexpr(64)  # of one warpgroup
COLUMNS: gl.constexpr = gl.constexpr(64)  # of one copy: 128 bytes, as the swizzled rows of an operand are


@gluon.jit
def _visible(token, queries, keys, V: gl.constexpr):
    """Number of keys that query `token` of a sequence sees."""
    if V.causal:
        seen = gl.minimum(gl.maximum(keys - queries + 1 + token, 0), keys)
    else:
        seen = token * 0 + keys
    return seen


@gluon.jit
def _piece(pieces):
    """What `deal` gave this program."""
    piece = pieces + 5 * gl.program_id(0)
    return gl.load(piece), gl.load(piece + 1), gl.load(piece + 2), gl.load(piece + 3), gl.load(piece + 4)


@gluon.jit
def _unit(sequence, unit, batch, V: gl.constexpr):
    """What a unit is: first token, queries, keys and units per head of its sequence, its head, first row and rows."""
    seq_lens, cu_seqlens_q, num_tokens, num_seqs, max_keys = batch
    start, queries = query_range(sequence, cu_seqlens_q, num_tokens, num_seqs, V)
    keys = key_count(sequence, seq_lens, num_seqs, max_keys)
    tiles = gl.maximum(query_tiles(queries, V), 1)
    first_row = unit % tiles * V.block_m
    rows = gl.minimum(queries * V.group - first_row, V.block_m)
    return start, queries, keys, tiles, unit // tiles, first_row, rows


@gluon.jit
def _key_tiles(first_row, rows, queries, keys, V: gl.constexpr):
    """Tiles of keys that the unit's last row sees, at least one."""
    return gl.maximum(gl.cdiv(_visible((first_row + rows - 1) // V.group, queries, keys, V), V.tile), 1)


@gluon.jit
def _span(index, begin, units, end_tile, key_tiles):
    """First tile and end of unit number `index` of a piece. Not carried from one to the next: Triton 3.6 loses it."""
    return gl.where(index == 0, begin, 0), gl.minimum(gl.where(index == units - 1, end_tile, key_tiles), key_tiles)


@gluon.jit
def _next(sequence, unit, tiles, num_kv_heads, batch, V: gl.constexpr):
    """The unit after `unit`."""
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    _, cu_seqlens_q, num_tokens, num_seqs, _ = batch
    unit += 1
    if unit >= tiles * num_kv_heads:
        unit = unit * 0
        sequence = next_sequence(sequence, gl.arange(0, 32, LANES), cu_seqlens_q, num_tokens, num_seqs, V)
    return sequence, unit


@gluon.jit
def _slot(count, V: gl.constexpr):
    """Buffer of the tile that is number `count` of this program, and the phase of its barriers."""
    return count % V.num_stages, count // V.num_stages & 1


@gluon.jit
def _copy_tile(source, buffers, ids, tile, keys, head, stage, arrived, DIM: gl.constexpr, V: gl.constexpr):
    """Starts the copies of one tile, `[TILE, DIM]` in pieces of `[rows of a block, COLUMNS]`.

    Keys past the last one must not show, NaN least of all. Blocks without keys are read past the cache's end, where
    the copy engine finds zeros. The last block is copied as many slots too early as it lacks keys, slots below 0
    being zeros too: its keys stand at the end of its rows (see `_positions`).
    """
    BLOCKS: gl.constexpr = V.tile // V.copy_rows
    PIECES: gl.constexpr = DIM // COLUMNS
    mbarrier.expect(arrived.index(stage), V.tile * DIM * 2)
    for block in gl.static_range(BLOCKS):
        position = tile * V.tile + block * V.copy_rows
        slot = position % V.block_size - gl.maximum(position + V.copy_rows - keys, 0)
        for piece in gl.static_range(PIECES):
            buffer = buffers.index((stage * PIECES + piece) * BLOCKS + block)
            _copy(source, [ids[block], slot, head, piece * COLUMNS], arrived.index(stage), buffer)


@gluon.jit
def _load(maps, block_table, table_stride, num_blocks, num_kv_heads, pieces, batch, buffers, barriers, V: gl.constexpr):
    """One warp: copies the keys and values of this program's piece, tile by tile, as their buffers become free."""
    BLOCKS: gl.constexpr = V.tile // V.copy_rows
    ROWS_COPIED: gl.constexpr = V.copy_rows
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, 4)
    KEY_PIECES: gl.constexpr = V.num_stages * BLOCKS * (V.head_dim // COLUMNS)
    VALUE_PIECES: gl.constexpr = V.num_stages * BLOCKS * (V.value_dim // COLUMNS)
    key_map, value_map = maps
    keys_free, keys_here, values_free, values_here = barriers
    key_buffers = buffers[1]._reinterpret(key_map.dtype, [KEY_PIECES, 1, ROWS_COPIED, 1, COLUMNS], LAYOUT)
    value_buffers = buffers[2]._reinterpret(key_map.dtype, [VALUE_PIECES, 1, ROWS_COPIED, 1, COLUMNS], LAYOUT)
    sequence, unit, begin, units, end_tile = _piece(pieces)
    count = begin * 0
    for index in range(units):
        _, queries, keys, tiles, head, first_row, rows = _unit(sequence, unit, batch, V)
        first, last = _span(index, begin, units, end_tile, _key_tiles(first_row, rows, queries, keys, V))
        table = block_table + sequence.to(gl.int64) * table_stride
        for tile in range(first, last):
            ids = ()
            for block in gl.static_range(BLOCKS):
                position = tile * V.tile + block * V.copy_rows
                used = position < keys
                ids += (gl.load(table + position // V.block_size, mask=used, other=num_blocks),)
            stage, phase = _slot(count, V)
            mbarrier.wait(keys_free.index(stage), phase ^ 1)
            _copy_tile(key_map, key_buffers, ids, tile, keys, head, stage, keys_here, V.head_dim, V)
            mbarrier.wait(values_free.index(stage), phase ^ 1)
            _copy_tile(value_map, value_buffers, ids, tile, keys, head, stage, values_here, V.value_dim, V)
            count += 1
        sequence, unit = _next(sequence, unit, tiles, num_kv_heads, batch, V)


@gluon.jit
def _positions(tile, keys, LAYOUT: gl.constexpr, V: gl.constexpr):
    """Positions in the sequence of the keys of a tile, as `_load` copied them; rows without a key are past the last."""
    position = tile * V.tile + gl.arange(0, V.tile, LAYOUT)
    last_block = (keys - 1) // V.copy_rows * V.copy_rows
    shifted = position - (last_block + V.copy_rows - keys)
    return gl.where(position < last_block, position, gl.where(shifted < last_block, keys, shifted))


@gluon.jit
def _softmax(scores, largest, total, tile, visible, keys, scale, MASK: gl.constexpr, V: gl.constexpr):
    """Weights of a tile, in powers of two, with the new maximum and sum of each row and the factor of the old ones."""
    LAYOUT: gl.constexpr = scores.type.layout
    if MASK:
        position = _positions(tile, keys, gl.SliceLayout(0, LAYOUT), V)
        scores = gl.where(position[None, :] < visible[:, None], scores, float("-inf"))
    larger = gl.maximum(largest, gl.max(scores, 1) * scale)
    # A row that has seen no key yet has no maximum to subtract: -inf - -inf would be NaN.
    shift = gl.where(larger == float("-inf"), 0.0, larger) if MASK else larger
    weights = gl.exp2(scores * scale - shift[:, None])
    decay = gl.exp2(largest - shift)
    return weights, larger, total * decay + gl.sum(weights, 1), decay


@gluon.jit
def _await(here, count, V: gl.constexpr, used=True):
    """Waits until tile number `count`, if it is `used`, has arrived."""
    stage, phase = _slot(count, V)
    mbarrier.wait(here.index(stage), phase, pred=used)


@gluon.jit
def _scores(query, key_buffers, count, V: gl.constexpr):
    """Starts the product of the query rows and the keys of tile number `count`."""
    TILE: gl.constexpr = V.tile
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    keys = key_buffers.index(count % V.num_stages).permute((1, 0))
    return warpgroup_mma(query, keys, gl.zeros([ROWS, TILE], gl.float32, LAYOUT), use_acc=False, is_async=True)


@gluon.jit
def _free(barriers, count, V: gl.constexpr):
    """Tells the loader that this warpgroup has read the buffer of tile number `count`."""
    mbarrier.arrive(barriers.index(count % V.num_stages), count=1)


@gluon.jit
def _tiles(
    state, weights, query, buffers, barriers, first, last, end, count, visible, keys, scale, MASK: gl.constexpr,
    V: gl.constexpr,
):  # fmt: skip
    """Online softmax over key tiles [first, last): a tile's scores are under way while the one before is weighted.

    `weights` are those of tile `first - 1`, whose number is `count`; returned are those of tile `last - 1`. The keys of
    tile `first` have arrived, those of tile `last` will have, unless it is the `end`.
    """
    largest, total, output = state
    _, key_buffers, value_buffers = buffers
    keys_free, keys_here, values_free, values_here = barriers
    for tile in range(first, last):
        scores = _scores(query, key_buffers, count + 1, V)
        _await(values_here, count, V)
        output = warpgroup_mma(weights, value_buffers.index(count % V.num_stages), output, is_async=True)
        scores = warpgroup_mma_wait(1, deps=(scores,))
        _free(keys_free, count + 1, V)
        later, largest, total, decay = _softmax(scores, largest, total, tile, visible, keys, scale, MASK, V)
        # A wait in a loop of its own, past which the assembler does not move the softmax.
        _await(keys_here, count + 2, V, tile + 1 < end)
        output, weights = warpgroup_mma_wait(0, deps=(output, weights))
        _free(values_free, count, V)
        output = output * gl.convert_layout(decay, gl.SliceLayout(1, output.type.layout))[:, None]
        weights = gl.convert_layout(later.to(weights.dtype), weights.type.layout)
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
    sums = partial + gl.num_programs(0) * (2 * V.block_m * V.value_dim)
    gl.store(sums + 2 * row, largest, mask=valid)
    gl.store(sums + 2 * row + 1, total, mask=valid)


@gluon.jit
def _load_query(query, query_strides, memory, packed, valid, V: gl.constexpr):
    """Puts a warpgroup's query rows, `packed` heads of tokens behind `query`, into shared memory."""
    DIM: gl.constexpr = V.head_dim
    THREADS: gl.constexpr = DIM // 8  # of a row, 16 bytes each
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // THREADS, THREADS], [4, 1], [1, 0])
    packed = gl.convert_layout(packed, gl.SliceLayout(1, LAYOUT))
    valid = gl.convert_layout(valid, gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, DIM, gl.SliceLayout(0, LAYOUT))
    rows = (packed // V.group).to(gl.int64) * query_strides[0] + (packed % V.group).to(gl.int64) * query_strides[1]
    pointers = query + rows[:, None] + column[None, :]
    pointers = gl.max_contiguous(gl.multiple_of(pointers, [1, 16]), [1, DIM])
    loaded = gl.load(pointers, mask=valid[:, None], other=0.0)
    _barrier()  # all warps have done with the rows before
    memory.store(loaded)
    fence_async_shared()
    _barrier()


@gluon.jit
def _attend(
    WARPGROUP: gl.constexpr, tensors, query_strides, scale, num_kv_heads, pieces, batch, buffers, barriers,
    V: gl.constexpr,
):  # fmt: skip
    """One warpgroup: attention of its half of the rows of every unit in this program's piece."""
    DIM: gl.constexpr = V.value_dim
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V.tile, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    query, output_rows, lse, partial, handoff = tensors
    query_buffers, key_buffers, value_buffers = buffers
    keys_free, keys_here, values_free, values_here = barriers
    queries_here = query_buffers.index(WARPGROUP)
    sequence, unit, begin, units, end_tile = _piece(pieces)
    program = gl.program_id(0)
    lane = WARPGROUP * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    # Others may look in this program's first slot for a part: an empty one, unless it leaves one there.
    _write_sums(partial, lane * 0.0 - float("inf"), lane * 0.0, 2 * program * V.block_m + lane, lane >= 0, V)
    if WARPGROUP == 0:
        gl.store(handoff + program, 0)
        gl.store(handoff + gl.num_programs(0) + program, -1)
    count = begin * 0
    for index in range(units):
        start, queries, keys, tiles, head, first_row, rows = _unit(sequence, unit, batch, V)
        key_tiles = _key_tiles(first_row, rows, queries, keys, V)
        first, last = _span(index, begin, units, end_tile, key_tiles)
        if first < last:
            first_token = first_row // V.group
            packed = first_row % V.group + lane
            valid = lane < rows
            visible = _visible(first_token + packed // V.group, queries, keys, V)
            query_head = query + (start + first_token).to(gl.int64) * query_strides[0]
            query_head += (head * V.group).to(gl.int64) * query_strides[1]
            _load_query(query_head, query_strides, queries_here, packed, valid, V)
            largest = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
            total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, SCORES))
            output = gl.zeros([ROWS, DIM], gl.float32, OUTPUT)
            _await(keys_here, count, V)
            scores = warpgroup_mma_wait(0, deps=(_scores(queries_here, key_buffers, count, V),))
            _free(keys_free, count, V)
            _await(keys_here, count + 1, V, first + 1 < last)
            weights, largest, total, _ = _softmax(scores, largest, total, first, visible, keys, scale, True, V)
            weights = gl.convert_layout(weights.to(key_buffers.dtype), WEIGHTS)
            masked = gl.minimum(gl.maximum(_visible(first_token, queries, keys, V) // V.tile, first + 1), last)
            state = (largest, total, output)
            state, weights, count = _tiles(
                state, weights, queries_here, buffers, barriers, first + 1, masked, last, count, visible, keys, scale,
                False, V,
            )  # fmt: skip
            state, weights, count = _tiles(
                state, weights, queries_here, buffers, barriers, masked, last, last, count, visible, keys, scale,
                True, V,
            )  # fmt: skip
            largest, total, output = state
            _await(values_here, count, V)
            output = warpgroup_mma(weights, value_buffers.index(count % V.num_stages), output, is_async=True)
            output, weights = warpgroup_mma_wait(0, deps=(output, weights))
            _free(values_free, count, V)
            count += 1
            if (first == 0) & (last == key_tiles):
                num_heads = num_kv_heads * V.group
                first_output = (start + first_token).to(gl.int64) * num_heads + head * V.group
                row = packed // V.group * num_heads + packed % V.group
                gl.store(lse + first_output + row, (largest + gl.log2(total)) * LN_2, mask=valid)
                factor = gl.convert_layout(1.0 / gl.where(total > 0, total, 1.0), gl.SliceLayout(1, OUTPUT))
                _store(output_rows + first_output * V.value_dim, row, output * factor[:, None], valid, V)
            else:
                slot = 2 * program + (first == 0).to(gl.int32)
                _write_sums(partial, largest, total, slot * V.block_m + lane, valid, V)
                _store(partial + slot * V.block_m * V.value_dim, lane, output, valid, V)
                if WARPGROUP == 0:
                    if first == 0:
                        gl.store(handoff + gl.num_programs(0) + program, sequence)
                        gl.store(handoff + 2 * gl.num_programs(0) + program, unit)
                    else:
                        gl.store(handoff + program, gl.where(last == key_tiles, 2, 1))
        sequence, unit = _next(sequence, unit, tiles, num_kv_heads, batch, V)


@gluon.jit(
    do_not_specialize=["num_tokens", "num_seqs", "num_kv_heads", "num_blocks", "max_keys", "table_stride"],
    do_not_specialize_on_alignment=["block_table", "seq_lens", "cu_seqlens_q"],
)
def attention_hopper(
    query, key_map, value_map, block_table, seq_lens, cu_seqlens_q, pieces, output, lse, partial, handoff, scale,
    num_tokens, num_seqs, num_kv_heads, num_blocks, max_keys, query_strides, table_stride, V: gl.constexpr,
):  # fmt: skip
    """Grid: one persistent program per multiprocessor, each with the piece that `deal_pieces` gave it.

    loader      | keys 0 | values 0 | keys 1 | values 1 | keys 2 | ...           as buffers become free
    warpgroup   |          Q K0^T | softmax | Q K1^T, P0 V0 | softmax | Q K2^T, P1 V1 | ...   for 64 rows each
    """
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    FREE: gl.constexpr = mbarrier.MBarrierLayout()
    STAGES: gl.constexpr = V.num_stages
    dtype: gl.constexpr = key_map.dtype
    buffers = (
        gl.allocate_shared_memory(dtype, [WARPGROUPS, ROWS, V.head_dim], LAYOUT),
        gl.allocate_shared_memory(dtype, [STAGES, V.tile, V.head_dim], LAYOUT),
        gl.allocate_shared_memory(dtype, [STAGES, V.tile, V.value_dim], LAYOUT),
    )
    keys_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], FREE)
    keys_here = gl.allocate_shared_memory(gl.int64, [STAGES, 1], FREE)
    values_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], FREE)
    values_here = gl.allocate_shared_memory(gl.int64, [STAGES, 1], FREE)
    for stage in gl.static_range(STAGES):
        mbarrier.init(keys_free.index(stage), count=WARPGROUPS)
        mbarrier.init(values_free.index(stage), count=WARPGROUPS)
        mbarrier.init(keys_here.index(stage), count=1)
        mbarrier.init(values_here.index(stage), count=1)
    barriers = (keys_free, keys_here, values_free, values_here)
    batch = (seq_lens, cu_seqlens_q, num_tokens, num_seqs, max_keys)
    tensors = (query, output, lse, partial, handoff)
    maps = (key_map, value_map)
    gl.warp_specialize(
        [
            (_attend, (0, tensors, query_strides, scale, num_kv_heads, pieces, batch, buffers, barriers, V)),
            (_attend, (1, tensors, query_strides, scale, num_kv_heads, pieces, batch, buffers, barriers, V)),
            (_load, (maps, block_table, table_stride, num_blocks, num_kv_heads, pieces, batch, buffers, barriers, V)),
        ],
        [4, 1],
        [232, 40],
    )
