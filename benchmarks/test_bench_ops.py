"""The operators on CPU, each in one group with its floor: a plain read or copy of the bytes, SDPA on contiguous keys.

Every path is checked against the reference's answer before it is timed: a wrong result has no speed.
"""

import pytest
import torch

import torch_paged
from torch_paged import ops
from torch_paged.testing import AttentionInputs

BATCH, KEYS, HEADS, KV_HEADS, DIM, BLOCK = 16, 2048, 32, 8, 128, 16


def paged_inputs(seq_lens, query_lens, dtype):
    """Dense caches of random numbers with shuffled blocks; decode sizes are too large for the poisoned factory."""
    blocks = [-(-keys // BLOCK) for keys in seq_lens]
    order = torch.randperm(sum(blocks)).int().split(blocks)
    table = torch.nn.utils.rnn.pad_sequence(list(order), batch_first=True)
    caches = [torch.randn(sum(blocks), KV_HEADS, BLOCK, DIM).to(dtype).transpose(1, 2) for _ in range(2)]
    query = torch.randn(sum(query_lens), HEADS, DIM).to(dtype)
    bounds = torch.tensor([0, *query_lens]).cumsum(0).int()
    lens = torch.tensor(seq_lens, dtype=torch.int32)
    return AttentionInputs(query, *caches, table, lens, None if len(set(query_lens)) == 1 else bounds)


def contiguous(inputs):
    """Query [S, H, q, D] and keys and values [S, Hk, keys, D] of a uniform batch, as SDPA wants them."""
    length = int(inputs.seq_lens[0])
    query = inputs.query.view(len(inputs.seq_lens), -1, HEADS, DIM).transpose(1, 2)
    gathered = [cache[inputs.block_table].flatten(1, 2)[:, :length].transpose(1, 2) for cache in inputs[1:3]]
    return query, *(part.contiguous() for part in gathered)


def sdpa(query, key, value):
    causal = query.shape[2] > 1
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)


def check(actual, expected):
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0.05, atol=0.02)


def run(benchmark, function, bytes_moved):
    benchmark.pedantic(function, warmup_rounds=2, rounds=7)
    benchmark.extra_info["GB/s"] = round(bytes_moved / benchmark.stats["median"] / 1e9, 2)


@pytest.mark.parametrize("path", ["paged", "gather-sdpa", "contiguous-sdpa", "plain-read"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("batch", "keys"), [(BATCH, KEYS), (1, 8192), (64, 32)])
def test_decode(benchmark, batch, keys, dtype, path):
    benchmark.group = f"decode {batch} x {keys} {dtype}"
    inputs = paged_inputs([keys] * batch, [1] * batch, dtype)
    dense = contiguous(inputs)
    paths = {
        "paged": lambda: inputs.call(torch.ops.paged.attention),
        "gather-sdpa": lambda: sdpa(*contiguous(inputs)),
        "contiguous-sdpa": lambda: sdpa(*dense),
        "plain-read": lambda: (dense[1].sum(), dense[2].sum()),
    }
    if path != "plain-read":
        check(paths[path](), sdpa(*(part.float() for part in dense)))
    run(benchmark, paths[path], 2 * dense[1].numel() * dense[1].element_size())


@pytest.mark.parametrize("path", ["paged", "contiguous-sdpa"])
def test_prefill(benchmark, path, tokens=2048):
    benchmark.group = f"prefill {tokens} causal bf16"
    inputs = paged_inputs([tokens], [tokens], torch.bfloat16)
    dense = contiguous(inputs)
    paths = {"paged": lambda: inputs.call(torch.ops.paged.attention), "contiguous-sdpa": lambda: sdpa(*dense)}
    check(paths[path](), sdpa(*(part.float() for part in dense)))
    benchmark.pedantic(paths[path], warmup_rounds=1, rounds=5)
    flops = 2 * HEADS * DIM * tokens * (tokens + 1)
    benchmark.extra_info["GFLOP/s"] = round(flops / benchmark.stats["median"] / 1e9, 1)


@pytest.mark.parametrize("path", ["one-call", "decodes-alone", "chunk-alone"])
def test_mixed(benchmark, path):
    """15 sequences decode beside one 512-token chunk: one ragged call against its two parts."""
    benchmark.group = "mixed 15 x 2048 decode + 512 on 2048 bf16"
    lens, counts = [KEYS] * 15, [1] * 15
    parts = {
        "one-call": ([*lens, KEYS], [*counts, 512]),
        "decodes-alone": (lens, counts),
        "chunk-alone": ([KEYS], [512]),
    }
    inputs = paged_inputs(*parts[path], torch.bfloat16)
    benchmark.pedantic(lambda: inputs.call(torch.ops.paged.attention), warmup_rounds=1, rounds=5)


@pytest.mark.parametrize("path", ["paged", "plain-copy"])
def test_append(benchmark, path, tokens=2048):
    benchmark.group = f"append {tokens} tokens bf16"
    caches = [torch.zeros(4096 // BLOCK, KV_HEADS, BLOCK, DIM, dtype=torch.bfloat16).transpose(1, 2) for _ in range(2)]
    key, value = torch.randn(2, tokens, KV_HEADS, DIM).bfloat16()
    slots = torch.randperm(4096)[:tokens]
    copies = torch.empty_like(key), torch.empty_like(value)
    paths = {
        "paged": lambda: torch_paged.append(key, value, *caches, slots),
        "plain-copy": lambda: (copies[0].copy_(key), copies[1].copy_(value)),
    }
    run(benchmark, paths[path], 4 * key.numel() * key.element_size())


@pytest.mark.parametrize("path", ["paged", "plain-copy"])
def test_copy_blocks(benchmark, path, pairs=256, layers=4):
    benchmark.group = f"copy_blocks {pairs} pairs x {layers} layers, K and V, bf16"
    caches = [torch.zeros(1024, BLOCK, KV_HEADS, DIM, dtype=torch.bfloat16) for _ in range(2 * layers)]
    order = torch.randperm(1024)[: 2 * pairs].view(pairs, 2)
    source = torch.zeros(pairs * len(caches), *caches[0].shape[1:], dtype=torch.bfloat16)
    target = torch.empty_like(source)
    paths = {"paged": lambda: torch_paged.copy_blocks(caches, order), "plain-copy": lambda: target.copy_(source)}
    run(benchmark, paths[path], 2 * source.numel() * source.element_size())


@pytest.mark.parametrize("path", ["paged", "plain-copy"])
def test_merge(benchmark, path, tokens=1024):
    benchmark.group = f"merge {tokens} tokens bf16"
    a, b, out = torch.randn(3, tokens, HEADS, DIM).bfloat16()
    lse_a, lse_b = torch.randn(2, tokens, HEADS)
    paths = {
        "paged": lambda: torch_paged.merge_attention(a, lse_a, b, lse_b),
        "plain-copy": lambda: (out.copy_(a), out.copy_(b)),
    }
    run(benchmark, paths[path], 3 * a.numel() * a.element_size())


@pytest.mark.parametrize("path", ["dispatch-and-checks", "empty_like"])
def test_call_overhead(benchmark, path, monkeypatch):
    """An eager call with all metadata and grad checks and a body that does nothing."""
    benchmark.group = "call overhead"
    query = torch.randn(4, 8, 32)
    cache, table = torch.randn(9, 4, 2, 32), torch.zeros(4, 2, dtype=torch.int32)
    lens, op, result = torch.ones(4, dtype=torch.int32), torch.ops.paged.attention, (query, query)
    op(query, cache, cache, table, lens)
    monkeypatch.setattr(torch_paged.bounds, "attention", lambda *args, **kwargs: None)  # noqa: ARG005
    package = ops._package(ops._cpu_package())
    monkeypatch.setattr(package, "attention", lambda *args: result)  # noqa: ARG005
    paths = {
        "dispatch-and-checks": lambda: op(query, cache, cache, table, lens, scale=0.1),
        "empty_like": lambda: torch.empty_like(query),
    }
    benchmark.pedantic(paths[path], warmup_rounds=10, rounds=200, iterations=200)
    benchmark.extra_info["us"] = round(benchmark.stats["median"] * 1e6, 2)
