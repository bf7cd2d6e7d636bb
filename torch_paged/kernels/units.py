"""The units of attention's work: one is a tile of query rows of one KV head of one sequence.

Each sequence's stand head by head, tile by tile: unit 5 of a sequence with 4 tiles of rows is tile 1 of head 1.
Sequence number `num_seqs` stands for the rows past `cu_seqlens_q[-1]`: queries without keys.
"""

import triton
import triton.language as tl

from torch_paged.kernels.attention_rows import tiles_of_keys

SEQUENCES: tl.constexpr = tl.constexpr(128)  # read at a time by every program
LATE_UNITS: tl.constexpr = tl.constexpr(256)  # a sequence has at least so many in all heads, or none


@triton.jit
def query_range(sequence, cu_seqlens_q, num_tokens, num_seqs, V: tl.constexpr):
    """First query token and number of queries of `sequence` (a scalar or a vector)."""
    if V.ragged:
        start = tl.load(cu_seqlens_q + sequence, mask=sequence <= num_seqs, other=num_tokens)
        stop = tl.load(cu_seqlens_q + sequence + 1, mask=sequence < num_seqs, other=num_tokens)
        start = tl.minimum(tl.maximum(start, 0), num_tokens)
        queries = tl.maximum(tl.minimum(stop, num_tokens), start) - start
    else:
        count = num_tokens // num_seqs
        start = sequence * count
        queries = tl.where(sequence < num_seqs, count, 0)
    return start, queries


@triton.jit
def key_count(sequence, seq_lens, num_seqs, max_keys):
    """Number of keys of `sequence`, never more than its row of the block table can name."""
    keys = tl.load(seq_lens + sequence, mask=sequence < num_seqs, other=0)
    return tl.minimum(tl.maximum(keys, 0), max_keys)


@triton.jit
def query_tiles(queries, V: tl.constexpr):
    """Number of query tiles of a sequence; 0 for the sequences that another variant serves."""
    rows = queries * V.group
    mine = (rows > V.rows_above) & (rows <= V.rows_upto)
    if V.single_tile:
        tiles = ((rows > 0) & mine).to(tl.int32)
    else:
        tiles = tl.where(mine, tl.cdiv(rows, V.block_m), 0)
    return tiles


@triton.jit
def late_tiles(queries, keys, num_kv_heads, V: tl.constexpr):
    """How many of a head's query tiles are not dealt out here, from the first on: they come last (see `deal_pieces`).

    They see no more than a quarter of the sequence, and its heads have enough of them for programs to end together.
    """
    late = queries * 0
    if V.causal:
        late = tl.maximum(keys // 4 - tl.maximum(keys - queries, 0), 0) * V.group // V.block_m
        late = tl.where(late * num_kv_heads >= LATE_UNITS, late, 0)
    return late


@triton.jit
def tiles_of_unit(sequence, unit, seq_lens, cu_seqlens_q, num_tokens, num_seqs, max_keys, V: tl.constexpr, window=0):
    """Key tiles of a unit, counted from the first that one of its rows sees."""
    _, queries = query_range(sequence, cu_seqlens_q, num_tokens, num_seqs, V)
    keys = key_count(sequence, seq_lens, num_seqs, max_keys)
    first_row = unit % tl.maximum(query_tiles(queries, V), 1) * V.block_m
    return tiles_of_keys(first_row, tl.minimum(queries * V.group - first_row, V.block_m), queries, keys, V, window)


@triton.jit
def next_sequence(sequence, lane, cu_seqlens_q, num_tokens, num_seqs, V: tl.constexpr):
    """The sequence after `sequence` that has units in this variant, or a number past the last one.

    `lane` is 0, 1, ...: as many sequences are looked at together.
    """
    LANES: tl.constexpr = lane.shape[0]
    following = sequence + 1
    if V.ragged:
        found = following
        searching = following <= num_seqs
        while searching:
            candidate = following + lane
            _, queries = query_range(candidate, cu_seqlens_q, num_tokens, num_seqs, V)
            found = tl.min(tl.where(query_tiles(queries, V) > 0, candidate, following + LANES), 0)
            following += LANES
            searching = (found == following) & (following <= num_seqs)
        following = found
    return following


@triton.jit
def following(sequence, unit, tiles, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, V: tl.constexpr):
    """`unit` of `sequence`, or as that has no more than `tiles` in each head, the first unit after them."""
    if unit >= tiles * num_kv_heads:
        unit = unit * 0
        sequence = next_sequence(sequence, tl.arange(0, SEQUENCES), cu_seqlens_q, num_tokens, num_seqs, V)
    return sequence, unit
