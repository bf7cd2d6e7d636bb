"""Compiles, before the first request, every kernel that a model can come to need."""

from collections.abc import Callable

import torch

from torch_paged.kernels.append import append
from torch_paged.kernels.attention import attention
from torch_paged.kernels.launch_config import FEW_ROWS
from torch_paged.kernels.merge_attention import merge_attention


def warmup(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    value_head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device | str,
    causal: bool,
    progress: Callable[[int, int], None] | None,
) -> int:
    """Launches each kernel on tiny zeros, for decode, several tokens, prefill and ragged batches; returns how many."""
    group = num_heads // num_kv_heads
    rows = sorted({1, FEW_ROWS // group, FEW_ROWS // group + 1} - {0})
    batches = [(queries, ragged) for ragged in (False, True) for queries in rows]
    # Head-major storage and two tokens: the strides of a PagedKVCache in use.
    sizes = [(2, num_kv_heads, block_size, dim) for dim in (head_dim, value_head_dim)]
    keys, values = (torch.zeros(size, dtype=dtype, device=device).transpose(1, 2) for size in sizes)
    new_keys, new_values = (cache.new_zeros(2, num_kv_heads, cache.shape[3]) for cache in (keys, values))
    append(new_keys, new_values, keys, values, torch.full((2,), -1, device=device))
    table = torch.zeros(1, 1, dtype=torch.int32, device=device)
    for done, (queries, ragged) in enumerate(batches, 1):
        query = keys.new_zeros(queries, num_heads, head_dim)
        bounds = torch.tensor([0, queries], dtype=torch.int32, device=device) if ragged else None
        output, lse = attention(query, keys, values, table, table[0], bounds, 1.0, causal)
        if queries > 1:
            merge_attention(output, lse, output, lse)
        if progress is not None:
            progress(done, len(batches))
    return len(batches)
