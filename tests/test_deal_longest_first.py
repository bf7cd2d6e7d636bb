"""Whole units, the longest first: where each stands, and when they are dealt out like that."""

import heapq
import itertools
import math
import os
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
import triton
from dealt_pieces import DEVICE, NO_RUNS, UNWRITTEN, deal, late_of, variant_of
from dealt_units import units_of

from torch_paged.kernels.attention_schedule import ROOM
from torch_paged.kernels.deal import LAST_TILE
from torch_paged.kernels.deal_pieces import list_room
from torch_paged.kernels.longest_first import GROUP_BYTES, deal_longest_first
from torch_paged.kernels.piece_list import PIECES_BEGIN, num_piece_ints

pytestmark = [pytest.mark.interpreter if os.environ.get("TRITON_INTERPRET") == "1" else pytest.mark.gpu]
NOTHING = [0, LAST_TILE.value]


@triton.jit
def deal_all(
    pieces, run, runs, late, short_upto, seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, max_keys,
    V: triton.language.constexpr,
):  # fmt: skip
    deal_longest_first(
        pieces, run, runs, late, short_upto, seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, max_keys, V
    )


def runs_in_order(queries, keys, heads, v, run, short_upto=0):
    """The runs as `(sequence, unit, units)`, and groups of heads: by group, the longest first, by head if equal.

    Those that end at `short_upto` or before come last, from all groups.
    """
    found, size_before = [], 0
    for sequence, (count, length) in enumerate(zip(queries, keys, strict=True)):
        rows = count * v.group
        tiles = -(-rows // v.block_m) if v.rows_above < rows <= v.rows_upto else 0
        size = max(-(-length // 64), 1) if tiles else 0
        for head in range(heads):
            group = size_before * 64 * 2 * (v.head_dim + v.value_dim) // GROUP_BYTES.value
            size_before += size
            for end in range(tiles, 0, -run):
                begin = max(end - run, 0)
                last_row = (length - count) * v.group + end * v.block_m
                its_group = group if last_row > short_upto else math.inf
                found.append((its_group, -last_row, sequence, head, head * tiles + begin, end - begin))
    groups = 1 + (size_before - 1) * 64 * 2 * (v.head_dim + v.value_dim) // GROUP_BYTES.value
    return [(sequence, unit, units) for _, _, sequence, _, unit, units in sorted(found)], groups


@pytest.mark.parametrize(
    ("queries", "keys", "heads", "programs", "rounds", "run", "groups"),
    [
        ([700], [700], 2, 5, 2, 1, 1),
        ([700], [700], 2, 50, 2, 1, 1),
        ([300, 40, 0, 520, 1, 300], [300, 40, 9, 520, 1, 800], 4, 7, 1, 1, 1),
        ([300, 40, 0, 520, 1, 300], [300, 40, 9, 520, 1, 800], 4, 7, 3, 2, 1),
        ([90] * 150, [90] * 150, 2, 6, 2, 1, 3),
        ([200, 300, 200], [7000, 8192, 400], 6, 5, 2, 1, 6),
        ([200, 300, 200], [7000, 8192, 400], 6, 5, 2, 3, 6),
        ([130, 257], [0, 100], 2, 3, 2, 1, 1),
    ],
    ids=["one", "few-units", "ragged", "runs", "many", "groups", "groups-of-runs", "without-keys"],
)
@pytest.mark.parametrize("short_upto", [0, 900, 1200, 10**6])
@pytest.mark.parametrize("late", [0, 1])
def test_the_longest_of_a_group_come_first(queries, keys, heads, programs, rounds, run, groups, late, short_upto):
    v, spare = variant_of(queries, keys, 50, heads, programs, num_heads=4 * heads), 50
    expected, its_groups = runs_in_order([*queries, spare], [*keys, 0], heads, v, run, short_upto)
    assert its_groups == groups
    size = PIECES_BEGIN.value + 5 * (programs * rounds + len(expected) + 20)
    pieces = torch.full((size,), UNWRITTEN, dtype=torch.int32, device=DEVICE)
    lens, bounds = (
        torch.tensor(it, dtype=torch.int32, device=DEVICE) for it in (keys, [0, *itertools.accumulate(queries)])
    )
    batch = sum(queries) + spare, len(keys), heads, 8192
    deal_all[(programs, rounds)](pieces, run, len(expected), late, short_upto, lens, bounds, *batch, V=v)
    begin, end = pieces[:2].tolist()
    written = pieces[PIECES_BEGIN.value :].view(-1, 5)
    assert begin == programs * rounds and (written[end:] == UNWRITTEN).all()
    turns = 0 if late else min(rounds, 2) if groups == 1 else 1
    dealt = written[:begin].view(programs, rounds, 5).transpose(0, 1).tolist()
    assert all(piece[3:] == NOTHING for turn in dealt[turns:] for piece in turn)
    dealt = [piece for number, turn in enumerate(dealt[:turns]) for piece in (reversed(turn) if number else turn)]
    got = dealt + written[begin:end].tolist()
    assert all(piece[3:] == NOTHING for piece in got[len(expected) :])
    assert got[: len(expected)] == [[*unit, 0, units, LAST_TILE.value] for *unit, units in expected]


def pieces_of(queries, heads, programs, rounds, v, keys=None, **options):
    """Pieces of all programs, and listed ones."""
    pieces, _, _ = deal(queries, keys or queries, 0, heads, programs, rounds, v, run=1, once=True, **options)
    begin, end = pieces[:2].tolist()
    pieces = pieces[PIECES_BEGIN.value :].view(-1, 5)
    return pieces[:begin].view(programs, rounds, 5).tolist(), pieces[begin:end].tolist()


def is_whole(dealt, listed):
    pieces = [*itertools.chain(*dealt), *listed]
    return all(first == 0 and count <= 1 and end == LAST_TILE.value for *_, first, count, end in pieces)


def longest_program(dealt, listed, cost):
    """Work of the program that ends last, if whoever is done takes from the list."""
    ends = [sum(cost[sequence, unit] for sequence, unit, _, count, _ in pieces if count) for pieces in dealt]
    heapq.heapify(ends)
    for sequence, unit, *_ in listed:
        heapq.heappushpop(ends, ends[0] + cost[sequence, unit])
    return max(ends)


@pytest.mark.parametrize("programs", [8, 13, 20, 31])
@pytest.mark.parametrize("queries", [[300], [600], [900], [200] * 3, [600, 300, 90, 450]], ids=str)
def test_programs_end_together_or_units_are_cut(queries, programs):
    """Work is keys and a fixed part of each unit, and combining parts costs a program twice as much as that part."""
    heads, rounds = 4, 2
    v = variant_of(queries, queries, 0, heads, programs, num_heads=16)
    cost = {unit: tiles * v.tile * v.group + v.unit_cost for unit, tiles in units_of(queries, queries, heads, v)}
    combined = sum(cost.values()) / programs + 2 * v.unit_cost
    dealt, listed = pieces_of(queries, heads, programs, rounds, v)
    if is_whole(dealt, listed):
        assert longest_program(dealt, listed, cost) <= combined + 0.25 * v.unit_cost
    else:
        every, _ = runs_in_order(queries, queries, heads, v, 1)
        assert longest_program([[]] * programs, every, cost) > combined - 0.5 * v.unit_cost


@pytest.mark.parametrize(("tokens", "heads", "group"), [(2500, 8, 4), (1700, 32, 1), (2400, 16, 1)])
def test_short_units_even_out_what_groups_leave(tokens, heads, group):
    """In groups like the others, they would leave programs up to 1.6 times their share: the last group's longest."""
    v = variant_of([tokens], [tokens], 0, heads, 132, num_heads=group * heads)
    cost = {unit: tiles * v.tile * v.group + v.unit_cost for unit, tiles in units_of([tokens], [tokens], heads, v)}
    dealt, listed = pieces_of([tokens], heads, 132, 2, v)
    assert is_whole(dealt, listed)
    assert longest_program(dealt, listed, cost) <= sum(cost.values()) / 132 + 1.5 * v.unit_cost


@pytest.mark.parametrize(
    ("queries", "keys", "programs", "whole"),
    [
        ([512], [512], 132, True),
        ([1024], [1024], 132, True),
        ([1500], [1500], 132, True),
        ([512] * 16, [512] * 16, 132, True),
        ([128], [4000], 132, False),
        ([576], [2000], 132, False),
        ([2048], [4096], 132, True),
        ([1000] * 8 + [128], [1000] * 8 + [8192], 132, False),
        ([1500, 64, 100], [1500, 64, 4100], 132, False),
    ],
    ids=["512", "1k", "1500", "16x512", "few", "one-and-a-bit", "chunk", "long-ones-last", "a-few-long-ones"],
)
def test_when_units_are_dealt_out_whole(queries, keys, programs, whole):
    heads = 8
    v = variant_of(queries, keys, 0, heads, programs, num_heads=32)
    assert is_whole(*pieces_of(queries, heads, programs, 2, v, keys)) == whole


def test_units_that_see_all_keys_are_cut():
    """Their order goes by the keys that causal ones see."""
    queries, heads, programs = [300, 500, 700], 4, 10
    assert is_whole(*pieces_of(queries, heads, programs, 2, variant_of(queries, queries, 0, heads, programs)))
    v = variant_of(queries, queries, 0, heads, programs, causal=False)
    assert not is_whole(*pieces_of(queries, heads, programs, 2, v))


def test_late_units_of_a_window_are_among_the_others():
    """They are not dealt out (see `attention_hopper`), so that all are listed."""
    queries, heads, programs, window = [2100], 8, 16, 100
    v = variant_of(queries, queries, 0, heads, programs, num_heads=64, window=window)
    dealt, listed = pieces_of(queries, heads, programs, 2, v, window=window)
    assert not any(count for pieces in dealt for *_, count, _ in pieces)
    assert sorted((sequence, unit) for sequence, unit, *_ in listed) == [
        u for u, _ in units_of(queries, queries, heads, v)
    ]
    assert is_whole(dealt, listed)


@pytest.mark.parametrize(("queries", "block_m", "whole"), [([1024], 64, True), ([4100], 128, False)])
def test_late_units_are_among_the_others_if_all_are_short(queries, block_m, whole):
    heads, programs = 8, 16
    v = variant_of(queries, queries, 0, heads, programs, num_heads=64, block_m=block_m)
    assert any(late_of(queries, queries, heads, v))
    dealt, listed = pieces_of(queries, heads, programs, 2, v)
    assert is_whole(dealt, listed) == whole
    assert any(count for pieces in dealt for *_, count, _ in pieces) != whole


def test_no_more_runs_than_there_is_room_for():
    """Of sequences that overlap there may be more."""
    queries, heads, programs = [400] * 9, 4, 10
    v = variant_of(queries, queries, 0, heads, programs, num_heads=16)
    dealt, listed = pieces_of([400], heads, programs, 1, v, queries, bounds=[0, 400] * 5)
    assert not is_whole(dealt, listed) and not listed


@pytest.mark.parametrize("tokens", [1024, 16384, 131072])
def test_runs_are_as_long_as_a_schedule_has_room(tokens):
    room, run = list_room(132, 6, tokens, 4, 8, 4, 128)
    units = (tokens // 32 + 5) * 8
    assert room * run >= units
    assert num_piece_ints(132, 6, -(-units // run)) <= ROOM
    assert run == 1 or num_piece_ints(132, 6, -(-units // (run - 1))) > ROOM


def test_who_finds_a_schedule_copies_it():
    queries, heads, programs = [300, 500], 4, 10
    v = replace(variant_of(queries, queries, 0, heads, programs, num_heads=16), rows_above=16)
    written, _, _ = deal(queries, queries, 0, heads, programs, 2, v, schedule=None, run=1)
    row = torch.cat([torch.full((8,), 7, dtype=torch.int32, device=DEVICE), written])
    row[row == UNWRITTEN] = 0
    for run in (1, NO_RUNS):
        copied, _, _ = deal(queries, queries, 0, heads, programs, 2, v, schedule=(row, 7), run=run)
        end = PIECES_BEGIN.value + 5 * int(written[1])
        assert torch.equal(copied[:end], written[:end])
