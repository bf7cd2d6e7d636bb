"""Attention of a group of sequences over chunks of gathered keys, each part by PyTorch's own flash attention."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from torch_paged.cpu.logits import Mask, capped_attention
from torch_paged.cpu.stored import Stored

_CHUNK_KEYS = 1024
_BATCH_BYTES = 16 << 20  # of gathered keys and values: smaller batches pay more calls than they save in cache misses
_flash_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class Part(NamedTuple):
    """Attention of some sequences' queries over some of their keys."""

    sequences: Tensor  # [n], each part's index in its group
    output: Tensor  # [n, num_heads, queries, value_head_dim]
    lse: Tensor  # float32 [n, num_heads, queries]


class Group(NamedTuple):
    """Runs of equally many queries; where a window hides the first keys, tables begin behind their blocks."""

    queries: Tensor  # [n, num_heads, queries, head_dim]
    block_table: Tensor  # [n, max_blocks_per_seq]
    lens: Tensor  # [n], keys
    stands: Tensor  # [n], the last query stands at the key before that one


class Chunks:
    """The two caches as chunks of gathered keys and values.

    With a `mask`, each chunk gets what it hides; without one, all queries see all keys of the prefixes.
    """

    def __init__(self, key: Stored, value: Stored, scale: float, softcap: float, mask: Mask | None) -> None:
        self.key, self.value, self.scale, self.softcap, self.mask = key, value, scale, softcap, mask
        self.block_size, self.num_kv_heads = key.cache.shape[1:3]
        self.value_dim = value.cache.shape[3]
        # A value that is a view of the key is read once: attention over the whole key, then its first columns.
        self.shared = key.same_as(value)
        self.key_bytes = self.num_kv_heads * (key.cache.shape[3] + self.value_dim) * key.dtype.itemsize

    def prefixes(self, group: Group, lens: Tensor) -> Iterator[Part]:
        """Attention of all queries over the first `lens` keys of their sequences, chunk by chunk."""
        rows = group.queries.shape[2] * group.queries.shape[1] // self.num_kv_heads
        # A part's output should be small beside the keys that it saw; a mask grows with both.
        blocks = -(-(_CHUNK_KEYS if self.mask else max(_CHUNK_KEYS, 16 * rows)) // self.block_size)
        size = blocks * self.block_size
        key_bytes = self.key_bytes + (8 * rows * self.num_kv_heads if self.mask else 0)
        full = lens // size
        sequences = torch.arange(len(lens)).repeat_interleave(full)
        chunks = torch.arange(len(sequences)) - (full.cumsum(0) - full)[sequences]
        for batch in _batches(torch.arange(len(sequences)), size * key_bytes):
            columns = chunks[batch, None] * blocks + torch.arange(blocks)
            yield self._chunk(group, sequences[batch], columns, None)
        tails = lens - full * size
        by_length = tails.argsort()[(tails == 0).sum() :]
        for batch in _batches(by_length, int(tails.max()) * key_bytes):
            columns = torch.arange(-(-int(tails[batch[-1]]) // self.block_size))
            yield self._chunk(group, batch, full[batch, None] * blocks + columns, lens[batch])

    def squares(self, group: Group) -> Iterator[Part]:
        """Causal attention of the queries over their own keys, the last ones of their sequences."""
        count = group.queries.shape[2]
        for batch in _batches(torch.arange(len(group.lens)), count * self.key_bytes):
            key, value = self._last_keys(group.block_table[batch], group.lens[batch], count)
            yield self._attend(batch, group.queries[batch], key, value, None, causal=True)

    def _last_keys(self, block_table: Tensor, lens: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The last `count` keys and values of each sequence, [n, num_kv_heads, count, head_dim]."""
        first, offset = (lens - count) // self.block_size, (lens - count) % self.block_size
        skipped = int(offset[0])
        if (offset == skipped).all():  # whole blocks are gathered much faster
            columns = first[:, None] + torch.arange(-(-(skipped + count) // self.block_size))
            blocks, inside = block_table.gather(1, columns).long(), slice(skipped, skipped + count)
            key = self.key.blocks(blocks)[:, :, inside]
            return key, key if self.shared else self.value.blocks(blocks)[:, :, inside]
        positions = lens[:, None] + torch.arange(-count, 0)
        place = block_table.gather(1, positions // self.block_size).long(), positions % self.block_size
        key = self.key.slots(*place)
        return key, key if self.shared else self.value.slots(*place)

    def _chunk(self, group: Group, sequences: Tensor, columns: Tensor, lens: Tensor | None) -> Part:
        """Attention over the blocks in `columns` of each sequence's table; over those of its first `lens` keys."""
        table = group.block_table
        blocks = table[sequences[:, None], columns.clamp(max=table.shape[1] - 1)].long()
        if lens is not None:
            # Entries past the end name no block: read the first one again, its keys are masked.
            blocks = blocks.where(columns * self.block_size < lens[:, None], blocks[:, :1])
        key = self.key.blocks(blocks)
        value = key if self.shared else self.value.blocks(blocks)
        queries = group.queries[sequences]
        if self.mask:
            query_positions = group.stands[sequences, None] + torch.arange(-queries.shape[2], 0)
            hidden = self.mask.hidden(query_positions, self._positions(columns), group.lens[sequences])
            _clear(hidden.all(1), key, value)
            bias = self.mask.bias(query_positions, self._positions(columns), hidden)
            part = self._attend(sequences, queries, key, value, bias)
            return _without(part, hidden.all(2)[:, None])
        if lens is None:
            return self._attend(sequences, queries, key, value, None)
        past = self._positions(columns) >= lens[:, None]
        _clear(past, key, value)
        bias = torch.zeros(past.shape, dtype=queries.dtype).masked_fill_(past, -math.inf)[:, None, None]
        return self._attend(sequences, queries, key, value, bias)

    def _positions(self, columns: Tensor) -> Tensor:
        return (columns[..., None] * self.block_size + torch.arange(self.block_size)).flatten(1)

    def _attend(
        self,
        sequences: Tensor,
        queries: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        causal: bool = False,
    ) -> Part:
        """Attention over gathered keys: where all rows see the same, heads that share a key are rows of one head."""
        if self.softcap and bias is not None:
            output, lse = capped_attention(queries, key, value, bias, self.scale, self.softcap)
            return Part(sequences, output[..., : self.value_dim], lse)
        shape = queries.shape
        if not causal and (bias is None or bias.shape[2] == 1):
            queries = queries.view(shape[0], self.num_kv_heads, -1, shape[3])
            if bias is not None and bias.shape[1] > 1:
                bias = bias.view(shape[0], self.num_kv_heads, -1, bias.shape[3])
        width = max(key.shape[3], value.shape[3])
        queries, key, value = (_widen(tensor, width) for tensor in (queries, key, value))
        output, lse = _flash_attention(queries, key, value, 0.0, causal, attn_mask=bias, scale=self.scale)
        output = output.masked_fill(lse.isposinf()[..., None], math.nan)  # of infinite logits it makes zeros
        return Part(sequences, output.view(*shape[:3], width)[..., : self.value_dim], lse.reshape(shape[:3]))


def _batches(indices: Tensor, item_bytes: int) -> tuple[Tensor, ...]:
    return indices.split(max(1, _BATCH_BYTES // max(item_bytes, 1))) if len(indices) else ()


def _widen(tensor: Tensor, width: int) -> Tensor:
    missing = width - tensor.shape[3]
    return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor


def _clear(unseen: Tensor, *gathered: Tensor) -> None:
    """WRITES zeros to keys and values that no query sees: a masked weight is 0, but what a slot holds may be NaN."""
    for rows in gathered:
        rows.masked_fill_(unseen[:, None, :, None], 0)


def _without(part: Part, unseeing: Tensor) -> Part:
    """`part`, in which rows that see none of its keys have no say, whatever flash attention makes of them."""
    output = part.output.masked_fill(unseeing[..., None], 0)
    return Part(part.sequences, output, part.lse.masked_fill(unseeing, -math.inf))
