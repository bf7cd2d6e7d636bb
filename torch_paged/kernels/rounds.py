"""Deals long prompts out in rounds, so that all programs read the keys of few heads at a time.

With one piece of the row of all units for each program (see `deal`), programs would together stand in every head of
every sequence at once, and the L2 cache would have to hold the keys of all. So the row is cut into rounds, and every
program has a piece of each. Pieces end between two units, and may be up to a unit too long or too short, but for those
of the last round, which are cut inside units and make up for that.

    row       |------ round 0 ------|------ round 1 ------|--------------- last round --------------|
    programs  |  0  |  1  |  2  | 3 |  3  | 0 |  1  |  2  |     0     |      1      |   2   |   3   |

Each round but the last begins with another program, so that nobody gets the longest piece of all of them.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from torch_paged.kernels.deal import all_work, locate

FURTHER_ON: tl.constexpr = tl.constexpr(19)  # by so many pieces a program is in each round


@triton.jit(
    do_not_specialize=["num_tokens", "num_seqs", "num_kv_heads", "max_keys", "programs", "rounds", "window"],
    do_not_specialize_on_alignment=["seq_lens", "cu_seqlens_q"],
)
def begin_rounds(
    seq_lens, cu_seqlens_q, starts, num_tokens, num_seqs, num_kv_heads, max_keys, window, programs, rounds,
    V: tl.constexpr,
):  # fmt: skip
    """Writes where pieces of all rounds but the last begin, and where that one does: offsets in the row of all units.

    Grid: one program for each of the `(rounds - 1) * programs + 1` offsets, int64. If units are so long that pieces
    would be much shorter than one, there are fewer rounds, and the others' pieces are empty.
    """
    if V.overlap:
        gdc_launch_dependents()
        gdc_wait()
    total, longest, _ = all_work(seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, max_keys, V, window)
    fits = total.to(tl.float32) / tl.maximum(longest * programs, 1).to(tl.float32)
    rounds = tl.maximum(tl.minimum(rounds, fits.to(tl.int32)), 1)
    # The last round is as long as two of the others.
    share = (total.to(tl.float32) / (rounds + 1).to(tl.float32) / programs.to(tl.float32)).to(tl.int64)
    number = tl.program_id(0)
    offset = tl.minimum(number, (rounds - 1) * programs) * share
    _, _, inside, _, _ = locate(
        offset, offset, seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, max_keys, V, window
    )
    tl.store(starts + number, offset - inside)


@triton.jit
def _last_piece(starts, total, programs, rounds, PROGRAMS: tl.constexpr, V: tl.constexpr):
    """Begin and end of this program's piece in the last round."""
    others = tl.arange(0, PROGRAMS)
    given = tl.zeros([PROGRAMS], tl.int64)
    for before in range(rounds - 1):
        start = starts + before * programs + (others + before * FURTHER_ON) % programs
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
def piece_of_round(starts, total, PROGRAMS: tl.constexpr, V: tl.constexpr):
    """Begin and end of this program's piece in this round, `tl.program_id(1)`: offsets in the row of all units."""
    program, number = tl.program_id(0), tl.program_id(1)
    programs, rounds = tl.num_programs(0), tl.num_programs(1)
    if number < rounds - 1:
        start = starts + number * programs + (program + number * FURTHER_ON) % programs
        begin, end = tl.load(start), tl.load(start + 1)
    else:
        begin, end = _last_piece(starts, total, programs, rounds, PROGRAMS, V)
    return begin, end
