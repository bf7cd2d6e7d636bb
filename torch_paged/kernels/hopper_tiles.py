"""What the warps of `attention_hopper` that multiply do with query rows and with one tile of keys after another."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from torch_paged.kernels.hopper_loader import gap_of, stage_of
from torch_paged.kernels.hopper_ring import hear, rows_of_unit

_barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # its name from Triton 3.7 on, and before

ROWS: gl.constexpr = gl.constexpr(16)  # of a warp: 64 of a warpgroup


@gluon.jit
def zero():
    """0, which the compiler does not know: what it is added to is computed where it is used, and costs no registers."""
    return gl.inline_asm_elementwise("mov.b32 $0, 0;", "=r", [], gl.int32, is_pure=False, pack=1)


@gluon.jit
def lanes_of(PART: gl.constexpr, LAYOUT: gl.constexpr):
    """Rows of a unit that this part of the warps serves."""
    MANY: gl.constexpr = ROWS * gl.num_warps()
    return PART * MANY + gl.arange(0, MANY, LAYOUT)


@gluon.jit
def fetch_query(query, query_strides, memory, PART: gl.constexpr, ring, number, V: gl.constexpr):
    """Starts copying this part's query rows, (query token, head of the group) packed, of unit number `number`.

    Returns the unit's head, -1 if there is no such unit.
    """
    DIM: gl.constexpr = V.head_dim
    THREADS: gl.constexpr = 8  # of a row, 16 bytes each time
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // THREADS, THREADS], [gl.num_warps(), 1], [1, 0])
    hear(ring, number)
    head, token, rows, offset = rows_of_unit(ring, number)
    if head >= 0:
        nothing = zero()
        lane = lanes_of(PART, gl.SliceLayout(1, LAYOUT)) + nothing
        packed = offset + lane
        column = gl.arange(0, DIM, gl.SliceLayout(0, LAYOUT))
        token_stride, head_stride = query_strides[0] + nothing, query_strides[1] + nothing
        offsets = (packed // V.group).to(gl.int64) * token_stride + (packed % V.group).to(gl.int64) * head_stride
        offsets += token.to(gl.int64) * token_stride + (head * V.group).to(gl.int64) * head_stride
        pointers = query + offsets[:, None] + column[None, :]
        pointers = gl.max_contiguous(gl.multiple_of(pointers, [1, 16]), [1, DIM])
        _barrier()  # all warps have done with the rows before
        async_copy.async_copy_global_to_shared(memory, pointers, mask=(lane < rows)[:, None])
        async_copy.commit_group()
    return head


@gluon.jit
def _await_query():
    async_copy.wait_group(0)
    fence_async_shared()
    _barrier()


@gluon.jit
def await_tile(here, count, V: gl.constexpr):
    """Waits until tile number `count` has arrived."""
    stage, phase = stage_of(count, V)
    mbarrier.wait(here.index(stage), phase)


@gluon.jit
def free_tile(free, count, V: gl.constexpr):
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
def _columns(tile):
    """`tile` with its columns apart that one thread holds, over which it shall not go one after another."""
    return gl.reshape(tile, [tile.shape[0], tile.shape[1] // 8, 8])


@gluon.jit
def _of_rows(reduced, like):
    """`reduced` columns as numbers of rows."""
    return gl.convert_layout(reduced, like.type.layout, assert_trivial=True)


@gluon.jit
def _mask(scores, tile, visible, keys, V: gl.constexpr):
    """`scores` of a tile, -inf where a row does not see a key: in columns, a thread's own are known to the compiler."""
    columns = _columns(scores)
    FLAT: gl.constexpr = gl.SliceLayout(1, columns.type.layout)
    EIGHTS: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, columns.type.layout))
    step = (8 * gl.arange(0, V.tile // 8, EIGHTS))[None, :, None]
    within = tile * V.tile + gl.arange(0, 8, gl.SliceLayout(0, FLAT))[None, :]
    last_block, gap = gap_of(keys, V)
    ends = visible + gl.where(visible > last_block, gap, 0)
    ends = gl.convert_layout(ends, gl.SliceLayout(1, FLAT), assert_trivial=True)[:, None] - within
    columns = gl.where(step < ends[:, None, :], columns, float("-inf"))
    if (gap > 0) & (last_block < (tile + 1) * V.tile):
        begins = (last_block - within)[:, None, :]
        columns = gl.where((step < begins) | (step >= begins + gap), columns, float("-inf"))
    return gl.convert_layout(gl.reshape(columns, scores.shape), scores.type.layout, assert_trivial=True)


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
def attend_tiles(
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
        await_tile(keys_here, count + 1, V)
        scores = _scores(query, key_buffers, count + 1, V)
        await_tile(values_here, count, V)
        output = warpgroup_mma(weights, value_buffers.index(count % V.num_stages), output, is_async=True)
        scores = warpgroup_mma_wait(1, deps=(scores,))
        free_tile(keys_free, count + 1, V)
        if MASK:
            scores = _mask(scores, tile, visible, keys, V)
        later, largest, total, decay = _softmax(scores, largest, total, scale, MASK)
        output, weights = warpgroup_mma_wait(0, deps=(output, weights))
        free_tile(values_free, count, V)
        output = output * gl.convert_layout(decay, gl.SliceLayout(1, output.type.layout))[:, None]
        weights = gl.convert_layout(_narrow(later, weights), weights.type.layout)
        count += 1
    return (largest, total, output), weights, count


@gluon.jit
def first_tile(
    query, buffers, barriers, first, count, masked, visible, keys, scale,
    ROW: gl.constexpr, OUTPUT: gl.constexpr, V: gl.constexpr,
):  # fmt: skip
    """State of the rows before a unit's first tile is added to the output, and that tile's weights."""
    _, key_buffers, _ = buffers
    keys_free, keys_here, _, _ = barriers
    LANES: gl.constexpr = ROWS * gl.num_warps()
    DIM: gl.constexpr = V.value_dim
    await_tile(keys_here, count, V)
    _await_query()
    scores = warpgroup_mma_wait(0, deps=(_scores(query, key_buffers, count, V),))
    free_tile(keys_free, count, V)
    if masked:
        scores = _mask(scores, first, visible, keys, V)
    nothing = gl.zeros([LANES], gl.float32, ROW)
    weights, largest, total, _ = _softmax(scores, nothing - float("inf"), nothing, scale, True)
    weights = gl.convert_layout(weights.to(key_buffers.dtype), gl.DotOperandLayout(0, OUTPUT, 2))
    return (largest, total, gl.zeros([LANES, DIM], gl.float32, OUTPUT)), weights
