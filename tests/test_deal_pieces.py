"""The pieces that are dealt to programs in advance: together everything, and nothing twice."""

import itertools
import os

import pytest
import torch

pytest.importorskip("triton")
from torch_paged.kernels.launch_config import attention_launches
from torch_paged.kernels.problem import Device, Problem, next_power_of_two
from torch_paged.kernels.rounds import begin_rounds, deal_pieces

pytestmark = [pytest.mark.interpreter if os.environ.get("TRITON_INTERPRET") == "1" else pytest.mark.gpu]
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"

BATCHES = {
    "one-sequence": ([300], [300]),
    "few-queries": ([40], [5000]),
    "mixed": ([1, 150, 0, 2, 33, 70], [200, 150, 9, 64, 20, 517]),
    "nobody": ([1, 2, 0], [40, 50, 60]),
    "short-ones": ([20] * 40, [20] * 40),
    "without-keys": ([200, 90], [0, 30]),
}


def units_of(queries, keys, heads, v):
    """Every unit that the launch serves, as (sequence, unit), with its number of key tiles."""
    for sequence, (count, length) in enumerate(zip(queries, keys, strict=True)):
        rows = count * v.group
        if not v.rows_above < rows <= v.rows_upto:
            continue
        tiles = -(-rows // v.block_m)
        for unit in range(tiles * heads):
            last = (min(rows, (unit % tiles + 1) * v.block_m) - 1) // v.group
            seen = min(max(length - count + 1 + last, 0), length) if v.causal else length
            yield (sequence, unit), max(-(-seen // v.tile), 1)


def dealt_pieces(queries, keys, spare, heads, programs, rounds, v):
    """What `deal_pieces` writes, in the order of the row."""
    lens = torch.tensor(keys, dtype=torch.int32, device=DEVICE)
    bounds = torch.tensor([0, *queries]).cumsum(0).int().to(DEVICE)
    batch = sum(queries) + spare, len(keys), heads, 8192
    starts = torch.full(((rounds - 1) * programs + 1,), -1, dtype=torch.int64, device=DEVICE)
    if rounds > 1:
        begin_rounds[(len(starts),)](lens, bounds, starts, *batch, programs, rounds, V=v)
    pieces = torch.full((programs, rounds, 5), -1, dtype=torch.int32, device=DEVICE)
    padded = next_power_of_two(programs)
    deal_pieces[(programs, rounds)](lens, bounds, starts, pieces, *batch, PROGRAMS=padded, V=v)
    return pieces.transpose(0, 1).flatten(0, 1).tolist()


def variant_of(queries, keys, spare, heads, programs, causal=True):
    problem = Problem(sum(queries) + spare, len(keys), 8, heads, 128, 128, 16, 2, causal, ragged=True)
    return attention_launches(problem, Device(programs, 227 * 1024, 90))[0].variant


@pytest.mark.parametrize(("programs", "rounds"), [(1, 1), (3, 1), (40, 1), (3, 2), (3, 5), (17, 3)])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("name", BATCHES)
def test_every_tile_is_dealt_once(name, causal, programs, rounds):
    queries, keys = BATCHES[name]
    spare, heads = 3, 2
    v = variant_of(queries, keys, spare, heads, programs, causal)
    pieces = dealt_pieces(queries, keys, spare, heads, programs, rounds, v)

    # The rows past the last query are a sequence of their own.
    units = list(units_of([*queries, spare], [*keys, 0], heads, v))
    order = {unit: number for number, (unit, _) in enumerate(units)}
    dealt = []
    for place, (sequence, unit, begin, count, end) in enumerate(pieces):
        for index in range(count):
            number = order[sequence, unit] + index
            tiles = units[number][1]
            first, last = (begin if index == 0 else 0), min(end if index == count - 1 else tiles, tiles)
            assert first < last
            assert place >= (rounds - 1) * programs or (first, last) == (0, tiles)
            dealt += [(number, tile) for tile in range(first, last)]
    assert dealt == list(itertools.chain(*([(n, tile) for tile in range(tiles)] for n, (_, tiles) in enumerate(units))))


@pytest.mark.parametrize("rounds", [1, 2, 4, 7])
def test_rounds_end_together(rounds):
    """All programs get as much, to a hundredth or two, though whole units alone are dealt at first."""
    programs, heads = 6, 4
    queries = keys = [3000, 900]
    v = variant_of(queries, keys, 0, heads, programs)
    fixed = v.unit_cost // (v.tile * v.group)  # in tiles
    units = dict(units_of(queries, keys, heads, v))
    costs = itertools.accumulate((tiles + fixed for tiles in units.values()), initial=0)
    before = dict(zip([*units, "end"], costs, strict=True))
    pieces = dealt_pieces(queries, keys, 0, heads, programs, rounds, v)
    begins = [(place % programs, before[s, u] + first) for place, (s, u, first, count, _) in enumerate(pieces) if count]
    work = [0] * programs
    for (program, begin), (_, end) in itertools.pairwise([*begins, (None, before["end"])]):
        work[program] += end - begin
    assert max(work) <= 1.02 * before["end"] / programs
    assert any(count for *_, count, _ in pieces[:programs])
