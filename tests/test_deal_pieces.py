"""The pieces that are dealt to programs in advance: together everything, and nothing twice."""

import itertools
import os
from dataclasses import replace

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
    """What `deal_pieces` writes, in the order of the row; `rounds` 0 is one round without `begin_rounds`."""
    lens = torch.tensor(keys, dtype=torch.int32, device=DEVICE)
    bounds = torch.tensor([0, *queries]).cumsum(0).int().to(DEVICE)
    batch = sum(queries) + spare, len(keys), heads, 8192
    starts = torch.full(((rounds - 1) * programs + 1 if rounds else 0,), -1, dtype=torch.int64, device=DEVICE)
    if rounds:
        begin_rounds[(len(starts),)](lens, bounds, starts, *batch, programs, rounds, V=v)
    pieces = torch.full((programs, max(rounds, 1), 5), -1, dtype=torch.int32, device=DEVICE)
    grid, padded = (programs, max(rounds, 1)), next_power_of_two(programs)
    deal_pieces[grid](lens, bounds, starts, pieces, *batch, PROGRAMS=padded, V=v)
    return pieces.transpose(0, 1)


def variant_of(queries, keys, spare, heads, programs, rounds, causal=True):
    problem = Problem(sum(queries) + spare, len(keys), 8, heads, 128, 128, 16, 2, causal, ragged=True)
    v = attention_launches(problem, Device(programs, 227 * 1024, 90))[0].variant
    return replace(v, parts=2 if rounds else 1)


@pytest.mark.parametrize("rounds", [0, 1, 2, 5])
@pytest.mark.parametrize("programs", [1, 3, 40])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("name", BATCHES)
def test_every_tile_is_dealt_once(name, causal, programs, rounds):
    queries, keys = BATCHES[name]
    spare, heads = 3, 2
    v = variant_of(queries, keys, spare, heads, programs, rounds, causal)
    pieces = dealt_pieces(queries, keys, spare, heads, programs, rounds, v)

    # The rows past the last query are a sequence of their own.
    units = list(units_of([*queries, spare], [*keys, 0], heads, v))
    order = {unit: number for number, (unit, _) in enumerate(units)}
    dealt = []
    for place, (sequence, unit, begin, count, end) in enumerate(pieces.flatten(0, 1).tolist()):
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
    """Together, the pieces of each program are as long as those of any other, to a tile or two."""
    programs, heads = 6, 4
    queries = keys = [3000, 900]
    v = variant_of(queries, keys, 0, heads, programs, rounds)
    pieces = dealt_pieces(queries, keys, 0, heads, programs, rounds, v)
    units = list(units_of(queries, keys, heads, v))
    order = {unit: number for number, (unit, _) in enumerate(units)}
    cost, work = v.unit_cost // (v.tile * v.group), [0] * programs
    for place, (sequence, unit, begin, count, end) in enumerate(pieces.flatten(0, 1).tolist()):
        of_piece = [tiles for _, tiles in units[order[sequence, unit] :][:count]] if count else []
        of_last = min(end, of_piece[-1]) if count else 0
        whole = sum(of_piece[:-1]) + cost * (count - 1) if count else 0
        work[place % programs] += whole + of_last + cost * (of_last == (of_piece or [0])[-1]) - begin * (count > 0)
    assert max(work) - min(work) <= 2 * cost + 2
    assert rounds == 1 or sum(piece[3] for piece in pieces[0].tolist()) > 0
