"""Compiles, before the first request, every attention kernel that a model can come to need."""

from collections.abc import Callable

import torch

from torch_paged.kernels.attention import attention
from torch_paged.kernels.launch_config import FEW_ROWS


def warmup_attention(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    value_head_dim: int | None = None,
    block_size: int = 16,
    dtype: torch.dtype,
    device: torch.device | str,
    causal: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Compile and load the kernels for decode, several tokens, prefill and ragged batches of one model.

    Launches each once on tiny zeros, so nothing is left to do at the first request: the kernels depend on neither
    lengths nor batch nor table width.

    Args:
        num_heads, num_kv_heads, head_dim, value_head_dim, block_size: as the model's caches have them.
        dtype: of query and caches.
        device: a CUDA device.
        causal: as attention will be called.
        progress: called with how many of how many batches are done, after each.

    Returns:
        The number of batches that were run.
    """
    group = num_heads // num_kv_heads
    rows = sorted({1, FEW_ROWS // group, FEW_ROWS // group + 1} - {0})
    batches = [(queries, ragged) for ragged in (False, True) for queries in rows]
    blocks = torch.zeros(1, block_size, num_kv_heads, head_dim, dtype=dtype, device=device)
    values = blocks.new_zeros(1, block_size, num_kv_heads, value_head_dim or head_dim)
    table = torch.zeros(1, 1, dtype=torch.int32, device=device)
    for done, (queries, ragged) in enumerate(batches, 1):
        query = blocks.new_zeros(queries, num_heads, head_dim)
        bounds = torch.tensor([0, queries], dtype=torch.int32, device=device) if ragged else None
        attention(query, blocks, values, table, table[0], bounds, 1.0, causal)
        if progress is not None:
            progress(done, len(batches))
    return len(batches)
