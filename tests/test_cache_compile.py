"""A small model on a PagedKVCache under `torch.compile` and `torch.export`: one graph for every step."""

import io
import itertools
import re

import pytest
import torch
from small_model import BLOCK_SIZE, HEADS, LAYERS, MAX_SEQ_LEN, VOCABULARY, Model, make_cache
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

from torch_paged.batch import PagedBatch, unbacked


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    with torch.no_grad():
        yield


class Pair:
    """The same steps on an eager model and on a compiled one, each with its own cache."""

    def __init__(self, compile_model, **options):
        self.caches = [make_cache(**options) for _ in range(2)]
        models = [Model(cache.layers) for cache in self.caches]
        models[1].load_state_dict(models[0].state_dict())
        self.models = [models[0], compile_model(models[1])]
        self.seqs = []

    def step(self, num_seqs, counts):
        while len(self.seqs) < num_seqs:
            self.seqs.append({cache.add() for cache in self.caches}.pop())  # the same handle in both
        seqs = self.seqs[:num_seqs]
        logits = []
        for cache, model in zip(self.caches, self.models, strict=True):
            batch = cache.prepare(seqs, counts)
            tokens = torch.arange(len(batch.positions)) * 7 % VOCABULARY
            logits.append(model(unbacked(tokens), batch)[:num_seqs])
            cache.commit(batch, tokens if batch.slot_mapping.min() >= 0 else None)
        torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-5)


def whole(counter, **options):
    return lambda model: torch.compile(model, fullgraph=True, backend=counter, **options)


def layer_by_layer(counter):
    def compile_layers(model):
        for index, layer in enumerate(model.layers):
            model.layers[index] = torch.compile(layer, fullgraph=True, backend=counter)
        return model

    return compile_layers


ORDERS = [(1, 2, 5, 9, 64, 4), (64, 4, 1, 9, 2, 5), (4, 64, 5, 1), (2, 1, 64)]


@pytest.mark.parametrize("how", [whole, layer_by_layer])
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_one_graph_for_every_batch(how, order):
    """Also where the batch is the number of heads (4), of key-value heads (2) or the table's width (64)."""
    counter = CompileCounterWithBackend("aot_eager")
    pair = Pair(how(counter))
    for num_seqs in order:
        pair.step(num_seqs, 1)
    assert counter.frame_count == 1


@pytest.mark.parametrize(("how", "backend"), [(whole, "inductor"), (layer_by_layer, "aot_eager")])
def test_one_graph_for_200_growing_steps(how, backend):
    counter = CompileCounterWithBackend(backend)
    pair = Pair(how(counter))
    pair.step(2, [3, 5])
    assert counter.frame_count == 1, "a ragged prefill is a graph of its own"
    for _ in range(200):
        pair.step(2, 1)
    assert counter.frame_count == 2


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_one_graph_for_every_ragged_batch(dynamic):
    """With buckets and without; two tokens or one, five sequences or a single one, more tokens than any before."""
    counters.clear()
    counter = CompileCounterWithBackend("aot_eager")
    for buckets in (None, [2, 8, 32]):
        pair = Pair(whole(counter, dynamic=dynamic), buckets=buckets)
        for counts in ([3, 5], [1, 1, 4, 2, 9], [2, 1], [1, 2] * 8, [4, 1, 1, 1], [90, 3]):
            pair.step(len(counts), counts)
    assert counters["stats"]["unique_graphs"] == 1, "even for both models"


def test_one_graph_for_uniform_steps_of_several_tokens():
    counter = CompileCounterWithBackend("aot_eager")
    pair = Pair(whole(counter), buckets=[2, 8, 32])
    for num_seqs, count in [(3, 4), (1, 4), (1, 1), (5, 1), (2, 9), (1, 33)]:
        pair.step(num_seqs, count)
    assert counter.frame_count == 1


def test_generated_code_does_not_copy_the_cache():
    """Nothing of a cache's size is allocated or cloned: the operators get the buffers themselves."""
    cache = make_cache(num_blocks=4093)
    model = torch.compile(Model(cache.layers), fullgraph=True)
    batch = cache.prepare([cache.add() for _ in range(3)], 1)
    _, code = run_and_get_code(model, unbacked(torch.tensor([1, 2, 3])), batch)
    assert len(code) == 1
    appends = re.findall(r"torch\.ops\.paged\.append\.default\((.*)\)", code[0])
    assert len(appends) == LAYERS
    inputs = set(re.search(r"(\w+(?:, \w+)*) = args", code[0]).group(1).split(", "))
    for call in appends:
        assert set(call.split(", ")[2:4]) <= inputs, "the caches are the graph's own inputs"
    assert not re.search(r"empty_strided\w*\(\(4093", code[0])
    assert "clone" not in code[0]


def test_a_cache_built_under_inference_mode_compiles():
    with torch.inference_mode():
        cache = make_cache()
    model = Model(cache.layers)
    compiled = torch.compile(model, fullgraph=True)
    seqs = [cache.add(), cache.add()]
    for mode in (torch.no_grad, torch.inference_mode, torch.no_grad):
        with mode():
            batch = cache.prepare(seqs, 2)
            actual = compiled(unbacked(torch.arange(4)), batch)
            torch.testing.assert_close(actual, model(torch.arange(4), batch), rtol=1e-4, atol=1e-5)
            cache.commit(batch)


@pytest.mark.parametrize("how", [whole, layer_by_layer])
@pytest.mark.parametrize(
    "options", [dict(), dict(cache_dtype=torch.int8), dict(cache_dtype=torch.float8_e4m3fn)], ids=str
)
def test_one_graph_for_each_group(how, options):
    """Layers of one window share a graph, whole models have one, whatever the batch; quantised caches too."""
    counter = CompileCounterWithBackend("aot_eager")
    pair = Pair(how(counter), sliding_window=[None, 9, 9], **options)
    for num_seqs in (1, 4, 2, 64):
        for _ in range(4):
            pair.step(num_seqs, 1)
    assert counter.frame_count == (1 if how is whole else 2)


def test_several_advanced_steps_of_groups_in_one_graph():
    caches = [make_cache(buckets=[4, 16], sliding_window=[None, 5, 5]) for _ in range(2)]
    models = [Model(cache.layers) for cache in caches]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(decode, fullgraph=True, backend=counter)
    for num_seqs in (3, 9, 1):
        tokens = torch.zeros(4 if num_seqs <= 4 else 16, dtype=torch.int64)
        results = []
        for cache, model, run in zip(caches, models, (decode, compiled), strict=True):
            seqs = [cache.add() for _ in range(num_seqs)]
            cache.commit(cache.prepare(seqs, 11))
            generator = torch.Generator().manual_seed(num_seqs)
            for tensor in itertools.chain(*cache.tensors()):  # what the eleven tokens left: the same in both
                tensor.normal_(generator=generator)
            batch = cache.prepare(seqs, 1, ahead=2)
            results.append(run(model, unbacked(tokens), batch, 3)[:num_seqs])
            cache.commit(batch, advanced=2)
            cache.check_integrity()
        assert torch.equal(*results)
    assert counter.frame_count == 1


def decode(model, tokens, batch, steps):
    """Greedy decoding without the host."""
    generated = []
    for _ in range(steps):
        tokens = model(tokens, batch).argmax(-1)
        generated.append(tokens)
        batch = batch.advance()
    return torch.stack(generated, 1)


def test_several_advanced_steps_in_one_graph():
    """`advance` traces: three decode steps in one graph, equal to three prepared ones, for any batch."""
    counter = CompileCounterWithBackend("aot_eager")
    caches = [make_cache(buckets=[4, 16]) for _ in range(2)]
    models = [Model(cache.layers) for cache in caches]
    compiled = torch.compile(decode, fullgraph=True, backend=counter)
    seqs = [{cache.add() for cache in caches}.pop() for _ in range(9)]
    for num_seqs in (3, 9, 1):
        tokens = torch.zeros(4 if num_seqs <= 4 else 16, dtype=torch.int64)
        batch = caches[1].prepare(seqs[:num_seqs], 1, ahead=2)
        actual = compiled(models[1], unbacked(tokens), batch, 3)[:num_seqs]
        caches[1].commit(batch, advanced=2)
        expected = []
        for _ in range(3):
            batch = caches[0].prepare(seqs[:num_seqs], 1)
            tokens = models[0](tokens, batch).argmax(-1)
            expected.append(tokens[:num_seqs])
            caches[0].commit(batch)
        assert torch.equal(actual, torch.stack(expected, 1))
    assert counter.frame_count == 1


def test_an_eagerly_advanced_batch_needs_no_graph_of_its_own():
    counter = CompileCounterWithBackend("aot_eager")
    cache = make_cache()
    model = torch.compile(Model(cache.layers), fullgraph=True, backend=counter)
    for num_seqs in (2, 1, 7):
        batch = cache.prepare([cache.add() for _ in range(num_seqs)], 1, ahead=1)
        for step in (batch, batch.advance()):
            model(unbacked(torch.zeros(num_seqs, dtype=torch.int64)), step)
    assert counter.frame_count == 1


@pytest.mark.parametrize("options", [dict(), dict(sliding_window=[9, None, 9], cache_dtype=torch.int8)], ids=str)
def test_export_holds_no_cache(options, place):
    """A saved program takes the caches as inputs, and gives the same answers at other sizes when loaded again."""

    def inputs(cache, num_seqs):
        batch = cache.prepare([cache.add() for _ in range(num_seqs)], 2)
        return torch.arange(2 * num_seqs, device=place) % VOCABULARY, batch, cache.tensors()

    cache = make_cache(device=place, **options)
    model = Model([cache.functional()] * LAYERS, functional=True).to(place)
    example = inputs(cache, 3)
    dynamic = {0: torch.export.Dim.DYNAMIC}
    batch = PagedBatch(*(None if part is None else dynamic if part.dim() else {} for part in example[1][:7]))
    if options:
        batch = batch._replace(further_groups=((dynamic, dynamic),))
    caches = [(dynamic,) * len(parts) for parts in example[2]]
    program = torch.export.export(model, example, dynamic_shapes=(dynamic, batch, caches))
    program.example_inputs = None
    file = io.BytesIO()
    torch.export.save(program, file)
    assert len(file.getvalue()) < sum(part.nbytes for parts in cache.tensors() for part in parts)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for num_seqs in (3, 5, 1):
        args = inputs(make_cache(num_blocks=100 + num_seqs, device=place, **options), num_seqs)
        expected = model(*args)
        for part in itertools.chain(*args[2]):
            part.fill_(torch.nan if part.is_floating_point() else 77)
        torch.testing.assert_close(loaded(*args), expected)


def test_host_work_in_a_compiled_function_breaks_its_graph():
    """A whole step, from `add` to `free`: what is between runs compiled, and all of it as without a compiler."""
    counter = CompileCounterWithBackend("aot_eager")
    caches = [make_cache() for _ in range(2)]
    models = [Model(cache.layers) for cache in caches]
    models[1].load_state_dict(models[0].state_dict())

    def serve(cache, model, seq, prompt):
        fresh = cache.add(prompt)
        batch = cache.prepare([seq, fresh], [1, len(prompt)])
        tokens = torch.arange(len(batch.positions)) % VOCABULARY
        cache.rollback(batch)
        batch = cache.prepare([seq, fresh], [1, len(prompt)])
        logits = model(unbacked(tokens), batch)
        cache.commit(batch, tokens)
        (child,) = cache.fork(fresh, 1)
        cache.swap_out(child)
        cache.swap_in(child)
        cache.clear_prefixes("nobody")
        cache.truncate(child, 1)
        cache.free([fresh, child])
        return logits

    runs = [serve, torch.compile(serve, backend=counter)]
    seqs = [cache.add() for cache in caches]
    for step in range(4):
        expected, seen = (run(*each, [3] * 5) for run, *each in zip(runs, caches, models, seqs, strict=True))
        torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-5)
        assert [cache.length(seq) for cache, seq in zip(caches, seqs, strict=True)] == [step + 1] * 2
        assert caches[0].stats() == caches[1].stats()
        caches[1].check_integrity()
    assert 1 <= counter.frame_count <= 3


def test_orders_cover_what_the_contract_names():
    assert {1, 2, 5, 9, 64} <= set(itertools.chain(*ORDERS))
    assert {HEADS, MAX_SEQ_LEN // BLOCK_SIZE} <= set(ORDERS[1])
