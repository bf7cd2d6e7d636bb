"""The operators under `torch.library.opcheck`, `torch.compile`, `torch.export` and fake tensors."""

import re

import pytest
import torch
from torch._dynamo.decorators import mark_unbacked
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

from torch_paged.testing import attention_inputs

ops = torch.ops.paged


def finite(inputs):
    """Without the poison: opcheck compares whole tensors."""
    return inputs._replace(key_cache=inputs.key_cache.nan_to_num(), value_cache=inputs.value_cache.nan_to_num())


def attention_samples():
    decode = finite(attention_inputs([1, 1, 1], [5, 17, 1], uniform=True))
    mixed = finite(attention_inputs([4, 1, 0], [9, 30, 3], dtype=torch.bfloat16, head_major=True))
    shared = decode._replace(value_cache=decode.key_cache[..., :24])
    yield "decode", decode[:5], {}
    yield "mixed", mixed[:5], dict(cu_seqlens_q=mixed.cu_seqlens_q, scale=0.2, causal=False)
    yield "shared-value", shared[:5], dict(scale=0.5)


def samples():
    for name, args, kwargs in attention_samples():
        yield pytest.param(ops.attention, args, kwargs, id=f"attention-{name}")
        yield pytest.param(ops.attention_with_lse, args, kwargs, id=f"attention_with_lse-{name}")
    for dtype in (torch.float32, torch.bfloat16):
        outputs, lses = torch.randn(2, 5, 4, 32).to(dtype), torch.randn(2, 5, 4)
        yield pytest.param(ops.merge_attention, (outputs[0], lses[0], outputs[1], lses[1]), {}, id=f"merge-{dtype}")
    key, cache, slots = torch.randn(5, 2, 16), torch.randn(4, 3, 2, 16), torch.tensor([0, 7, -1, 11])
    yield pytest.param(ops.append, (key, key.clone(), cache, cache.clone(), slots), {}, id="append")
    yield pytest.param(ops.append, (key, None, cache.clone(), None, slots), {}, id="append-key-alone")
    caches = [torch.randn(4, 3), torch.randn(4, 2, 5).half()]
    yield pytest.param(ops.copy_blocks, (caches, torch.tensor([[0, 1], [-1, 3]])), {}, id="copy_blocks")
    staging = torch.zeros(2, 32, dtype=torch.uint8)
    yield pytest.param(ops.gather_blocks, (caches, torch.tensor([3, -1]), staging), {}, id="gather_blocks")
    yield pytest.param(ops.scatter_blocks, (staging.clone(), torch.tensor([2, 0]), caches), {}, id="scatter_blocks")


@pytest.mark.parametrize(("op", "args", "kwargs"), [*samples()])
def test_opcheck(op, args, kwargs):
    torch.library.opcheck(op.default, args, kwargs)


@pytest.mark.parametrize(("op", "args", "kwargs"), [*samples()])
def test_compiled_equals_eager(op, args, kwargs):
    """With every tensor cloned for each of the two calls, results and mutated arguments agree."""

    def cloned():
        return [[t.clone() for t in a] if isinstance(a, list) else a.clone() if a is not None else a for a in args]

    torch.compiler.reset()
    eager_args, compiled_args = cloned(), cloned()
    expected = op(*eager_args, **kwargs)
    actual = torch.compile(lambda *args: op(*args, **kwargs), fullgraph=True)(*compiled_args)
    torch.testing.assert_close((actual, compiled_args), (expected, eager_args), rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["separate", "head-major"])
def test_compiled_step_writes_the_cache_in_place(layout):
    """Append and attention in one graph: no copy of a cache in the generated code, in either layout."""
    shape = (4096, 16, 2, 32)
    if layout == "head-major":
        caches = [torch.zeros(4096, 2, 16, 32).transpose(1, 2) for _ in range(2)]
    else:
        caches = [torch.zeros(shape) for _ in range(2)]
    query, key, value = torch.randn(3, 4, 32), torch.randn(3, 2, 32), torch.randn(3, 2, 32)
    table = torch.tensor([[5], [9], [700]], dtype=torch.int32)
    lens, slots = torch.ones(3, dtype=torch.int32), table[:, 0].long() * 16

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("key_cache", caches[0], persistent=False)
            self.register_buffer("value_cache", caches[1], persistent=False)

        def forward(self, query, key, value):
            ops.append(key * 2, value + 1, self.key_cache, self.value_cache, slots)
            return ops.attention(query, self.key_cache, self.value_cache, table, lens)

    torch.compiler.reset()
    output, codes = run_and_get_code(torch.compile(Layer(), fullgraph=True), query, key, value)
    torch.testing.assert_close(output, (value + 1).repeat_interleave(2, 1))
    torch.testing.assert_close(caches[0][[5, 9, 700], 0], key * 2)
    calls = "\n".join(codes)
    assert calls.count("torch.ops.paged.append.default(") == 1
    assert calls.count("torch.ops.paged.attention.default(") == 1
    allocated = [int(n) for n in re.findall(r"empty_strided_\w+\(\((\d+),", calls)]
    assert max(allocated, default=0) < 4096, "a tensor as long as the cache is allocated"
    assert "clone" not in calls.replace("clone_preserve_strides", "").lower().split("def call")[1]


def test_one_graph_for_every_batch():
    """Unbacked dimensions: batch 1, the number of heads, the table's width, in any order."""
    counter = CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    compiled = torch.compile(
        lambda *args: ops.attention_with_lse(*args[:5], cu_seqlens_q=args[5]), fullgraph=True, backend=counter
    )
    for ragged in (False, True):
        for batch in (4, 1, 2, 64, 5, 9):
            lens = [(7 * i) % 40 + 1 for i in range(batch)]
            inputs = attention_inputs([1] * batch, lens, block_size=10, uniform=not ragged)
            table = torch.full((batch, 4), -1, dtype=torch.int32)
            table[:, : inputs.block_table.shape[1]] = inputs.block_table[:, :4]
            inputs = inputs._replace(block_table=table)
            for tensor in inputs:
                if tensor is not None:
                    mark_unbacked(tensor, 0)
            for actual, expected in zip(compiled(*inputs), inputs.call(ops.attention_with_lse), strict=True):
                assert torch.equal(actual, expected)
    assert counter.frame_count == 2  # uniform and ragged


def test_fake_shapes_on_a_gpu_that_is_not_there():
    with torch._subclasses.FakeTensorMode():
        query = torch.empty(6, 8, 64, dtype=torch.bfloat16, device="cuda")
        key_cache, value_cache = (torch.empty(9, 16, 2, d, dtype=torch.bfloat16, device="cuda") for d in (64, 48))
        table, lens = (torch.empty(s, dtype=torch.int32, device="cuda") for s in ((3, 4), (3,)))
        output, lse = ops.attention_with_lse(query, key_cache, value_cache, table, lens)
    assert (output.shape, output.dtype, output.device.type) == ((6, 8, 48), torch.bfloat16, "cuda")
    assert (lse.shape, lse.dtype, output.is_contiguous()) == ((6, 8), torch.float32, True)


def test_export_keeps_the_operators():
    inputs = finite(attention_inputs([1, 1], [5, 17], uniform=True))

    class Model(torch.nn.Module):
        def forward(self, *args):
            return ops.attention(*args)

    program = torch.export.export(Model(), inputs[:5])
    assert "torch.ops.paged.attention.default" in program.graph_module.code
    assert torch.equal(program.module()(*inputs[:5]), inputs.call(ops.attention))


def test_version_rises_with_a_write():
    """Autograd notices that a tensor saved for backward was overwritten."""
    cache = torch.ones(4, 3, 2, 16)
    weight = torch.ones(1, requires_grad=True)
    loss = (cache * weight).sum()
    ops.append(torch.zeros(1, 2, 16), None, cache, None, torch.tensor([0]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("operator", ["append", "copy_blocks"])
def test_views_whose_offset_is_dynamic_are_refused(operator):
    """Inductor would write to the beginning of their storage: PyTorch's issue 198068."""
    rows, slots, pairs = torch.ones(2, 2, 32), torch.tensor([16, 17]), torch.tensor([[0, 2]])

    @torch.compile(fullgraph=True, dynamic=True)
    def write(key_cache, value_cache):
        if operator == "append":
            torch.ops.paged.append(rows, rows, key_cache, value_cache, slots)
        else:
            torch.ops.paged.copy_blocks([key_cache, value_cache], pairs)

    caches = torch.randn(2, 5, 16, 2, 32)
    before = caches.clone()
    with pytest.raises(RuntimeError, match="must not be a view whose offset in its storage depends on dynamic sizes"):
        write(*caches)
    assert torch.equal(caches, before)
    apart = [cache.clone() for cache in caches]
    write(*apart)
    block = 1 if operator == "append" else 2
    for cache, old in zip(apart, before, strict=True):
        assert cache[block].ne(old[block]).any() and cache[0].equal(old[0])
