"""Typed and documented wrappers: one function an operator, each a single call of `torch.ops.paged.<name>`.

Shapes use these letters: T tokens, H query heads, Hk key-value heads (H is a multiple of Hk), D and Dv the head dims
of keys and values (16 to 512, or 576 and 512), S sequences, N blocks, B block size.
All functions raise TypeError, ValueError or NotImplementedError for wrong dtypes, shapes, strides, devices and options
before anything is written, and NotImplementedError for an argument that requires grad while grad mode is on, or has a
tangent of forward mode. Ids and lengths out of range are an IndexError on CPU, and on a GPU with `TORCH_PAGED_DEBUG=1`.
While it is compiled, none writes a view whose offset in its storage depends on dynamic sizes: a ValueError.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_paged import ops  # noqa: F401 - defines the operators

_ops = torch.ops.paged


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
    sliding_window: int | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    key_scale_cache: Tensor | None = None,
    value_scale_cache: Tensor | None = None,
    schedule: Tensor | None = None,
) -> Tensor:
    """Attention of ragged queries over a paged KV cache, by online softmax over the blocks of each sequence.

    Query i of a sequence with q queries and s keys stands at position s - q + i; with `causal` it sees the keys up to
    its own position. A row that sees no key, and a row past the last of `cu_seqlens_q`, is zeros.
    A logit is `scale * q.k`, then capped, then lowered by the ALiBi slope times the distance, then masked.
    Method: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention" (2023).

    Args:
        query: fp32, fp16 or bf16 [T, H, D], any strides with a unit last one.
        key_cache: [N, B, Hk, D] in query's dtype, float8_e4m3fn, float8_e5m2 or int8, any strides with a unit last one.
        value_cache: [N, B, Hk, Dv] likewise; may be a view of the key cache (`key_cache[..., :Dv]`).
        block_table: int32 [S, max_blocks_per_seq]; an entry none of whose keys any query sees is never read.
        seq_lens: int32 [S], keys per sequence, the new tokens included.
        cu_seqlens_q: int32 [S + 1], where each sequence's queries start; None: T / S queries each, as in decode; a GPU
            serves that with fewer launches.
        scale: factor of the logits, any finite float32; None: 1 / sqrt(D). Logits have to fit into float32 as well.
        causal: whether a query sees only the keys up to its position.
        sliding_window: W >= 1: a query sees itself and the W - 1 keys before it; needs `causal`.
        softcap: c > 0 makes `c * tanh(logit / c)` of a scaled logit (Gemma 2); 0: off. On Hopper, where more than
            64 rows (queries of a sequence times heads of a group) share keys of 16 bits, output and lse come of the
            hardware's tanh, exact to 11 bits.
        alibi_slopes: float32 [H], of Press et al., "Train Short, Test Long" (2021).
        sinks: float32 [H], one extra logit in each row's denominator, neither scaled nor capped (gpt-oss). A row that
            sees no key then has lse = sink.
        key_scale, value_scale: float32, 0-dim or [Hk]: true value = stored value * scale. int8 needs them or those
            below, float8 may go without, an unquantised cache must.
        key_scale_cache, value_scale_cache: float32 [N, B, Hk], a scale for each token and head, as `append` writes.
        schedule: from `schedule`, called with the same lengths; None: every call deals its work out by itself.

    Returns:
        Contiguous [T, H, Dv] in query's dtype.

    Raises:
        TypeError, ValueError: a dtype, shape, stride, device or option that does not fit.
        IndexError: a length or a used block out of range, or `cu_seqlens_q` does not begin at 0, decreases or ends past
            T (on CPU, and on a GPU in debug mode).
    """
    result: Tensor = _ops.attention(
        query,
        key_cache,
        value_cache,
        block_table,
        seq_lens,
        cu_seqlens_q=cu_seqlens_q,
        scale=scale,
        causal=causal,
        sliding_window=sliding_window,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        key_scale=key_scale,
        value_scale=value_scale,
        key_scale_cache=key_scale_cache,
        value_scale_cache=value_scale_cache,
        schedule=schedule,
    )
    return result


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
    schedule: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`attention`, and the logarithm of each row's softmax denominator, for `merge_attention`.

    Arguments and errors are the same.

    Returns:
        The output, [T, H, Dv], and lse, float32 [T, H], to base e; -inf for a row that sees no key.
    """
    output, lse = _ops.attention_with_lse(
        query,
        key_cache,
        value_cache,
        block_table,
        seq_lens,
        cu_seqlens_q=cu_seqlens_q,
        scale=scale,
        causal=causal,
        sliding_window=sliding_window,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        key_scale=key_scale,
        value_scale=value_scale,
        key_scale_cache=key_scale_cache,
        value_scale_cache=value_scale_cache,
        schedule=schedule,
    )
    return output, lse


def schedule(
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
) -> Tensor:
    """Which part of the work each program on the GPU does, for all calls of `attention` with these lengths.

    Layers share it: with `schedule=`, their calls need not find it out each by itself, and begin to fetch keys while
    the kernel before them ends. Where a call has nothing to share it is zeros: on CPU, and in prefill on Hopper of more
    than about 13k tokens with 32 query heads, half as many with 64.

    A call that would be dealt out otherwise, for its shapes, dtypes or options, takes no notice of a schedule. Lengths
    are not compared: `block_table`, `seq_lens` and `cu_seqlens_q` must not be changed, not even on the same stream,
    between this call and the last one that uses its result. With other lengths attention's results are wrong, some rows
    perhaps not written, though nothing is read or written out of place. Another stream needs an event, as ever.

    Args:
        query, key_cache, value_cache: as in `attention`; only their shapes and dtypes matter, and are checked. The
            operator itself, `torch.ops.paged.schedule`, should be given stand-ins for caches that the same compiled
            function writes, as this function does: torch.compile would copy them.
        the others: as in `attention`; values of `scale`, slopes, sinks and scales do not matter.

    Returns:
        int32, of one shape whatever the batch.

    Raises:
        TypeError, ValueError: as in `attention`, for what matters.
    """
    result: Tensor = _ops.schedule(
        query,
        _stand_in(key_cache),
        _stand_in(value_cache),
        block_table,
        seq_lens,
        cu_seqlens_q=cu_seqlens_q,
        scale=scale,
        causal=causal,
        sliding_window=sliding_window,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        key_scale=key_scale,
        value_scale=value_scale,
        key_scale_cache=None if key_scale_cache is None else _stand_in(key_scale_cache),
        value_scale_cache=None if value_scale_cache is None else _stand_in(value_scale_cache),
    )
    return result


def _stand_in(cache: Tensor) -> Tensor:
    """A cache of one block like those of `cache`."""
    return torch.empty((1, *cache.shape[1:]), dtype=cache.dtype, device=cache.device)


def merge_attention(output_a: Tensor, lse_a: Tensor, output_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys, from the attention over each (computed in fp32).

    Method: the rescaling of online softmax, Milakov and Gimelshein (2018), as in FlashAttention.

    Args:
        output_a, output_b: fp32, fp16 or bf16 [T, H, Dv].
        lse_a, lse_b: float32 [T, H], to base e.

    Returns:
        The output, contiguous [T, H, Dv] in output_a's dtype, and its lse, float32 [T, H].

    Raises:
        TypeError, ValueError: a dtype, shape or device that does not fit.
    """
    output, lse = _ops.merge_attention(output_a, lse_a, output_b, lse_b)
    return output, lse


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
    """WRITES row i of `key` and `value` to slot `slot_mapping[i]` of the caches.

    A quantised cache stores `row / scale`, rounded to the nearest number of its type, ties to even, and never past
    its largest. A scale cache gets the row's and head's own scale: its largest magnitude over the type's largest
    number, or 1 where that is 0 or subnormal. A row with NaN or infinities is stored, but its values mean nothing.

    Args:
        key: [T, Hk, D], any strides.
        value: [T, Hk, Dv], or None together with `value_cache` where the value is a view of the key cache.
        key_cache: [N, B, Hk, D] in key's dtype, float8_e4m3fn, float8_e5m2 or int8, MUTATED.
        value_cache: [N, B, Hk, Dv] likewise, MUTATED.
        slot_mapping: int64 [n], n <= T: block * B + offset. Negative: skip. Rows of key past n are not written.
        key_scale, value_scale: float32, 0-dim or [Hk], of a quantised cache; None with float8: 1.
        key_scale_cache, value_scale_cache: float32 [N, B, Hk] instead, MUTATED.

    Caches should not be views of one tensor under torch.compile, which copies both then in every call.

    Raises:
        TypeError, ValueError: a dtype, shape, stride or device that does not fit, or scales that do not go with the
            cache's dtype.
        IndexError: a slot past the cache (on CPU, and on a GPU in debug mode).
    """
    _ops.append(
        key,
        value,
        key_cache,
        value_cache,
        slot_mapping,
        key_scale=key_scale,
        value_scale=value_scale,
        key_scale_cache=key_scale_cache,
        value_scale_cache=value_scale_cache,
    )


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
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    key_scale_cache: Tensor | None = None,
    value_scale_cache: Tensor | None = None,
) -> Tensor:
    """Rotary position embedding of queries and keys, and `append` of the keys and values, in one pass.

    Row i is turned by the angles at `positions[i]`, in float32, and rounded to its dtype before it is stored. Column
    j of the first 2 r makes a pair with column j + r; the columns behind them stay as they are.
    Method: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021).

    Args:
        query: fp32, fp16 or bf16 [T, H, D], any strides.
        key: [T, Hk, D] in query's dtype, any strides.
        value: [T, Hk, Dv] likewise, or None together with `value_cache`.
        cos, sin: fp32, fp16 or bf16 [P, r] with 2 r <= D, a row for each position.
        positions: int64 [T], below P. On a GPU one out of range is taken for the nearest.
        key_cache, value_cache, slot_mapping and the scales: as in `append`; the caches are MUTATED.
        interleaved: column 2 j makes a pair with column 2 j + 1 instead.

    Returns:
        The rotated query, contiguous [T, H, D].

    Raises:
        TypeError, ValueError: as in `append`.
        IndexError: a slot or a position out of range (on CPU, and on a GPU in debug mode).
    """
    rotated: Tensor = _ops.rotary_append(
        query,
        key,
        value,
        cos,
        sin,
        positions,
        key_cache,
        value_cache,
        slot_mapping,
        interleaved=interleaved,
        key_scale=key_scale,
        value_scale=value_scale,
        key_scale_cache=key_scale_cache,
        value_scale_cache=value_scale_cache,
    )
    return rotated


def copy_blocks(caches: Sequence[Tensor], block_pairs: Tensor) -> None:
    """WRITES each pair's source block to its destination block, in every cache, as if all at once.

    Args:
        caches: tensors of one first dimension N, any dtypes and shapes, MUTATED.
        block_pairs: int64 [n, 2] of (source, destination); a row with a negative entry is skipped.

    Raises:
        TypeError, ValueError: a dtype, shape or device that does not fit.
        ValueError: a destination occurs twice or is also a source (on CPU, and on a GPU in debug mode).
        IndexError: a block past the caches (likewise).
    """
    _ops.copy_blocks(caches, block_pairs)


def gather_blocks(caches: Sequence[Tensor], blocks: Tensor, out: Tensor) -> None:
    """WRITES to row i of `out` block `blocks[i]` of every cache, one after another, each in row-major order.

    For two caches of block shape [2, 3], `out` may be [n, 2, 2, 3] in their dtype, or the bytes of the same.

    Args:
        caches: tensors of one first dimension N, any dtypes and shapes.
        blocks: int64 [n]; a negative entry leaves its row of `out` as it is.
        out: contiguous, n rows of as many bytes as a block has in all caches together; uint8, or the dtype that all
            caches share. It must not overlap them. MUTATED.

    Raises:
        TypeError, ValueError: a dtype, shape, stride or device that does not fit.
        IndexError: a block past the caches (on CPU, and on a GPU in debug mode).
    """
    _ops.gather_blocks(caches, blocks, out)


def scatter_blocks(source: Tensor, blocks: Tensor, caches: Sequence[Tensor]) -> None:
    """WRITES row i of `source` to block `blocks[i]` of every cache: the inverse of `gather_blocks`.

    Args:
        source: as `out` of `gather_blocks`.
        blocks: int64 [n]; a negative entry is skipped.
        caches: as in `gather_blocks`, MUTATED.

    Raises:
        TypeError, ValueError: as in `gather_blocks`.
        ValueError: a block occurs twice (on CPU, and on a GPU in debug mode).
        IndexError: a block past the caches (likewise).
    """
    _ops.scatter_blocks(source, blocks, caches)
