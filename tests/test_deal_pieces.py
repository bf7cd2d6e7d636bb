"""The pieces that are dealt to programs in advance: together everything, and nothing twice."""

import itertools
import os

import pytest
import torch

pytest.importorskip("triton")
from torch_paged.kernels.launch_config import attention_launches
from torch_paged.kernels.problem import Device, Problem
from torch_paged.kernels.schedule import deal_pieces

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


@pytest.mark.parametrize("programs", [1, 3, 40])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("name", BATCHES)
def test_every_tile_is_dealt_once(name, causal, programs):
    queries, keys = BATCHES[name]
    spare, heads = 3, 2
    problem = Problem(sum(queries) + spare, len(keys), 8, heads, 128, 128, 16, 2, causal, ragged=True)
    v = attention_launches(problem, Device(programs, 227 * 1024, 90))[0].variant
    pieces = torch.full((programs, 5), -1, dtype=torch.int32, device=DEVICE)
    lens = torch.tensor(keys, dtype=torch.int32, device=DEVICE)
    bounds = torch.tensor([0, *queries]).cumsum(0).int().to(DEVICE)
    deal_pieces[(programs,)](lens, bounds, pieces, problem.num_tokens, len(keys), heads, 8192, V=v)

    # The rows past the last query are a sequence of their own.
    units = list(units_of([*queries, spare], [*keys, 0], heads, v))
    order = {unit: number for number, (unit, _) in enumerate(units)}
    dealt = []
    for sequence, unit, begin, count, end in pieces.tolist():
        for index in range(count):
            number = order[sequence, unit] + index
            tiles = units[number][1]
            first, last = (begin if index == 0 else 0), min(end if index == count - 1 else tiles, tiles)
            assert first < last
            dealt += [(number, tile) for tile in range(first, last)]
    assert dealt == list(itertools.chain(*([(n, tile) for tile in range(tiles)] for n, (_, tiles) in enumerate(units))))
