"""The warps of `attention_hopper` that copy blocks into shared memory, and the walk over a program's units.

Several blocks make one tile: each is copied into a slice of it by the copy engine (TMA), which knows a cache by its
strides, so that neither layout nor block size matters. The instructions that multiply see one operand.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from torch_paged.kernels.attention_rows import tiles_of_keys
from torch_paged.kernels.deal import key_count, next_sequence, query_range, query_tiles

_copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # its name from Triton 3.9 on, and before

COLUMNS: gl.constexpr = gl.constexpr(64)  # of one copy: 128 bytes, as the swizzled rows of an operand are


@gluon.jit
def zero():
    """0, which the compiler does not know: what it is added to is computed where it is used, and costs no registers."""
    return gl.inline_asm_elementwise("mov.b32 $0, 0;", "=r", [], gl.int32, is_pure=False, pack=1)


@gluon.jit
def piece_of(pieces, turn, turns):
    """What `deal_pieces` gave this program in a turn: sequence, unit, first tile, units, end in the last of them."""
    piece = pieces + 5 * (gl.program_id(0) * turns + turn + zero())
    return gl.load(piece), gl.load(piece + 1), gl.load(piece + 2), gl.load(piece + 3), gl.load(piece + 4)


@gluon.jit
def unit_of(sequence, unit, batch, V: gl.constexpr):
    """What a unit is: first token, queries, keys and units per head of its sequence, its head, first row and rows."""
    seq_lens, cu_seqlens_q, num_tokens, num_seqs, max_keys = batch
    start, queries = query_range(sequence, cu_seqlens_q, num_tokens + zero(), num_seqs, V)
    keys = key_count(sequence, seq_lens, num_seqs, max_keys)
    tiles = gl.maximum(query_tiles(queries, V), 1)
    first_row = unit % tiles * V.block_m
    rows = gl.minimum(queries * V.group - first_row, V.block_m)
    return start, queries, keys, tiles, unit // tiles, first_row, rows


@gluon.jit
def span_of(index, begin, units, end_tile, key_tiles):
    """First tile and end of unit number `index` of a piece. Not carried from one to the next: Triton 3.6 loses it."""
    return gl.where(index == 0, begin, 0), gl.minimum(gl.where(index == units - 1, end_tile, key_tiles), key_tiles)


@gluon.jit
def next_unit(sequence, unit, tiles, num_kv_heads, batch, V: gl.constexpr):
    """The unit after `unit`, of `tiles` a head."""
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    _, cu_seqlens_q, num_tokens, num_seqs, _ = batch
    unit += 1
    if unit >= tiles * num_kv_heads:
        unit = unit * 0
        sequence = next_sequence(sequence, gl.arange(0, 32, LANES), cu_seqlens_q, num_tokens, num_seqs, V)
    return sequence, unit


@gluon.jit
def stage_of(count, V: gl.constexpr):
    """Buffer of the tile that is number `count` of this program, and the phase of its barriers."""
    return count % V.num_stages, count // V.num_stages & 1


@gluon.jit
def load_tiles(arguments, DIM: gl.constexpr, PARTS: gl.constexpr, V: gl.constexpr):
    """One warp: copies the keys, or the values, of this program's piece, tile by tile, as buffers become `free`.

    What stands past the last key must not show, NaN least of all. Blocks without keys are read past the cache's end,
    where the copy engine finds zeros. The last block is copied as many slots too early as it lacks keys, and slots
    below 0 are zeros too: its keys stand at the end of its rows (see `gap_of`).
    """
    source, buffers, free, here, work = arguments
    block_table, table_stride, num_blocks, num_kv_heads, pieces, turns, batch = work
    BLOCKS: gl.constexpr = V.tile // V.copy_rows
    PIECES: gl.constexpr = DIM // COLUMNS
    COUNT: gl.constexpr = V.num_stages * PIECES * BLOCKS
    ROWS: gl.constexpr = V.copy_rows
    slices = buffers._reinterpret(source.dtype, [COUNT, 1, ROWS, 1, COLUMNS], gl.NVMMASharedLayout(128, 16, 4))
    count = num_kv_heads * 0
    for turn in range(min(PARTS - 1, 1), turns if PARTS > 1 else 1):
        sequence, unit, begin, units, end_tile = piece_of(pieces, turn, turns)
        for index in range(units):
            _, queries, keys, tiles, head, first_row, rows = unit_of(sequence, unit, batch, V)
            first, last = span_of(index, begin, units, end_tile, tiles_of_keys(first_row, rows, queries, keys, V))
            table = block_table + sequence.to(gl.int64) * table_stride
            for tile in range(first, last):
                ids = ()
                for block in gl.static_range(BLOCKS):
                    position = tile * V.tile + block * V.copy_rows
                    ids += (gl.load(table + position // V.block_size, mask=position < keys, other=num_blocks),)  # type: ignore[assignment]
                stage, phase = stage_of(count, V)
                mbarrier.wait(free.index(stage), phase ^ 1)
                mbarrier.expect(here.index(stage), V.tile * DIM * 2)
                for block in gl.static_range(BLOCKS):
                    position = tile * V.tile + block * V.copy_rows
                    slot = position % V.block_size - gl.maximum(position + V.copy_rows - keys, 0)
                    for piece in gl.static_range(PIECES):
                        copied = slices.index((stage * PIECES + piece) * BLOCKS + block)
                        _copy(source, [ids[block], slot, head, piece * COLUMNS], here.index(stage), copied)
                count += 1
            sequence, unit = next_unit(sequence, unit, tiles, num_kv_heads, batch, V)


@gluon.jit
def gap_of(keys, V: gl.constexpr):
    """Position of the first key of the last block, and how many rows without a key `load_tiles` left before it."""
    last_block = (keys - 1) // V.copy_rows * V.copy_rows
    return last_block, last_block + V.copy_rows - keys
