"""The specification: every operator in plain PyTorch, one sequence and one block at a time, written to be read.

Computes in float64 and rounds once, to the operator's result dtypes; a float64 query keeps float64 throughout.
Nothing in the package imports this file: tests compare with it.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def attention(*args: Tensor, **options: Any) -> Tensor:
    """`softmax(scale * q k^T + mask) v` of each sequence over the keys that its block table names."""
    return attention_with_lse(*args, **options)[0]


def attention_with_lse(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    sliding_window: int | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    key_scale_cache: Tensor | None = None,
    value_scale_cache: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same, and the natural logarithm of each row's softmax denominator."""
    num_tokens, num_heads, head_dim = query.shape
    group = num_heads // key_cache.shape[2]
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    output = query.new_zeros(num_tokens, num_heads, value_cache.shape[3], dtype=torch.float64)
    lse = query.new_full((num_tokens, num_heads), -math.inf, dtype=torch.float64)
    for seq, (start, end) in enumerate(_query_ranges(num_tokens, len(seq_lens), cu_seqlens_q)):
        num_queries, num_keys = end - start, int(seq_lens[seq])
        if num_queries == 0:
            continue
        query_positions = num_keys - num_queries + torch.arange(num_queries, device=query.device)
        # A window hides the first keys from every query: their blocks may be gone.
        first = 0 if sliding_window is None else max(num_keys - num_queries, 0) - sliding_window + 1
        keys = torch.arange(max(first, 0), num_keys, device=query.device)
        key = _read(key_cache, block_table[seq], keys, key_scale, key_scale_cache).repeat_interleave(group, 1)
        value = _read(value_cache, block_table[seq], keys, value_scale, value_scale_cache).repeat_interleave(group, 1)
        logits = scale * torch.einsum("qhd,khd->hqk", query[start:end].double(), key)
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        distance = query_positions[:, None] - keys
        if alibi_slopes is not None:
            logits -= alibi_slopes.double()[:, None, None] * distance.abs()
        if causal:
            logits.masked_fill_(distance < 0, -math.inf)
        if sliding_window is not None:
            logits.masked_fill_(distance >= sliding_window, -math.inf)
        seq_lse = logits.logsumexp(-1)
        if sinks is not None:
            seq_lse = torch.logaddexp(seq_lse, sinks.double()[:, None])
        # A row that sees nothing has lse = -inf; its weights are exp(-inf) of anything finite: zeros.
        weights = (logits - seq_lse.masked_fill(seq_lse == -math.inf, 0)[..., None]).exp()
        output[start:end] = torch.einsum("hqk,khd->qhd", weights, value)
        lse[start:end] = seq_lse.T
    return output.to(query.dtype), lse.to(_lse_dtype(query))


def merge_attention(output_a: Tensor, lse_a: Tensor, output_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the attention over each."""
    lse = torch.logaddexp(lse_a.double(), lse_b.double())
    finite = lse.masked_fill(lse == -math.inf, 0)
    weight_a, weight_b = (lse_a - finite).exp()[..., None], (lse_b - finite).exp()[..., None]
    # A part that saw no key has no say, whatever its rows hold.
    part_a = output_a.double().masked_fill(lse_a.isneginf()[..., None], 0)
    part_b = output_b.double().masked_fill(lse_b.isneginf()[..., None], 0)
    output = weight_a * part_a + weight_b * part_b
    return output.to(output_a.dtype), lse.to(_lse_dtype(output_a))


def append(
    key: Tensor,
    value: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor | None,
    slot_mapping: Tensor,
    *,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    key_scale_cache: Tensor | None = None,
    value_scale_cache: Tensor | None = None,
) -> None:
    """WRITES row i of `key` and `value` to slot `slot_mapping[i]` of the caches, unless that is negative.

    A quantised cache takes `quantise(row, scale)`; with a scale cache, each row and head has `row_scale` of its own.
    """
    sides = ((key, key_cache, key_scale, key_scale_cache), (value, value_cache, value_scale, value_scale_cache))
    for rows, cache, scale, scale_cache in sides:
        if rows is None or cache is None:
            continue
        for row, slot in zip(rows, slot_mapping.tolist(), strict=False):
            place = slot // cache.shape[1], slot % cache.shape[1]
            if slot < 0:
                continue
            if cache.dtype == row.dtype:
                cache[place] = row
                continue
            if scale_cache is not None:
                scale = scale_cache[place] = row_scale(row, cache.dtype)
            stored = quantise(row, row.new_ones(()) if scale is None else scale, cache.dtype)
            cache.view(torch.uint8)[place] = stored.view(torch.uint8)  # PyTorch cannot index every float8 type


def rotary_append(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    key_cache: Tensor,
    value_cache: Tensor | None,
    slot_mapping: Tensor,
    *,
    interleaved: bool = False,
    **scales: Tensor | None,
) -> Tensor:
    """`append` of the rotated key; returns the rotated query."""
    angles = cos[positions], sin[positions]
    append(rotate(key, *angles, interleaved), value, key_cache, value_cache, slot_mapping, **scales)
    return rotate(query, *angles, interleaved)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The first 2 r columns of `[num_tokens, num_heads, head_dim]` turned by angles `[num_tokens, r]`, rounded once.

    Column i makes a pair with column i + r; interleaved, column 2 i with column 2 i + 1 (Su et al., 2021, "RoFormer").
    """
    half = cos.shape[1]
    turned = heads.double()
    pairs = turned[..., : 2 * half].unflatten(-1, (half, 2) if interleaved else (2, half))
    a, b = pairs.unbind(-1 if interleaved else -2)
    cos, sin = cos.double()[:, None], sin.double()[:, None]
    rotated = torch.stack([a * cos - b * sin, b * cos + a * sin], -1 if interleaved else -2).flatten(-2)
    return torch.cat([rotated, turned[..., 2 * half :]], -1).to(heads.dtype)


def largest(dtype: torch.dtype) -> float:
    """The largest finite number of a quantised type: 448, 57344 or 127."""
    return torch.iinfo(dtype).max if dtype == torch.int8 else torch.finfo(dtype).max


def row_scale(row: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales that bring each head's largest magnitude to the largest number of `dtype`: float32 `[num_heads]`.

    Where that would be 0 or subnormal, as for a row of zeros, the scale is 1.
    """
    peak = row.float().abs().amax(-1)
    scale = peak / torch.full_like(peak, largest(dtype))  # a GPU would multiply by a number's reciprocal
    return torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)


def quantise(row: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`row / scale` in float32, rounded to the nearest number of `dtype`, ties to even; never past its largest."""
    limit = largest(dtype)
    exact = (row.float() / scale.float().reshape(-1, 1)).clamp(-limit - (dtype == torch.int8), limit)
    return exact.nan_to_num().round().to(dtype) if dtype == torch.int8 else exact.to(dtype)


def copy_blocks(caches: Sequence[Tensor], block_pairs: Tensor) -> None:
    """WRITES each pair's source block to its destination, in every cache, as if all at once."""
    pairs = [(source, destination) for source, destination in block_pairs.tolist() if min(source, destination) >= 0]
    for cache in caches:
        before = cache.clone()
        for source, destination in pairs:
            cache[destination] = before[source]


def gather_blocks(caches: Sequence[Tensor], blocks: Tensor, out: Tensor) -> None:
    """WRITES to row i of `out` the bytes of block `blocks[i]` of each cache in turn, unless that is negative."""
    for row, block in _kept(blocks):
        parts = [cache[block].contiguous().view(-1).view(torch.uint8) for cache in caches]
        out[row].view(-1).view(torch.uint8).copy_(torch.cat(parts))


def scatter_blocks(source: Tensor, blocks: Tensor, caches: Sequence[Tensor]) -> None:
    """WRITES row i of `source` back to block `blocks[i]` of each cache: the inverse of `gather_blocks`."""
    for row, block in _kept(blocks):
        stored = source[row].view(-1).view(torch.uint8)
        sizes = [cache[block].numel() * cache.element_size() for cache in caches]
        for cache, part in zip(caches, stored.split(sizes), strict=True):
            cache[block] = part.clone().view(cache.dtype).view(cache.shape[1:])


def _query_ranges(num_tokens: int, num_seqs: int, cu_seqlens_q: Tensor | None) -> Iterator[tuple[int, int]]:
    if cu_seqlens_q is None:
        count = num_tokens // max(num_seqs, 1)
        return ((seq * count, (seq + 1) * count) for seq in range(num_seqs))
    return pairwise(cu_seqlens_q.tolist())


def _read(cache: Tensor, blocks: Tensor, keys: Tensor, scale: Tensor | None, scale_cache: Tensor | None) -> Tensor:
    """The keys or values at positions `keys` of a sequence: float64 `[len(keys), num_kv_heads, head_dim]`."""
    place = blocks[keys // cache.shape[1]].long(), keys % cache.shape[1]
    rows = (cache.view(torch.uint8)[place].view(cache.dtype) if cache.itemsize == 1 else cache[place]).double()
    if scale_cache is not None:
        scale = scale_cache[place]
    return rows if scale is None else rows * scale.double()[..., None]


def _kept(blocks: Tensor) -> Iterator[tuple[int, int]]:
    return ((row, block) for row, block in enumerate(blocks.tolist()) if block >= 0)


def _lse_dtype(like: Tensor) -> torch.dtype:
    return torch.float64 if like.dtype == torch.float64 else torch.float32
