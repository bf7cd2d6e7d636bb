"""Fake CUDA tensors on any machine: the form of every result, and the graph of a compiled step."""

import inspect
import operator
from collections import Counter

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.fx_passes.post_grad import decompose_auto_functionalized
from torch._inductor.fx_passes.reinplace import reinplace_inplaceable_ops
from torch._inductor.fx_utils import FakeTensorUpdater
from torch._subclasses import FakeTensorMode

ops = torch.ops.paged
BF16, INT32, INT64 = torch.bfloat16, torch.int32, torch.int64
NUM_BLOCKS = 4096


def cuda(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype, device="cuda")


def form(tensor):
    return tensor.shape, tensor.dtype, tensor.device.type, tensor.stride()


@pytest.fixture
def fake():
    with FakeTensorMode() as mode:
        yield mode


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
@pytest.mark.parametrize("ragged", [False, True], ids=["uniform", "ragged"])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 48), (576, 512)])
def test_attention(key_dim, value_dim, ragged, dtype):
    """Contiguous results, whatever the strides of the query and the caches."""
    query = cuda(6, 8, 2 * key_dim, dtype=dtype).as_strided((6, 8, key_dim), (16 * key_dim, 2 * key_dim, 1))
    key_cache = cuda(9, 2, 16, key_dim, dtype=dtype).transpose(1, 2)
    value_cache = cuda(9, 16, 2, value_dim, dtype=dtype)
    table, lens = cuda(3, 4, dtype=INT32), cuda(3, dtype=INT32)
    bounds = cuda(4, dtype=INT32) if ragged else None
    arguments = (query, key_cache, value_cache, table, lens)
    output, lse = ops.attention_with_lse(*arguments, cu_seqlens_q=bounds)
    expected = (6, 8, value_dim), dtype, "cuda", (8 * value_dim, value_dim, 1)
    assert form(output) == expected
    assert form(ops.attention(*arguments, cu_seqlens_q=bounds)) == expected
    assert form(lse) == ((6, 8), torch.float32, "cuda", (8, 1))


@pytest.mark.usefixtures("fake")
def test_merge():
    output_a, output_b = cuda(8, 5, 64).transpose(0, 1), cuda(5, 8, 64, dtype=torch.float32)
    lse = cuda(8, 5, dtype=torch.float32).T
    output, merged = ops.merge_attention(output_a, lse, output_b, lse)
    assert form(output) == ((5, 8, 64), BF16, "cuda", (512, 64, 1))
    assert form(merged) == ((5, 8), torch.float32, "cuda", (8, 1))


@pytest.mark.usefixtures("fake")
def test_writes_return_nothing():
    caches = [cuda(9, 16, 2, 64), cuda(9, 2, 16, 48).transpose(1, 2)]
    key, value = cuda(5, 2, 64), cuda(5, 2, 48)
    assert ops.append(key, value, *caches, cuda(5, dtype=INT64)) is None
    assert ops.append(key, None, caches[0], None, cuda(3, dtype=INT64)) is None
    assert ops.copy_blocks(caches, cuda(7, 2, dtype=INT64)) is None
    staging = cuda(4, 16 * 2 * (64 + 48))
    assert ops.gather_blocks(caches, cuda(4, dtype=INT64), staging) is None
    assert ops.scatter_blocks(staging, cuda(4, dtype=INT64), caches) is None


@pytest.mark.usefixtures("fake")
def test_contract_errors_are_raised_without_data():
    caches = [cuda(9, 16, 2, 64), cuda(9, 16, 2, 64)]
    key = cuda(5, 2, 64)
    with pytest.raises(TypeError, match=r"slot_mapping must be int64 \[num_slots\], got int32 \[5\]"):
        ops.append(key, key, *caches, cuda(5, dtype=INT32))
    with pytest.raises(ValueError, match="must be on cuda:0 like the others, got cpu"):
        ops.append(key, key, *caches, torch.empty(5, dtype=INT64))


class Layer(torch.nn.Module):
    """Copies blocks, appends, attends in two parts, merges them, and moves blocks out and back in."""

    def __init__(self, layout):
        super().__init__()
        shape = (NUM_BLOCKS, 16, 2, 64)
        if layout == "one-tensor":
            self.register_buffer("both", cuda(2, *shape), persistent=False)
        elif layout == "head-major":
            self.register_buffer("key_cache", cuda(NUM_BLOCKS, 2, 16, 64).transpose(1, 2), persistent=False)
            self.register_buffer("value_cache", cuda(NUM_BLOCKS, 2, 16, 64).transpose(1, 2), persistent=False)
        else:
            self.register_buffer("key_cache", cuda(*shape), persistent=False)
            self.register_buffer("value_cache", cuda(*shape), persistent=False)
        self.register_buffer("staging", cuda(2, 2, *shape[1:]), persistent=False)
        self.layout = layout

    def forward(self, query, key, value, table, lens, slots, pairs, blocks):
        caches = self.both.unbind() if self.layout == "one-tensor" else [self.key_cache, self.value_cache]
        ops.copy_blocks(caches, pairs)
        ops.append(key * 2, value + 1, *caches, slots)
        first = ops.attention_with_lse(query, *caches, table, lens, scale=0.1)
        second = ops.attention_with_lse(query, *caches, table, lens - 1, scale=0.2)
        output, _ = ops.merge_attention(*first, *second)
        ops.gather_blocks(caches, blocks, self.staging)
        ops.scatter_blocks(self.staging, blocks + 1, caches)
        return output + ops.attention(query, *caches, table, lens)


def layer_inputs(batch):
    rows = (cuda(batch, heads, 64) for heads in (8, 2, 2))
    integers = (cuda(batch, 7, dtype=INT32), cuda(batch, dtype=INT32), cuda(batch, dtype=INT64))
    return (*rows, *integers, cuda(3, 2, dtype=INT64), cuda(2, dtype=INT64))


@pytest.fixture
def compiled_graphs(monkeypatch):
    """`torch.compile`'s backend here, and the graphs it got, after the passes by which Inductor writes in place."""
    # Tensor.copy_ looks for a real device before it dispatches; the operator below it does not.
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, other: torch.ops.aten.copy_.default(self, other))
    graphs = []

    def capture(module, _):
        (wants,) = inspect.signature(FakeTensorUpdater).parameters
        reinplace_inplaceable_ops(FakeTensorUpdater(module.graph if wants == "graph" else module), module.graph)
        decompose_auto_functionalized(module.graph)
        module.recompile()
        graphs.append(module.graph)
        return module.forward

    torch.compiler.reset()
    return aot_autograd(fw_compiler=capture, keep_inference_input_mutations=True), graphs


def called(graph):
    """How often the graph calls each function, but for views, tuple items and copies of a tensor to itself."""
    nodes = [node for node in graph.nodes if node.op == "call_function" and node.target is not operator.getitem]
    copies_to_itself = [n for n in nodes if n.target is torch.ops.aten.copy_.default and n.args[0] is n.args[1]]
    return Counter(str(node.target) for node in nodes if node not in copies_to_itself)


@pytest.mark.parametrize("layout", ["separate", "one-tensor", "head-major"])
def test_compiled_step_holds_the_operators_alone(layout, compiled_graphs):
    """Each call is one node, and no cache is cloned: what else is there is the model's own arithmetic."""
    backend, graphs = compiled_graphs
    with FakeTensorMode():
        layer, inputs = Layer(layout), layer_inputs(5)
    with torch.no_grad():
        output = torch.compile(layer, fullgraph=True, backend=backend)(*inputs)
    assert form(output) == ((5, 8, 64), BF16, "cuda", (512, 64, 1))
    (graph,) = graphs
    counts = called(graph)
    paged = {name: count for name, count in counts.items() if name.startswith("paged.")}
    assert paged == {
        "paged.copy_blocks.default": 1,
        "paged.append.default": 1,
        "paged.attention_with_lse.default": 2,
        "paged.merge_attention.default": 1,
        "paged.gather_blocks.default": 1,
        "paged.scatter_blocks.default": 1,
        "paged.attention.default": 1,
    }
    arithmetic = {"aten.mul.Tensor", "aten.add.Tensor", "aten.sub.Tensor"}
    views = {"aten.select.int", "aten.permute.default", "aten.as_strided.default", "aten.unbind.int"}
    assert counts.keys() - paged.keys() - arithmetic - views == set()
