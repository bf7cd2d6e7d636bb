"""Deals units out whole, the longest first, where programs end together without any unit being cut.

Units of a prompt grow from its first tokens to its last, so that the short ones even out what the long ones leave (the
rule of the longest processing time, R. L. Graham, 1969). Nothing is left to combine.

    heads     |--- first group ---|--- second group ---| ... |--- all of them ---|     8 MB of keys and values a group
    units      longest ....... short longest ....... short     short ... shortest
    programs   0 1 2 ... |     the list: a program that has done with its own takes the next one

Heads stand in groups, also of several sequences, so that what programs read at a time stays in the L2 cache. The short
units of all of them come last, and even out what the last groups leave. Of more units than a schedule has room for,
`run` that follow each other are dealt out as one: a run.
"""

import triton
import triton.language as tl

from torch_paged.kernels.deal import LAST_TILE, PIECE, write_piece
from torch_paged.kernels.piece_list import PIECES_BEGIN, write_listed
from torch_paged.kernels.units import key_count, query_range, query_tiles

GROUP_BYTES: tl.constexpr = tl.constexpr(8 * 2**20)
_AT_A_TIME: tl.constexpr = tl.constexpr(8)  # runs that a program finds the places of together, ...
_SEQUENCES: tl.constexpr = tl.constexpr(32)  # ... among those of so many sequences
_SPAN: tl.constexpr = tl.constexpr(64)  # keys: sizes of heads are counted in these
_SHORT: tl.constexpr = tl.constexpr(2 / 3)  # of the longest unit: what ends there or before is short,
_SHORT_OF_SHARE: tl.constexpr = tl.constexpr(2)  # or, if it is less, at so many times its part of a share in that place


@triton.jit
def end_together(work, longest, runs, V: tl.constexpr):
    """Whether whole runs keep programs hardly longer than equal pieces, whose parts must be combined.

    That counts as much as two units beside their keys, and 1% of everything (see `benchmarks/NOTES.md`).
    Nobody has more than the longest run, or one of the shortest more than a share, as far as the last turn is not full.
    This counts on lengths that are evenly spread, as those of prompts are. If a few were much longer than most, all
    others would be short and have no groups: such batches are cut.
    """
    programs, longest, runs = tl.num_programs(0), longest.to(tl.float32), runs.to(tl.float32)
    share = work / programs
    shortest = 2 * work / runs - longest
    lacking = tl.ceil(runs / programs) - runs / programs
    return (shortest >= 0) & (tl.maximum(longest, share + shortest * lacking) <= 1.01 * share + 2 * V.unit_cost)


@triton.jit
def short_end(work, longest, V: tl.constexpr):
    """Units that end here or before are short: keys that the last row sees, times group. Under a window none is.

    The more units a program has, the less is left to even out, and the fewer keys shall be read from memory again.
    """
    if V.has.window:
        end = 0
    else:
        longest = longest.to(tl.float32)
        of_longest = tl.minimum(_SHORT_OF_SHARE * longest * tl.num_programs(0) / work, _SHORT)
        end = ((longest - V.unit_cost) * of_longest).to(tl.int32)
    return end


@triton.jit
def _runs_of(sequence, run, seq_lens, cu_seqlens_q, num_tokens, num_seqs, max_keys, V: tl.constexpr):
    """Query tiles and runs of each head of sequences, its size, and the keys that its last row sees times group."""
    _, queries = query_range(sequence, cu_seqlens_q, num_tokens, num_seqs, V)
    keys = key_count(sequence, seq_lens, num_seqs, max_keys)
    tiles = query_tiles(queries, V)
    size = tl.where(tiles > 0, tl.maximum(tl.cdiv(keys, _SPAN), 1), 0)
    return tiles, tl.cdiv(tiles, run), size, (keys - queries) * V.group + tiles * V.block_m


@triton.jit
def _sequence_of(number, run, seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, max_keys, V: tl.constexpr):
    """The sequences of runs number `number`, of all before them the runs and the sizes, and the size of everything."""
    runs_before, size_before = num_seqs * 0, num_seqs * 0
    sequence, begin, its_size_before = number * 0, number * 0, number * 0
    for first in range(0, num_seqs + 1, _SEQUENCES):
        others = first + tl.arange(0, _SEQUENCES)
        _, runs, size, _ = _runs_of(others, run, seq_lens, cu_seqlens_q, num_tokens, num_seqs, max_keys, V)
        after = (runs_before + tl.cumsum(runs * num_kv_heads))[None, :]
        size_after = (size_before + tl.cumsum(size * num_kv_heads))[None, :]
        ended = after <= number[:, None]
        sequence += tl.sum(ended.to(tl.int32), 1)
        begin = tl.maximum(begin, tl.max(tl.where(ended, after, 0), 1))
        its_size_before = tl.maximum(its_size_before, tl.max(tl.where(ended, size_after, 0), 1))
        runs_before += tl.sum(runs) * num_kv_heads
        size_before += tl.sum(size) * num_kv_heads
    return sequence, begin, its_size_before, size_before


@triton.jit
def _heads_before(size, distance, num_kv_heads):
    """How many heads of a sequence, each of a size, begin within a distance of its first one, which may be below 0."""
    return tl.minimum(tl.maximum(tl.cdiv(distance, tl.maximum(size, 1)), 0), num_kv_heads)


@triton.jit
def _place_of(
    sequence, head, end, group_begin, run, short_upto, seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads,
    max_keys, GROUP: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """How many runs come before such as see up to `end`: the longer of their group, and all long of earlier groups.

    Short ones, up to `short_upto`, have no groups: all longer ones come before them.
    """
    step = run * V.block_m
    grouped = (end > short_upto)[:, None]
    place = sequence * 0
    before = num_seqs * 0
    for first in range(0, num_seqs + 1, _SEQUENCES):
        others = (first + tl.arange(0, _SEQUENCES))[None, :]
        _, runs, size, others_end = _runs_of(others, run, seq_lens, cu_seqlens_q, num_tokens, num_seqs, max_keys, V)
        distance = group_begin[:, None] - (before + tl.cumsum(size * num_kv_heads, 1) - size * num_kv_heads)
        earlier = tl.where(grouped, _heads_before(size, distance, num_kv_heads), 0)
        heads = tl.where(grouped, _heads_before(size, distance + GROUP, num_kv_heads), num_kv_heads) - earlier
        long = tl.minimum(tl.maximum(tl.cdiv(others_end - short_upto, step), 0), runs)
        longer_by = others_end - end[:, None]
        longer = tl.minimum(tl.maximum(tl.cdiv(longer_by, step), 0), runs)
        equal = (longer_by == longer * step) & (longer < runs)
        equal_heads = tl.where(others < sequence[:, None], heads, 0)
        equal_heads = tl.where(others == sequence[:, None], head[:, None] - earlier, equal_heads)
        place += tl.sum(long * earlier + heads * longer + tl.where(equal, equal_heads, 0), 1)
        before += tl.sum(size) * num_kv_heads
    return place


@triton.jit
def deal_longest_first(
    pieces, run, runs, late, short_upto, seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, max_keys,
    V: tl.constexpr,
):  # fmt: skip
    """Writes `runs` pieces of `run` units: of one turn for programs or, back and forth, of two, the others in the list.

    A second turn would not even out the first if that has groups of its own. Of `late` units among them, which programs
    leave out where these are not listed (see `attention_hopper`), all are.
    """
    programs, rounds = tl.num_programs(0), tl.num_programs(1)
    program = tl.program_id(0) + tl.program_id(1) * programs
    GROUP: tl.constexpr = GROUP_BYTES // (_SPAN * 2 * (V.head_dim + V.value_dim))
    turns = rounds * 0
    for first in range(program * _AT_A_TIME, runs + programs * rounds, programs * rounds * _AT_A_TIME):
        number = first + tl.arange(0, _AT_A_TIME)
        sequence, begin, size_before, size_of_all = _sequence_of(
            number, run, seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, max_keys, V
        )
        tiles, its_runs, size, end = _runs_of(sequence, run, seq_lens, cu_seqlens_q, num_tokens, num_seqs, max_keys, V)
        turns = tl.where(late > 0, 0, tl.where(size_of_all <= GROUP, tl.minimum(rounds, 2), 1))
        its_runs = tl.maximum(its_runs, 1)
        head, index = (number - begin) // its_runs, (number - begin) % its_runs
        group_begin = (size_before + head * size) // GROUP * GROUP
        place = _place_of(
            sequence, head, end - index * run * V.block_m, group_begin, run, short_upto, seq_lens, cu_seqlens_q,
            num_tokens, num_seqs, num_kv_heads, max_keys, GROUP, V,
        )  # fmt: skip
        # Behind all runs, the pieces of programs that have none.
        exists = number < runs
        place = tl.where(exists, place, number - runs)
        turn = place // programs
        owner = tl.where(turn % 2 == 0, place % programs, programs - 1 - place % programs)
        owned = turn < tl.where(exists, turns, rounds)
        piece = tl.where(owned, owner * rounds + turn, place + (rounds - turns) * programs)
        first_tile = tl.maximum(tiles - (index + 1) * run, 0)
        count = tl.where(exists, tiles - index * run - first_tile, 0)
        valid = exists | (owned & (place >= tl.minimum(runs, turns * programs)))
        write_piece(
            pieces + PIECES_BEGIN + PIECE * piece, sequence, head * tiles + first_tile, 0, count, LAST_TILE, valid
        )
    if program == 0:
        write_listed(pieces, programs * rounds, programs * rounds + tl.maximum(runs - turns * programs, 0))
