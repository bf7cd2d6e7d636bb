"""What the rows of a unit see, and what belongs to each of them."""

import triton
import triton.language as tl

from torch_paged.kernels.attention_logits import LOG2_E


@triton.jit
def visible_to(token, queries, keys, V: tl.constexpr):
    """Number of keys that query `token` of a sequence sees."""
    if V.causal:
        seen = tl.minimum(tl.maximum(keys - queries + 1 + token, 0), keys)
    else:
        seen = token * 0 + keys
    return seen


@triton.jit
def first_seen(token, queries, keys, window, V: tl.constexpr):
    """The first key that query `token` of a sequence sees, and with it every later one."""
    if V.has.window:
        first = tl.maximum(visible_to(token, queries, keys, V) - window, 0)
    else:
        first = 0
    return first


@triton.jit
def tiles_of_keys(first_row, rows, queries, keys, V: tl.constexpr, window=0):
    """Tiles of keys that some of a unit's `rows` sees, at least one."""
    skipped = first_seen(first_row // V.group, queries, keys, window, V) // V.tile
    seen = visible_to((first_row + rows - 1) // V.group, queries, keys, V)
    return tl.maximum(tl.cdiv(seen, V.tile) - skipped, 1)


@triton.jit
def rows_of(packed, first_token, head, queries, keys, alibi_slopes, window, V: tl.constexpr):
    """What `logits` knows of every row; what no option asks for is anything."""
    token = first_token + packed // V.group
    visible = visible_to(token, queries, keys, V)
    position = visible
    slopes = visible
    if V.has.alibi:
        position = keys - queries + token
        slopes = tl.load(alibi_slopes + head * V.group + packed % V.group) * LOG2_E
    return visible, position, slopes, window


@triton.jit
def sinks_of(packed, head, sequence, num_seqs, sinks, V: tl.constexpr):
    """Sinks of the rows, to base 2: -inf for rows of no sequence, anything without the option."""
    sink = packed
    if V.has.sinks:
        row_sinks = sinks + head * V.group + packed % V.group
        sink = tl.load(row_sinks, mask=sequence < num_seqs, other=float("-inf")) * LOG2_E
    return sink
