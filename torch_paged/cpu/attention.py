"""Paged attention by gathering chunks of blocks for PyTorch's own flash attention, and merging the parts.

Sequences that have the same number of queries go together. A query sees all keys before the sequence's first query,
its prefix, and causally those of the queries themselves, the square:

    keys      |------- prefix -------|-- square --|
    chunks    |--------|--------|-tail|
    queries                          q0 q1 q2 q3

Prefixes are cut into chunks of whole blocks, so that gathered keys take little memory, and so that one long sequence
and many short ones keep all cores busy alike.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from torch_paged.options import PLAIN, AttentionOptions

_CHUNK_KEYS = 1024
_BATCH_BYTES = 16 << 20  # of gathered keys and values: smaller batches pay more calls than they save in cache misses
_flash_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class _Part(NamedTuple):
    """Attention of some sequences' queries over some of their keys."""

    sequences: Tensor  # [n], each part's index in its group
    output: Tensor  # [n, num_heads, queries, value_head_dim]
    lse: Tensor  # float32 [n, num_heads, queries]


def attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor | None,
    scale: float,
    causal: bool,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """Output [num_tokens, num_heads, value_head_dim] and float32 lse [num_tokens, num_heads]."""
    if options != PLAIN or not query.dtype == key_cache.dtype == value_cache.dtype:
        raise NotImplementedError(f"not supported here yet: {options}, caches of {key_cache.dtype}")
    num_tokens, num_heads, _ = query.shape
    output = query.new_zeros(num_tokens, num_heads, value_cache.shape[3])
    lse = query.new_full((num_tokens, num_heads), -math.inf, dtype=torch.float32)
    ends, counts = _queries(num_tokens, seq_lens, cu_seqlens_q)
    if scale <= 0:  # flash attention masks before it scales: keep its factor positive
        query, scale = query * math.copysign(scale != 0, scale), abs(scale) or 1.0
    caches = _Caches(key_cache, value_cache, scale)
    # Queries that would stand before the first key see nothing; without a mask, those of an empty sequence.
    seeing = torch.minimum(counts, seq_lens) if causal else counts * (seq_lens > 0)
    for count in seeing.unique().tolist():
        if count == 0:
            continue
        group = (seeing == count).nonzero()[:, 0]
        tokens = (ends[group, None] + torch.arange(-count, 0)).flatten()
        queries = query[tokens].view(len(group), count, num_heads, -1).transpose(1, 2).contiguous()
        square = count if causal and count > 1 else 0
        parts = [*caches.prefixes(queries, block_table[group], seq_lens[group] - square)]
        if square:
            parts += caches.squares(queries, block_table[group], seq_lens[group])
        group_output, group_lse = _merge(parts, len(group))
        output[tokens] = group_output.transpose(1, 2).flatten(0, 1).to(output.dtype)
        lse[tokens] = group_lse.transpose(1, 2).flatten(0, 1)
    return output, lse


class _Caches:
    """The two caches as chunks of gathered keys and values."""

    def __init__(self, key_cache: Tensor, value_cache: Tensor, scale: float) -> None:
        self.key_cache, self.value_cache, self.scale = key_cache, value_cache, scale
        self.block_size, self.num_kv_heads = key_cache.shape[1:3]
        self.value_dim = value_cache.shape[3]
        # A value that is a view of the key is read once: attention over the whole key, then its first columns.
        self.shared = (
            key_cache.data_ptr() == value_cache.data_ptr()
            and key_cache.stride() == value_cache.stride()
            and key_cache.shape[3] >= self.value_dim
        )
        # Reused by every chunk: fresh memory would cost more than the copy into it.
        self.key_buffer, self.value_buffer = key_cache.new_empty(0), value_cache.new_empty(0)
        self.key_bytes = self.num_kv_heads * (key_cache.shape[3] + self.value_dim) * key_cache.element_size()

    def prefixes(self, queries: Tensor, block_table: Tensor, lens: Tensor) -> Iterator[_Part]:
        """Attention of all queries over the first `lens` keys of their sequences, chunk by chunk."""
        rows = queries.shape[2] * queries.shape[1] // self.num_kv_heads
        # A part's output should be small beside the keys that it saw.
        blocks = -(-max(_CHUNK_KEYS, 16 * rows) // self.block_size)
        size = blocks * self.block_size
        full = lens // size
        sequences = torch.arange(len(lens)).repeat_interleave(full)
        chunks = torch.arange(len(sequences)) - (full.cumsum(0) - full)[sequences]
        for batch in _batches(torch.arange(len(sequences)), self._batch_size(size)):
            columns = chunks[batch, None] * blocks + torch.arange(blocks)
            yield self._chunk(queries, block_table, sequences[batch], columns, None)
        tails = lens - full * size
        by_length = tails.argsort()[(tails == 0).sum() :]
        for batch in _batches(by_length, self._batch_size(int(tails.max()))):
            columns = torch.arange(-(-int(tails[batch[-1]]) // self.block_size))
            yield self._chunk(queries, block_table, batch, full[batch, None] * blocks + columns, tails[batch])

    def squares(self, queries: Tensor, block_table: Tensor, lens: Tensor) -> Iterator[_Part]:
        """Causal attention of the queries over their own keys, the last ones of their sequences."""
        count = queries.shape[2]
        for batch in _batches(torch.arange(len(lens)), self._batch_size(count)):
            key, value = self._last_keys(block_table[batch], lens[batch], count)
            yield self._attend(batch, queries[batch], key, value, None, packed=False)

    def _last_keys(self, block_table: Tensor, lens: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The last `count` keys and values of each sequence, [n, num_kv_heads, count, head_dim]."""
        first, offset = (lens - count) // self.block_size, (lens - count) % self.block_size
        skipped = int(offset[0])
        if (offset == skipped).all():  # whole blocks are gathered much faster
            columns = first[:, None] + torch.arange(-(-(skipped + count) // self.block_size))
            blocks, inside = block_table.gather(1, columns).long(), slice(skipped, skipped + count)
            key = _gather(self.key_cache, blocks, self.key_buffer)[:, :, inside]
            return key, key if self.shared else _gather(self.value_cache, blocks, self.value_buffer)[:, :, inside]
        positions = lens[:, None] + torch.arange(-count, 0)
        place = block_table.gather(1, positions // self.block_size).long(), positions % self.block_size
        key = self.key_cache[place].transpose(1, 2)
        return key, key if self.shared else self.value_cache[place].transpose(1, 2)

    def _batch_size(self, keys: int) -> int:
        return max(1, _BATCH_BYTES // max(keys * self.key_bytes, 1))

    def _chunk(
        self, queries: Tensor, block_table: Tensor, sequences: Tensor, columns: Tensor, lens: Tensor | None
    ) -> _Part:
        """Attention over the blocks in `columns` of each sequence's table; over the first `lens` keys of them."""
        blocks = block_table[sequences[:, None], columns.clamp(max=block_table.shape[1] - 1)].long()
        mask = None
        if lens is not None:
            # Entries past the end name no block: read the first one again, its keys are masked.
            used = torch.arange(columns.shape[-1]) * self.block_size < lens[:, None]
            blocks = blocks.where(used, blocks[:, :1])
        key = _gather(self.key_cache, blocks, self.key_buffer)
        value = key if self.shared else _gather(self.value_cache, blocks, self.value_buffer)
        if lens is not None:
            past = torch.arange(key.shape[2]) >= lens[:, None]
            mask = torch.zeros(past.shape, dtype=queries.dtype).masked_fill_(past, -math.inf)[:, None, None]
            for rows in (key, value):  # a masked weight is 0, but what the slot holds may be NaN
                rows.masked_fill_(past[:, None, :, None], 0)
        return self._attend(sequences, queries[sequences], key, value, mask, packed=True)

    def _attend(
        self, sequences: Tensor, queries: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, packed: bool
    ) -> _Part:
        """Attention over gathered keys; `packed`, not causal: the heads that share a key are rows of one head."""
        shape = queries.shape
        if packed:
            queries = queries.view(shape[0], self.num_kv_heads, -1, shape[3])
        width = max(key.shape[3], value.shape[3])
        queries, key, value = (_widen(tensor, width) for tensor in (queries, key, value))
        output, lse = _flash_attention(queries, key, value, 0.0, not packed, attn_mask=mask, scale=self.scale)
        return _Part(sequences, output.view(*shape[:3], width)[..., : self.value_dim], lse.reshape(shape[:3]))


def _queries(num_tokens: int, seq_lens: Tensor, cu_seqlens_q: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where each sequence's query rows end, and how many they are."""
    if cu_seqlens_q is not None:
        return cu_seqlens_q[1:].long(), cu_seqlens_q.diff()
    counts = torch.full_like(seq_lens, num_tokens // max(len(seq_lens), 1))
    return counts.cumsum(0), counts


def _batches(indices: Tensor, size: int) -> tuple[Tensor, ...]:
    return indices.split(size) if len(indices) else ()


def _gather(cache: Tensor, blocks: Tensor, out: Tensor) -> Tensor:
    """Keys or values [n, num_kv_heads, columns * block_size, head_dim] of the blocks [n, columns], in `out`."""
    num_blocks, block_size, num_heads, head_dim = cache.shape
    n, columns = blocks.shape
    head_major = cache.transpose(1, 2)
    if head_major.is_contiguous():  # a block of one head lies in one piece: put those of a head together
        rows = head_major.view(num_blocks * num_heads, block_size * head_dim)
        indices = blocks[:, None] * num_heads + torch.arange(num_heads)[:, None]
        return torch.index_select(rows, 0, indices.flatten(), out=out.resize_(0)).view(
            n, num_heads, columns * block_size, head_dim
        )
    gathered = torch.index_select(cache, 0, blocks.flatten(), out=out.resize_(0))
    return gathered.view(n, columns * block_size, num_heads, head_dim).transpose(1, 2)


def _widen(tensor: Tensor, width: int) -> Tensor:
    missing = width - tensor.shape[3]
    return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor


def _merge(parts: list[_Part], num_seqs: int) -> tuple[Tensor, Tensor]:
    """The parts of each sequence by online softmax: every part weighs e^(lse - largest lse)."""
    sequences = torch.cat([part.sequences for part in parts])
    output = torch.cat([part.output for part in parts])
    lse = torch.cat([part.lse for part in parts])
    if len(sequences) == num_seqs:  # one part each
        order = sequences.argsort()
        return output[order], lse[order]
    largest = lse.new_full((num_seqs, *lse.shape[1:]), -math.inf)
    largest.scatter_reduce_(0, sequences[:, None, None].expand_as(lse), lse, "amax")
    weight = (lse - largest[sequences]).exp_()
    total = torch.zeros_like(largest).index_add_(0, sequences, weight)
    merged = output.new_zeros(num_seqs, *output.shape[1:], dtype=torch.float32)
    merged.index_add_(0, sequences, output * weight[..., None])
    return merged / total[..., None], largest + total.log()
