"""Deals long prompts out in rounds, so that all programs read the keys of few heads at a time.

With one piece of the row of all units for each program (see `deal`), programs would together stand in every head of
every sequence at once, and the L2 cache would have to hold the keys of all. So the row is cut into rounds, and every
program has a piece of each. Pieces end between two units, and may be up to a unit too long or too short, but for those
of the last round, which are cut inside units and make up for that.

    row       |------ round 0 ------|------ round 1 ------|--------------- last round --------------|
    programs  |  0  |  1  |  2  | 3 |  0  | 1 |  2  |  3  |     0     |      1      |   2   |   3   |

Rounds are for the form of the Hopper kernel that is faster where units have many tiles of keys. The other form, for
short prompts, gets all of its work at once. Shapes alone do not tell many prompts from one long chunk beside many
decodes: the host launches both forms then, and `deal_pieces`, which sees the lengths, gives everything to one of them.
The other sees that first, ends, and has written nothing.

    turn      |  0: everything, for the form for short prompts  |  1: round 0  |  2: round 1  |  3: last round  |

Both kernels here begin while the one before them ends, and touch no memory until all of it has: by then whoever had
their workspace has done with it. The Hopper kernel begins when they have ended, as it is slower otherwise.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from torch_paged.kernels.attention_state import write_sums
from torch_paged.kernels.deal import (
    SEQUENCES,
    all_work,
    equal_share,
    following,
    locate,
    query_range,
    query_tiles,
    tile_at,
    tiles_of_unit,
)


@triton.jit(
    do_not_specialize=["num_tokens", "num_seqs", "num_kv_heads", "max_keys", "programs", "rounds"],
    do_not_specialize_on_alignment=["seq_lens", "cu_seqlens_q"],
)
def begin_rounds(
    seq_lens, cu_seqlens_q, starts, num_tokens, num_seqs, num_kv_heads, max_keys, programs, rounds, V: tl.constexpr
):
    """Writes where pieces of all rounds but the last begin, and where that one does: offsets in the row of all units.

    Grid: one program for each of the `(rounds - 1) * programs + 1` offsets, int64. If units are so long that pieces
    would be much shorter than one, there are fewer rounds, and the others' pieces are empty.
    """
    if V.overlap:
        gdc_launch_dependents()
        gdc_wait()
    total, longest, _ = all_work(seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, max_keys, V)
    fits = total.to(tl.float32) / tl.maximum(longest * programs, 1).to(tl.float32)
    rounds = tl.maximum(tl.minimum(rounds, fits.to(tl.int32)), 1)
    # The last round is as long as two of the others.
    share = (total.to(tl.float32) / (rounds + 1).to(tl.float32) / programs.to(tl.float32)).to(tl.int64)
    number = tl.program_id(0)
    offset = tl.minimum(number, (rounds - 1) * programs) * share
    _, _, inside, _, _ = locate(offset, offset, seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, max_keys, V)
    tl.store(starts + number, offset - inside)


@triton.jit
def _last_piece(starts, total, programs, rounds, PROGRAMS: tl.constexpr, V: tl.constexpr):
    """Begin and end of this program's piece in the last round."""
    others = tl.arange(0, PROGRAMS)
    given = tl.zeros([PROGRAMS], tl.int64)
    for before in range(rounds - 1):
        start = starts + before * programs + others
        given += tl.load(start + 1, mask=others < programs, other=0) - tl.load(start, mask=others < programs, other=0)
    share = (total.to(tl.float32) / programs.to(tl.float32)).to(tl.int64)
    due = tl.where(others < programs, tl.maximum(share - given, V.least_work), 0)
    start = tl.load(starts + (rounds - 1) * programs)
    scale = (total - start).to(tl.float32) / tl.sum(due).to(tl.float32)
    begin = tl.sum(tl.where(others < tl.program_id(0), due, 0))
    end = tl.sum(tl.where(others <= tl.program_id(0), due, 0))
    begin = tl.minimum(start + (begin.to(tl.float32) * scale).to(tl.int64), total)
    end = tl.minimum(start + (end.to(tl.float32) * scale).to(tl.int64), total)
    return begin, tl.where(tl.program_id(0) == programs - 1, total, end)


@triton.jit
def _has_long_loops(total, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, long_loop, V: tl.constexpr):
    """Whether the units of the whole work have `long_loop` tiles of keys or more, on average."""
    lane = tl.arange(0, SEQUENCES)
    units = tl.zeros([SEQUENCES], tl.int64)
    for first in range(0, num_seqs + 1, SEQUENCES):
        _, queries = query_range(first + lane, cu_seqlens_q, num_tokens, num_seqs, V)
        units += query_tiles(queries, V)
    return total >= tl.sum(units) * num_kv_heads * (long_loop * V.tile * V.group + V.unit_cost)


@triton.jit
def _leave_nothing(partial, handoff, V: tl.constexpr):
    """Empties what this program of attention leaves to others; they may look in its first slot for a part."""
    program, lane = tl.program_id(0), tl.arange(0, triton.next_power_of_2(V.block_m))
    write_sums(partial, lane * 0.0 - float("inf"), lane * 0.0, 2 * program * V.block_m + lane, lane < V.block_m, V)
    tl.store(handoff + program, 0)
    tl.store(handoff + tl.num_programs(0) + program, -1)


@triton.jit(
    do_not_specialize=["num_tokens", "num_seqs", "num_kv_heads", "max_keys", "long_loop"],
    do_not_specialize_on_alignment=["seq_lens", "cu_seqlens_q"],
)
def deal_pieces(
    seq_lens, cu_seqlens_q, starts, pieces, partial, handoff, num_tokens, num_seqs, num_kv_heads, max_keys, long_loop,
    PROGRAMS: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Writes the pieces to `pieces`, int32 `[programs, turns, 5]`: sequence, unit, first tile, units, end in the last.

    By `long_loop`, turn 0 or all others are the work; in those that are not, pieces have -1 units. Units of which a
    program has no tile are not among its piece's.

    Grid: (programs of attention, turns: 1 and the rounds). A single round needs no `starts` (see `begin_rounds`).
    PROGRAMS is a power of two that is no less than programs.
    """
    if V.overlap:
        gdc_wait()
    program, turn = tl.program_id(0), tl.program_id(1)
    programs, rounds = tl.num_programs(0), tl.num_programs(1) - 1
    if turn == 0:
        _leave_nothing(partial, handoff, V)
    total, _, _ = all_work(seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, max_keys, V)
    in_rounds = (rounds > 0) & _has_long_loops(total, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, long_loop, V)
    served = in_rounds == (turn > 0)
    total = tl.where(served, total, 0)
    if (total == 0) | (turn == 0) | (rounds == 1):
        begin, end, _near = equal_share(total, V)
    elif turn < rounds:
        begin = tl.load(starts + (turn - 1) * programs + program)
        end = tl.load(starts + (turn - 1) * programs + program + 1)
    else:
        begin, end = _last_piece(starts, total, programs, rounds, PROGRAMS, V)
    sequence, unit, inside, units, end_tile = locate(
        begin, end, seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, max_keys, V
    )
    first = tile_at(inside, V)
    key_tiles = tiles_of_unit(sequence, unit, seq_lens, cu_seqlens_q, num_tokens, num_seqs, max_keys, V)
    if (units > 0) & (first >= tl.minimum(tl.where(units == 1, end_tile, key_tiles), key_tiles)):
        first = first * 0
        units -= 1
        _, queries = query_range(sequence, cu_seqlens_q, num_tokens, num_seqs, V)
        tiles = query_tiles(queries, V)
        sequence, unit = following(sequence, unit + 1, tiles, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, V)
    piece = pieces + 5 * (program * (rounds + 1) + turn)
    tl.store(piece, sequence)
    tl.store(piece + 1, unit)
    tl.store(piece + 2, first)
    tl.store(piece + 3, tl.where(served, units, -1))
    tl.store(piece + 4, end_tile)
