"""What a step's layers share: which piece of the work each program of attention has, written down once.

For programs 0, 1, ... of P, in int32 (for the Hopper kernel what `deal_pieces` writes, from number 8 on):

    stamp | 7 unused | sequence, unit, first, units, end of program 0 | of 1 | ... | before | sequence | unit
    0                  8                                                             8 + 5 P, P each

`stamp` names the launch that it was made for. Behind the pieces (see `deal`) stands what each program leaves unfinished
(see `attention_combine`).

Attention and combine read it, and the lengths and blocks that it was made from, while the kernel before them ends; all
else they read after that. They may, as the stamp is written last, by a kernel of its own that waits for all before it:
a program that sees the stamp sees the rest, and one that does not deals by itself, with the same result. Every program
of attention waits before it ends, and the first of combine: whoever waits for these has waited for all before them.
"""

import triton
import triton.language as tl

from torch_paged.kernels.deal import PIECE, piece_of, read_piece, share_of, write_piece
from torch_paged.kernels.launch import Launcher
from torch_paged.kernels.launch_config import AttentionLaunch
from torch_paged.kernels.units import tiles_of_unit
from torch_paged.options import SCHEDULE_SHAPE

DEALT: tl.constexpr = tl.constexpr(8)  # where the pieces begin
ROOM = SCHEDULE_SHAPE[1] - 8  # numbers that there may be of them
MOST_PROGRAMS = ROOM // 8


@triton.jit
def is_scheduled(schedule, stamp):
    """Whether there is a schedule for this launch; with a stamp of 0 none is looked for."""
    return tl.load(schedule, mask=stamp != 0, other=-1) == stamp


@triton.jit
def scheduled_piece(schedule, stamp):
    """This program's piece, as `deal` would return it, if there is a schedule for this launch."""
    return read_piece(schedule + DEALT + PIECE * tl.program_id(0), stamp != 0)


@triton.jit
def scheduled_handoff(schedule, programs):
    """What the programs leave, as they would write it behind their partial results."""
    return schedule + DEALT + PIECE * programs


@triton.jit(
    do_not_specialize=["num_tokens", "num_seqs", "num_kv_heads", "max_keys", "window"],
    do_not_specialize_on_alignment=["seq_lens", "cu_seqlens_q", "schedule"],
)
def _schedule(seq_lens, cu_seqlens_q, schedule, num_tokens, num_seqs, num_kv_heads, max_keys, window, V: tl.constexpr):
    """Grid: programs of attention, each of which writes what its namesake will do and leave."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    begin, end, near = share_of(seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, max_keys, V, window)
    sequence, unit, first, units, end_tile = piece_of(
        begin, end, near, seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, max_keys, V, window
    )
    write_piece(schedule + DEALT + PIECE * program, sequence, unit, first, units, end_tile)

    key_tiles = tiles_of_unit(sequence, unit, seq_lens, cu_seqlens_q, num_tokens, num_seqs, max_keys, V, window)
    last = tl.minimum(tl.where(units == 1, end_tile, key_tiles), key_tiles)
    continued = (units > 0) & (first > 0) & (first < last)
    last_sequence, last_unit, _, _, _ = piece_of(
        end, end, near, seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, max_keys, V, window
    )
    last_tiles = tiles_of_unit(
        last_sequence, last_unit, seq_lens, cu_seqlens_q, num_tokens, num_seqs, max_keys, V, window
    )
    begun = (units > 1) | ((units == 1) & (first == 0))
    left = begun & (end_tile < last_tiles)
    handoff = scheduled_handoff(schedule, programs) + program
    tl.store(handoff, tl.where(continued, tl.where(last == key_tiles, 2, 1), 0))
    tl.store(handoff + programs, tl.where(left, last_sequence, -1))
    tl.store(handoff + 2 * programs, last_unit)


def schedule_launcher(launch: AttentionLaunch) -> Launcher:
    """Launches the kernel that writes the schedule of `launch`."""
    return Launcher(_schedule, (launch.programs, 1, 1), dict(V=launch.variant), dict(num_warps=4))
