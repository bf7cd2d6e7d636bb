"""Layers that share a schedule: made once a step, by a compiled model too, one for each group of layers."""

import re

import pytest
import torch
from small_model import HEADS, Model, make_cache
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

from torch_paged import PagedKVCache, unbacked
from torch_paged.options import SCHEDULE_SHAPE


class Scheduled(Model):
    """The small model, whose layers share a schedule."""

    def forward(self, tokens, batch):
        return super().forward(tokens, self.layers[0].kv.scheduled(batch, HEADS))


def test_a_compiled_model_makes_it_once_a_step():
    torch.compiler.reset()
    cache, calls = make_cache(), []

    def backend(graph, _):
        calls.append([node.target for node in graph.graph.nodes if "paged" in str(node.target)])
        return graph

    counter = CompileCounterWithBackend(backend)
    model = Scheduled(cache.layers).eval()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for count in (1, 4, 2, 9):
            sequences = [cache.add() for _ in range(count)]
            for tokens in (7, 1):
                batch = cache.prepare(sequences, [tokens] * count)
                ids = unbacked(torch.arange(count * tokens) % 50)
                torch.testing.assert_close(compiled(ids, batch), Model.forward(model, ids, batch))
                cache.commit(batch)
    assert counter.frame_count == 1
    assert [str(target) for target in calls[0]].count("paged.schedule") == 1
    assert [str(target) for target in calls[0]].count("paged.attention") == 3


def test_a_compiled_model_does_not_copy_its_caches_for_it():
    """Not even where Inductor moves the schedule behind the first append."""
    torch.compiler.reset()
    cache = make_cache(num_blocks=4093)
    batch = cache.prepare([cache.add() for _ in range(3)], 1)
    model = torch.compile(Scheduled(cache.layers), fullgraph=True)
    with torch.no_grad():
        _, (code,) = run_and_get_code(model, unbacked(torch.tensor([1, 2, 3])), batch)
    assert code.count("torch.ops.paged.schedule.default(") == 1
    assert not re.search(r"empty_strided\w*\(\(4093", code)
    assert "clone" not in code


@pytest.mark.parametrize("scales", ["static", "token"])
def test_layers_of_a_quantised_cache(scales):
    cache = make_cache(cache_dtype=torch.int8, scales=scales)
    batch = cache.prepare([cache.add(), cache.add()], [20, 3])
    scheduled = cache.layers[0].scheduled(batch, 4)
    query, key = torch.randn(23, 4, 16), torch.randn(23, 2, 16)
    assert torch.equal(cache.layers[1](query, key, key, scheduled), cache.layers[1](query, key, key, batch))


def test_scheduled_and_with_schedule_refuse():
    cache = make_cache()
    batch = cache.prepare([cache.add()], [2])
    with pytest.raises(TypeError, match="batch must be a PagedBatch, got tuple"):
        cache.layers[0].scheduled((1, 2), HEADS)
    with pytest.raises(ValueError, match=r"one group of layers, got a layer of groups\[3\]"):
        batch.with_schedule(torch.zeros(SCHEDULE_SHAPE, dtype=torch.int32), 3)
    with pytest.raises(ValueError, match=r"2 groups of layers, got a layer of groups\[2\]"):
        batch._replace(further_groups=(batch.tables(0),)).with_schedule(torch.zeros(SCHEDULE_SHAPE).int(), 2)
    with pytest.raises(ValueError, match=r"2 groups of layers, got a layer of groups\[-1\]"):
        batch._replace(further_groups=(batch.tables(0),)).tables(-1)


def test_layers_of_every_group_have_their_own():
    cache = PagedKVCache(
        3, 2, 16, num_blocks=99, max_seqs=2, max_seq_len=99, dtype=torch.float32, device="cpu",
        sliding_window=[None, 8, None],
    )  # fmt: skip
    batch = cache.prepare([cache.add(), cache.add()], [20, 20])
    assert batch.schedules is None
    once = cache.layers[1].scheduled(batch, 4)
    assert once.schedules[0] is None
    twice = cache.layers[0].scheduled(once, 4)
    assert twice.schedules[1] is once.schedules[1]
    query, key = torch.randn(40, 4, 16), torch.randn(40, 2, 16)
    for layer in cache.layers:
        assert torch.equal(layer(query, key, key, twice), layer(query, key, key, batch))
    assert batch._replace(schedules=twice.schedules).advance().schedules is None
