"""Paged attention by gathering chunks of blocks for PyTorch's own flash attention, and merging the parts.

Sequences that have the same number of queries go together. A query sees all keys before the sequence's first query,
its prefix, and causally those of the queries themselves, the square:

    keys      |------- prefix -------|-- square --|
    chunks    |--------|--------|-tail|
    queries                          q0 q1 q2 q3

Prefixes are cut into chunks of whole blocks, so that gathered keys take little memory, and so that one long sequence
and many short ones keep all cores busy alike.

A window, ALiBi and softcap need a mask of all their queries and keys. With them the queries are cut into tiles, and
the keys that some query of a tile sees are its prefix, without a square:

    keys      . . . |--- window ---|   . . .
    tiles                         q0 q1|q2 q3
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from torch_paged.cpu.chunks import Chunks, Group, Part
from torch_paged.cpu.logits import Mask
from torch_paged.cpu.stored import Stored
from torch_paged.options import AttentionOptions

_TILE_QUERIES = 128


class _Runs(NamedTuple):
    """Runs of queries of one sequence each: a sequence's, or a tile of them."""

    counts: Tensor  # [n], queries
    ends: Tensor  # [n], where they end
    block_table: Tensor  # [n, max_blocks_per_seq]
    lens: Tensor  # [n], keys of the table
    stands: Tensor  # [n], one more than the last query's position among them


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
    num_tokens, num_heads, _ = query.shape
    output = query.new_zeros(num_tokens, num_heads, value_cache.shape[3])
    lse = query.new_full((num_tokens, num_heads), -math.inf, dtype=torch.float32)
    ends, counts = _queries(num_tokens, seq_lens, cu_seqlens_q)
    if options.sinks is not None and len(ends):
        lse[: int(ends[-1])] = options.sinks  # of rows that see no key
    if scale <= 0:  # flash attention masks before it scales: keep its factor positive
        query, scale = query * math.copysign(scale != 0, scale), abs(scale) or 1.0
    chunks = _chunks(query, key_cache, value_cache, scale, causal, options)
    # Queries that would stand before the first key see nothing; without a mask, those of an empty sequence.
    seeing = torch.minimum(counts, seq_lens) if causal else counts * (seq_lens > 0)
    runs = _Runs(seeing, ends, block_table, seq_lens, seq_lens)
    if chunks.mask:
        runs = _behind_window(_tiles(runs, causal), options.sliding_window, key_cache.shape[1])
    for count in runs.counts.unique().tolist():
        if count == 0:
            continue
        members = (runs.counts == count).nonzero()[:, 0]
        tokens = (runs.ends[members, None] + torch.arange(-count, 0)).flatten()
        queries = query[tokens].view(len(members), count, num_heads, -1).transpose(1, 2)
        queries = queries.to(chunks.key.dtype).contiguous()
        lens = runs.lens[members]
        stands = runs.stands[members] if chunks.mask else lens
        group = Group(queries, runs.block_table[members], lens, stands)
        square = count if causal and count > 1 and not chunks.mask else 0
        with torch.autocast("cpu", enabled=False):  # the caller's would change types
            parts = [*chunks.prefixes(group, lens - square)]
            if square:
                parts += chunks.squares(group)
            group_output, group_lse = _with_sinks(*_merge(parts, len(members)), options.sinks)
        output[tokens] = group_output.transpose(1, 2).flatten(0, 1).to(output.dtype)
        lse[tokens] = group_lse.transpose(1, 2).flatten(0, 1)
    return output, lse


def _chunks(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, scale: float, causal: bool, options: AttentionOptions
) -> Chunks:
    plain = query.dtype == key_cache.dtype == value_cache.dtype and not options.softcap
    dtype = query.dtype if plain else torch.float32
    key = Stored(key_cache, options.key_scale, options.key_scale_cache, dtype)
    value = Stored(value_cache, options.value_scale, options.value_scale_cache, dtype)
    masked = options.softcap or options.sliding_window is not None or options.alibi_slopes is not None
    mask = Mask(causal, options.sliding_window, options.alibi_slopes) if masked else None
    return Chunks(key, value, scale, options.softcap, mask)


def _queries(num_tokens: int, seq_lens: Tensor, cu_seqlens_q: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where each sequence's query rows end, and how many they are."""
    if cu_seqlens_q is not None:
        return cu_seqlens_q[1:].long(), cu_seqlens_q.diff()
    counts = torch.full_like(seq_lens, num_tokens // max(len(seq_lens), 1))
    return counts.cumsum(0), counts


def _tiles(runs: _Runs, causal: bool) -> _Runs:
    """Every run cut, from its end, into runs of at most a tile: of keys, causally, those up to the last query."""
    counts, ends, block_table, lens, stands = runs
    pieces = -(-counts // _TILE_QUERIES)
    whole = torch.arange(len(pieces)).repeat_interleave(pieces)
    later = (torch.arange(len(whole)) - (pieces.cumsum(0) - pieces)[whole]) * _TILE_QUERIES
    counts = (counts[whole] - later).clamp(max=_TILE_QUERIES)
    stands = stands[whole] - later
    return _Runs(counts, ends[whole] - later, block_table[whole], stands if causal else lens[whole], stands)


def _behind_window(runs: _Runs, sliding_window: int | None, block_size: int) -> _Runs:
    """The runs without the leading blocks that none of their queries sees: distances are all that masks know."""
    if sliding_window is None:
        return runs
    counts, ends, block_table, lens, stands = runs
    first = (stands - counts - sliding_window + 1).clamp(min=0) // block_size
    width = -(-int((lens - first * block_size).max()) // block_size) if len(lens) else 0
    columns = (first[:, None] + torch.arange(width)).clamp(max=block_table.shape[1] - 1)
    skipped = first * block_size
    return _Runs(counts, ends, block_table.gather(1, columns), lens - skipped, stands - skipped)


def _merge(parts: list[Part], num_seqs: int) -> tuple[Tensor, Tensor]:
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


def _with_sinks(output: Tensor, lse: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """One more logit in the denominator of each head's rows."""
    if sinks is None:
        return output, lse
    total = torch.logaddexp(lse, sinks[:, None])
    return output * (lse - total).exp_()[..., None], total
