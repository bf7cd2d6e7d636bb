"""Random calls of the native CPU kernels against the reference: `python tests/native_fuzz.py LIBRARY SEED COUNT`.

A process of its own, so that a library built with sanitizers can be tried as well. Tensors have exactly the size that
they need: a read past one is a read past its allocation. Unused slots, scales and table entries are poisoned.
"""

import math
import random
import sys
from pathlib import Path

import torch

from torch_paged import ops, reference
from torch_paged.cpu import build

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
BYTES = [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8]
EPS = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}  # of merged results


def choose(*values):
    return random.choice(values)


def cache(num_blocks, block_size, heads, dim, dtype):
    """Poison in some layout: token-major, head-major, or a slice of something larger."""
    layout = choose("token", "head", "slice")
    shape = (num_blocks, block_size, heads, dim)
    if layout == "head":
        made = torch.zeros(num_blocks, heads, block_size, dim, dtype=dtype).transpose(1, 2)
    elif layout == "slice":
        pad = random.randrange(3)
        made = torch.zeros(num_blocks, block_size + 1, heads * 2, dim + pad, dtype=dtype)[:, :block_size, ::2, :dim]
    else:
        made = torch.zeros(shape, dtype=dtype)
    if dtype.itemsize == 1:
        made.view(torch.uint8).fill_(0x7F)  # NaN, or 127
    else:
        made.fill_(math.nan)
    return made


def numbers(shape, dtype):
    if dtype == torch.int8:
        return torch.randint(-128, 128, shape).to(dtype)
    return (torch.randn(shape) * choose(0.3, 1, 1, 3)).to(dtype)


def store(made, block, offset, row):
    target = made.view(torch.uint8) if made.itemsize == 1 else made
    target[block, offset] = row.view(target.dtype)


def attention_case():
    """Positional arguments and options of one attention call."""
    group, kv_heads = choose(1, 2, 3, 4, 7, 8, 20), choose(1, 2, 3)
    dim, value_dim = (576, 512) if random.random() < 0.05 else (choose(16, 41, 64, 80, 97, 128, 160, 256),) * 2
    if random.random() < 0.3 and dim != 576:
        value_dim = choose(16, 23, 48, 64, 129)
    block_size, dtype = choose(1, 3, 7, 16, 16, 32, 100), choose(*FLOATS)
    key_type, value_type = (choose(dtype, dtype, *BYTES) for _ in range(2))
    shared = value_dim <= dim and random.random() < 0.2
    num_seqs = choose(0, 1, 1, 2, 5)
    lens = [choose(0, 1, random.randrange(60), random.randrange(400), random.randrange(3000)) for _ in range(num_seqs)]
    uniform = random.random() < 0.4
    longest = choose(1, 1, 3, 9, 70)
    counts = [longest if uniform else random.randrange(longest + 2) for _ in lens]
    blocks = [-(-n // block_size) for n in lens]
    num_blocks = sum(blocks) + 1
    order = torch.randperm(num_blocks).int()
    table = torch.full((num_seqs, max(blocks, default=0) + random.randrange(2)), 1 << 30, dtype=torch.int32)
    key_cache = cache(num_blocks, block_size, kv_heads, dim, key_type)
    value_cache = (
        key_cache[..., :value_dim] if shared else cache(num_blocks, block_size, kv_heads, value_dim, value_type)
    )
    options, scale_caches = scales(key_cache, value_cache, shared)
    causal = random.random() < 0.8
    if causal and random.random() < 0.3:
        options["sliding_window"] = choose(1, 2, 17, 64, 500, 1 << 40)
    used = 0
    for seq, keys in enumerate(lens):
        first = max(0, keys - counts[seq]) - options.get("sliding_window", 1 << 41) + 1
        for position in range(max(first, 0), keys if counts[seq] else 0):
            column, offset = divmod(position, block_size)
            table[seq, column] = block = int(order[used + column])
            store(key_cache, block, offset, numbers((kv_heads, dim), key_cache.dtype))
            if not shared:
                store(value_cache, block, offset, numbers((kv_heads, value_dim), value_cache.dtype))
            for scale_cache in scale_caches:
                scale_cache[block, offset] = torch.rand(kv_heads) * 0.02 + 0.001
        used += blocks[seq]
    heads = group * kv_heads
    query = torch.randn(sum(counts) + (0 if uniform else random.randrange(3)), heads, dim + choose(0, 0, 5)).to(dtype)
    if random.random() < 0.3:
        options["softcap"] = choose(0.5, 30.0)
    if random.random() < 0.3:
        options["alibi_slopes"] = torch.rand(heads)
    if random.random() < 0.3:
        options["sinks"] = torch.randn(heads * 2)[::2]
    if random.random() < 0.3:
        options["scale"] = choose(0.0, -0.3, 1.5, 1e-60)
    bounds = None if uniform else torch.tensor([0, *counts]).cumsum(0).int()
    lens = torch.tensor(lens, dtype=torch.int32)
    return (query[..., :dim], key_cache, value_cache, table, lens), dict(options, cu_seqlens_q=bounds, causal=causal)


def scales(key_cache, value_cache, shared):
    """Options that say how quantised caches are read, and the scale caches among them, to be filled."""
    options, scale_caches = {}, []
    for side, made in (("key", key_cache), ("value", value_cache)):
        if made.itemsize > 1:
            continue
        kind = choose("static", "head", "token", *(["none"] if made.dtype != torch.int8 else []))
        if kind == "token":
            options[f"{side}_scale_cache"] = torch.full(made.shape[:3], math.nan)
            scale_caches.append(options[f"{side}_scale_cache"])
        elif kind != "none":
            options[f"{side}_scale"] = torch.rand(() if kind == "static" else (made.shape[2],)) * 0.02 + 0.001
    if shared and key_cache.dtype == torch.int8 and "value_scale" in options:
        options["value_scale"] = options["value_scale"].clone()
    return options, scale_caches


def check_attention():
    arguments, options = attention_case()
    output, lse = torch.ops.paged.attention_with_lse(*arguments, **options)
    exact, exact_lse = reference.attention_with_lse(arguments[0].double(), *arguments[1:], **options)
    seen = exact_lse.isfinite()
    assert torch.equal(lse.isneginf(), exact_lse.isneginf()), "other rows see nothing"
    # Outputs and, of bf16, weights are rounded: that errs by what the values' magnitudes add up to, however well the
    # values cancel. So do float32's logits, by their size before they cancel, and by ALiBi's share of them.
    query, key_cache, value_cache, *rest = arguments
    magnitude = reference.attention(query.double(), key_cache, value_cache.double().abs(), *rest, **options)
    scale = options.get("scale", query.shape[2] ** -0.5)
    largest = [rows.double().nan_to_num().norm(dim=-1).amax().item() if rows.numel() else 0 for rows in arguments[:2]]
    size = abs(scale) * math.prod(largest) * (1 if options.get("key_scale") is None else 0.03)
    if "alibi_slopes" in options and rest[1].numel():
        size += (options["alibi_slopes"].max() * rest[1].max()).item()
    budget = torch.finfo(output.dtype).eps + torch.finfo(torch.float32).eps * (16 + size)
    off = ((output.double() - exact).abs() - budget * magnitude).amax().item() if exact.numel() else 0.0
    subnormal = torch.finfo(output.dtype).smallest_normal * torch.finfo(output.dtype).eps
    assert off <= max(subnormal, 1e-12), f"output is off by {off} more than its budget"
    error = (lse.double() - exact_lse)[seen].abs().max().item() if seen.any() else 0.0
    assert error <= 3e-5 * (1 + exact_lse[seen].abs().max().item() if seen.any() else 1), f"lse is off by {error}"


def check_append():
    kv_heads, dim, value_dim, block_size = (
        choose(1, 2, 8),
        choose(16, 41, 80, 128),
        choose(16, 33, 64),
        choose(1, 5, 16),
    )
    dtype, tokens = choose(*FLOATS), choose(0, 1, 7, 40, 2000)
    num_blocks = 6 + tokens // block_size
    caches = [cache(num_blocks, block_size, kv_heads, d, choose(dtype, *BYTES)) for d in (dim, value_dim)]
    options, _ = scales(*caches, False)
    rows = [(torch.randn(tokens, kv_heads, d + 3) * choose(0, 1, 100)).to(dtype)[..., 3:] for d in (dim, value_dim)]
    if random.random() < 0.2:
        rows[0] = rows[0].transpose(0, 2).contiguous().transpose(0, 2)
    count = min(tokens, num_blocks * block_size)
    slots = torch.randperm(num_blocks * block_size)[:count] - choose(0, 0, 4)
    expected = [c.clone() for c in caches]
    expected_options = {name: value.clone() for name, value in options.items()}
    reference.append(*rows, *expected, slots, **expected_options)
    torch.ops.paged.append(*rows, *caches, slots, **options)
    for actual, wanted in zip([*caches, *options.values()], [*expected, *expected_options.values()], strict=True):
        assert torch.equal(*(t.flatten().view(torch.uint8) for t in (actual, wanted))), "append differs"


def check_blocks():
    shape = choose((), (5,), (3, 2, 17), (16, 2, 64))
    dtype = choose(*FLOATS, torch.int8)
    caches = [torch.randn(9, *shape).to(dtype) for _ in range(choose(1, 3))]
    if len(shape) == 3 and random.random() < 0.5:
        caches = [c.transpose(1, 2).contiguous().transpose(1, 2) for c in caches]
    order = torch.randperm(9)
    pairs = torch.stack([order[:4], order[4:8]], 1) - choose(0, 2)
    pairs = pairs[: random.randrange(5)]
    expected = [c.clone() for c in caches]
    reference.copy_blocks(expected, pairs)
    torch.ops.paged.copy_blocks(caches, pairs)
    blocks = order[: random.randrange(9)] - choose(0, 3)
    out = torch.zeros(len(blocks), sum(c[0].numel() for c in caches), dtype=dtype)
    wanted = out.clone()
    torch.ops.paged.gather_blocks(caches, blocks, out)
    reference.gather_blocks(expected, blocks, wanted)
    assert torch.equal(out, wanted), "gather differs"
    torch.ops.paged.scatter_blocks(out, blocks, caches)
    assert all(torch.equal(a, b) for a, b in zip(caches, expected, strict=True)), "copy or scatter differs"


def check_merge():
    tokens, heads, dim = choose(0, 1, 9), choose(1, 3), choose(16, 41, 128)
    outputs = [torch.randn(tokens, heads, dim).to(choose(*FLOATS)) for _ in range(2)]
    lses = [torch.randn(heads, tokens).T * 5 for _ in range(2)]
    lses[0][: tokens // 3], lses[1][tokens // 4 : tokens // 2] = -math.inf, -math.inf
    outputs[0][: tokens // 3], outputs[1][tokens // 4 : tokens // 2] = math.nan, math.nan
    output, lse = torch.ops.paged.merge_attention(outputs[0], lses[0], outputs[1], lses[1])
    exact, exact_lse = reference.merge_attention(
        outputs[0].double(), lses[0].double(), outputs[1].double(), lses[1].double()
    )
    torch.testing.assert_close(output.double(), exact, atol=EPS[output.dtype] * 3, rtol=EPS[output.dtype])
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-5, rtol=1e-5)


def main():
    library, seed, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    build.library = lambda: library
    assert ops._cpu_package() == "torch_paged.cpu.native", "the library did not load"
    checks = [check_attention] * 6 + [check_append, check_blocks, check_merge]
    for case in range(seed, seed + count):
        random.seed(case)
        torch.manual_seed(case)
        torch.set_num_threads(choose(1, 2, 3))
        check = choose(*checks)
        try:
            check()
        except Exception as error:
            raise SystemExit(f"case {case}, {check.__name__}: {error!r}") from error
    print(f"{count} calls agree with the reference")


if __name__ == "__main__":
    main()
