"""What `deal_pieces` writes, and whether that is everything, nothing twice."""

import itertools
import os
from dataclasses import replace

import torch
from dealt_units import units_of

from torch_paged.kernels.deal import LAST_TILE
from torch_paged.kernels.deal_pieces import deal_pieces, list_room
from torch_paged.kernels.features import Features
from torch_paged.kernels.launch_config import attention_launches
from torch_paged.kernels.piece_list import PIECES_BEGIN, num_piece_ints
from torch_paged.kernels.problem import Device, Problem, next_power_of_two
from torch_paged.kernels.rounds import FURTHER_ON, begin_rounds
from torch_paged.kernels.units import LATE_UNITS

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
UNWRITTEN = -77
NO_SCHEDULE = ()
NO_RUNS = 2**20  # units in the place of one: nothing is dealt out the longest first


def deal(
    queries, keys, spare, heads, programs, rounds, v, bounds=None, window=None, schedule=NO_SCHEDULE, run=NO_RUNS,
    once=False,
):  # fmt: skip
    """What `deal_pieces` writes: pieces, and what is left to `combine`. `schedule`: it and a stamp; None: write one.

    Units that are cut are so in `rounds`, or `once`.
    """
    lens = torch.tensor(keys, dtype=torch.int32, device=DEVICE)
    if bounds is None:
        bounds = [0, *itertools.accumulate(queries)]
    batch = sum(queries) + spare, len(keys), heads, 8192, window or 0
    bounds = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    starts = None
    if rounds > 1 and not once:
        starts = torch.full(((rounds - 1) * programs + 1,), -1, dtype=torch.int64, device=DEVICE)
    if starts is not None and schedule in (None, NO_SCHEDULE):
        begin_rounds[(len(starts),)](lens, bounds, starts, *batch, programs, rounds, V=v)
    room, _ = list_room(programs, rounds, *batch[:3], v.group, v.block_m)
    pieces = torch.full((num_piece_ints(programs, rounds, room) + 500,), UNWRITTEN, dtype=torch.int32, device=DEVICE)
    partial = torch.full((2 * programs * v.block_m * (v.value_dim + 2),), torch.nan, device=DEVICE)
    handoff = torch.full((3, programs), UNWRITTEN, dtype=torch.int32, device=DEVICE)
    if schedule is None:
        begun = None, 0, pieces, None, None
    else:
        begun = (lens, 0) if schedule == NO_SCHEDULE else schedule
        begun += pieces, partial, handoff
    deal_pieces[(programs, rounds)](
        lens, bounds, starts, *begun, *batch, room, run, PROGRAMS=next_power_of_two(programs), V=v
    )
    return pieces, partial, handoff


def dealt_rounds(queries, keys, spare, heads, programs, rounds, v, window=None, **options):
    """`[rounds, pieces]` in the order of the row, and late ones; a list of alike units is a last round."""
    pieces, _, _ = deal(queries, keys, spare, heads, programs, rounds, v, window=window, **options)
    begin, end = pieces[: PIECES_BEGIN.value].tolist()
    pieces = pieces[PIECES_BEGIN.value :].view(-1, 5)
    room, _ = list_room(programs, rounds, sum(queries) + spare, len(keys), heads, v.group, v.block_m)
    assert begin == programs * rounds and end <= begin + room
    assert (pieces[end:] == UNWRITTEN).all()
    dealt, listed = pieces[:begin].view(programs, rounds, 5).transpose(0, 1), pieces[begin:end].tolist()
    _, _, first, count, last = dealt[-1].unbind(1)
    in_turn = ((count == 0) | ((first == 0) & (count == 1) & (last == LAST_TILE.value))).all()
    turned = range(rounds if in_turn else rounds - 1)
    dealt = [its.roll(FURTHER_ON.value * (number in turned) * number, 0).tolist() for number, its in enumerate(dealt)]
    alike = listed and not any(late_of(queries, keys, heads, v))
    return ([*dealt, listed], []) if alike else (dealt, listed)


def dealt_pieces(*batch, **options):
    """The pieces, in the order of the row, and late ones."""
    rounds, late = dealt_rounds(*batch, **options)
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
