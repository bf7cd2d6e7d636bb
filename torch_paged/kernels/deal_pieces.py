"""Deals out, in advance, what the programs of `attention_hopper` do: whole units, or pieces of the row of all units.

Units stay whole if they are alike (see `alike`), or if programs then end together (see `longest_first`). Else programs
have equal pieces, in rounds or one each, and units are cut where these end.

Programs with equal work end up to 4% apart, in each run others. So the units of a long prompt that see no more
than a quarter of it are late: not dealt out, but listed, the longest of a sequence first, and who has done with its
pieces takes the next one. Listed are whole units as well, if there are more of them than pieces for programs.

Both kernels that deal out, and the Hopper kernel, begin while the one before them ends, and touch no memory until all
of it has: by then whoever had their workspace has done with it.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from torch_paged.kernels.alike import LONG_UNIT, deal_alike, parts_of_units
from torch_paged.kernels.attention_schedule import DEALT, ROOM, is_scheduled
from torch_paged.kernels.attention_state import write_sums
from torch_paged.kernels.deal import LAST_TILE, PIECE, all_work, equal_share, locate, read_piece, tile_at, write_piece
from torch_paged.kernels.longest_first import deal_longest_first, end_together, short_end
from torch_paged.kernels.piece_list import PIECES_BEGIN, num_piece_ints, write_listed
from torch_paged.kernels.rounds import piece_of_round
from torch_paged.kernels.units import (
    SEQUENCES,
    following,
    key_count,
    late_tiles,
    query_range,
    query_tiles,
    tiles_of_unit,
)


def most_late(num_tokens: int, num_kv_heads: int, group: int, block_m: int) -> int:
    """Late units that a batch can have (see `late_tiles`)."""
    return num_tokens * group // (4 * block_m) * num_kv_heads


def list_room(
    programs: int, rounds: int, num_tokens: int, num_seqs: int, num_kv_heads: int, group: int, block_m: int
) -> tuple[int, int]:
    """Pieces that the list may have, and how many whole units are one of them, so that a schedule has room for all."""
    units = (num_tokens * group // block_m + num_seqs + 1) * num_kv_heads
    most = max((ROOM - num_piece_ints(programs, rounds, 0)) // PIECE.value, 1)
    return max(most_late(num_tokens, num_kv_heads, group, block_m), min(units, most)), -(-units // most)


@triton.jit
def _late_units(sequence, seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, max_keys, V: tl.constexpr):
    """Query tiles of each head of a sequence (or of several), and late units of all heads."""
    _, queries = query_range(sequence, cu_seqlens_q, num_tokens, num_seqs, V)
    keys = key_count(sequence, seq_lens, num_seqs, max_keys)
    tiles = query_tiles(queries, V)
    return tiles, tl.where(tiles > 0, late_tiles(queries, keys, num_kv_heads, V) * num_kv_heads, 0)


@triton.jit
def _count_units(seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, max_keys, run, V: tl.constexpr):
    """How many units there are, how many of them are late, and how many runs of `run` units, int64."""
    lane = tl.arange(0, SEQUENCES)
    units = tl.zeros([SEQUENCES], tl.int64)
    late = tl.zeros([SEQUENCES], tl.int64)
    runs = tl.zeros([SEQUENCES], tl.int64)
    for first in range(0, num_seqs + 1, SEQUENCES):
        tiles, more = _late_units(first + lane, seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, max_keys, V)
        units += tiles * num_kv_heads
        late += more
        runs += tl.cdiv(tiles, run) * num_kv_heads
    return tl.sum(units), tl.sum(late), tl.sum(runs)


@triton.jit
def _leave_nothing(partial, handoff, V: tl.constexpr):
    """Empties what this program of attention leaves to others; they may look in its first slot for a part."""
    program, lane = tl.program_id(0), tl.arange(0, triton.next_power_of_2(V.block_m))
    write_sums(partial, lane * 0.0 - float("inf"), lane * 0.0, 2 * program * V.block_m + lane, lane < V.block_m, V)
    tl.store(handoff + program, 0)
    tl.store(handoff + tl.num_programs(0) + program, -1)


@triton.jit
def _deal_late(
    pieces, dealt, room, seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, max_keys, V: tl.constexpr
):
    """Writes a piece for every late unit, behind the `dealt` ones, and ahead of them all where these begin and end."""
    program, lane = tl.program_id(0), tl.arange(0, SEQUENCES)
    before = num_seqs * 0
    for first in range(0, num_seqs, SEQUENCES):
        _, units = _late_units(first + lane, seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, max_keys, V)
        for sequence in range(first + program, tl.minimum(first + SEQUENCES, num_seqs), tl.num_programs(0)):
            tiles, its_units = _late_units(
                sequence, seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, max_keys, V
            )
            begin = before + tl.sum(tl.where(first + lane < sequence, units, 0))
            for start in range(0, its_units, SEQUENCES):
                number = start + lane
                tile = (its_units - 1 - number) // num_kv_heads
                unit = number % num_kv_heads * tiles + tile
                valid = (number < its_units) & (begin + number < room)
                piece = pieces + PIECES_BEGIN + PIECE * (dealt + begin + number)
                write_piece(piece, sequence, unit, 0, 1, LAST_TILE, valid)
        before = tl.minimum(before + tl.sum(units), room)
    if program == 0:
        write_listed(pieces, dealt, dealt + before)


@triton.jit
def _copy_pieces(
    schedule, pieces, room, seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, max_keys, window,
    V: tl.constexpr,
):  # fmt: skip
    """Copies the pieces of a schedule, as each call counts listed ones off in its own (see `next_piece`).

    Whatever lengths it was made for, they begin in a unit that there is, and have a tile of it.
    """
    program = tl.program_id(0) + tl.program_id(1) * tl.num_programs(0)
    programs = tl.num_programs(0) * tl.num_programs(1)
    dealt = schedule + DEALT
    count = tl.minimum(tl.load(dealt + 1), programs + room)
    if program == 0:
        write_listed(pieces, programs, count)
    for first_number in range(program * SEQUENCES, count, programs * SEQUENCES):
        number = first_number + tl.arange(0, SEQUENCES)
        place = PIECES_BEGIN + PIECE * number
        sequence, unit, first, units, end_tile = read_piece(dealt + place, number < count)
        _, queries = query_range(sequence, cu_seqlens_q, num_tokens, num_seqs, V)
        unit = tl.minimum(unit, tl.maximum(query_tiles(queries, V), 1) * num_kv_heads - 1)
        key_tiles = tiles_of_unit(sequence, unit, seq_lens, cu_seqlens_q, num_tokens, num_seqs, max_keys, V, window)
        first = tl.minimum(first, key_tiles - 1)
        write_piece(pieces + place, sequence, unit, first, units, end_tile, number < count)


@triton.jit(
    do_not_specialize=[
        "stamp", "num_tokens", "num_seqs", "num_kv_heads", "max_keys", "window", "room", "run",
    ],
    do_not_specialize_on_alignment=["seq_lens", "cu_seqlens_q", "schedule"],
)  # fmt: skip
def deal_pieces(
    seq_lens, cu_seqlens_q, starts, schedule, stamp, pieces, partial, handoff, num_tokens, num_seqs, num_kv_heads,
    max_keys, window, room, run, PROGRAMS: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Writes the pieces (see `piece_list`).

    A piece begins with a tile that is its program's. Late units among its units are not. They are listed, or whole ones
    that there is no round for, each as a piece of its own, number [next, end), whole ones as `run` that follow each
    other. There is room for `room` pieces (see `list_room`); sequences that overlap may have more: late ones are left
    out, whole ones not listed.

    Without a `schedule`, writes the pieces of one. Else begins a call: copies the schedule's pieces if its stamp is
    found there, and deals out by itself if not, in one round but for whole units.

    Grid: (programs of attention, rounds). Where units are cut in one round alone, there are no `starts` (see
    `begin_rounds`). PROGRAMS is a power of two that is no less than programs.
    """
    if V.overlap:
        gdc_launch_dependents()
        gdc_wait()
    program, number = tl.program_id(0), tl.program_id(1)
    programs, rounds = tl.num_programs(0), tl.num_programs(1)
    once = starts is None
    if schedule is not None:
        if number == 0:
            _leave_nothing(partial, handoff, V)
        if is_scheduled(schedule, stamp):
            _copy_pieces(
                schedule, pieces, room, seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, max_keys, window, V
            )
            return
        once = once | (stamp != 0)
    total, longest, _ = all_work(seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, max_keys, V, window)
    if total == 0:
        nothing = program * 0
        mine = pieces + PIECES_BEGIN + PIECE * (program * rounds + number)
        write_piece(mine, nothing, nothing, nothing, nothing, nothing)
        if program == 0:
            write_listed(pieces, programs * rounds, programs * rounds)
        return
    units, late, runs = _count_units(seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, max_keys, run, V)
    parts, in_turn = parts_of_units(total, longest, units, once, room, V)
    if (parts > 0) & (late == 0):
        if number == 0:
            deal_alike(
                pieces, units, parts, in_turn, seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, max_keys,
                window, V,
            )  # fmt: skip
        return
    # As if late units were as long as the others. Long ones take less time in rounds and a list of late ones.
    work = total.to(tl.float32) * (units.to(tl.float32) / tl.maximum(units - late, 1).to(tl.float32))
    few_keys = work <= units.to(tl.float32) * (LONG_UNIT * V.group + V.unit_cost)
    if V.causal & ((late == 0) | few_keys | V.has.window) & (runs <= room):
        if end_together(work, longest * run, runs, V):
            deal_longest_first(
                pieces, run, runs.to(tl.int32), late, short_end(work, longest, V), seq_lens, cu_seqlens_q, num_tokens,
                num_seqs, num_kv_heads, max_keys, V,
            )  # fmt: skip
            return
    if number == 0:
        _deal_late(
            pieces, programs * rounds, room, seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, max_keys, V
        )
    begin, end, _near = equal_share(tl.where(number == 0, total, 0), V)
    if starts is not None:  # which the compiler knows
        if not once:
            begin, end = piece_of_round(starts, total, PROGRAMS, V)
    sequence, unit, inside, units, end_tile = locate(
        begin, end, seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, max_keys, V, window
    )
    first = tile_at(inside, V)
    key_tiles = tiles_of_unit(sequence, unit, seq_lens, cu_seqlens_q, num_tokens, num_seqs, max_keys, V, window)
    if (units > 0) & (first >= tl.minimum(tl.where(units == 1, end_tile, key_tiles), key_tiles)):
        first = first * 0
        units -= 1
        _, queries = query_range(sequence, cu_seqlens_q, num_tokens, num_seqs, V)
        tiles = query_tiles(queries, V)
        sequence, unit = following(sequence, unit + 1, tiles, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, V)
    write_piece(pieces + PIECES_BEGIN + PIECE * (program * rounds + number), sequence, unit, first, units, end_tile)
