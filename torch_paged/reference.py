"""The specification: every operator in plain PyTorch, one sequence and one block at a time, written to be read.

Computes in float64 and rounds once, to the operator's result dtypes; a float64 query keeps float64 throughout.
Nothing in the package imports this file: tests compare with it.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor


def attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
) -> Tensor:
    """`softmax(scale * q k^T + mask) v` of each sequence over the keys that its block table names."""
    return attention_with_lse(
        query,
        key_cache,
        value_cache,
        block_table,
        seq_lens,
        cu_seqlens_q=cu_seqlens_q,
        scale=scale,
        causal=causal,
    )[0]


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
) -> tuple[Tensor, Tensor]:
    """The same, and the natural logarithm of each row's softmax denominator."""
    num_tokens, num_heads, head_dim = query.shape
    group = num_heads // key_cache.shape[2]
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    output = query.new_zeros(num_tokens, num_heads, value_cache.shape[3], dtype=torch.float64)
    lse = query.new_full((num_tokens, num_heads), -math.inf, dtype=torch.float64)
    for seq, (start, end) in enumerate(_query_ranges(num_tokens, len(seq_lens), cu_seqlens_q)):
        num_keys = int(seq_lens[seq])
        if start == end or num_keys == 0:
            continue
        key = _read(key_cache, block_table[seq], num_keys).repeat_interleave(group, dim=1)
        value = _read(value_cache, block_table[seq], num_keys).repeat_interleave(group, dim=1)
        logits = scale * torch.einsum("qhd,khd->hqk", query[start:end].double(), key)
        query_positions = num_keys - (end - start) + torch.arange(end - start, device=query.device)
        if causal:
            logits.masked_fill_(torch.arange(num_keys, device=query.device) > query_positions[:, None], -math.inf)
        seq_lse = logits.logsumexp(-1)
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
    key: Tensor, value: Tensor | None, key_cache: Tensor, value_cache: Tensor | None, slot_mapping: Tensor
) -> None:
    """WRITES row i of `key` and `value` to slot `slot_mapping[i]` of the caches, unless that is negative."""
    block_size = key_cache.shape[1]
    for row, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            key_cache[slot // block_size, slot % block_size] = key[row]
            if value is not None and value_cache is not None:
                value_cache[slot // block_size, slot % block_size] = value[row]


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


def _read(cache: Tensor, blocks: Tensor, num_keys: int) -> Tensor:
    """The first `num_keys` keys or values of a sequence: float64 `[num_keys, num_kv_heads, head_dim]`."""
    used = blocks[: -(-num_keys // cache.shape[1])].long()
    return cache[used].flatten(0, 1)[:num_keys].double()


def _kept(blocks: Tensor) -> Iterator[tuple[int, int]]:
    return ((row, block) for row, block in enumerate(blocks.tolist()) if block >= 0)


def _lse_dtype(like: Tensor) -> torch.dtype:
    return torch.float64 if like.dtype == torch.float64 else torch.float32
