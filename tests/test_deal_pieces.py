"""The pieces that are dealt to programs in advance: together everything, nothing twice, and all to one form."""

import itertools
import os
import random
from dataclasses import replace

import pytest
import torch
from dealt_units import units_of

pytest.importorskip("triton")
from torch_paged.kernels.attention_schedule import DEALT, ROOM
from torch_paged.kernels.deal import LAST_TILE
from torch_paged.kernels.features import Features
from torch_paged.kernels.launch_config import attention_launches
from torch_paged.kernels.launch_tiles import LONG_LOOP
from torch_paged.kernels.problem import Device, Problem, next_power_of_two
from torch_paged.kernels.rounds import (
    FURTHER_ON,
    PIECES_BEGIN,
    SHORT_LOOPS,
    begin_rounds,
    deal_pieces,
    list_room,
    most_late,
    num_piece_ints,
)
from torch_paged.kernels.units import LATE_UNITS

pytestmark = [pytest.mark.interpreter if os.environ.get("TRITON_INTERPRET") == "1" else pytest.mark.gpu]
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"

UNWRITTEN = -77
NO_SCHEDULE = ()
BATCHES = {
    "one-sequence": ([300], [300]),
    "few-queries": ([40], [5000]),
    "mixed": ([1, 150, 0, 2, 33, 70], [200, 150, 9, 64, 20, 517]),
    "nobody": ([1, 2, 0], [40, 50, 60]),
    "short-ones": ([20] * 40, [20] * 40),
    "without-keys": ([200, 90], [0, 30]),
}


def deal(queries, keys, spare, heads, programs, rounds, v, long_loop=0, bounds=None, window=None, schedule=NO_SCHEDULE):
    """What `deal_pieces` writes: pieces, and what is left to `combine`. `schedule`: it and a stamp; None: write one."""
    lens = torch.tensor(keys, dtype=torch.int32, device=DEVICE)
    if bounds is None:
        bounds = [0, *itertools.accumulate(queries)]
    batch = sum(queries) + spare, len(keys), heads, 8192, window or 0
    bounds = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    starts = torch.full(((rounds - 1) * programs + 1,), -1, dtype=torch.int64, device=DEVICE)
    if rounds > 1 and schedule in (None, NO_SCHEDULE):
        begin_rounds[(len(starts),)](lens, bounds, starts, *batch, programs, rounds, V=v)
    room = list_room(programs, rounds, *batch[:3], v.group, v.block_m)
    pieces = torch.full((num_piece_ints(programs, rounds, room) + 500,), UNWRITTEN, dtype=torch.int32, device=DEVICE)
    partial = torch.full((2 * programs * v.block_m * (v.value_dim + 2),), torch.nan, device=DEVICE)
    handoff = torch.full((3, programs), UNWRITTEN, dtype=torch.int32, device=DEVICE)
    if schedule is None:
        begun = None, 0, pieces, None, None
    else:
        begun = (lens, 0) if schedule == NO_SCHEDULE else schedule
        begun += pieces, partial, handoff
    deal_pieces[(programs, rounds)](
        lens, bounds, starts, *begun, *batch, long_loop, room, PROGRAMS=next_power_of_two(programs), V=v
    )
    return pieces, partial, handoff


def dealt_rounds(queries, keys, spare, heads, programs, rounds, v, *args, window=None, **options):
    """The form, `[rounds, pieces]` in the order of the row, and late ones; a list of alike units is a last round."""
    pieces, _, _ = deal(queries, keys, spare, heads, programs, rounds, v, *args, window=window, **options)
    begin, end, form = pieces[: PIECES_BEGIN.value].tolist()
    pieces = pieces[PIECES_BEGIN.value :].view(-1, 5)
    if not any(units_of([*queries, spare], [*keys, 0], heads, v, window)):
        assert form == -1 and begin == end == UNWRITTEN and (pieces == UNWRITTEN).all()
        return form, [], []
    room = list_room(programs, rounds, sum(queries) + spare, len(keys), heads, v.group, v.block_m)
    assert begin == programs * rounds and end <= begin + room
    assert (pieces[end:] == UNWRITTEN).all()
    dealt, listed = pieces[:begin].view(programs, rounds, 5).transpose(0, 1), pieces[begin:end].tolist()
    _, _, first, count, last = dealt[-1].unbind(1)
    in_turn = ((count == 0) | ((first == 0) & (count == 1) & (last == LAST_TILE.value))).all()
    turned = range(rounds if in_turn else rounds - 1)
    dealt = [its.roll(FURTHER_ON.value * (number in turned) * number, 0).tolist() for number, its in enumerate(dealt)]
    alike = listed and not any(late_of(queries, keys, heads, v))
    return (form, [*dealt, listed], []) if alike else (form, dealt, listed)


def dealt_pieces(*batch, **options):
    """The pieces, in the order of the row, and late ones."""
    _, rounds, late = dealt_rounds(*batch, **options)
    assert all(count >= 0 for pieces in rounds for *_, count, _ in pieces)
    return list(itertools.chain(*rounds)), late


def variant_of(queries, keys, spare, heads, programs, causal=True, block_m=128, num_heads=8, window=None, ragged=True):
    has = Features(window=window is not None)
    sizes = sum(queries) + spare, len(keys), num_heads, heads
    problem = Problem(*sizes, 128, 128, 16, 2, causal, ragged, features=has)
    variant = attention_launches(problem, Device(programs, 227 * 1024, 90))[0].variant
    return replace(variant, block_m=block_m, overlap=False)  # the interpreter knows nothing of that


def late_of(queries, keys, heads, v):
    """The late units, longest first: whose rows all see less than a quarter of a sequence that has enough of them."""
    for sequence, (count, length) in enumerate(zip(queries, keys, strict=True)):
        rows = count * v.group
        late = max(length // 4 - max(length - count, 0), 0) * v.group // v.block_m if v.causal else 0
        assert length - count + late * v.block_m // v.group <= length // 4 or not late
        if v.rows_above < rows <= v.rows_upto and late * heads >= LATE_UNITS.value:
            for tile in reversed(range(late)):
                yield from ((sequence, head * -(-rows // v.block_m) + tile) for head in range(heads))


def check_covered(pieces, late, queries, keys, spare, heads, v, window=None):
    """Each tile of keys of each unit is in one piece, and returns whether each piece has whole units alone."""
    assert late == [[*unit, 0, 1, LAST_TILE.value] for unit in late_of(queries, keys, heads, v)]
    late = {(sequence, unit) for sequence, unit, *_ in late}
    # The rows past the last query are a sequence of their own.
    units = list(units_of([*queries, spare], [*keys, 0], heads, v, window))
    order = {unit: number for number, (unit, _) in enumerate(units)}
    dealt, whole = [], []
    for sequence, unit, begin, count, end in pieces:
        whole.append(True)
        for index in range(count):
            number = order[sequence, unit] + index
            its, tiles = units[number]
            if its in late:
                continue
            first, last = (begin if index == 0 else 0), min(end if index == count - 1 else tiles, tiles)
            assert first < last
            whole[-1] &= (first, last) == (0, tiles)
            dealt += [(number, tile) for tile in range(first, last)]
    assert dealt == [(n, i) for n, (its, tiles) in enumerate(units) if its not in late for i in range(tiles)]
    return whole


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


@pytest.mark.parametrize(
    ("queries", "keys", "programs", "rounds", "parts"),
    [
        ([90], [4000], 13, 1, 1),  # 3 tiles of rows of 4 heads
        ([90, 0, 96], [4000, 50, 3900], 13, 1, 1),
        ([90, 0, 96], [4000, 50, 3900], 12, 3, 1),
        ([96] * 20, [4000] * 20, 32, 1, 1),
        ([20] * 132, [4000] * 132, 66, 2, 1),
        ([32], [4000], 13, 1, 3),
        ([32], [4000], 12, 2, 3),
        ([1, 20, 1], [400, 4000, 9], 33, 1, 8),
        ([60] * 40, [200] * 40, 21, 1, 1),
    ],
    ids=["one", "two", "empty-round", "many", "sequences", "thirds", "empty-thirds", "decodes-beside", "short"],
)
def test_alike_units_are_cut_alike(queries, keys, programs, rounds, parts):
    """Long ones go one after the other to all programs, and what the rounds do not hold is in the list."""
    heads = 4
    v = variant_of(queries, keys, 0, heads, programs, num_heads=16)
    v = replace(v, rows_above=16)
    _, dealt, late = dealt_rounds(queries, keys, 0, heads, programs, rounds, v)
    pieces = [*itertools.chain(*dealt)]
    whole = check_covered(pieces, late, queries, keys, 0, heads, v)
    tiles = dict(units_of([*queries, 0], [*keys, 0], heads, v))
    assert not late
    if keys[0] > 200:
        assert all(count <= 1 for *_, count, _ in pieces)
        assert len(pieces) == max(len(tiles) * parts, programs * rounds)
    if parts == 1:
        assert all(whole)
    for sequence, unit, first, count, end in pieces:
        of_unit = tiles.get((sequence, unit), 0)
        assert count == 0 or min(end, of_unit) - first <= -(-of_unit // parts)


@pytest.mark.parametrize(
    ("queries", "keys", "programs", "rounds"),
    [
        ([90, 20], [4000, 400], 15, 1),
        ([96] * 8, [3600] * 6 + [5200] * 2, 12, 1),
        ([33], [4000], 13, 1),
        ([96] * 5, [4000] * 5, 11, 3),
        ([96] * 2, [1500] * 2, 12, 2),
    ],
    ids=["lengths", "longest", "too-few-for-all", "rounds-do-it-better", "short"],
)
def test_other_units_are_cut_where_pieces_end(queries, keys, programs, rounds):
    """12 units of 4000 keys and 4 of 400; 24 and 8; 8; 60, which are 5.5 turns; 24 that do not have many keys."""
    heads = 4
    v = replace(variant_of(queries, keys, 0, heads, programs, num_heads=16), rows_above=16)
    pieces, late = dealt_pieces(queries, keys, 0, heads, programs, rounds, v)
    assert not all(check_covered(pieces, late, queries, keys, 0, heads, v))
    assert all(count for *_, count, _ in pieces[-programs:])


@pytest.mark.parametrize(("window", "ragged"), [(1700, True), (None, False)])
def test_alike_units_of_a_window_or_a_uniform_batch_go_in_turn(window, ragged):
    queries, keys, heads, programs, rounds = [96] * 6, [4000] * 6, 4, 12, 2
    v = variant_of(queries, keys, 0, heads, programs, num_heads=16, window=window, ragged=ragged)
    _, dealt, late = dealt_rounds(queries, keys, 0, heads, programs, rounds, v, window=window)
    assert all(check_covered(itertools.chain(*dealt), late, queries, keys, 0, heads, v, window))
    assert [[count for *_, count, _ in turn] for turn in dealt] == [[1] * 12, [1] * 12, [1] * 48]


def test_a_program_does_not_get_the_longest_unit_of_every_turn():
    """11 programs, and heads of 11 units, which have 2000 to 3400 keys."""
    queries, keys, heads, programs, rounds = [1408], [3400], 6, 11, 6
    v = variant_of(queries, keys, 0, heads, programs, num_heads=heads)
    pieces, _, _ = deal(queries, keys, 0, heads, programs, rounds, v)
    tiles = dict(units_of([*queries, 0], [*keys, 0], heads, v))
    pieces = pieces[PIECES_BEGIN.value :][: 5 * programs * rounds].view(programs, rounds, 5).tolist()
    assert sorted(unit for turns in pieces for _, unit, *_ in turns) == [*range(66)]
    work = [sum(tiles[0, unit] for _, unit, *_ in turns) for turns in pieces]
    assert max(work) * programs <= 1.06 * sum(work)


def test_no_more_alike_units_are_listed_than_there_is_room_for():
    """Of sequences that overlap there may be more."""
    queries, keys, heads, programs = [90] * 5, [4000] * 5, 4, 5
    v = replace(variant_of(queries, keys, 0, heads, programs, num_heads=16), rows_above=16)
    _, dealt, late = dealt_rounds([90], keys, 0, heads, programs, 1, v, bounds=[0, 90, 0, 90, 0, 90])
    assert len(dealt) == 1 and not late


def test_no_more_late_units_than_there_is_room_for():
    """Of sequences that overlap there may be more."""
    queries, heads = [2048] * 5, 8
    v = variant_of(queries, queries, 0, heads, 3, num_heads=64)
    _, _, late = dealt_rounds([2048, 100], queries, 0, heads, 3, 1, v, bounds=[0, 2048, 0, 2048, 0, 2048])
    assert len(late) == most_late(2148, heads, v.group, v.block_m) < 3 * LATE_UNITS.value


def test_late_units_do_not_decide_for_a_form():
    """The others have long loops, all together short ones."""
    queries, heads = [60] * 5 + [2100] + [60] * 5, 8
    v = variant_of(queries, queries, 0, heads, 3, num_heads=64)
    form, _, late = dealt_rounds(queries, queries, 0, heads, 3, 1, v, LONG_LOOP)
    units = dict(units_of(queries, queries, heads, v))
    all_units, others = len(units), len(units) - len(late)
    long = sum(tiles for its, tiles in units.items() if [*its, 0, 1, LAST_TILE.value] not in late)
    assert 1.05 * all_units * LONG_LOOP > 1.1 * long > 1.2 * others * LONG_LOOP
    assert form == 1


SHAPES = {
    "decodes": ([1] * 20, range(1, 9000)),
    "decodes-and-chunk": ([1] * 12 + [700], range(700, 9000)),
    "short-prompts": ([100, 60, 90, 33, 150], range(1, 400)),
    "short-prompts-on-many-keys": ([100, 60, 90, 33, 150], range(4000, 8192)),
    "short-and-long": ([60, 90, 1, 1, 3500], range(1, 3600)),
    "nobody": ([], []),
}


def mean_loop(queries, keys, heads, v, window):
    """Tiles of keys of a unit, on average."""
    tiles = [tiles for _, tiles in units_of(queries, keys, heads, v, window)]
    return sum(tiles) / len(tiles) if tiles else 0


@pytest.mark.parametrize(("rounds", "seed", "window"), [(1, 0, None), (3, 1, None), (3, 2, 200)])
@pytest.mark.parametrize("name", SHAPES)
def test_one_form_gets_everything(name, rounds, seed, window):
    """That for long loops where units have many tiles of keys on average; nobody tells the host."""
    chance, heads, programs, spare = random.Random(seed), 2, 4, seed
    queries, lengths = SHAPES[name]
    queries = chance.sample(queries, len(queries))
    keys = [max(count, chance.choice(lengths)) for count in queries]
    v = variant_of(queries, keys, spare, heads, programs, window=window)
    batch = queries, keys, spare, heads, programs, rounds, v
    form, dealt, late = dealt_rounds(*batch, LONG_LOOP, window=window)
    check_covered(itertools.chain(*dealt), late, queries, keys, spare, heads, v, window)
    mean = mean_loop(queries, keys, heads, v, window)
    if mean and not 0.9 * LONG_LOOP < mean < 1.1 * LONG_LOOP:
        assert form == (mean >= LONG_LOOP)
    for long_loop, expected in ((0, 1), (SHORT_LOOPS.value, 0)):
        same_form, same, _ = dealt_rounds(*batch, long_loop, window=window)
        assert same == dealt and same_form == (-1 if form < 0 else expected)


@pytest.mark.parametrize("batch", [BATCHES["mixed"], ([1] * 20, [90] * 20)], ids=["work", "no-work"])
@pytest.mark.parametrize(("long_loop", "block_m"), [(0, 128), (LONG_LOOP, 128), (0, 192)])
def test_nothing_is_left_to_others_yet(long_loop, block_m, batch):
    """What the form with the work overwrites, and the other leaves alone: an empty first slot of each program."""
    queries, keys, programs = *batch, 3
    v = variant_of(queries, keys, 0, 2, programs, block_m=block_m)
    _, partial, handoff = deal(queries, keys, 0, 2, programs, 2, v, long_loop)
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


@pytest.mark.parametrize("long_loop", [0, LONG_LOOP])
@pytest.mark.parametrize("name", SCHEDULED_BATCHES)
def test_a_schedule_has_what_a_call_deals_out(name, long_loop):
    """And a call that finds it has the same, and leaves nothing to others yet."""
    (queries, keys), rounds = SCHEDULED_BATCHES[name]
    heads, programs, stamp = 8, 3, 1234567
    v = variant_of(queries, keys, 0, heads, programs, num_heads=64)
    batch = queries, keys, 0, heads, programs, rounds, v, long_loop
    expected, _, _ = deal(*batch)
    written, _, _ = deal(*batch, schedule=None)
    assert torch.equal(written, expected)

    # As a schedule is zeros before.
    copied, partial, handoff = deal(*batch, schedule=(stamped(written, stamp), stamp))
    if name == "no-work":
        expected[:2] = torch.tensor([programs * rounds, 0])
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
    _, dealt, late = dealt_rounds(queries, keys, 349 - sum(queries), heads, programs, rounds, v, schedule=schedule)
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
    room = list_room(*launched, 16384, num_seqs, heads[1], v.group, v.block_m)
    assert num_piece_ints(*launched, room) <= ROOM


@pytest.mark.parametrize("name", SCHEDULED_BATCHES)
def test_who_does_not_find_its_schedule_deals_out_in_one_round_or_in_turn(name):
    (queries, keys), rounds = SCHEDULED_BATCHES[name]
    heads, programs = 8, 3
    v = variant_of(queries, keys, 0, heads, programs, num_heads=64)
    other = torch.full((100,), 5, dtype=torch.int32, device=DEVICE)
    form, dealt, late = dealt_rounds(queries, keys, 0, heads, programs, rounds, v, schedule=(other, 6))
    assert form == (-1 if name == "no-work" else 1)
    if name not in ("one-round", "alike"):  # these have alike units
        assert all(count == 0 for pieces in dealt[1:] for *_, count, _ in pieces)
    check_covered(itertools.chain(*dealt), late, queries, keys, 0, heads, v)
