"""The pieces that are dealt to programs in advance: together everything, nothing twice."""

import itertools
import os
import random

import pytest
import torch

pytest.importorskip("triton")
from dealt_pieces import DEVICE, UNWRITTEN, check_covered, deal, dealt_pieces, dealt_rounds, variant_of
from dealt_units import units_of

from torch_paged.kernels.attention_schedule import DEALT, ROOM
from torch_paged.kernels.deal_pieces import list_room
from torch_paged.kernels.features import Features
from torch_paged.kernels.launch_config import attention_launches
from torch_paged.kernels.piece_list import num_piece_ints
from torch_paged.kernels.problem import Device, Problem
from torch_paged.kernels.rounds import FURTHER_ON
from torch_paged.kernels.units import LATE_UNITS

pytestmark = [pytest.mark.interpreter if os.environ.get("TRITON_INTERPRET") == "1" else pytest.mark.gpu]

BATCHES = {
    "one-sequence": ([300], [300]),
    "few-queries": ([40], [5000]),
    "mixed": ([1, 150, 0, 2, 33, 70], [200, 150, 9, 64, 20, 517]),
    "nobody": ([1, 2, 0], [40, 50, 60]),
    "short-ones": ([20] * 40, [20] * 40),
    "without-keys": ([200, 90], [0, 30]),
}


@pytest.mark.parametrize(
    ("programs", "rounds", "causal", "block_m"),
    [(3, 1, True, 128), (1, 1, True, 128), (13, 1, True, 192), (3, 2, False, 128), (3, 4, True, 192)],
)
@pytest.mark.parametrize("name", BATCHES)
def test_every_tile_is_dealt_once(name, programs, rounds, causal, block_m):
    queries, keys = BATCHES[name]
    spare, heads = 3, 2
    v = variant_of(queries, keys, spare, heads, programs, causal, block_m)
    pieces, late = dealt_pieces(queries, keys, spare, heads, programs, rounds, v)
    whole = check_covered(pieces, late, queries, keys, spare, heads, v)
    assert all(whole[: (rounds - 1) * programs])


def test_units_are_cut_in_one_round_of_two():
    queries, keys = BATCHES["mixed"]
    v = variant_of(queries, keys, 3, 2, 7)
    (first, second), late = dealt_rounds(queries, keys, 3, 2, 7, 2, v, once=True)
    check_covered(first, late, queries, keys, 3, 2, v)
    assert not any(count for *_, count, _ in second)


@pytest.mark.parametrize(
    ("name", "window", "programs", "rounds"),
    [
        ("mixed", 1, 3, 1),
        ("mixed", 100, 7, 1),
        ("few-queries", 300, 3, 3),
        ("without-keys", 128, 3, 2),
        ("uniform", 130, 3, 3),
        ("late", 300, 3, 3),
        ("late", 2**31 - 1, 3, 2),
    ],
)
def test_every_tile_that_a_window_shows_is_dealt_once(name, window, programs, rounds):
    others = {"uniform": ([90] * 3, [700, 90, 40]), "late": ([2500, 40], [2600, 3000])}
    queries, keys = (BATCHES | others)[name]
    spare, ragged = (0, False) if name == "uniform" else (3, True)
    heads, num_heads = (8, 64) if name == "late" else (2, 8)
    v = variant_of(queries, keys, spare, heads, programs, num_heads=num_heads, window=window, ragged=ragged)
    pieces, late = dealt_pieces(queries, keys, spare, heads, programs, rounds, v, window=window)
    assert (len(late) >= LATE_UNITS.value) == (name == "late")
    whole = check_covered(pieces, late, queries, keys, spare, heads, v, window)
    assert all(whole[: (rounds - 1) * programs])


@pytest.mark.parametrize(("programs", "rounds", "causal"), [(3, 1, True), (7, 2, True), (5, 3, True), (5, 3, False)])
@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        ([2048], [2048]),
        ([4000], [4100]),
        ([3000], [2900]),
        ([1, 2500, 1, 60, 2100, 2047], [500, 2500, 4000, 60, 2100, 2047]),
        ([2400] + [100] * 130 + [2400], [2400] + [100] * 130 + [2500]),
    ],
    ids=["just-enough", "a-few-keys-before", "more-queries-than-keys", "several", "far-behind"],
)
def test_units_that_see_little_of_a_long_prompt_come_last(queries, keys, programs, rounds, causal):
    heads, spare = 8, 3
    v = variant_of(queries, keys, spare, heads, programs, causal, num_heads=64)
    pieces, late = dealt_pieces(queries, keys, spare, heads, programs, rounds, v)
    assert (len(late) >= LATE_UNITS.value) == causal
    whole = check_covered(pieces, late, queries, keys, spare, heads, v)
    assert all(whole[: (rounds - 1) * programs])


def test_no_more_late_units_than_there_is_room_for():
    """Of sequences that overlap there may be more."""
    queries, heads = [2048] * 9, 8
    v = variant_of(queries, queries, 0, heads, 3, num_heads=64)
    _, late = dealt_rounds([2048, 100], queries, 0, heads, 3, 1, v, bounds=[0, 2048] * 5)
    room, _ = list_room(3, 1, 2148, 9, heads, v.group, v.block_m)
    assert len(late) == room < 5 * LATE_UNITS.value


SHAPES = {
    "decodes": ([1] * 20, range(1, 9000)),
    "decodes-and-chunk": ([1] * 12 + [700], range(700, 9000)),
    "short-prompts": ([100, 60, 90, 33, 150], range(1, 400)),
    "short-prompts-on-many-keys": ([100, 60, 90, 33, 150], range(4000, 8192)),
    "short-and-long": ([60, 90, 1, 1, 3500], range(1, 3600)),
    "nobody": ([], []),
}


@pytest.mark.parametrize(("rounds", "seed", "window"), [(1, 0, None), (3, 1, None), (3, 2, 200)])
@pytest.mark.parametrize("name", SHAPES)
def test_random_batches_are_dealt_out_once(name, rounds, seed, window):
    chance, heads, programs, spare = random.Random(seed), 2, 4, seed
    queries, lengths = SHAPES[name]
    queries = chance.sample(queries, len(queries))
    keys = [max(count, chance.choice(lengths)) for count in queries]
    v = variant_of(queries, keys, spare, heads, programs, window=window)
    dealt, late = dealt_rounds(queries, keys, spare, heads, programs, rounds, v, window=window)
    check_covered(itertools.chain(*dealt), late, queries, keys, spare, heads, v, window)


@pytest.mark.parametrize("batch", [BATCHES["mixed"], ([1] * 20, [90] * 20)], ids=["work", "no-work"])
@pytest.mark.parametrize("block_m", [128, 192])
def test_nothing_is_left_to_others_yet(block_m, batch):
    """An empty first slot of each program."""
    queries, keys, programs = *batch, 3
    v = variant_of(queries, keys, 0, 2, programs, block_m=block_m)
    _, partial, handoff = deal(queries, keys, 0, 2, programs, 2, v)
    check_nothing_is_left(partial, handoff, programs, v)


def check_nothing_is_left(partial, handoff, programs, v):
    assert handoff.tolist() == [[0] * programs, [-1] * programs, [UNWRITTEN] * programs]
    outputs, sums = partial.split([2 * programs * v.block_m * v.value_dim, 4 * programs * v.block_m])
    sums = sums.view(programs, 2, v.block_m, 2)
    assert outputs.isnan().all() and sums[:, 1].isnan().all()
    assert (sums[:, 0, :, 0] == -torch.inf).all() and (sums[:, 0, :, 1] == 0).all()


@pytest.mark.parametrize(
    ("queries", "heads", "num_heads", "programs", "rounds"),
    [([3000, 900], 4, 8, 5, 2), ([3000, 900], 4, 8, 5, 7), ([2048], 6, 6, 11, 6)],
    ids=["two", "seven", "each-begins-a-head"],
)
def test_rounds_end_together(queries, heads, num_heads, programs, rounds):
    """All programs get as much, to a tile and a hundredth or two, though whole units alone are dealt at first."""
    keys = queries
    v = variant_of(queries, keys, 0, heads, programs, num_heads=num_heads)
    fixed = v.unit_cost // (v.tile * v.group)  # in tiles
    units = dict(units_of(queries, keys, heads, v))
    costs = itertools.accumulate((tiles + fixed for tiles in units.values()), initial=0)
    before = dict(zip([*units, "end"], costs, strict=True))
    pieces, _ = dealt_pieces(queries, keys, 0, heads, programs, rounds, v)
    begins = []
    for place, (sequence, unit, first, count, _) in enumerate(pieces):
        if count:
            number, last = place // programs, rounds - 1
            turned = FURTHER_ON.value * number if number < last else 0
            begins.append(((place - turned) % programs, before[sequence, unit] + first))
    work = [0] * programs
    for (program, begin), (_, end) in itertools.pairwise([*begins, (None, before["end"])]):
        work[program] += end - begin
    assert max(work) - 1 <= 1.02 * before["end"] / programs
    assert any(count for *_, count, _ in pieces[:programs])


SCHEDULED_BATCHES = {
    "mixed": (BATCHES["mixed"], 3),
    "late": (([3000, 1], [3000, 500]), 4),
    "one-round": (BATCHES["few-queries"], 1),
    "alike": (([48], [4000]), 2),  # 8 turns
    "no-work": (([1] * 20, [90] * 20), 2),
}


@pytest.mark.parametrize("name", SCHEDULED_BATCHES)
def test_a_schedule_has_what_a_call_deals_out(name):
    """And a call that finds it has the same, and leaves nothing to others yet."""
    (queries, keys), rounds = SCHEDULED_BATCHES[name]
    heads, programs, stamp = 8, 3, 1234567
    v = variant_of(queries, keys, 0, heads, programs, num_heads=64)
    batch = queries, keys, 0, heads, programs, rounds, v
    expected, _, _ = deal(*batch)
    written, _, _ = deal(*batch, schedule=None)
    assert torch.equal(written, expected)

    # As a schedule is zeros before.
    copied, partial, handoff = deal(*batch, schedule=(stamped(written, stamp), stamp))
    assert torch.equal(copied, expected)
    check_nothing_is_left(partial, handoff, programs, v)


def stamped(written, stamp):
    """A schedule of what `deal_pieces` wrote, zeros elsewhere."""
    row = torch.cat([torch.full((DEALT.value,), stamp, dtype=torch.int32, device=DEVICE), written])
    row[row == UNWRITTEN] = 0
    return row


@pytest.mark.parametrize(
    ("queries", "keys"),
    [([40, 9, 300], [40, 9, 300]), ([0, 0, 1], [0, 5, 1]), ([349, 0, 0], [7, 0, 0]), ([100, 149, 100], [9000] * 3)],
)
@pytest.mark.parametrize("rounds", [1, 3])
def test_pieces_for_other_lengths_begin_in_a_unit_and_have_a_tile(queries, keys, rounds):
    """Whoever uses a schedule for lengths that it was not made for loses results, but nothing is read out of place."""
    made_for, heads, programs, stamp = ([300, 9, 40], [8000, 1000, 800]), 2, 3, 9
    v = variant_of(*made_for, 0, heads, programs)
    written, _, _ = deal(*made_for, 349 - sum(made_for[0]), heads, programs, rounds, v, schedule=None)
    schedule = stamped(written, stamp), stamp
    dealt, late = dealt_rounds(queries, keys, 349 - sum(queries), heads, programs, rounds, v, schedule=schedule)
    tiles = dict(units_of([*queries, 349 - sum(queries)], [*keys, 0], heads, v))
    of_head = [-(-count * v.group // v.block_m) for count in (*queries, 349 - sum(queries))]
    for sequence, unit, first, count, end in [*itertools.chain(*dealt), *late]:
        if count:
            assert 0 <= unit < max(of_head[sequence], 1) * heads
            assert 0 <= first < tiles.get((sequence, unit), 1) and (count > 1 or end > first)


@pytest.mark.parametrize("heads", [(32, 8), (32, 32), (64, 8), (28, 4)])
@pytest.mark.parametrize(("num_seqs", "ragged"), [(1, False), (16, False), (16, True)])
@pytest.mark.parametrize(("dim", "short_window"), [(64, False), (64, True), (128, False), (128, True), (256, False)])
def test_a_schedule_has_room_for_prompts_of_16k_tokens(heads, num_seqs, ragged, dim, short_window):
    sizes, windows = (16384, num_seqs, *heads), dict(features=Features(window=short_window), short_window=short_window)
    problem = Problem(*sizes, dim, dim, 16, 2, True, ragged, **windows)
    launch = attention_launches(problem, Device(132, 227 * 1024, 90))[0]
    v, launched = launch.variant, (launch.programs, launch.rounds)
    room, _ = list_room(*launched, 16384, num_seqs, heads[1], v.group, v.block_m)
    assert num_piece_ints(*launched, room) <= ROOM


@pytest.mark.parametrize("name", SCHEDULED_BATCHES)
def test_who_does_not_find_its_schedule_deals_out_in_one_round_or_in_turn(name):
    (queries, keys), rounds = SCHEDULED_BATCHES[name]
    heads, programs = 8, 3
    v = variant_of(queries, keys, 0, heads, programs, num_heads=64)
    other = torch.full((100,), 5, dtype=torch.int32, device=DEVICE)
    dealt, late = dealt_rounds(queries, keys, 0, heads, programs, rounds, v, schedule=(other, 6))
    if name not in ("one-round", "alike"):  # these have alike units
        assert all(count == 0 for pieces in dealt[1:] for *_, count, _ in pieces)
    check_covered(itertools.chain(*dealt), late, queries, keys, 0, heads, v)
