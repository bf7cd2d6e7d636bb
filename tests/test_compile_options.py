"""Options and quantised caches under `opcheck` and `torch.compile`: whole graphs, one for many batches, no copies."""

import re

import pytest
import torch
from torch._dynamo.decorators import mark_unbacked
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

from torch_paged.testing import Storage, attention_inputs, quantised

ops = torch.ops.paged
E4M3, E5M2, INT8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8
SLOPES, SINKS = torch.tensor([0.5, 0.25, 0.1, 0.05]), torch.tensor([1.0, -1.0, 0.0, 2.0])

ATTENTION = {
    "window": (None, dict(sliding_window=9)),
    "softcap": (None, dict(softcap=2.0)),
    "alibi-sinks": (None, dict(alibi_slopes=SLOPES, sinks=SINKS)),
    "e4m3": (Storage(E4M3), {}),
    "e5m2-head": (Storage(E5M2, "head"), dict(sinks=SINKS)),
    "int8-token": (Storage(INT8, "token"), dict(sliding_window=9, alibi_slopes=SLOPES)),
}


def attention_arguments(name, query_lens=(4, 1, 0), seq_lens=(9, 30, 3), finite=True, **shape):
    """Tensors in order, and keywords; without poison, since opcheck compares whole tensors."""
    storage, options = ATTENTION[name]
    inputs = attention_inputs(query_lens, seq_lens, **shape)
    if finite:
        inputs = inputs._replace(key_cache=inputs.key_cache.nan_to_num(), value_cache=inputs.value_cache.nan_to_num())
    inputs, scales = quantised(inputs, storage, storage)
    return inputs, options | scales


def write_arguments(stored, scales):
    """Arguments of `append`: rows, caches, slots; and the scales."""
    key, slots = torch.randn(5, 2, 16), torch.tensor([0, 7, -1, 11])
    caches = [torch.zeros(4, 3, 2, 16).to(stored) for _ in range(2)]
    if scales == "token":
        options = dict(key_scale_cache=torch.ones(4, 3, 2), value_scale_cache=torch.ones(4, 3, 2))
    else:
        options = dict(key_scale=torch.tensor(0.1), value_scale=torch.tensor([0.1, 0.3]))
    return (key, key.flip(0).clone(), *caches, slots), options


def samples():
    for name in ATTENTION:
        inputs, options = attention_arguments(name)
        args, options = inputs[:5], dict(options, cu_seqlens_q=inputs.cu_seqlens_q)
        yield pytest.param(ops.attention, args, options, id=f"attention-{name}")
        yield pytest.param(ops.attention_with_lse, args, options, id=f"attention_with_lse-{name}")
    for stored, scales in ((E4M3, "static"), (E5M2, "token"), (INT8, "token")):
        args, options = write_arguments(stored, scales)
        yield pytest.param(ops.append, args, options, id=f"append-{stored}-{scales}")
        angles = torch.rand(2, 9, 6).unbind()
        rotary = (torch.randn(5, 4, 16), *args[:2], *angles, torch.tensor([0, 8, 2, 3, 1]), *args[2:])
        yield pytest.param(ops.rotary_append, rotary, options, id=f"rotary_append-{stored}-{scales}")
    key, cache = torch.randn(5, 2, 16), torch.zeros(4, 3, 2, 16)
    rotary = (torch.randn(5, 4, 16), key, None, *torch.rand(2, 9, 8).unbind(), torch.arange(5), cache, None, args[4])
    yield pytest.param(ops.rotary_append, rotary, dict(interleaved=True), id="rotary_append-key-alone")


def cloned(values):
    return [value.clone() if isinstance(value, torch.Tensor) else value for value in values]


def as_bytes(values):
    """What `assert_close` can compare: PyTorch has no arithmetic of float8."""
    return [value.view(torch.uint8) if value is not None and value.itemsize == 1 else value for value in values]


@pytest.mark.parametrize(("op", "args", "options"), [*samples()])
def test_opcheck(op, args, options):
    """PyTorch compares before and after in arithmetic that float8 lacks: int8 stands for it in that part."""
    parts = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    float8 = any(isinstance(value, torch.Tensor) and value.dtype in (E4M3, E5M2) for value in args)
    torch.library.opcheck(op.default, args, options, test_utils=parts[float8:])


@pytest.mark.parametrize(("op", "args", "options"), [*samples()])
def test_compiled_equals_eager(op, args, options):
    """Results, and every tensor that was written, scales among them."""
    torch.compiler.reset()
    results = []
    for function in (op, torch.compile(lambda *args, **options: op(*args, **options), fullgraph=True)):
        copies, keywords = cloned(args), dict(zip(options, cloned(options.values()), strict=True))
        result = function(*copies, **keywords)
        tensors = [value for value in keywords.values() if isinstance(value, torch.Tensor)]
        results.append((result, as_bytes(copies), tensors))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


class QuantisedLayer(torch.nn.Module):
    """Rotation, append and attention over caches that are buffers."""

    def __init__(self, num_blocks):
        super().__init__()
        for side in ("key", "value"):
            cache = torch.zeros(num_blocks, 16, 2, 32, dtype=torch.uint8).view(E4M3)
            self.register_buffer(f"{side}_cache", cache, persistent=False)
            self.register_buffer(f"{side}_scale_cache", torch.zeros(num_blocks, 16, 2), persistent=False)

    def forward(self, query, key, value, cos, sin, positions, slots, table, lens):
        scales = dict(key_scale_cache=self.key_scale_cache, value_scale_cache=self.value_scale_cache)
        caches = self.key_cache, self.value_cache
        query = ops.rotary_append(query, key * 2, value + 1, cos, sin, positions, *caches, slots, **scales)
        return ops.attention(query, *caches, table, lens, sliding_window=64, sinks=SINKS, **scales)


def layer_arguments(batch):
    table = (torch.arange(batch, dtype=torch.int32) * 3 + 5)[:, None]
    tensors = torch.randn(batch, 4, 32), *torch.randn(2, batch, 2, 32).unbind(), *torch.rand(2, 4, 16).unbind()
    return *tensors, torch.ones(batch, dtype=torch.int64), table[:, 0].long() * 16, table, torch.ones_like(table[:, 0])


def test_compiled_quantised_step_writes_the_caches_in_place():
    """Neither a cache nor a scale cache is copied by the generated code."""
    torch.compiler.reset()
    layers = [QuantisedLayer(4096) for _ in range(2)]
    arguments = layer_arguments(3)
    output, codes = run_and_get_code(torch.compile(layers[0], fullgraph=True), *arguments)
    torch.testing.assert_close(output, layers[1](*arguments))
    for mine, theirs in zip(layers[0].buffers(), layers[1].buffers(), strict=True):
        assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))
    assert layers[0].key_scale_cache[5, 0].ne(0).all()
    calls = "\n".join(codes)
    assert calls.count("torch.ops.paged.rotary_append.default(") == 1
    assert calls.count("torch.ops.paged.attention.default(") == 1
    allocated = [int(size) for size in re.findall(r"empty_strided_\w+\(\((\d+),", calls)]
    assert max(allocated, default=0) < 4096, "a tensor as long as the cache is allocated"
    assert "clone" not in calls.replace("clone_preserve_strides", "").lower().split("def call")[1]


def test_one_graph_for_every_batch_of_a_quantised_layer():
    counter = CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    layer = QuantisedLayer(256)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for batch in (4, 1, 2, 64, 5, 9):
        arguments = layer_arguments(batch)
        for position in (0, 1, 2, 5, 6, 7, 8):
            mark_unbacked(arguments[position], 0)
        assert torch.equal(compiled(*arguments), layer(*arguments))
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ATTENTION)
def test_one_graph_for_every_batch(name):
    counter = CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    compiled = torch.compile(
        lambda args, options: ops.attention_with_lse(*args, **options), fullgraph=True, backend=counter
    )
    for batch in (4, 1, 2, 64, 5, 9):
        lens = [(7 * i) % 40 + 1 for i in range(batch)]
        shape = dict(block_size=10, sliding_window=ATTENTION[name][1].get("sliding_window"), uniform=True)
        inputs, options = attention_arguments(name, [1] * batch, lens, finite=False, **shape)
        table = torch.full((batch, 4), -1, dtype=torch.int32)
        table[:, : inputs.block_table.shape[1]] = inputs.block_table[:, :4]
        args = inputs._replace(block_table=table)[:5]
        for tensor in (*args, *(options[name] for name in options if name.endswith("scale_cache"))):
            mark_unbacked(tensor, 0)
        expected = ops.attention_with_lse(*args, **options)
        for actual, exact in zip(compiled(args, options), expected, strict=True):
            assert torch.equal(actual, exact)
    assert counter.frame_count == 1
