"""Deals units out that are alike, as those of a chunk of a prompt on many keys are: whole, or in equal parts.

If programs can have as many whole ones each, or nearly, or a unit as many equal parts, they do, in turn: the first ones
of the row, the next ones, and so on. Programs that read the keys of a head are at the same of them then, which pass
through the L2 cache once. Cut anywhere (see `deal`), each would be elsewhere.
"""

import triton
import triton.language as tl

from torch_paged.kernels.deal import LAST_TILE, PIECE, write_piece
from torch_paged.kernels.piece_list import PIECES_BEGIN, write_listed
from torch_paged.kernels.rounds import FURTHER_ON
from torch_paged.kernels.units import SEQUENCES, query_range, query_tiles, tiles_of_unit

LONGER: tl.constexpr = tl.constexpr(1.16)  # units stay whole if nobody gets more than so many times a share,
LITTLE_LONGER: tl.constexpr = tl.constexpr(1.08)  # or so many, where rounds could even that out
LONG_UNIT: tl.constexpr = tl.constexpr(1536)  # keys, on average, of units that programs get in turn,
ALIKE: tl.constexpr = tl.constexpr(1.25)  # if the longest is no more than so many times as long
MOST_TURNS: tl.constexpr = tl.constexpr(8)  # and there are no more turns; a power of two


@triton.jit
def parts_of_units(total, longest, units, once, room, V: tl.constexpr):
    """Into how many equal parts each of so many units is cut, 1 leaves them whole; 0 if they are not alike enough.

    And whether programs get these in turn: if they have so many keys that it pays to read them together.
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
def deal_alike(
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
    valid = (turn < rounds) | (place < end)
    write_piece(pieces + PIECES_BEGIN + PIECE * number, sequence, unit, begin_tile, count, end_tile, valid)
    if program == 0:
        dealt = programs * rounds
        write_listed(pieces, dealt, tl.where(in_turn, tl.maximum(slots, dealt), dealt))
