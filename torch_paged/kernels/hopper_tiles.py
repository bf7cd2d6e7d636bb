"""What the warps of `attention_hopper` that multiply do with query rows and with one tile of keys after another."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma_wait,
)

from torch_paged.kernels.hopper_loader import COLUMNS, columns_of, copies_of, gap_of, stage_of
from torch_paged.kernels.hopper_products import (
    PART_ROWS,
    add_keys,
    add_values,
    await_products,
    no_output,
    of_rows,
    scaled,
)
from torch_paged.kernels.hopper_ring import hear, rows_of_unit
from torch_paged.kernels.hopper_units import zero

barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # its name from Triton 3.7 on, and before


@gluon.constexpr_function
def hide_together(V):
    """Whether parts of the warps share the work of `_hide_values`."""
    return V.has.window and V.block_m > PART_ROWS.value


@gluon.jit
def lanes_of(PART: gl.constexpr, LAYOUT: gl.constexpr):
    """Rows of a unit that this part of the warps serves."""
    return PART * PART_ROWS + gl.arange(0, PART_ROWS, LAYOUT)


@gluon.jit
def fetch_query(query, query_strides, memory, PART: gl.constexpr, ring, number, V: gl.constexpr):
    """Starts copying this part's query rows, (query token, head of the group) packed, of unit number `number`.

    Returns the unit's head, -1 if there is no such unit.
    """
    DIM: gl.constexpr = columns_of(V.head_dim)
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
        barrier()  # all warps have done with the rows before
        valid = (lane < rows)[:, None]
        if DIM > V.head_dim:
            valid = valid & (column < V.head_dim)[None, :]
        async_copy.async_copy_global_to_shared(memory, pointers, mask=valid)
        async_copy.commit_group()
    return head


@gluon.jit
def _await_query():
    async_copy.wait_group(0)
    fence_async_shared()
    barrier()


@gluon.jit
def await_tile(here, count, V: gl.constexpr):
    """Waits until tile number `count` has arrived."""
    stage, phase = stage_of(count, V)
    mbarrier.wait(here.index(stage), phase)


@gluon.jit
def free_tile(free, count, V: gl.constexpr):
    """Tells the loader that these warps, all of them, have read the buffer of tile number `count`."""
    mbarrier.arrive(free.index(count % V.num_stages), count=1)


@gluon.jit
def _columns(tile):
    """`tile` with its columns apart that one thread holds, over which it shall not go one after another."""
    return gl.reshape(tile, [tile.shape[0], tile.shape[1] // 8, 8])


@gluon.jit
def _logits(scores, scale, V: gl.constexpr):
    """Numbers, and a factor: logits to base 2 are their product.

    The device's own tanh is exact to 11 bits: more than a bfloat16 has, as many as a float16.
    """
    factor = scale
    if V.has.softcap:
        inner, factor = scale
        scores = gl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=r,r", [scores * inner], gl.float32, is_pure=True, pack=1
        )
    return scores, factor


@gluon.jit
def _placed(key, keys, V: gl.constexpr):
    """Where keys [0, key) end among the rows of all tiles (see `gap_of`)."""
    last_copy, gap = gap_of(keys, V)
    return key + gl.where(key > last_copy, gap, 0)


@gluon.jit
def _mask(scores, tile, sight, V: gl.constexpr):
    """`scores` of a tile, -inf where a row does not see a key: in columns, a thread's own are known to the compiler."""
    visible, _low, keys, window = sight
    columns = _columns(scores)
    FLAT: gl.constexpr = gl.SliceLayout(1, columns.type.layout)
    ROW: gl.constexpr = gl.SliceLayout(1, FLAT)
    EIGHTS: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, columns.type.layout))
    step = (8 * gl.arange(0, V.tile // 8, EIGHTS))[None, :, None]
    within = tile * V.tile + gl.arange(0, 8, gl.SliceLayout(0, FLAT))[None, :]
    last_copy, gap = gap_of(keys, V)
    ends = of_rows(_placed(visible, keys, V), ROW)[:, None] - within
    columns = gl.where(step < ends[:, None, :], columns, float("-inf"))
    if V.has.window:
        begins = of_rows(_placed(gl.maximum(visible - window, 0), keys, V), ROW)[:, None] - within
        columns = gl.where(step >= begins[:, None, :], columns, float("-inf"))
    if (gap > 0) & (last_copy < (tile + 1) * V.tile):
        lacking = (last_copy - within)[:, None, :]
        columns = gl.where((step < lacking) | (step >= lacking + gap), columns, float("-inf"))
    return gl.convert_layout(gl.reshape(columns, scores.shape), scores.type.layout, assert_trivial=True)


@gluon.jit
def _hide_values(values, barriers, tile, count, sight, PART: gl.constexpr, V: gl.constexpr):
    """Zeros in the place of the values that stand in the first copy that a row sees, before the key that it sees.

    No weight is given to them, but NaN times 0 would show. Parts of the warps take eights of rows in turn, of a buffer
    always the same, so that racecheck sees no two write to one place; `first_tile` waits until all have.
    """
    EIGHT: gl.constexpr = 8  # rows of 128 bytes, after which the swizzle repeats
    PARTS: gl.constexpr = V.block_m // PART_ROWS
    PIECES: gl.constexpr = columns_of(V.value_dim) // COLUMNS
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [gl.num_warps(), 1], [1, 0])
    _, _, _, values_here, values_hidden = barriers
    _visible, low, keys, _window = sight
    begin = gl.maximum(low // V.copy_rows * V.copy_rows - tile * V.tile, 0)
    end = _placed(low, keys, V) - tile * V.tile
    if end > begin:
        await_tile(values_here, count, V)
        shape: gl.constexpr = [V.num_stages * PIECES * V.tile // EIGHT, EIGHT, COLUMNS]
        eights = values._reinterpret(values.dtype, shape, gl.NVMMASharedLayout(128, 16, 2))
        row = gl.arange(0, EIGHT, gl.SliceLayout(1, LAYOUT))
        own = (begin // EIGHT + PARTS - 1 - PART) // PARTS * PARTS + PART
        for first in range(own * EIGHT, end, PARTS * EIGHT):
            for piece in gl.static_range(copies_of(V.value_dim)):
                rows = eights.index(((count % V.num_stages * PIECES + piece) * V.tile + first) // EIGHT)
                rows.store(gl.where((first + row >= end)[:, None], rows.load(LAYOUT), 0.0).to(values.dtype))
        fence_async_shared()
        barrier()
    if hide_together(V):
        mbarrier.arrive(values_hidden, count=1)


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
    ROW: gl.constexpr = largest.type.layout
    larger = gl.maximum(largest, of_rows(gl.max(gl.max(_columns(scores), 1), 1), ROW) * scale)
    # A row that has seen no key yet has no maximum to subtract: -inf - -inf would be NaN.
    shift = gl.where(larger == float("-inf"), 0.0, larger) if SOME_EMPTY else larger
    weights = gl.exp2(scores * scale - shift[:, None])
    decay = gl.exp2(largest - shift)
    return weights, larger, total * decay + of_rows(gl.sum(gl.sum(_columns(weights), 1), 1), ROW), decay


@gluon.jit
def attend_tiles(
    state, weights, query, buffers, barriers, first, last, count, sight, scale, MASK: gl.constexpr, V: gl.constexpr
):
    """Online softmax over key tiles [first, last): a tile's scores are under way while the one before is weighted.

    `weights` are those of tile `first - 1`, whose number is `count`; returned are those of tile `last - 1`. `sight` is
    how many keys each row sees, the first that one of them does, the keys of the sequence, and the window.
    """
    largest, total, outputs = state
    _, key_buffers, value_buffers = buffers
    keys_free, keys_here, values_free, values_here, _ = barriers
    for tile in range(first, last):
        await_tile(keys_here, count + 1, V)
        scores = add_keys(query, key_buffers, count + 1, V)
        await_tile(values_here, count, V)
        outputs = add_values(outputs, weights, value_buffers, count, V)
        scores = warpgroup_mma_wait(len(outputs), deps=(scores,))
        free_tile(keys_free, count + 1, V)
        scores, factor = _logits(scores, scale, V)
        if MASK:
            scores = _mask(scores, tile, sight, V)
        later, largest, total, decay = _softmax(scores, largest, total, factor, MASK)
        outputs, weights = await_products(outputs, weights)
        free_tile(values_free, count, V)
        outputs = scaled(outputs, decay)
        weights = gl.convert_layout(_narrow(later, weights), weights.type.layout)
        count += 1
    return (largest, total, outputs), weights, count


@gluon.jit
def first_tile(
    query, buffers, barriers, first, count, number, masked, sight, scale, PART: gl.constexpr, ROW: gl.constexpr,
    V: gl.constexpr,
):  # fmt: skip
    """State of the rows before the first tile of unit `number` is added to the output, and that tile's weights."""
    _, key_buffers, value_buffers = buffers
    keys_free, keys_here, _, _, values_hidden = barriers
    await_tile(keys_here, count, V)
    _await_query()
    scores = add_keys(query, key_buffers, count, V)
    if V.has.window:
        _hide_values(value_buffers, barriers, first, count, sight, PART, V)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    free_tile(keys_free, count, V)
    scores, factor = _logits(scores, scale, V)
    if masked:
        scores = _mask(scores, first, sight, V)
    nothing = gl.zeros([PART_ROWS], gl.float32, ROW)
    weights, largest, total, _ = _softmax(scores, nothing - float("inf"), nothing, factor, True)
    outputs = no_output(V)
    weights = gl.convert_layout(weights.to(key_buffers.dtype), gl.DotOperandLayout(0, outputs[0].type.layout, 2))
    if hide_together(V):
        mbarrier.wait(values_hidden, number & 1)
    return (largest, total, outputs), weights
