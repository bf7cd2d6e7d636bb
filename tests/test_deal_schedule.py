"""The pieces that a schedule deals to programs: each tile of keys once, and beside them what a program leaves."""

import itertools
from dataclasses import replace

import pytest
import torch
from dealt_units import units_of

pytest.importorskip("triton")
from torch_paged.kernels.attention_schedule import _schedule
from torch_paged.kernels.launch_config import attention_launches
from torch_paged.kernels.problem import Device, Problem
from torch_paged.options import SCHEDULE_SHAPE

pytestmark = pytest.mark.interpreter

WORK = {
    "alike": ([1] * 5, [130] * 5),
    "alike-and-long": ([1] * 3, [2000] * 3),
    "short": ([1] * 40, list(range(40))),
    "long": ([1], [3000]),
    "unlike": ([1] * 5, [1, 900, 70, 0, 333]),
    "ragged": ([1, 9, 0, 40, 3], [200, 150, 9, 64, 700]),
}


@pytest.mark.parametrize("programs", [1, 2, 7, 24])
@pytest.mark.parametrize("name", WORK)
def test_every_tile_is_dealt_once_and_what_is_left_is_told(name, programs):
    queries, keys = WORK[name]
    ragged, heads = len(set(queries)) > 1, 2
    problem = Problem(sum(queries), len(keys), 8, heads, 128, 128, 16, 2, True, ragged)
    launch = attention_launches(problem, Device(programs, 160 * 1024, 80))[-1]
    v = replace(launch.variant, resident=1)
    lens, bounds = (torch.tensor(it, dtype=torch.int32) for it in (keys, [0, *itertools.accumulate(queries)]))
    schedule = torch.zeros(SCHEDULE_SHAPE[1], dtype=torch.int32)
    batch = sum(queries), len(keys), heads, 8192
    _schedule[(programs,)](lens, bounds if ragged else None, schedule, *batch, 0, V=v)

    assert schedule[0] == 0, "a stamp comes later"
    pieces = schedule[8 : 8 + 5 * programs].view(-1, 5).tolist()
    handoff = schedule[8 + 5 * programs : 8 + 8 * programs].view(3, -1).T.tolist()
    units = list(units_of([*queries, 0], [*keys, 0], heads, v))
    order = {unit: number for number, (unit, _) in enumerate(units)}
    dealt, owners = [], []
    for owner, (piece, left_by) in enumerate(zip(pieces, handoff, strict=True)):
        (sequence, unit, begin, count, end), (before, left_sequence, left_unit) = piece, left_by
        left, continued = None, 0
        for index in range(count):
            number = order[sequence, unit] + index
            tiles = units[number][1]
            first, last = (begin if index == 0 else 0), min(end if index == count - 1 else tiles, tiles)
            dealt += [(number, tile) for tile in range(first, last)]
            owners += [owner] * max(last - first, 0)
            if first and first < last:
                continued = 2 if last == tiles else 1
            if not first and last < tiles:
                left = units[number][0]
        assert before == continued
        assert (left_sequence, left_unit) == left if left else left_sequence == -1
    assert dealt == [(number, tile) for number, (_, tiles) in enumerate(units) for tile in range(tiles)]
    if name == "alike-and-long":
        longest = max(owners.count(number) for number in range(programs))
        assert longest <= 1.1 * len(dealt) / programs + 4, "all programs have work"
    if name == "alike" and programs == 24:
        assert all(count == 1 for _, _, _, count, _ in pieces[:20]), "two pieces of every unit"
