"""The walk of a program of `attention_hopper` over the units of its pieces (see `deal_pieces`)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from torch_paged.kernels.attention_rows import tiles_of_keys
from torch_paged.kernels.deal import END, FIRST, PIECE, UNITS
from torch_paged.kernels.piece_list import PIECES_BEGIN
from torch_paged.kernels.units import key_count, late_tiles, next_sequence, query_range, query_tiles


@gluon.jit
def zero():
    """0, which the compiler does not know: what it is added to is computed where it is used, and costs no registers."""
    return gl.inline_asm_elementwise("mov.b32 $0, 0;", "=r", [], gl.int32, is_pure=False, pack=1)


@gluon.jit
def of_piece(pieces, piece, FIELD: gl.constexpr):
    """What `deal_pieces` wrote of a piece. Read where it is used, it costs no registers elsewhere."""
    return gl.load(pieces + (PIECES_BEGIN + FIELD) + PIECE * piece)


@gluon.jit
def next_piece(pieces, turn, rounds):
    """Number of this program's piece for a turn; after all rounds, of a listed one that nobody has, or -1."""
    piece = gl.program_id(0) * rounds + turn
    if turn >= rounds:
        piece = gl.atomic_add(pieces, 1, sem="relaxed")
        piece = gl.where(piece < gl.load(pieces + 1), piece, -1)
    return piece


@gluon.jit
def sequence_of(sequence, num_kv_heads, batch, V: gl.constexpr):
    """First token, queries, keys, units per head of a sequence, and how many of these are late."""
    seq_lens, cu_seqlens_q, num_tokens, num_seqs, max_keys = batch
    if V.has.window:
        num_tokens += zero()  # loaders spill without it
    start, queries = query_range(sequence, cu_seqlens_q, num_tokens, num_seqs, V)
    keys = key_count(sequence, seq_lens, num_seqs, max_keys)
    tiles = gl.maximum(query_tiles(queries, V), 1)
    return start, queries, keys, tiles, late_tiles(queries, keys, num_kv_heads, V)


@gluon.jit
def span_of(pieces, piece, index, first_row, rows, queries, keys, window, V: gl.constexpr):
    """First tile and end of unit number `index` of a piece, and which part of the unit that is (see `left_of_unit`).

    Tiles are counted from the first that a row sees, here and in pieces.
    """
    key_tiles = tiles_of_keys(first_row, rows, queries, keys, V, window)
    first, last = key_tiles * 0, key_tiles
    if index == 0:
        first = of_piece(pieces, piece, FIRST)
    if index == of_piece(pieces, piece, UNITS) - 1:
        last = gl.minimum(of_piece(pieces, piece, END), key_tiles)
    part = gl.where(first > 0, 1, 0) + gl.where(last == key_tiles, 1, 0)
    return first, last, gl.where((first == 0) & (last == key_tiles), -1, part)


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
