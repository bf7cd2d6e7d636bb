"""`paged::schedule`: the same results for less work, whatever batch it was made for."""

import itertools
import os
import re
from dataclasses import replace

import pytest
import torch
from test_cache_compile import HEADS, Model, make_cache
from test_deal_pieces import units_of
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from torch.utils._pytree import tree_leaves

from torch_paged import PagedKVCache, unbacked
from torch_paged.options import PLAIN, SCHEDULE_SHAPE
from torch_paged.testing import Storage, attention_inputs, quantised

ops = torch.ops.paged
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

BATCHES = {
    "decode": dict(query_lens=[1] * 4, seq_lens=[300, 0, 17, 129], uniform=True),
    "one-sequence": dict(query_lens=[1], seq_lens=[700], uniform=True, num_heads=8, num_kv_heads=1),
    "alike": dict(query_lens=[1] * 6, seq_lens=[70] * 6, uniform=True),
    "several-queries": dict(query_lens=[5] * 3, seq_lens=[300, 5, 90], uniform=True, num_heads=12, head_dim=80),
    "prefill": dict(query_lens=[70] * 2, seq_lens=[70, 130], uniform=True, block_size=7),
    "mixed": dict(query_lens=[1, 40, 0, 2, 33], seq_lens=[200, 90, 9, 64, 20], num_heads=6, spare_tokens=3),
    "nobody": dict(query_lens=[0, 0], seq_lens=[0, 40]),
    "no-sequence": dict(query_lens=[], seq_lens=[]),
}
OPTIONS = {
    "plain": {},
    "window-sinks": dict(sliding_window=40, sinks=torch.arange(12.0)),
}


def both(inputs, schedule, **options):
    """Outputs and lse with and without `schedule`."""
    return (inputs.call(ops.attention_with_lse, schedule=it, **options) for it in (None, schedule))


def same(first, second):
    return all(torch.equal(a, b) and not a.isnan().any() for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", BATCHES)
def test_results_are_the_same_to_the_bit(name, options, device):
    inputs = attention_inputs(**BATCHES[name], device=device, sliding_window=OPTIONS[options].get("sliding_window"))
    given = {
        key: it[: inputs.query.shape[1]].to(device) if key == "sinks" else it for key, it in OPTIONS[options].items()
    }
    schedule = inputs.call(ops.schedule, **given)
    assert (schedule.dtype, schedule.shape) == (torch.int32, SCHEDULE_SHAPE)
    assert same(*both(inputs, schedule, **given))


@pytest.mark.parametrize("scales", ["head", "token"])
def test_of_a_quantised_cache(scales, device):
    storage = Storage(torch.int8, scales)
    inputs, options = quantised(attention_inputs([1] * 3, [90, 200, 1], uniform=True, device=device), storage, storage)
    assert same(*both(inputs, inputs.call(ops.schedule, **options), **options))


def test_only_the_metadata_of_a_query_matter(device):
    inputs = attention_inputs(**BATCHES["decode"], device=device)
    unset = inputs._replace(query=torch.full_like(inputs.query, torch.nan))
    assert torch.equal(unset.call(ops.schedule), inputs.call(ops.schedule))


@pytest.mark.parametrize("other", ["more-heads", "window", "more-sequences", "zeros", "anything"])
def test_what_is_made_for_another_call_is_not_used(other, device):
    inputs = attention_inputs(**BATCHES["decode"], device=device)
    heads, longer = (attention_inputs(**(BATCHES["decode"] | it), device=device) for it in ({"num_heads": 8}, {}))
    longer = longer._replace(seq_lens=torch.full_like(longer.seq_lens, 9))
    schedule = {
        "more-heads": lambda: heads.call(ops.schedule),
        "window": lambda: longer.call(ops.schedule, sliding_window=3),
        "more-sequences": lambda: attention_inputs([1] * 9, [9] * 9, uniform=True, device=device).call(ops.schedule),
        "zeros": lambda: torch.zeros(SCHEDULE_SHAPE, dtype=torch.int32, device=device),
        "anything": lambda: torch.randint(-(2**31), 2**31 - 1, SCHEDULE_SHAPE, dtype=torch.int32, device=device),
    }[other]()
    assert same(*both(inputs, schedule))


@pytest.fixture
def only_its_own_memory(monkeypatch):
    """Interpreted kernels that look at an address outside of the tensors that they are given fail."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    inside = []

    def checked(access):
        def look(self, pointers, *rest):
            mask = rest[0] if access.__name__ == "create_masked_load" else rest[1]
            wrong = pointers.data[mask.data.astype(bool)].astype("uint64")
            for first, end in inside:
                wrong = wrong[(wrong < first) | (wrong >= end)]
            assert not len(wrong), f"{access.__name__} of {len(wrong)} numbers outside"
            return access(self, pointers, *rest)

        return look

    def remembered(self, arguments, keywords):
        result = prepare(self, arguments, keywords)
        storages = [it.untyped_storage() for it in tree_leaves(result[0]) if isinstance(it, torch.Tensor)]
        inside[:] = [(it.data_ptr(), it.data_ptr() + it.nbytes()) for it in storages]
        return result

    prepare = GridExecutor._init_args_hst
    monkeypatch.setattr(GridExecutor, "_init_args_hst", remembered)
    for name in ("create_masked_load", "create_masked_store"):
        monkeypatch.setattr(InterpreterBuilder, name, checked(getattr(InterpreterBuilder, name)))


STALE = {
    "none": (BATCHES["decode"], dict(seq_lens=[0] * 4)),
    "other-lengths": (BATCHES["decode"], dict(seq_lens=[1, 300, 2, 3])),
    "impossible-lengths": (BATCHES["decode"], dict(seq_lens=[-5, 10**6, 2**31 - 1, 7])),
    "other-queries": (BATCHES["mixed"], dict(cu_seqlens_q=[0, 41, 42, 70, 71, 76])),
    "backwards": (BATCHES["mixed"], dict(cu_seqlens_q=[9, 3, 40, 2, 90, 1], seq_lens=[1, 2, 300, 64, 7])),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("name", STALE)
def test_other_lengths_are_wrong_but_harmless(name, only_its_own_memory):  # noqa: ARG001
    from torch_paged.kernels import attention, schedule

    batch, changes = STALE[name]
    inputs = attention_inputs(**batch)
    made = torch.zeros(SCHEDULE_SHAPE, dtype=torch.int32)
    others = {key: torch.tensor(it, dtype=torch.int32) for key, it in changes.items()}
    schedule(*inputs._replace(**others), True, PLAIN, made)
    assert made[0, 0] > 0
    attention(*inputs, 0.1, True, PLAIN, made)


@pytest.mark.parametrize(
    ("schedule", "error", "message"),
    [
        (torch.zeros(SCHEDULE_SHAPE), TypeError, r"schedule must be int32 \[launches, numbers\], got float32"),
        (
            torch.zeros(2, dtype=torch.int32),
            ValueError,
            r"schedule must be int32 \[launches, numbers\], got int32 \[2\]",
        ),
        (
            torch.zeros(2, 9, dtype=torch.int32),
            ValueError,
            r"schedule must be int32 \[2, 8192\], as paged::schedule makes it, got int32 \[2, 9\]",
        ),
        (
            torch.zeros(2, 2 * SCHEDULE_SHAPE[1], dtype=torch.int32)[:, ::2],
            ValueError,
            r"schedule must be contiguous, as paged::schedule makes it, got strides \[16384, 2\]",
        ),
        (torch.zeros(SCHEDULE_SHAPE, dtype=torch.int32, device="meta"), ValueError, "schedule must be on cpu like"),
    ],
)
def test_refused(schedule, error, message):
    with pytest.raises(error, match=message):
        attention_inputs(**BATCHES["decode"]).call(ops.attention, schedule=schedule)


def test_the_call_itself_is_checked():
    inputs = attention_inputs(**BATCHES["decode"])
    with pytest.raises(TypeError, match="block_table must be int32"):
        inputs._replace(block_table=inputs.block_table.long()).call(ops.schedule)


@pytest.mark.parametrize("name", ["decode", "mixed"])
def test_opcheck(name):
    inputs = attention_inputs(**BATCHES[name])
    inputs = inputs._replace(key_cache=inputs.key_cache.nan_to_num(), value_cache=inputs.value_cache.nan_to_num())
    bounds = dict(cu_seqlens_q=inputs.cu_seqlens_q)
    torch.library.opcheck(ops.schedule.default, inputs[:5], bounds)
    torch.library.opcheck(ops.attention.default, inputs[:5], bounds | dict(schedule=inputs.call(ops.schedule)))


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


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [False, True], ids=["eager", "graph"])
def test_steps_that_follow_each_other_closely(captured):
    """Kernels that begin while others end: lengths and blocks change from step to step, keys right before a call."""
    inputs = attention_inputs([1] * 6, [700] * 6, uniform=True, device="cuda", dtype=torch.float16)
    keys, values, table, lens = inputs.key_cache, inputs.value_cache, inputs.block_table, inputs.seq_lens
    first, blocks, rows = torch.tensor([300, 1, 700, 64, 65, 128]), table.clone(), torch.arange(6, device="cuda")
    new = torch.randn(6, 2, 32, device="cuda", dtype=torch.float16)

    def step(shared):
        lens.sub_(1).clamp_(min=1)
        table.copy_(table.roll(1, 0))
        schedule = inputs.call(ops.schedule) if shared else None
        outputs = []
        for layer in range(3):
            last = lens.long() - 1
            ops.append(new * (layer + 1), new - layer, keys, values, table[rows, last // 16] * 16 + last % 16)
            outputs.append(inputs.call(ops.attention, schedule=schedule))
        return torch.stack(outputs)

    def steps(shared, run=None):
        run = run or (lambda: step(shared))
        lens.copy_(first), table.copy_(blocks)
        keys.copy_(kept[0]), values.copy_(kept[1])
        return torch.stack([run().clone() for _ in range(40)])

    kept = keys.clone(), values.clone()
    expected = steps(False)
    run = None
    if captured:
        step(True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = step(True)
        run = lambda: graph.replay() or output  # noqa: E731
    assert torch.equal(steps(True, run), expected)


WORK = {
    "alike": ([1] * 5, [130] * 5),
    "alike-and-long": ([1] * 3, [2000] * 3),
    "short": ([1] * 40, list(range(40))),
    "long": ([1], [3000]),
    "unlike": ([1] * 5, [1, 900, 70, 0, 333]),
    "ragged": ([1, 9, 0, 40, 3], [200, 150, 9, 64, 700]),
}


@pytest.mark.skipif(not INTERPRETED, reason="what the kernel writes is looked at where it is interpreted")
@pytest.mark.interpreter
@pytest.mark.parametrize("programs", [1, 2, 7, 24])
@pytest.mark.parametrize("name", WORK)
def test_every_tile_is_dealt_once_and_what_is_left_is_told(name, programs):
    from torch_paged.kernels.attention_schedule import _schedule
    from torch_paged.kernels.launch_config import attention_launches
    from torch_paged.kernels.problem import Device, Problem

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
