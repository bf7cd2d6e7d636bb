"""Compiles, before the first request, every kernel that a model can come to need."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from torch_paged.kernels.append import append
from torch_paged.kernels.attention import attention
from torch_paged.kernels.attention_plan import problem_of
from torch_paged.kernels.copy_blocks import copy_blocks
from torch_paged.kernels.device import device_of
from torch_paged.kernels.gather_blocks import gather_blocks, scatter_blocks
from torch_paged.kernels.launch_config import MANY_ROWS, AttentionLaunch, attention_launches
from torch_paged.kernels.merge_attention import merge_attention
from torch_paged.options import PLAIN


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
    """Launches each kernel on tiny zeros, for decode, several tokens, prefill and ragged batches; returns how many.

    Caches are head-major, as PagedKVCache makes them, and token-major; values are a cache of their own and, where keys
    have more columns, also a view of the keys. Triton compiles only what differs.
    """
    sizes = [(2, num_kv_heads, block_size, dim) for dim in (head_dim, value_head_dim)]
    head_major = [torch.zeros(size, dtype=dtype, device=device).transpose(1, 2) for size in sizes]
    token_major = [cache.contiguous() for cache in head_major]
    batches = []
    for keys, values in (head_major, token_major):
        _write(keys, values)
        for its_values in [values] if value_head_dim >= head_dim else [values, keys[..., :value_head_dim]]:
            batches += [(keys, its_values, *kind) for kind in _kinds(num_heads, keys, its_values, causal)]
    for done, (keys, values, queries, ragged) in enumerate(batches, 1):
        output, lse = attention(*_batch(num_heads, keys, values, queries, ragged), 1.0, causal, PLAIN)
        if done == 1:
            merge_attention(output, lse, output, lse)
        if progress is not None:
            progress(done, len(batches))
    return len(batches)


_Batch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]


def _batch(num_heads: int, keys: Tensor, values: Tensor, queries: int, ragged: bool) -> _Batch:
    """Arguments of attention for one sequence with so many queries."""
    table = torch.zeros(1, 1, dtype=torch.int32, device=keys.device)
    bounds = torch.tensor([0, queries], dtype=torch.int32, device=keys.device) if ragged else None
    return keys.new_zeros(queries, num_heads, keys.shape[3]), keys, values, table, table[0], bounds


def _kinds(num_heads: int, keys: Tensor, values: Tensor, causal: bool) -> list[tuple[int, bool]]:
    """Numbers of queries, uniform and ragged, that between them need every launch there is."""
    query, _, _, table, _, _ = _batch(num_heads, keys, values, 1, False)
    problem = problem_of(query, keys, values, table, None, causal)
    kinds: list[tuple[int, bool]] = []
    known: set[AttentionLaunch] = set()
    for ragged, queries in itertools.product((False, True), range(1, MANY_ROWS * keys.shape[2] // num_heads + 2)):
        launches = attention_launches(replace(problem, num_tokens=queries, ragged=ragged), device_of(keys.device))
        compiled = {replace(launch, unit_rows=0) for launch in launches}  # which decides a grid alone
        if not compiled <= known:
            known |= compiled
            kinds.append((queries, ragged))
    return kinds


def _write(keys: Tensor, values: Tensor) -> None:
    """Writes nothing, in every way that caches of two layers can be written."""
    num_heads, block_size = keys.shape[2], keys.shape[1]
    new_keys, new_values = (cache.new_zeros(2, num_heads, cache.shape[3]) for cache in (keys, values))
    nowhere = torch.full((2,), -1, device=keys.device)
    append(new_keys, new_values, keys, values, nowhere)
    append(new_keys, None, keys, None, nowhere)
    # The second layer's blocks stand elsewhere in a packed row. A latent cache is its keys alone.
    for caches in ([keys, values] * 2, [keys] * 2):
        rows = keys.new_empty(2, sum(cache.shape[3] for cache in caches) * num_heads * block_size)
        copy_blocks(caches, nowhere[:0].view(0, 2))
        gather_blocks(caches, nowhere, rows)
        scatter_blocks(rows, nowhere, caches)
