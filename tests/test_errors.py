"""Every error of the contract through `torch.ops.paged.*`: before any write, eager and compiled, with both sides named."""

import pytest
import torch

import torch_paged

ops = torch.ops.paged
INT32 = torch.int32


def attention(**changes):
    """A valid decode call with some arguments changed."""
    arguments = dict(
        query=torch.randn(3, 4, 32),
        key_cache=torch.randn(5, 4, 2, 32),
        value_cache=torch.randn(5, 4, 2, 32),
        block_table=torch.tensor([[0, 1], [2, 3], [4, 0]], dtype=INT32),
        seq_lens=torch.tensor([8, 5, 1], dtype=INT32),
    )
    return ops.attention, arguments | changes


def merge(**changes):
    arguments = dict(
        output_a=torch.randn(3, 4, 32),
        lse_a=torch.randn(3, 4),
        output_b=torch.randn(3, 4, 32),
        lse_b=torch.randn(3, 4),
    )
    return ops.merge_attention, arguments | changes


def append(**changes):
    arguments = dict(
        key=torch.randn(3, 2, 32),
        value=torch.randn(3, 2, 32),
        key_cache=torch.randn(5, 4, 2, 32),
        value_cache=torch.randn(5, 4, 2, 32),
        slot_mapping=torch.tensor([0, 7, 19]),
    )
    return ops.append, arguments | changes


def rotary(**changes):
    arguments = append()[1] | dict(query=torch.randn(3, 4, 32), cos=torch.ones(8, 16), sin=torch.ones(8, 16))
    return ops.rotary_append, arguments | dict(positions=torch.tensor([0, 3, 7])) | changes


INT8, FLOAT8 = (
    dict(key_cache=torch.zeros(5, 4, 2, 32, dtype=dtype), value_cache=torch.zeros(5, 4, 2, 32, dtype=dtype))
    for dtype in (torch.int8, torch.float8_e4m3fn)
)


def copy_blocks(pairs, **changes):
    return ops.copy_blocks, dict(
        caches=[torch.randn(5, 4), torch.randn(5, 2)], block_pairs=torch.tensor(pairs)
    ) | changes


def gather(**changes):
    arguments = dict(caches=[torch.randn(5, 4), torch.randn(5, 2)], blocks=torch.tensor([0, 4]), out=torch.zeros(2, 6))
    return ops.gather_blocks, arguments | changes


def scatter(**changes):
    arguments = dict(
        source=torch.zeros(2, 6), blocks=torch.tensor([0, 4]), caches=[torch.randn(5, 4), torch.randn(5, 2)]
    )
    return ops.scatter_blocks, arguments | changes


METADATA = {
    "gather-out-none": (gather(out=None), TypeError, "out must be a tensor of as many rows as blocks, got None"),
    "gather-blocks-none": (gather(blocks=None), TypeError, r"blocks must be int64 \[num_rows\], got None"),
    "scatter-none": (scatter(source=None), TypeError, "source must be a tensor of as many rows as blocks, got None"),
    "copy-none": (copy_blocks([], block_pairs=None), TypeError, r"block_pairs must be int64 \[num_pairs, 2\], got None"),
    "rotary-key-none": (rotary(key=None), TypeError, "key must be float32 or .*, got None"),
    "query-none": (attention(query=None), TypeError, r"query must be float32 or .*, got None"),
    "value-cache-none": (attention(value_cache=None), TypeError, r"value_cache must be float32 or .*, got None"),
    "query-dtype": (attention(query=torch.randn(3, 4, 32).double()), TypeError, r"query must be float32 or .* got float64 \[3, 4, 32\]"),
    "query-rank": (attention(query=torch.randn(3, 128)), ValueError, r"query must be .*\[num_tokens, num_heads, head_dim\], got float32 \[3, 128\]"),
    "query-stride": (attention(query=torch.randn(3, 32, 4).transpose(1, 2)), ValueError, r"query must have a last stride of 1, got strides \[128, 1, 4\]"),
    "cache-dtype": (attention(key_cache=torch.randn(5, 4, 2, 32).half()), TypeError, "key_cache must have query's dtype float32, or float8_e4m3fn, float8_e5m2, int8, got float16"),
    "value-dtype": (attention(value_cache=torch.randn(5, 4, 2, 32).half()), TypeError, "value_cache must have query's dtype float32, or float8_e4m3fn, float8_e5m2, int8, got float16"),
    "cache-rank": (attention(key_cache=torch.randn(20, 2, 32)), ValueError, r"key_cache must be .*\[num_blocks, block_size, num_kv_heads, head_dim\], got"),
    "cache-stride": (attention(key_cache=torch.randn(5, 4, 32, 2).transpose(2, 3)), ValueError, "key_cache must have a last stride of 1"),
    "head-dims-differ": (attention(key_cache=torch.randn(5, 4, 2, 48)), ValueError, "key_cache must be .* with head_dim = 32, got"),
    "value-blocks-differ": (attention(value_cache=torch.randn(6, 4, 2, 32)), ValueError, "value_cache must be .* with num_blocks = 5, got"),
    "value-block-size": (attention(value_cache=torch.randn(5, 8, 2, 32)), ValueError, "value_cache must be .* with block_size = 4, got"),
    "value-heads": (attention(value_cache=torch.randn(5, 4, 1, 32)), ValueError, "value_cache must be .* with num_kv_heads = 2, got"),
    "group": (attention(query=torch.randn(3, 3, 32)), ValueError, "num_heads must be a multiple of num_kv_heads, got 3 and 2"),
    "no-heads": (attention(query=torch.randn(3, 0, 32)), ValueError, "num_heads must be at least 1, got 0"),
    "head-dim-small": (attention(query=torch.randn(3, 4, 8), key_cache=torch.randn(5, 4, 2, 8)), ValueError, "head_dim and value_head_dim must be 16 to 512.* got 8 and 32"),
    "head-dim-large": (attention(query=torch.randn(3, 4, 520), key_cache=torch.randn(5, 4, 2, 520)), ValueError, "got 520 and 32"),
    "value-dim-large": (attention(value_cache=torch.randn(5, 4, 2, 513)), ValueError, "got 32 and 513"),
    "no-kv-heads": (attention(key_cache=torch.randn(5, 4, 0, 32), value_cache=torch.randn(5, 4, 0, 32)), ValueError, "num_kv_heads must be at least 1, got 0"),
    "no-block-size": (attention(key_cache=torch.randn(5, 0, 2, 32), value_cache=torch.randn(5, 0, 2, 32)), ValueError, "block_size must be at least 1, got 0"),
    "table-dtype": (attention(block_table=torch.zeros(3, 2, dtype=torch.int64)), TypeError, r"block_table must be int32 \[num_seqs, max_blocks_per_seq\], got int64 \[3, 2\]"),
    "table-rank": (attention(block_table=torch.zeros(3, dtype=INT32)), ValueError, "block_table must be"),
    "lens-dtype": (attention(seq_lens=torch.zeros(3, dtype=torch.int64)), TypeError, r"seq_lens must be int32 \[num_seqs\], got int64 \[3\]"),
    "lens-length": (attention(seq_lens=torch.zeros(2, dtype=INT32)), ValueError, r"seq_lens must be int32 \[num_seqs\] with num_seqs = 3, got int32 \[2\]"),
    "uniform": (attention(query=torch.randn(4, 4, 32)), ValueError, "num_tokens must be a multiple of num_seqs, got 4 tokens and 3 sequences"),
    "uniform-none": (attention(block_table=torch.zeros(0, 2, dtype=INT32), seq_lens=torch.zeros(0, dtype=INT32)), ValueError, "got 3 tokens and 0 sequences"),
    "bounds-dtype": (attention(cu_seqlens_q=torch.zeros(4, dtype=torch.int64)), TypeError, "cu_seqlens_q must be int32"),
    "bounds-length": (attention(cu_seqlens_q=torch.zeros(3, dtype=INT32)), ValueError, r"cu_seqlens_q must be int32 \[num_seqs \+ 1\] with num_seqs = 3, got int32 \[3\]"),
    "scale-infinite": (attention(scale=float("inf")), ValueError, "scale must be a finite number in float32, got inf"),
    "scale-nan": (attention(scale=float("nan")), ValueError, "scale must be a finite number in float32, got nan"),
    "scale-huge": (attention(scale=-1e39), ValueError, "scale must be a finite number in float32, got -1e[+]39"),
    "device": (attention(query=torch.randn(3, 4, 32, device="meta")), ValueError, "key_cache must be on meta like the others, got cpu"),
    "window": (attention(sliding_window=0), ValueError, "sliding_window must be at least 1, got 0"),
    "window-not-causal": (attention(sliding_window=4, causal=False), ValueError, "sliding_window needs causal=True, got sliding_window=4, causal=False"),
    "softcap-negative": (attention(softcap=-1.0), ValueError, r"softcap must be 0 \(off\) or a positive normal number in float32, got -1.0"),
    "softcap-infinite": (attention(softcap=float("inf")), ValueError, "softcap must be .* got inf"),
    "softcap-nan": (attention(softcap=float("nan")), ValueError, "softcap must be .* got nan"),
    "softcap-huge": (attention(softcap=1e39), ValueError, "softcap must be .* got 1e[+]39"),
    "softcap-tiny": (attention(softcap=1e-39), ValueError, "softcap must be .* got 1e-39"),
    "alibi-length": (attention(alibi_slopes=torch.ones(3)), ValueError, r"alibi_slopes must be float32 \[num_heads\] with num_heads = 4, got float32 \[3\]"),
    "alibi-dtype": (attention(alibi_slopes=torch.ones(4).half()), TypeError, r"alibi_slopes must be float32 \[num_heads\], got float16 \[4\]"),
    "sinks-length": (attention(sinks=torch.ones(2)), ValueError, "sinks must be .* with num_heads = 4, got"),
    "sinks-device": (attention(sinks=torch.ones(4, device="meta")), ValueError, "sinks must be on cpu like the others, got meta"),
    "key-scale-unquantised": (attention(key_scale=torch.ones(())), ValueError, "key_scale must be None with an unquantised float32 key_cache, got one"),
    "value-scale-unquantised": (attention(value_scale=torch.ones(2)), ValueError, "value_scale must be None with an unquantised float32 value_cache, got one"),
    "scale-cache-unquantised": (attention(key_scale_cache=torch.ones(5, 4, 2)), ValueError, "key_scale_cache must be None with an unquantised"),
    "int8-no-scale": (attention(**INT8), ValueError, "key_cache of int8 needs key_scale or key_scale_cache, got neither"),
    "int8-no-value-scale": (attention(**INT8, key_scale=torch.ones(())), ValueError, "value_cache of int8 needs value_scale or value_scale_cache, got neither"),
    "two-scales": (attention(**FLOAT8, key_scale=torch.ones(2), key_scale_cache=torch.ones(5, 4, 2)), ValueError, r"key_scale \(static\) and key_scale_cache \(per token\) exclude each other, got both"),
    "scale-dtype": (attention(**FLOAT8, key_scale=torch.ones(2).half()), TypeError, r"key_scale must be float32, 0-dim or \[num_kv_heads\], got float16 \[2\]"),
    "scale-length": (attention(**FLOAT8, value_scale=torch.ones(3)), ValueError, r"value_scale must be float32 \[num_kv_heads\] with num_kv_heads = 2, got float32 \[3\]"),
    "scale-rank": (attention(**FLOAT8, value_scale=torch.ones(2, 1)), ValueError, r"value_scale must be .* got float32 \[2, 1\]"),
    "scale-cache-shape": (attention(**FLOAT8, key_scale_cache=torch.ones(5, 4, 1)), ValueError, "key_scale_cache must be .* with num_kv_heads = 2, got"),
    "merge-none": (merge(lse_b=None), TypeError, r"lse_b must be float32 \[num_tokens, num_heads\], got None"),
    "merge-dtype": (merge(output_a=torch.randn(3, 4, 32).double()), TypeError, "output_a must be float32 or"),
    "merge-lse-dtype": (merge(lse_b=torch.randn(3, 4).half()), TypeError, r"lse_b must be float32 \[num_tokens, num_heads\], got float16"),
    "merge-shape": (merge(output_b=torch.randn(2, 4, 32)), ValueError, "output_b must be .* with num_tokens = 3, got"),
    "merge-lse-shape": (merge(lse_a=torch.randn(3, 5)), ValueError, "lse_a must be .* with num_heads = 4, got"),
    "append-none": (append(slot_mapping=None), TypeError, r"slot_mapping must be int64 \[num_slots\], got None"),
    "append-dtype": (append(key=torch.randn(3, 2, 32).double()), TypeError, "key must be float32 or"),
    "append-value-dtype": (append(value=torch.randn(3, 2, 32).half()), TypeError, "value must be float32"),
    "append-cache-dtype": (append(key_cache=torch.randn(5, 4, 2, 32).half()), TypeError, "key_cache must have key's dtype float32, or float8_e4m3fn, float8_e5m2, int8, got float16"),
    "append-heads": (append(key=torch.randn(3, 3, 32), value=torch.randn(3, 3, 32)), ValueError, "key_cache must be .* with num_kv_heads = 3, got"),
    "append-rows": (append(value=torch.randn(2, 2, 32)), ValueError, "value must be .* with num_tokens = 3, got"),
    "append-slots-dtype": (append(slot_mapping=torch.zeros(3, dtype=INT32)), TypeError, r"slot_mapping must be int64 \[num_slots\], got int32 \[3\]"),
    "append-slots-many": (append(slot_mapping=torch.zeros(4, dtype=torch.int64)), ValueError, "slot_mapping must have at most key's 3 rows, got 4"),
    "append-value-alone": (append(value_cache=None), ValueError, "value and value_cache must be given together, got value without value_cache"),
    "append-cache-alone": (append(value=None), ValueError, "got value_cache without value"),
    "append-scale": (append(key_scale=torch.ones(())), ValueError, "key_scale must be None with an unquantised float32 key_cache, got one"),
    "append-int8": (append(**INT8), ValueError, "key_cache of int8 needs key_scale or key_scale_cache, got neither"),
    "append-two-scales": (append(**FLOAT8, value_scale=torch.ones(2), value_scale_cache=torch.ones(5, 4, 2)), ValueError, "value_scale .* exclude each other, got both"),
    "append-scale-of-nothing": (append(value=None, value_cache=None, value_scale=torch.ones(())), ValueError, "value_scale must be None with no value_cache, got one"),
    "rotary-key-dtype": (rotary(key=torch.randn(3, 2, 32).half()), TypeError, "key must have query's dtype float32, got float16"),
    "rotary-wide": (rotary(cos=torch.ones(8, 17), sin=torch.ones(8, 17)), ValueError, r"cos must have 1 to head_dim / 2 = 16 columns, got float32 \[8, 17\]"),
    "rotary-sin": (rotary(sin=torch.ones(7, 16)), ValueError, "sin must be .* with num_positions = 8, got"),
    "rotary-sin-dtype": (rotary(sin=torch.ones(8, 16).half()), TypeError, "sin must be float32"),
    "rotary-positions": (rotary(positions=torch.zeros(3, dtype=INT32)), TypeError, "positions must be int64"),
    "rotary-positions-length": (rotary(positions=torch.zeros(2, dtype=torch.int64)), ValueError, "positions must be .* with num_tokens = 3, got"),
    "copy-dtype": (copy_blocks([[0, 1]], block_pairs=torch.zeros(1, 2, dtype=INT32)), TypeError, r"block_pairs must be int64 \[num_pairs, 2\], got int32 \[1, 2\]"),
    "copy-shape": (copy_blocks([[0, 1, 2]]), ValueError, r"block_pairs must be int64 \[num_pairs, 2\], got int64 \[1, 3\]"),
    "copy-blocks-differ": (copy_blocks([[0, 1]], caches=[torch.randn(5, 4), torch.randn(6, 4)]), ValueError, r"caches must have the same first dimension, got 5 and, in caches\[1\], 6"),
    "copy-scalar": (copy_blocks([[0, 1]], caches=[torch.tensor(1.0)]), ValueError, r"caches\[0\] must be \[num_blocks, ...\], got a 0-dim tensor"),
    "gather-dtype": (gather(out=torch.zeros(2, 6).double()), TypeError, "out must be float32 or uint8, got float64"),
    "gather-rows": (gather(out=torch.zeros(3, 6)), ValueError, "out must have 2 rows like blocks, got float32"),
    "gather-bytes": (gather(out=torch.zeros(2, 5)), ValueError, "out must hold 24 bytes a row, one block of every cache, got 20 bytes"),
    "gather-strides": (gather(out=torch.zeros(6, 2).T), ValueError, r"out must be contiguous, got strides \[1, 2\]"),
    "gather-blocks-dtype": (gather(blocks=torch.zeros(2, dtype=INT32)), TypeError, r"blocks must be int64 \[num_rows\], got int32"),
    "gather-mixed": (gather(caches=[torch.randn(5, 4), torch.randn(5, 4).half()]), TypeError, "out must be uint8, got float32"),
    "scatter-bytes": (scatter(source=torch.zeros(2, 7)), ValueError, "source must hold 24 bytes a row, .* got 28 bytes"),
}  # fmt: skip

VALUES = {
    "lens-negative": (attention(seq_lens=torch.tensor([8, -2, 1], dtype=INT32)), IndexError, r"seq_lens must be 0 to max_blocks_per_seq .* = 8, got -2 at \[1\]"),
    "lens-too-large": (attention(seq_lens=torch.tensor([8, 5, 9], dtype=INT32)), IndexError, r"seq_lens must be 0 to max_blocks_per_seq .* = 8, got 9 at \[2\]"),
    "block-negative": (attention(block_table=torch.tensor([[0, -1], [2, 3], [4, 0]], dtype=INT32)), IndexError, r"block_table must be 0 to num_blocks - 1 = 4, got -1 at \[0, 1\]"),
    "block-too-large": (attention(block_table=torch.tensor([[0, 1], [2, 5], [4, 0]], dtype=INT32)), IndexError, r"block_table must be 0 to num_blocks - 1 = 4, got 5 at \[1, 1\]"),
    "bounds-start": (attention(cu_seqlens_q=torch.tensor([1, 1, 2, 3], dtype=INT32)), IndexError, "cu_seqlens_q must start at 0, got 1"),
    "bounds-decrease": (attention(cu_seqlens_q=torch.tensor([0, 2, 1, 3], dtype=INT32)), IndexError, r"cu_seqlens_q must be non-decreasing, got a step of -1 at \[1\]"),
    "bounds-wrap": (attention(cu_seqlens_q=torch.tensor([0, 2**31 - 1, -(2**31), 3], dtype=INT32)), IndexError, "cu_seqlens_q must be non-decreasing"),
    "bounds-end": (attention(cu_seqlens_q=torch.tensor([0, 1, 2, 4], dtype=INT32)), IndexError, "cu_seqlens_q must end at or before num_tokens = 3, got 4"),
    "slot": (append(slot_mapping=torch.tensor([0, 20, 3])), IndexError, r"slot_mapping must be below num_blocks .* = 20, got 20 at \[1\]"),
    "position": (rotary(positions=torch.tensor([0, 8, 1])), IndexError, r"positions must be 0 to num_positions - 1 = 7, got 8 at \[1\]"),
    "position-negative": (rotary(positions=torch.tensor([0, 2, -1])), IndexError, r"positions must be 0 to num_positions - 1 = 7, got -1 at \[2\]"),
    "rotary-slot": (rotary(slot_mapping=torch.tensor([0, 20, 3])), IndexError, r"slot_mapping must be below num_blocks .* = 20, got 20 at \[1\]"),
    "window-block": (attention(block_table=torch.tensor([[9, 7], [9, 5], [4, 0]], dtype=INT32), sliding_window=1), IndexError, r"block_table must be 0 to num_blocks - 1 = 4, got 7 at \[0, 1\]"),
    "pair-source": (copy_blocks([[1, 0], [5, 2]]), IndexError, r"block_pairs must be below num_blocks = 5, got 5 at \[1, 0\]"),
    "pair-destination": (copy_blocks([[1, 0], [0, 9]]), IndexError, r"block_pairs must be below num_blocks = 5, got 9 at \[1, 1\]"),
    "pair-twice": (copy_blocks([[0, 2], [1, 2]]), ValueError, "block_pairs must name each destination once, got 2 more than once"),
    "pair-chain": (copy_blocks([[0, 2], [2, 3]]), ValueError, "block_pairs must not copy from a destination, got 2 as both"),
    "gather-block": (gather(blocks=torch.tensor([0, 5])), IndexError, r"blocks must be below num_blocks = 5, got 5 at \[1\]"),
    "scatter-block": (scatter(blocks=torch.tensor([7, 0])), IndexError, r"blocks must be below num_blocks = 5, got 7 at \[0\]"),
    "scatter-twice": (scatter(blocks=torch.tensor([3, 3])), ValueError, "blocks must name each block once, got 3 more than once"),
}  # fmt: skip


def tensors_of(arguments):
    for value in arguments.values():
        yield from value if isinstance(value, list) else [value]


def assert_raises_and_writes_nothing(call, error, message, function):
    op, arguments = call
    tensors = [t for t in tensors_of(arguments) if isinstance(t, torch.Tensor) and t.device.type == "cpu"]
    tensors = [t.view(torch.uint8) if t.element_size() == 1 else t for t in tensors]  # equal knows no float8
    before = [tensor.clone() for tensor in tensors]
    with pytest.raises(error, match=message):
        function(op, arguments)
    assert all(torch.equal(now, then) for now, then in zip(tensors, before, strict=True))


@pytest.mark.parametrize("name", [*METADATA, *VALUES])
def test_eager(name):
    assert_raises_and_writes_nothing(*(METADATA | VALUES)[name], lambda op, arguments: op(**arguments))


@pytest.mark.interpreter
@pytest.mark.parametrize("name", [*METADATA, *VALUES])
def test_interpreted(name):
    test_eager(name)


@pytest.mark.parametrize("name", METADATA)
def test_with_lse(name):
    (op, arguments), error, message = METADATA[name]
    if op is ops.attention:
        assert_raises_and_writes_nothing(
            (op, arguments), error, message, lambda _, arguments: ops.attention_with_lse(**arguments)
        )


@pytest.mark.parametrize("name", METADATA)
def test_fake(name):
    """The fake kernel raises the same, so that a wrong model fails when it is traced."""
    call, error, message = METADATA[name]
    mode = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=False)

    def fake(value):
        return [mode.from_tensor(t) for t in value] if isinstance(value, list) else mode.from_tensor(value)

    def traced(op, arguments):
        with mode:
            op(**{k: fake(v) if isinstance(v, torch.Tensor | list) else v for k, v in arguments.items()})

    assert_raises_and_writes_nothing(call, error, message, traced)


@pytest.mark.parametrize("name", [*METADATA, *VALUES])
def test_compiled(name):
    """Wrong metadata fails in tracing (wrapped by the compiler, message kept), wrong values when the graph runs."""
    call, error, message = (METADATA | VALUES)[name]
    torch.compiler.reset()
    if name in METADATA:
        error = (error, RuntimeError, torch._dynamo.exc.TorchRuntimeError)

    def compiled(op, arguments):
        torch.compile(lambda arguments: op(**arguments), fullgraph=True, backend="aot_eager")(arguments)

    assert_raises_and_writes_nothing(call, error, message, compiled)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (attention(query=torch.randn(3, 4, 32, requires_grad=True)), "query"),
        (attention(key_cache=torch.randn(5, 4, 2, 32, requires_grad=True)), "key_cache"),
        (merge(lse_b=torch.randn(3, 4, requires_grad=True)), "lse_b"),
        (append(value=torch.randn(3, 2, 32, requires_grad=True)), "value"),
        (
            copy_blocks([[0, 1]], caches=[torch.randn(5, 4), torch.randn(5, 4, requires_grad=True)]),
            r"caches\[1\]",
        ),
        (gather(out=torch.zeros(2, 6, requires_grad=True)), "out"),
    ],
)
def test_grad_is_refused_with_advice(call, name):
    op, arguments = call
    with pytest.raises(RuntimeError, match=rf"has no backward, but {name} requires grad: .*torch\.no_grad"):
        op(**arguments)
    with pytest.raises(RuntimeError, match="has no backward"):
        torch.compile(lambda arguments: op(**arguments), fullgraph=True, backend="aot_eager")(arguments)
    with torch.no_grad():
        op(**arguments)
    with torch.inference_mode():
        op(**arguments)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (attention(), "query"),
        (merge(), "lse_b"),
        (append(), "value"),
        (rotary(), "cos"),
        (copy_blocks([[0, 1]]), "caches"),
    ],
)
def test_tangents_are_refused_with_advice(call, name):
    """Of forward mode, under no_grad too, which does not end it: they would be lost in silence."""
    op, arguments = call
    tensor = arguments[name][0] if name == "caches" else arguments[name]

    def run(tensor):
        value = [tensor, *arguments[name][1:]] if name == "caches" else tensor
        return op(**arguments | {name: value})

    with (
        torch.no_grad(),
        pytest.raises(NotImplementedError, match=f"has no forward derivative, but {name}.*unpack_dual"),
    ):
        torch.func.jvp(run, (tensor,), (torch.ones_like(tensor),))
    with torch.autograd.forward_ad.dual_level():
        run(tensor)


def test_unused_table_entries_are_not_validated():
    """Past a sequence's keys, and in the whole row of a sequence without a query."""
    op, arguments = attention(
        block_table=torch.tensor([[0, -7], [1 << 30, 9], [4, 1 << 30]], dtype=INT32),
        seq_lens=torch.tensor([4, 8, 1], dtype=INT32),
        cu_seqlens_q=torch.tensor([0, 1, 1, 3], dtype=INT32),
    )
    assert op(**arguments).isfinite().all()


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        (dict(num_heads=3), ValueError, "num_heads must be a multiple of num_kv_heads, got 3 and 2"),
        (dict(head_dim=8), ValueError, "head_dim and value_head_dim must be 16 to 512"),
        (dict(dtype=torch.float64), TypeError, "query must be float32 or"),
        (dict(cache_dtype=torch.int8), ValueError, "key_cache of int8 needs key_scale or key_scale_cache, got neither"),
        (dict(scales="head"), ValueError, "key_scale must be None with an unquantised float32 key_cache"),
        (dict(sliding_window=True, causal=False), ValueError, "sliding_window needs causal=True"),
        (dict(rotary_dim=5), ValueError, "rotary_dim must be even, got 5"),
        (dict(rotary_dim=-2), ValueError, "rotary_dim must be at least 1, got -2"),
        (dict(num_heads=-4), ValueError, "num_heads must be at least 1, got -4"),
        (dict(block_size=2.0), TypeError, "block_size must be an integer, got 2.0"),
        (dict(dtype=None), TypeError, r"dtype must be a torch\.dtype, got None"),
        (dict(rotary_dim=64), ValueError, "cos must have 1 to head_dim / 2 = 16 columns"),
    ],
)
def test_warmup_refuses_what_no_operator_serves(changes, error, match):
    model = dict(num_heads=4, num_kv_heads=2, head_dim=32, dtype=torch.float32, device="cpu")
    with pytest.raises(error, match=match):
        torch_paged.warmup(**model | changes)
    for scales in ("scalar", "head", "token"):
        torch_paged.warmup(**model | dict(device="meta", cache_dtype=torch.int8, scales=scales, rotary_dim=32))
