"""Caches for tests of PagedKVCache: one that is filled with NaN, and one of sizes that a test changes."""

import math

import torch

from torch_paged.cache import PagedKVCache

HEADS, KV_HEADS, DIM, VALUE_DIM = 4, 2, 16, 24
SIZES = dict(block_size=4, num_blocks=8, max_seqs=3, max_seq_len=20, dtype=torch.bfloat16, device="cpu")


def make_cache(device="cpu", **options):
    """Two layers of float32; whoever reads what no step has written gets NaN."""
    defaults = dict(block_size=4, num_blocks=32, max_seqs=8, max_seq_len=40, dtype=torch.float32, device=device)
    cache = PagedKVCache(2, KV_HEADS, DIM, value_head_dim=VALUE_DIM, **(defaults | options))
    for tensor in sum(cache.tensors(), ()):
        tensor.fill_(math.nan)
    return cache


def build(num_layers=2, num_kv_heads=2, head_dim=16, **options):
    """A cache of `SIZES`, where `options` do not say otherwise."""
    return PagedKVCache(num_layers, num_kv_heads, head_dim, **(SIZES | options))
