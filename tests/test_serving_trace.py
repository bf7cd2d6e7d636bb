"""How full the cache is kept on the benchmarks' trace: lengths alone decide, so that it can be asserted."""

import importlib
import sys
from pathlib import Path

import pytest

pytest.importorskip("safetensors")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
serving_trace = importlib.import_module("serving_trace")

PLACES = 8
MEMORY = serving_trace.Memory(PLACES, serving_trace.MOST_TOKENS, model=False)


@pytest.fixture(scope="module")
def requests():
    return serving_trace.trace(192, cut_each=False)


def test_the_trace(requests):
    lengths = [len(request.prompt) + request.max_new_tokens for request in requests]
    assert max(lengths) <= serving_trace.MOST_TOKENS
    for request in serving_trace.trace(512):
        assert 1 <= max(len(request.prompt), request.max_new_tokens) <= serving_trace.MOST_TOKENS
    medians = [
        sorted(values)[96] for values in zip(*((len(r.prompt), r.max_new_tokens) for r in requests), strict=True)
    ]
    assert medians == [pytest.approx(160, rel=0.2), pytest.approx(220, rel=0.2)]


@pytest.mark.parametrize("policy", ["recompute", "swap"])
def test_the_memory_is_full_while_requests_wait(requests, policy):
    figures = serving_trace.serve(MEMORY, requests, "paged", policy=policy).figures
    assert figures["live"] >= 0.94
    assert figures["filled"] >= 0.96
    assert figures["sequences"] >= 3.2 * PLACES  # 3.5 of these would fit without any waste
    assert (figures["read_again"] == 0) == (policy == "swap")


def test_places_are_never_short_of_blocks(requests):
    slots, batches = (serving_trace.serve(MEMORY, requests[:48], way).figures for way in ("slots", "batches"))
    assert slots["gave_way"] == batches["gave_way"] == 0
    assert PLACES - 0.3 <= slots["sequences"] <= PLACES
    assert batches["live"] < slots["live"] < 0.4
    assert batches["steps"] > 2 * slots["steps"]
