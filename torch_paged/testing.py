"""Input factories and error budgets for tests and benchmarks.

Factories poison whatever an operator must not read: unused slots and blocks hold NaN, unused table entries ids that
no cache has. Budgets come from the error of the same computation done plainly in the low precision.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_POISON_ID = 1 << 30


class AttentionInputs(NamedTuple):
    """Positional arguments of `paged::attention`, then its `cu_seqlens_q` (None: uniform)."""

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_table: Tensor
    seq_lens: Tensor
    cu_seqlens_q: Tensor | None

    def call(self, op, **options):  # type: ignore[no-untyped-def]
        """`op(query, ..., seq_lens, cu_seqlens_q=..., **options)`."""
        return op(*self[:5], cu_seqlens_q=self.cu_seqlens_q, **options)


def paged_tensor(
    num_blocks: int,
    block_size: int,
    num_heads: int,
    head_dim: int,
    *,
    head_major: bool = False,
    fill: float = math.nan,
) -> Tensor:
    """A float32 cache `[num_blocks, block_size, num_heads, head_dim]`, stored token-major or head-major."""
    if head_major:
        return torch.full((num_blocks, num_heads, block_size, head_dim), fill).transpose(1, 2)
    return torch.full((num_blocks, block_size, num_heads, head_dim), fill)


def attention_inputs(
    query_lens: Sequence[int],
    seq_lens: Sequence[int],
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    value_head_dim: int | None = None,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    head_major: bool = False,
    uniform: bool = False,
    spare_tokens: int = 0,
    seed: int = 0,
) -> AttentionInputs:
    """A ragged batch: sequence i has `seq_lens[i]` keys and, at their end, `query_lens[i]` queries.

    Blocks are shuffled; the table has a spare column and the cache spare blocks, all poisoned. `uniform` leaves
    `cu_seqlens_q` out; `spare_tokens` adds padding rows after the last query.
    """
    generator = torch.Generator().manual_seed(seed)
    value_head_dim = head_dim if value_head_dim is None else value_head_dim
    blocks_of = [-(-keys // block_size) for keys in seq_lens]
    num_blocks = sum(blocks_of) + 3
    order = torch.randperm(num_blocks, generator=generator).int()
    table = torch.full((len(seq_lens), max(blocks_of, default=0) + 1), _POISON_ID, dtype=torch.int32)
    key_cache = paged_tensor(num_blocks, block_size, num_kv_heads, head_dim, head_major=head_major)
    value_cache = paged_tensor(num_blocks, block_size, num_kv_heads, value_head_dim, head_major=head_major)
    used = 0
    for seq, (keys, count) in enumerate(zip(seq_lens, blocks_of, strict=True)):
        if query_lens[seq] == 0:
            continue  # nobody looks at these keys: their row stays poisoned
        table[seq, :count] = order[used : used + count]
        used += count
        for position in range(keys):
            block, offset = int(table[seq, position // block_size]), position % block_size
            key_cache[block, offset] = torch.randn(num_kv_heads, head_dim, generator=generator)
            value_cache[block, offset] = torch.randn(num_kv_heads, value_head_dim, generator=generator)
    num_tokens = sum(query_lens) + spare_tokens
    query = torch.randn(num_tokens, num_heads, head_dim, generator=generator)
    query[sum(query_lens) :] = math.nan
    bounds = torch.tensor([0, *query_lens]).cumsum(0).int()
    return AttentionInputs(
        query.to(device, dtype),
        _keep_layout(key_cache, device, dtype),
        _keep_layout(value_cache, device, dtype),
        table.to(device),
        torch.tensor(seq_lens, dtype=torch.int32, device=device),
        None if uniform else bounds.to(device),
    )


def low_precision_attention(
    inputs: AttentionInputs, *, scale: float | None = None, causal: bool = True
) -> tuple[Tensor, Tensor]:
    """Attention of each sequence over its gathered keys, every step rounded to query's dtype: the error budget."""
    query, key_cache, value_cache, block_table, seq_lens, cu_seqlens_q = inputs
    num_tokens, num_heads, head_dim = query.shape
    group = num_heads // key_cache.shape[2]
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    output = query.new_zeros(num_tokens, num_heads, value_cache.shape[3])
    lse = query.new_full((num_tokens, num_heads), -math.inf, dtype=torch.float32)
    count = num_tokens // max(len(seq_lens), 1)
    bounds = range(0, num_tokens + 1, max(count, 1)) if cu_seqlens_q is None else cu_seqlens_q.tolist()
    for seq, keys in enumerate(seq_lens.tolist()):
        start, end = bounds[seq], bounds[seq + 1]
        if start == end or keys == 0:
            continue
        used = block_table[seq, : -(-keys // key_cache.shape[1])].long()
        key = key_cache[used].flatten(0, 1)[:keys].repeat_interleave(group, 1)
        value = value_cache[used].flatten(0, 1)[:keys].repeat_interleave(group, 1)
        logits = torch.einsum("qhd,khd->hqk", query[start:end], key) * scale
        if causal:
            first = keys - (end - start)
            rows = torch.arange(first, keys, device=query.device)[:, None]
            logits = logits.masked_fill(torch.arange(keys, device=query.device) > rows, -math.inf)
        weights = logits.softmax(-1).nan_to_num(0)
        output[start:end] = torch.einsum("hqk,khd->qhd", weights, value)
        lse[start:end] = logits.float().logsumexp(-1).T
    return output, lse


def assert_within_budget(actual: Tensor, exact: Tensor, low_precision: Tensor, what: str = "output") -> None:
    """Raise AssertionError unless `actual` is about as close to `exact` as plain low-precision arithmetic is.

    The budget is twice the largest error of `low_precision`, and two rounding steps of the dtype at the largest
    value. Infinities must stand in the same places, and no NaN anywhere.
    """
    exact, actual_wide, low = exact.double(), actual.double(), low_precision.double()
    finite = exact.isfinite()
    if not torch.equal(actual_wide[~finite], exact[~finite]):
        raise AssertionError(f"{what}: expected infinities {exact[~finite][:4]}, got {actual_wide[~finite][:4]}")
    if not finite.any():
        return
    size = exact[finite].abs().max().item()
    budget = 2 * (low - exact)[finite].abs().max().item() + 2 * torch.finfo(actual.dtype).eps * max(size, 1e-3)
    error = (actual_wide - exact)[finite].abs().max().item()
    if not error <= budget:
        raise AssertionError(f"{what}: largest error {error:.3e} exceeds the budget {budget:.3e}")


def _keep_layout(cache: Tensor, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(cache.shape, cache.stride(), dtype=dtype, device=device).copy_(cache)
