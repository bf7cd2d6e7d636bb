"""Deals long prompts out in rounds, so that all programs read the keys of few heads at a time.

With one piece of the row of all units for each program (see `deal`), programs would together stand in every head of
every sequence at once, and the L2 cache would have to hold the keys of all. So the row is cut into rounds, and every
program has a piece of each. Pieces end between two units, and may be up to a unit too long or too short, but for those
of the last round, which are cut inside units and make up for that.

    row       |------ round 0 ------|------ round 1 ------|--------------- last round --------------|
    programs  |  0  |  1  |  2  | 3 |  3  | 0 |  1  |  2  |     0     |      1      |   2   |   3   |

Each round but the last begins with another program, so that nobody gets the longest piece of all of them.

The units of a chunk of a prompt on many keys are alike. If the programs can have as many whole ones each, or nearly, or
a unit as many equal parts, they do, in turn: the first ones of the row, the next ones, and so on. Programs that read
the keys of a head are at the same of them then, which pass through the L2 cache once. Cut anywhere, each would be
elsewhere.

The Hopper kernel has a form that is faster where units have many tiles of keys, and one for short prompts. Shapes alone
do not tell many prompts from one long chunk beside many decodes: the host launches both forms then, and `deal_pieces`,
which sees the lengths, gives everything to one of them. The other sees that first, ends, and has written nothing.

Programs with equal work end up to 4% apart, in each run others. So the units of a long prompt that see no more
than a quarter of it are late: not dealt out, but in a list, the longest of a sequence first, from which who has done
with its pieces takes the next one. In that list are alike units as well, if there are more turns than rounds.

Both kernels here begin while the one before them ends, and touch no memory until all of it has: by then whoever had
their workspace has done with it. The Hopper kernel begins when they have ended, as it is slower otherwise.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from torch_paged.kernels.attention_schedule import DEALT, is_scheduled
from torch_paged.kernels.attention_state import write_sums
from torch_paged.kernels.deal import LAST_TILE, PIECE, all_work, equal_share, locate, read_piece, tile_at, write_piece
from torch_paged.kernels.units import (
    SEQUENCES,
    following,
    key_count,
    late_tiles,
    query_range,
    query_tiles,
    tiles_of_unit,
)

SHORT_LOOPS: tl.constexpr = tl.constexpr(-1)  # in the place of a number of tiles: no loop is long
FORM: tl.constexpr = tl.constexpr(2)  # where `deal_pieces` writes which form has the work: 1, that for long loops, or 0
PIECES_BEGIN: tl.constexpr = tl.constexpr(3)  # where it writes the first piece
FURTHER_ON: tl.constexpr = tl.constexpr(19)  # by so many pieces a program is in each round, or turn
LONGER: tl.constexpr = tl.constexpr(1.16)  # alike units stay whole if nobody gets more than so many times a share,
LITTLE_LONGER: tl.constexpr = tl.constexpr(1.08)  # or so many, where rounds could even that out
LONG_UNIT: tl.constexpr = tl.constexpr(1536)  # keys, on average, of units that programs get in turn,
ALIKE: tl.constexpr = tl.constexpr(1.25)  # if the longest is no more than so many times as long
MOST_TURNS: tl.constexpr = tl.constexpr(8)  # and there are no more turns; a power of two


def most_late(num_tokens: int, num_kv_heads: int, group: int, block_m: int) -> int:
    """Late units that a batch can have (see `late_tiles`)."""
    return num_tokens * group // (4 * block_m) * num_kv_heads


def list_room(
    programs: int, rounds: int, num_tokens: int, num_seqs: int, num_kv_heads: int, group: int, block_m: int
) -> int:
    """Units that the list may have: late ones, or alike ones that there is no round for."""
    most_turns: int = MOST_TURNS.value
    units = (num_tokens * group // block_m + num_seqs + 1) * num_kv_heads
    alike = min(units, most_turns * programs) - rounds * programs
    return max(most_late(num_tokens, num_kv_heads, group, block_m), alike)


def num_piece_ints(programs: int, rounds: int, room: int) -> int:
    """int32 numbers that `deal_pieces` writes for so many rounds, with room for so many units in the list."""
    begin: int = PIECES_BEGIN.value
    piece: int = PIECE.value
    return begin + piece * (programs * rounds + room)


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
def _late_units(sequence, seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, max_keys, V: tl.constexpr):
    """Query tiles of each head of a sequence (or of several), and late units of all heads."""
    _, queries = query_range(sequence, cu_seqlens_q, num_tokens, num_seqs, V)
    keys = key_count(sequence, seq_lens, num_seqs, max_keys)
    tiles = query_tiles(queries, V)
    return tiles, tl.where(tiles > 0, late_tiles(queries, keys, num_kv_heads, V) * num_kv_heads, 0)


@triton.jit
def _count_units(seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, max_keys, V: tl.constexpr):
    """How many units there are, and how many of them are late, int64."""
    lane = tl.arange(0, SEQUENCES)
    units = tl.zeros([SEQUENCES], tl.int64)
    late = tl.zeros([SEQUENCES], tl.int64)
    for first in range(0, num_seqs + 1, SEQUENCES):
        tiles, more = _late_units(first + lane, seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, max_keys, V)
        units += tiles * num_kv_heads
        late += more
    return tl.sum(units), tl.sum(late)


@triton.jit
def _parts_of_units(total, longest, units, once, room, V: tl.constexpr):
    """Into how many equal parts each of so many units is cut, 1 leaves them whole; 0 if they are not alike enough.

    And whether programs get these in turn: where they read keys that not everybody finds in the L2 cache anyway.
    """
    programs, rounds = tl.num_programs(0), tl.num_programs(1)
    if V.has.window:
        longest += V.block_m  # keys that not all rows of a unit see
    parts = tl.maximum(tl.minimum(programs // tl.maximum(units, 1), longest // V.least_work), 1)
    turns = tl.cdiv(units * parts, programs)
    fit = (turns <= MOST_TURNS) & (units * parts - rounds * programs <= room)
    average = total.to(tl.float32) / tl.maximum(units, 1).to(tl.float32)
    longest = longest.to(tl.float32)
    in_turn = fit & (average >= LONG_UNIT * V.group + V.unit_cost) & (longest <= ALIKE * average)
    most = (turns - 1).to(tl.float32) * tl.where(in_turn, average, longest) + longest
    alike = most * programs <= tl.where(once, LONGER, LITTLE_LONGER) * total.to(tl.float32) * parts
    return tl.where(alike & (in_turn | once), parts, 0).to(tl.int32), in_turn


@triton.jit
def _deal_alike(
    pieces, units, parts, in_turn, seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, max_keys, window,
    V: tl.constexpr,
):  # fmt: skip
    """Writes pieces of units that are alike, whole ones, or parts of one.

    In turn, a round has one for each program, and what is more than rounds hold is listed. Else, or if there is only
    one turn, a program has all of its own in the first round.
    """
    program, programs, rounds = tl.program_id(0), tl.num_programs(0), tl.num_programs(1)
    turn, lane = tl.arange(0, MOST_TURNS), tl.arange(0, SEQUENCES)
    slots = (units * parts).to(tl.int32)
    place = tl.minimum(turn * programs + (program + turn * FURTHER_ON) % programs, slots)
    end = tl.minimum(place + 1, slots)
    if not (in_turn & (slots > programs)):
        place = tl.where(turn == 0, program * slots // programs, slots)
        end = tl.where(turn == 0, (program + 1) * slots // programs, slots)
    begin, part = place // parts, place % parts
    before = num_seqs * 0
    sequence = turn * 0
    its_begin = turn * 0
    for first in range(0, num_seqs + 1, SEQUENCES):
        _, queries = query_range(first + lane, cu_seqlens_q, num_tokens, num_seqs, V)
        its_units = query_tiles(queries, V) * num_kv_heads
        after = (before + tl.cumsum(its_units))[None, :]
        ended = after <= begin[:, None]
        sequence += tl.sum(ended.to(tl.int32), 1)
        its_begin = tl.maximum(its_begin, tl.max(tl.where(ended, after, 0), 1))
        before += tl.sum(its_units)
    unit = begin - its_begin
    tiles = tiles_of_unit(sequence, unit, seq_lens, cu_seqlens_q, num_tokens, num_seqs, max_keys, V, window)
    begin_tile, end_tile = tiles * part // parts, tiles * (part + 1) // parts
    count = tl.where(begin_tile < end_tile, end - place, 0)
    end_tile = tl.where(part + 1 < parts, end_tile, LAST_TILE)
    number = tl.where(turn < rounds, program * rounds + turn, place)
    dealt = (turn < rounds) | (place < end)
    write_piece(pieces + PIECES_BEGIN + PIECE * number, sequence, unit, begin_tile, count, end_tile, dealt)
    if program == 0:
        tl.store(pieces, programs * rounds)
        tl.store(pieces + 1, tl.where(in_turn, tl.maximum(slots, programs * rounds), programs * rounds))


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
        tl.store(pieces, dealt)
        tl.store(pieces + 1, dealt + before)


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
        tl.store(pieces, programs)
        tl.store(pieces + 1, count)
        tl.store(pieces + FORM, tl.load(dealt + FORM))
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
    do_not_specialize=["stamp", "num_tokens", "num_seqs", "num_kv_heads", "max_keys", "window", "long_loop", "room"],
    do_not_specialize_on_alignment=["seq_lens", "cu_seqlens_q", "schedule"],
)
def deal_pieces(
    seq_lens, cu_seqlens_q, starts, schedule, stamp, pieces, partial, handoff, num_tokens, num_seqs, num_kv_heads,
    max_keys, window, long_loop, room, PROGRAMS: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Writes the pieces, int32: first sequence, unit and tile, units, and the tile that is the end in the last of them.

    next, end, form | program 0, round 0 | round 1 | ... | program 1, round 0 | ... | listed | listed | ...
    0                 3                    8                                          3 + 5 * programs * rounds

    The form is 1 if units that are not late have `long_loop` tiles of keys or more, on average, unless that is
    SHORT_LOOPS, else 0; or without any work -1, and nothing else is written here. A piece begins with a tile that is
    its program's. Late units among its units are not. They are listed, or alike units that there is no round for, each
    as a piece of its own, number [next, end). There is room for `room` of these (see `list_room`); sequences that
    overlap may have more: late ones are left out, alike ones not listed.

    Without a `schedule`, writes the pieces of one. Else begins a call: copies the schedule's pieces if its stamp is
    found there, and deals out by itself if not, in one round but for alike units.

    Grid: (programs of attention, rounds). A single round needs no `starts` (see `begin_rounds`). PROGRAMS is a power of
    two that is no less than programs.
    """
    if V.overlap:
        gdc_wait()
    program, number = tl.program_id(0), tl.program_id(1)
    programs, rounds = tl.num_programs(0), tl.num_programs(1)
    once = rounds == 1
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
        tl.store(pieces + FORM, -1)
        return
    all_units, late_ones = _count_units(seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, max_keys, V)
    parts, in_turn = _parts_of_units(total, longest, all_units, once, room, V)
    parts = tl.where(late_ones == 0, parts, 0)
    if number == 0:
        if program == 0:
            long = total >= (all_units - late_ones) * (long_loop * V.tile * V.group + V.unit_cost)
            tl.store(pieces + FORM, (long & (long_loop != SHORT_LOOPS)).to(tl.int32))
        if parts > 0:
            _deal_alike(
                pieces, all_units, parts, in_turn, seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, max_keys,
                window, V,
            )  # fmt: skip
        else:
            _deal_late(
                pieces, programs * rounds, room, seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, max_keys, V
            )
    if parts > 0:
        return
    if once:
        begin, end, _near = equal_share(tl.where(number == 0, total, 0), V)
    elif number < rounds - 1:
        start = starts + number * programs + (program + number * FURTHER_ON) % programs
        begin, end = tl.load(start), tl.load(start + 1)
    else:
        begin, end = _last_piece(starts, total, programs, rounds, PROGRAMS, V)
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
