"""The batches that attention is measured and checked on, and their random inputs."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torch_paged.storage import empty_cache

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class Case:
    """One batch: per sequence its keys and its queries."""

    keys: tuple[int, ...]
    queries: tuple[int, ...]
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    value_dim: int = 128
    block: int = 16
    dtype: str = "bf16"
    ragged: bool = False
    shuffled: bool = True
    causal: bool = True
    head_major: bool = True  # storage, as PagedKVCache has it; otherwise token-major
    pool: int = 0  # GB of both caches, if more than the sequences need

    @property
    def bytes(self) -> int:
        size = DTYPES[self.dtype].itemsize
        return sum(self.keys) * self.kv_heads * (self.dim + self.value_dim) * size

    @property
    def block_bytes(self) -> int:
        return self.block * self.kv_heads * (self.dim + self.value_dim) * DTYPES[self.dtype].itemsize

    @property
    def flops(self) -> int:
        return self.flops_within(max(self.keys))

    def flops_within(self, window: int) -> int:
        """Of pairs of a query and a key that it sees, at most `window` keys where they are causal."""

        def seen(queries: int) -> int:  # by so many from the first key on
            return window * queries - window * (window - 1) // 2 if queries > window else queries * (queries + 1) // 2

        lens = zip(self.keys, self.queries, strict=True)
        pairs = sum(seen(k) - seen(k - q) if self.causal else q * k for k, q in lens)
        return 2 * pairs * self.heads * (self.dim + self.value_dim)


def decode(count: int, keys: int, queries: int = 1, **options: Any) -> Case:
    return Case((keys,) * count, (queries,) * count, **options)


def log_uniform(count: int, low: int, high: int) -> tuple[int, ...]:
    """A fixed list, in a fixed shuffled order."""
    steps = torch.linspace(math.log(low), math.log(high), count, dtype=torch.float64).exp().round().int()
    return tuple(steps[torch.randperm(count, generator=torch.Generator().manual_seed(0))].tolist())


CASES = {
    "decode 64 x 8k": decode(64, 8192),
    "decode 64 x 8k, token-major": decode(64, 8192, head_major=False),
    "decode 64 x 8k, consecutive": decode(64, 8192, shuffled=False),
    "decode 64 x 8k, pool of 64 GB": decode(64, 8192, pool=64),
    "decode 64 x 8k, consecutive in 64 GB": decode(64, 8192, pool=64, shuffled=False),
    "decode 64 x 8k, no table": decode(64, 8192, block=8192),  # one block a sequence: its id is loaded once
    "decode 1 x 4k": decode(1, 4096),
    "decode 1 x 128k": decode(1, 131072),
    "decode 256 x 128": decode(256, 128),
    "decode 40 x 500": decode(40, 500),  # 320 units for 264 programs: most are cut
    "decode ragged": Case(log_uniform(256, 64, 32768), (1,) * 256),
    "decode 64 x 8k, cu_seqlens_q": decode(64, 8192, ragged=True),
    "mha 16 x 128, block 8": decode(16, 128, heads=32, kv_heads=32, block=8),
    "mha 16 x 2000, block 8": decode(16, 2000, heads=32, kv_heads=32, block=8),
    "mha 16 x 4000, block 8": decode(16, 4000, heads=32, kv_heads=32, block=8),
    "q 1, 32 x 8k": decode(32, 8192),
    "q 4, 32 x 8k": decode(32, 8192, 4),
    "q 16, 32 x 8k": decode(32, 8192, 16),
    "q 4, 16 x 1000": decode(16, 1000, 4),
    "q 8, 1 x 8k": decode(1, 8192, 8),
    **{f"decode 64 x 8k, dim {dim}": decode(64, 8192, dim=dim, value_dim=dim) for dim in (64, 80, 96, 256)},
    **{f"decode 64 x 8k, block {block}": decode(64, 8192, block=block) for block in (1, 8, 32, 64, 256)},
    "prefill 8k": Case((8192,), (8192,)),
    "prefill 8k, token-major": Case((8192,), (8192,), head_major=False),
    "prefill 8k, block 8": Case((8192,), (8192,), block=8),
    "prefill 8k, block 64": Case((8192,), (8192,), block=64),
    "prefill 8k, no table": Case((8192,), (8192,), block=8192),
    "prefill 8k, dim 64": Case((8192,), (8192,), dim=64, value_dim=64),
    "prefill 8k, dim 256": Case((8192,), (8192,), dim=256, value_dim=256),
    **{f"prefill 8k, dim {dim}": Case((8192,), (8192,), dim=dim, value_dim=dim) for dim in (80, 96, 192)},
    "prefill 8k, dims 192 and 128": Case((8192,), (8192,), dim=192),
    "prefill 8k, 32 KV heads": Case((8192,), (8192,), kv_heads=32),
    "prefill 8k, all keys": Case((8192,), (8192,), causal=False),
    "prefill 32k": Case((32768,), (32768,)),
    "prefill 1k": Case((1024,), (1024,)),
    "prefill 16 x 1k": Case((1024,) * 16, (1024,) * 16),
    "prefill 16 x 512, cu_seqlens_q": Case((512,) * 16, (512,) * 16, ragged=True),
    "prefill 4 x 4k, cu_seqlens_q": Case((4096,) * 4, (4096,) * 4, ragged=True),
    "prefill 512 on 8k": Case((8192,), (512,)),
    "prefill 1k on 16k": Case((16384,), (1024,)),
    "prefill 128 on 128k": Case((131072,), (128,)),
    "prefill 2k on 8k, 32 KV heads": Case((8192,), (2048,), kv_heads=32),
    "prefill 4 x 1k on 4k, 32 KV heads": Case((4096,) * 4, (1024,) * 4, kv_heads=32),
    "mixed": Case((8192,) * 60 + (10240,), (1,) * 60 + (2048,), ragged=True),
    "mixed, decodes alone": Case((8192,) * 60, (1,) * 60, ragged=True),
    "mixed, chunk alone": Case((10240,), (2048,), ragged=True),
}

# Odd shapes, small enough to be verified whole: dims, groups, blocks, dtypes, empty and padded batches.
ODD = {
    f"{name} {dtype}": replace(case, dtype=dtype)
    for dtype in DTYPES
    for name, case in {
        "decode": Case((1, 0, 45, 700), (1,) * 4, heads=4, kv_heads=2),
        "several": Case((3, 20, 200), (3,) * 3, heads=12, kv_heads=2, dim=80, value_dim=80, block=1),
        "q16": Case((300, 16, 900), (16,) * 3, heads=8, kv_heads=2, dim=64, value_dim=64, block=32),
        "ragged": Case((50, 190, 12, 1, 400), (1, 190, 0, 1, 37), heads=14, kv_heads=2, block=7, ragged=True),
        "dims": Case((50, 190, 400), (1, 190, 7), heads=3, kv_heads=1, dim=41, value_dim=23, ragged=True),
        "dim 96/160": Case((50, 190), (2, 2), heads=40, kv_heads=2, dim=96, value_dim=160, block=64),
        "dim 256": Case((500, 190), (200, 190), heads=4, kv_heads=2, dim=256, value_dim=256, ragged=True),
        "dim 512": Case((100, 30), (9, 2), heads=16, kv_heads=1, dim=512, value_dim=512, ragged=True),
        "dim 576/512": Case((100, 300), (1, 1), heads=64, kv_heads=1, dim=576, value_dim=512, block=64),
        "not causal": Case((50, 190, 0), (70, 190, 3), heads=4, kv_heads=4, causal=False, ragged=True),
    }.items()
}

# The same for the kernel that serves many rows, too large to be interpreted.
ODD_PREFILL = {
    f"{name} {dtype}": replace(case, dtype=dtype)
    for dtype in ("bf16", "fp16")
    for name, case in {
        "prefill": Case((700, 1, 130, 9), (700, 1, 40, 0), heads=8, kv_heads=2, ragged=True, head_major=False),
        "prefill, block 8": Case(
            (333, 500), (333, 257), heads=4, kv_heads=4, dim=64, value_dim=64, block=8, ragged=True
        ),
        "prefill, block 64": Case((600, 600), (600, 600), heads=16, kv_heads=1, block=64),
        "prefill, block 256": Case((1000, 300, 257), (130, 300, 257), heads=6, kv_heads=2, block=256, ragged=True),
        "prefill, block 128": Case((301, 129), (130, 140), heads=5, kv_heads=1, block=128, causal=False, ragged=True),
        "prefill, dims 128/64": Case((300, 190), (200, 190), heads=4, kv_heads=2, value_dim=64, block=32, ragged=True),
        "prefill, dims 24/40": Case((700, 90), (700, 70), heads=4, kv_heads=2, dim=24, value_dim=40, ragged=True),
        "prefill, dims 96/192": Case((700, 90), (700, 70), heads=4, kv_heads=2, dim=96, value_dim=192, ragged=True),
        "prefill, dim 256, block 64": Case((500,), (500,), heads=4, kv_heads=2, dim=256, value_dim=256, block=64),
        "chunk": Case((9000,), (40,), heads=8, kv_heads=2),
    }.items()
}


def starts_of(lens: Iterable[int], device: torch.device) -> Tensor:
    """Where each sequence's part begins, and the end of the last."""
    return torch.tensor((0, *lens), device=device).cumsum(0).int()


def make(case: Case, device: torch.device, seed: int = 0) -> Arguments:
    """Random inputs; unused slots, blocks and table entries hold what must not be read."""
    torch.manual_seed(seed)
    dtype, blocks = DTYPES[case.dtype], [-(-keys // case.block) for keys in case.keys]
    total = max(sum(blocks), case.pool * 10**9 // case.block_bytes)
    order = torch.randperm(total, device=device) if case.shuffled else torch.arange(total, device=device)
    table = torch.full((len(blocks), max(blocks) + 1), 1 << 30, dtype=torch.int32, device=device)
    block = (case.block, case.kv_heads) if case.head_major else (case.kv_heads, case.block)
    key_cache, value_cache = (
        empty_cache(total + 1, *block, dim, dtype, device).normal_() for dim in (case.dim, case.value_dim)
    )
    if not case.head_major:
        key_cache, value_cache = key_cache.transpose(1, 2), value_cache.transpose(1, 2)
    key_cache[total], value_cache[total] = math.nan, math.nan
    first = 0
    for row, (count, keys) in enumerate(zip(blocks, case.keys, strict=True)):
        table[row, :count] = order[first : first + count]
        first += count
        if keys % case.block:
            key_cache[order[first - 1], keys % case.block :] = math.nan
            value_cache[order[first - 1], keys % case.block :] = math.nan
    query = torch.randn(sum(case.queries) + 3 * case.ragged, case.heads, case.dim, device=device, dtype=dtype)
    bounds = starts_of(case.queries, device) if case.ragged else None
    return query, key_cache, value_cache, table, torch.tensor(case.keys, dtype=torch.int32, device=device), bounds
