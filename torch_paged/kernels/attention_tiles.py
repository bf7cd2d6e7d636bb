"""What attention does with one tile of keys: find its blocks, load it, and fold it into the running softmax."""

import triton
import triton.language as tl

from torch_paged.kernels.attention_logits import logits, sees
from torch_paged.kernels.attention_stored import HEADROOM, normalise, static_scale, widen, widen_pairs


@triton.jit
def _present(position, span, V: tl.constexpr):
    """Whether some query row of the unit sees the key at `position`: `span` is the first and the one past the last."""
    low, keys = span
    present = position < keys
    if V.has.window:
        present = present & (position >= low)
    return present


@triton.jit
def _block_ids(table, tile, span, V: tl.constexpr):
    """Block ids of one tile of keys: one, one per block, or one per key. Entries of no use are not read."""
    low, keys = span
    TILE: tl.constexpr = V.tile
    if V.paging == "one":
        entry = tile * TILE // V.block_size
        used = tile * TILE < keys
        if V.has.window:
            used = used & (tile * TILE + TILE > low)
    elif V.paging == "several":
        entry = tile * (TILE // V.block_size) + tl.arange(0, TILE // V.block_size)
        used = entry * V.block_size < keys
        if V.has.window:
            used = used & (entry * V.block_size + V.block_size > low)
    else:
        position = tile * TILE + tl.arange(0, TILE)
        entry = position // V.block_size
        used = _present(position, span, V)
    return tl.load(table + entry, mask=used, other=0)


@triton.jit
def _load_rows(
    cache, strides, ids, tile, span,
    COLUMN: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, MASK: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """[TILE, WIDTH] of a cache from column COLUMN on; zeros past column DIM and, if MASK, for keys that none sees."""
    TILE: tl.constexpr = V.tile
    BLOCK: tl.constexpr = V.block_size
    column = COLUMN + tl.arange(0, WIDTH)
    blocks = ids.to(tl.int64) * strides[0]
    if V.paging == "several":
        slots = tl.arange(0, BLOCK).to(tl.int64) * strides[1]
        # [blocks of the tile, BLOCK, WIDTH]
        offsets = blocks[:, None, None] + slots[None, :, None] + column[None, None, :]
        # Not the pointers: AMD's compiler takes no reshaped ones.
        offsets = tl.reshape(offsets, (TILE, WIDTH))
    else:
        slots = (tile * TILE + tl.arange(0, TILE)) % BLOCK
        offsets = (blocks + slots.to(tl.int64) * strides[1])[:, None] + column[None, :]
    if V.aligned:
        # Reshaped offsets do not show the compiler what the launch knows: rows are contiguous and start at 16 bytes.
        VECTOR: tl.constexpr = 128 // cache.dtype.element_ty.primitive_bitwidth
        offsets = tl.max_contiguous(tl.multiple_of(offsets, (1, VECTOR)), (1, WIDTH))
        pointers = tl.max_contiguous(tl.multiple_of(cache + offsets, (1, 16)), (1, WIDTH))
    else:
        pointers = cache + offsets
    if MASK:
        present = _present(tile * TILE + tl.arange(0, TILE), span, V)[:, None]
        rows = tl.load(pointers, mask=present & (column < DIM)[None, :], other=0.0)
    elif COLUMN + WIDTH > DIM:
        rows = tl.load(pointers, mask=(column < DIM)[None, :], other=0.0)
    else:
        rows = tl.load(pointers)
    return rows


@triton.jit
def _token_scales(scales, strides, ids, tile, span, V: tl.constexpr):
    """[TILE] scales of the tokens of a tile; 0 for those that none sees."""
    TILE: tl.constexpr = V.tile
    BLOCK: tl.constexpr = V.block_size
    blocks = ids.to(tl.int64) * strides[0]
    if V.paging == "several":
        slots = tl.arange(0, BLOCK).to(tl.int64) * strides[1]
        offsets = tl.reshape(blocks[:, None] + slots[None, :], (TILE,))
    else:
        offsets = blocks + ((tile * TILE + tl.arange(0, TILE)) % BLOCK).to(tl.int64) * strides[1]
    # Each is loaded once and summed with nothing: the compiler would have every thread load all those that its scores
    # need, being so few.
    present = _present(tile * TILE + tl.arange(0, TILE), span, V)[:, None] & (tl.arange(0, 2) == 0)[None, :]
    return tl.sum(tl.load(tl.broadcast_to((scales + offsets)[:, None], (TILE, 2)), mask=present, other=0.0), 1)


@triton.jit
def prefetch(caches, cache_strides, table, tile, span, num_blocks, V: tl.constexpr):
    """Has the L2 cache fetch a tile, which does no harm whatever is being written there."""
    if V.aligned:
        KEY: tl.constexpr = V.head_dim * caches[0].dtype.element_ty.primitive_bitwidth // 128 * 16
        VALUE_DIM: tl.constexpr = V.value_dim // 2 if V.value_pairs else V.value_dim
        VALUE: tl.constexpr = VALUE_DIM * caches[1].dtype.element_ty.primitive_bitwidth // 128 * 16
        low, keys = span
        # For rows that no one sees others are fetched twice.
        position = tile * V.tile + tl.arange(0, V.tile)
        position = tl.maximum(tl.minimum(position, keys - 1), low)
        block = tl.load(table + position // V.block_size, mask=position < keys, other=0)
        block = tl.minimum(tl.maximum(block, 0), num_blocks - 1).to(tl.int64)
        slot = (position % V.block_size).to(tl.int64)
        key = caches[0] + block * cache_strides[0][0] + slot * cache_strides[0][1]
        value = caches[1] + block * cache_strides[1][0] + slot * cache_strides[1][1]
        # [keys and values, V.tile]
        of_value = (tl.arange(0, 2) == 1)[:, None]
        rows = tl.where(of_value, value.to(tl.int64)[None, :], key.to(tl.int64)[None, :])
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;", "=r,l,r",
            [rows, tl.where(of_value, VALUE, KEY)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def attend(
    state, query, caches, cache_strides, table, first, last, rows, span, num_blocks, factor, cap,
    MASK: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Online softmax, in powers of two, over key tiles [first, last).

    `state` is every row's maximum and sum, and the two pieces of its output, multiples of a fifth number, their unit;
    `rows` what each row sees (see `logits`), `span` what any sees; `caches` keys and values and, where tokens have
    them, their scales, all of one head.
    """
    BLOCK_M: tl.constexpr = V.block_m
    TILE: tl.constexpr = V.tile
    K0: tl.constexpr = V.key_widths[0]
    K1: tl.constexpr = V.key_widths[1]
    V0: tl.constexpr = V.value_widths[0]
    V1: tl.constexpr = V.value_widths[1]
    PRECISION: tl.constexpr = V.precision
    KEY: tl.constexpr = V.has.key
    VALUE: tl.constexpr = V.has.value
    LOAD_MASK: tl.constexpr = MASK and V.shared_values
    # Warps share the few rows of decode, so that each sum over a row is an exchange between them: one, at the end.
    SUM_LAST: tl.constexpr = BLOCK_M == 16
    key_cache, value_cache, key_scales, value_scales = caches
    largest, total, output0, output1, unit = state
    query0, query1 = query
    sums = total
    if SUM_LAST:
        sums = tl.zeros([BLOCK_M, TILE], tl.float32)
    next_ids = _block_ids(table, first, span, V)
    for tile in tl.range(first, last, num_stages=V.num_stages):
        # Ids are loaded one tile ahead, as a load that feeds a load in the same iteration would cost a pipeline stage,
        # and carried as they come: if anything but the next iteration used them, nothing here would be pipelined.
        ids = tl.minimum(tl.maximum(next_ids, 0), num_blocks - 1)
        next_ids = _block_ids(table, tile + 1, span, V)
        # Keys past the last one need no mask, as their scores get one.
        # [TILE, K0]
        key0 = _load_rows(key_cache, cache_strides[0], ids, tile, span, 0, K0, V.head_dim, LOAD_MASK, V)
        key0 = widen(key0, query0.dtype, KEY)
        # [BLOCK_M, TILE]
        scores = tl.dot(query0, tl.trans(key0), input_precision=PRECISION)
        if K1 > 0:
            key1 = _load_rows(key_cache, cache_strides[0], ids, tile, span, K0, K1, V.head_dim, LOAD_MASK, V)
            key1 = widen(key1, query0.dtype, KEY)
            scores += tl.dot(query1, tl.trans(key1), input_precision=PRECISION)
        scale = factor
        if V.has.logits:
            if KEY.scale == "token":
                scores *= _token_scales(key_scales, cache_strides[2], ids, tile, span, V)[None, :]
            scores = logits(scores, tile, rows, factor, cap, V)
            scale = 1.0
        if MASK:
            position = tile * TILE + tl.arange(0, TILE)
            scores = tl.where(sees(position[None, :], rows, V), scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1) * scale)
        # A row that has seen no key yet has no maximum to subtract: -inf - -inf would be NaN.
        shift = tl.where(larger == float("-inf"), 0.0, larger) if MASK else larger
        weights = tl.exp2(scores * scale - shift[:, None])
        decay = tl.exp2(largest - shift)
        if SUM_LAST:
            sums = sums * decay[:, None] + weights
            total = total * decay
        else:
            total = total * decay + tl.sum(weights, 1)
        largest = larger
        if VALUE.scale == "token":
            # Weights times their tokens' scales stay inside float16 as multiples of the largest scale. They stand at
            # its upper end: one large scale, of a row of zeros perhaps, must not press the others out at the lower.
            scales = _token_scales(value_scales, cache_strides[3], ids, tile, span, V)
            larger_unit = tl.maximum(unit, tl.max(tl.abs(scales), 0))
            weights *= (scales * (1.0 / larger_unit) * HEADROOM)[None, :]
            decay *= unit / larger_unit
            unit = larger_unit
        # [TILE, V0]
        if V.shared_values:
            value0 = key0
        elif V.value_pairs:
            pairs = _load_rows(value_cache, cache_strides[1], ids, tile, span, 0, V0, V0, MASK, V)
            value0, value1 = widen_pairs(pairs, VALUE)
        else:
            value0 = _load_rows(value_cache, cache_strides[1], ids, tile, span, 0, V0, V.value_dim, MASK, V)
            value0 = widen(value0, query0.dtype, VALUE)
        weights = weights.to(value0.dtype)
        output0 = tl.dot(weights, value0, output0 * decay[:, None], input_precision=PRECISION)
        if V1 > 0:
            if not V.value_pairs:
                value1 = _load_rows(value_cache, cache_strides[1], ids, tile, span, V0, V1, V.value_dim, MASK, V)
                value1 = widen(value1, query0.dtype, VALUE)
            output1 = tl.dot(weights, value1, output1 * decay[:, None], input_precision=PRECISION)
    if SUM_LAST:
        total += tl.sum(sums, 1)
    return largest, total, output0, output1, unit


@triton.jit
def load_query(pointers, valid, COLUMN: tl.constexpr, WIDTH: tl.constexpr, V: tl.constexpr):
    """[BLOCK_M, WIDTH] of the query rows, as they stand: after arithmetic they could not be read from shared memory."""
    column = COLUMN + tl.arange(0, WIDTH)
    pointers = pointers[:, None] + column[None, :]
    if V.aligned:
        pointers = tl.max_contiguous(tl.multiple_of(pointers, (1, 16)), (1, WIDTH))
    return tl.load(pointers, mask=valid[:, None] & (column < V.head_dim)[None, :], other=0.0)


@triton.jit
def query_of(pointers, valid, scale, key_scale, head, V: tl.constexpr):
    """Both pieces of the query rows of one head, and the `factor` and `cap` of their logits."""
    K0: tl.constexpr = V.key_widths[0]
    K1: tl.constexpr = V.key_widths[1]
    KEY: tl.constexpr = V.has.key
    query0 = load_query(pointers, valid, 0, K0, V)
    query1 = query0
    if K1 > 0:
        query1 = load_query(pointers, valid, K0, K1, V)
    query = (query0, query1)
    factor = scale
    cap = scale
    if V.has.softcap:
        factor, cap = scale
    if V.has.normalised:
        query, power = normalise(query0, query1, V)
        factor = factor * power
    if KEY.scale == "scalar" or KEY.scale == "head":
        factor = factor * static_scale(key_scale, head, KEY)
    return query, factor, cap


@triton.jit
def store_rows(base, row, values, valid, COLUMN: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """Writes columns [COLUMN, COLUMN + WIDTH) of rows of DIM elements that stand close behind `base`."""
    column = COLUMN + tl.arange(0, WIDTH)
    inside = valid[:, None] & (column < DIM)[None, :]
    tl.store(base + (row * DIM)[:, None] + column[None, :], values.to(base.dtype.element_ty), mask=inside)
