"""Input factories and error budgets for tests and benchmarks.

Factories poison whatever an operator must not read: unused slots and blocks hold NaN, unused table entries ids that
no cache has. Budgets come from the error of the same computation done plainly in the low precision.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

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


class Storage(NamedTuple):
    """How a cache is quantised: its dtype, and what has a scale of its own."""

    dtype: torch.dtype
    scales: Literal["scalar", "head", "token"] | None = None


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
    sliding_window: int | None = None,
    seed: int = 0,
) -> AttentionInputs:
    """A ragged batch: sequence i has `seq_lens[i]` keys and, at their end, `query_lens[i]` queries.

    Blocks are shuffled; the table has a spare column and the cache spare blocks, all poisoned, and so are keys that
    a `sliding_window` hides from every query, and the table entries of blocks that hold no others. `uniform` leaves
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
        first = 0 if sliding_window is None else max(max(keys - query_lens[seq], 0) - sliding_window + 1, 0)
        table[seq, first // block_size : count] = order[used + first // block_size : used + count]
        used += count
        for position in range(first, keys):
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


def quantised(
    inputs: AttentionInputs, key: Storage | None, value: Storage | None, seed: int = 0
) -> tuple[AttentionInputs, dict[str, Tensor]]:
    """The same batch with caches stored as told (None: as they are), and the scales as keywords of `paged::attention`.

    Scales are up to twice what the numbers need, so that no two heads or tokens share one. What was poisoned stays
    so: NaN, or -128 in an int8 cache, which has none; a scale cache holds NaN there.
    """
    generator = torch.Generator().manual_seed(seed)
    scales = {}
    caches = []
    for side, cache, storage in (("key", inputs.key_cache, key), ("value", inputs.value_cache, value)):
        if storage is None:
            caches.append(cache)
            continue
        dtype, kind = storage
        scale = torch.ones(())
        if kind is not None:
            poisoned = cache[..., 0].isnan().cpu()
            kept = {"scalar": (), "head": (2,), "token": (0, 1, 2)}[kind]
            largest = cache.float().cpu().nan_to_num().abs().amax([dim for dim in range(4) if dim not in kept])
            limit = torch.iinfo(dtype).max if dtype == torch.int8 else torch.finfo(dtype).max
            scale = largest / limit * (1 + torch.rand(largest.shape, generator=generator))
            if kind == "token":
                scale = scale.masked_fill(poisoned, math.nan)
            scales[f"{side}_scale_cache" if kind == "token" else f"{side}_scale"] = scale.to(cache.device)
        exact = cache.float() / scale.to(cache.device)[..., None]
        stored = exact.nan_to_num(-128).round() if dtype == torch.int8 else exact
        caches.append(_keep_layout(stored, cache.device, dtype, like=cache))
    return inputs._replace(key_cache=caches[0], value_cache=caches[1]), scales


def low_precision_attention(
    inputs: AttentionInputs,
    *,
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
        if start == end:
            continue
        first = 0 if sliding_window is None else max(max(keys - end + start, 0) - sliding_window + 1, 0)
        positions = torch.arange(first, keys, device=query.device)
        place = block_table[seq, positions // key_cache.shape[1]].long(), positions % key_cache.shape[1]
        key = _read(key_cache, place, key_scale, key_scale_cache, query.dtype).repeat_interleave(group, 1)
        value = _read(value_cache, place, value_scale, value_scale_cache, query.dtype).repeat_interleave(group, 1)
        logits = torch.einsum("qhd,khd->hqk", query[start:end], key) * scale
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        distance = torch.arange(keys - end + start, keys, device=query.device)[:, None] - positions
        if alibi_slopes is not None:
            logits = logits - alibi_slopes.to(query.dtype)[:, None, None] * distance.abs()
        if causal:
            logits = logits.masked_fill(distance < 0, -math.inf)
        if sliding_window is not None:
            logits = logits.masked_fill(distance >= sliding_window, -math.inf)
        if sinks is not None:
            logits = torch.cat([logits, sinks.to(query.dtype)[:, None, None].expand(-1, end - start, 1)], -1)
        weights = logits.softmax(-1).nan_to_num(0)[..., : len(positions)]
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


def _keep_layout(cache: Tensor, device: torch.device | str, dtype: torch.dtype, like: Tensor | None = None) -> Tensor:
    strides = (cache if like is None else like).stride()
    return torch.empty_strided(cache.shape, strides, dtype=dtype, device=device).copy_(cache)


def _read(
    cache: Tensor, place: tuple[Tensor, Tensor], scale: Tensor | None, scale_cache: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Stored rows of a cache, widened and scaled in `dtype`: [len(place), num_kv_heads, head_dim]."""
    rows = cache.view(torch.uint8)[place].view(cache.dtype) if cache.itemsize == 1 else cache[place]
    scale = scale if scale_cache is None else scale_cache[place]
    return rows.to(dtype) if scale is None else rows.to(dtype) * scale.to(dtype)[..., None]
