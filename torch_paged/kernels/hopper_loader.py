"""The warps of `attention_hopper` that copy blocks into shared memory.

Several blocks make one tile: each is copied into a slice of it by the copy engine (TMA), which knows a cache by its
strides, so that neither layout nor block size matters. The instructions that multiply see one operand.

A block that is larger than a tile, or does not divide one, comes in several copies, a dimension to the copy engine.

What stands past the last key must not show, NaN least of all. Copies without keys are read past the cache's end, where
the copy engine finds zeros. The last copy begins as many slots too early as it lacks keys, and slots below 0 are zeros
too: its keys stand at the end of its rows (see `gap_of`). Past the end of a row it finds zeros as well.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from torch_paged.kernels import problem
from torch_paged.kernels.attention_rows import first_seen
from torch_paged.kernels.deal import SEQUENCE, UNIT, UNITS
from torch_paged.kernels.hopper_ring import forget, hear, rows_of_unit, source_of_unit, tell
from torch_paged.kernels.hopper_units import next_piece, next_unit, of_piece, sequence_of, span_of

_copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # its name from Triton 3.9 on, and before

COLUMNS: gl.constexpr = gl.constexpr(64)  # of one copy: 128 bytes, as the swizzled rows of an operand are


columns_of = gluon.constexpr_function(problem.columns_of)


@gluon.constexpr_function
def copies_of(dim):
    """Copies of a row of `dim` numbers: none that would hold nothing but zeros, and no product reads its columns."""
    return (dim + 63) // 64


@gluon.jit
def stage_of(count, V: gl.constexpr):
    """Buffer of the tile that is number `count` of this program, and the phase of its barriers."""
    return count % V.num_stages, count // V.num_stages & 1


@gluon.jit
def gap_of(keys, V: gl.constexpr):
    """Position of the first key of the last copy, and how many rows of no use the loaders left before it."""
    last_copy = (keys - 1) // V.copy_rows * V.copy_rows
    return last_copy, last_copy + V.copy_rows - keys


@gluon.jit
def _copy_tiles(
    memory, table, num_blocks, head, low, keys, first, last, count, SEEN: gl.constexpr, DIM: gl.constexpr,
    V: gl.constexpr,
):  # fmt: skip
    """Copies tiles [first, last), of which rows see the keys SEEN: "all", those "to" `keys`, "from" `low` to `keys`."""
    source, buffers, free, here = memory
    ROWS: gl.constexpr = V.copy_rows
    COPIES: gl.constexpr = V.tile // ROWS
    PIECES: gl.constexpr = columns_of(DIM) // COLUMNS
    COUNT: gl.constexpr = V.num_stages * PIECES * COPIES
    WHOLE: gl.constexpr = V.block_size == ROWS
    # The dimensions of `HopperLauncher._map`.
    SHAPE: gl.constexpr = [COUNT, 1, ROWS, 1, COLUMNS] if WHOLE else [COUNT, 1, 1, ROWS, 1, COLUMNS]
    slices = buffers._reinterpret(source.dtype, SHAPE, gl.NVMMASharedLayout(128, 16, len(SHAPE) - 1))
    for tile in range(first, last):
        ids = ()
        for copy in gl.static_range(COPIES):
            position = tile * V.tile + copy * ROWS
            exists = True if SEEN == "all" else position < keys
            if SEEN == "from":
                exists = exists & (position + ROWS > low)
            ids += (gl.load(table + position // V.block_size, mask=exists, other=num_blocks),)  # type: ignore[assignment]
        stage, phase = stage_of(count, V)
        mbarrier.wait(free.index(stage), phase ^ 1)
        mbarrier.expect(here.index(stage), V.tile * copies_of(DIM) * COLUMNS * 2)
        for copy in gl.static_range(COPIES):
            position = tile * V.tile + copy * ROWS
            lacking = 0 if SEEN == "all" else gl.maximum(position + ROWS - keys, 0)
            of_block = position % V.block_size // ROWS  # which of the block's copies
            for piece in gl.static_range(copies_of(DIM)):
                slot, column = -lacking, piece * COLUMNS
                place = (ids[copy], slot, head, column) if WHOLE else (ids[copy], of_block, slot, head, column)
                copied = slices.index((stage * PIECES + piece) * COPIES + copy)
                _copy(source, place, here.index(stage), copied)
        count += 1
    return count


@gluon.jit
def _load_tiles(memory, table, num_blocks, head, low, keys, first, last, count, DIM: gl.constexpr, V: gl.constexpr):
    """One warp: copies tiles [first, last) of a unit's keys, or values, of which rows see those from `low` on."""
    if V.has.window:
        whole = gl.minimum(gl.maximum(gl.cdiv(low, V.tile), first), last)
        count = _copy_tiles(memory, table, num_blocks, head, low, keys, first, whole, count, "from", DIM, V)
        first = whole
    whole = gl.minimum(gl.maximum(keys // V.tile, first), last)
    count = _copy_tiles(memory, table, num_blocks, head, low, keys, first, whole, count, "all", DIM, V)
    return _copy_tiles(memory, table, num_blocks, head, low, keys, whole, last, count, "to", DIM, V)


@gluon.jit
def load_keys(memory, ring, work, pieces, rounds, batch, V: gl.constexpr):
    """Walks over this program's units, tells the other warps of each, and loads its keys."""
    block_table, table_stride, num_blocks, num_kv_heads, window = work
    nothing = num_kv_heads * 0
    count = nothing
    number = nothing
    turn = nothing
    piece = next_piece(pieces, turn, rounds)
    while piece >= 0:
        sequence, unit = of_piece(pieces, piece, SEQUENCE), of_piece(pieces, piece, UNIT)
        index = nothing
        while index < of_piece(pieces, piece, UNITS):
            start, queries, keys, tiles, late = sequence_of(sequence, num_kv_heads, batch, V)
            # Late units are pieces of their own.
            skipped = gl.where(turn < rounds, gl.maximum(late - unit % tiles, 0), 0)
            index += skipped
            unit += skipped
            if index < of_piece(pieces, piece, UNITS):
                head, first_row = unit // tiles, unit % tiles * V.block_m
                rows = gl.minimum(queries * V.group - first_row, V.block_m)
                first, last, part = span_of(pieces, piece, index, first_row, rows, queries, keys, window, V)
                token, offset = first_row // V.group, first_row % V.group
                low = first_seen(token, queries, keys, window, V)
                if V.has.window:
                    first += low // V.tile
                    last += low // V.tile
                record = (head, start + token, rows, offset, token - queries, keys, first, last, sequence, unit, part)
                tell(ring, number, record)
                number += 1
                table = block_table + sequence.to(gl.int64) * table_stride
                count = _load_tiles(memory, table, num_blocks, head, low, keys, first, last, count, V.head_dim, V)
                sequence, unit = next_unit(sequence, unit, tiles, num_kv_heads, batch, V)
            index += 1
        turn += 1
        piece = next_piece(pieces, turn, rounds)
    tell(ring, number, (-1,))


@gluon.jit
def load_values(memory, ring, work, V: gl.constexpr):
    """Loads the values of every unit of which `load_keys` tells."""
    block_table, table_stride, num_blocks, num_kv_heads, window = work
    count = num_kv_heads * 0
    number = count
    hear(ring, number)
    head, _token, _rows, _offset = rows_of_unit(ring, number)
    while head >= 0:
        behind, keys, first, last, sequence = source_of_unit(ring, number)
        low = first_seen(behind, 0, keys, window, V)
        table = block_table + sequence.to(gl.int64) * table_stride
        count = _load_tiles(memory, table, num_blocks, head, low, keys, first, last, count, V.value_dim, V)
        forget(ring, number)
        number += 1
        hear(ring, number)
        head, _token, _rows, _offset = rows_of_unit(ring, number)
