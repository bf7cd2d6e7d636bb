"""Typed and documented wrappers: one function an operator, each a single call of `torch.ops.paged.<name>`.

Shapes use these letters: T tokens, H query heads, Hk key-value heads (H is a multiple of Hk), D and Dv the head dims
of keys and values (16 to 512, or 576 and 512), S sequences, N blocks, B block size.
All functions raise TypeError, ValueError or NotImplementedError for wrong dtypes, shapes, strides, devices and options
before anything is written, and NotImplementedError for an argument that requires grad while grad mode is on. Ids and
lengths out of range are an IndexError on CPU, and on a GPU with `TORCH_PAGED_DEBUG=1`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_paged import ops

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
    **options: Any,
) -> Tensor:
    """Attention of ragged queries over a paged KV cache, by online softmax over the blocks of each sequence.

    Query i of a sequence with q queries and s keys stands at position s - q + i; with `causal` it sees the keys up to
    its own position. A row that sees no key, and a row past the last of `cu_seqlens_q`, is zeros.
    Method: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention" (2023).

    Args:
        query: fp32, fp16 or bf16 [T, H, D], any strides with a unit last one.
        key_cache: [N, B, Hk, D] in query's dtype, any strides with a unit last one.
        value_cache: [N, B, Hk, Dv] likewise; may be a view of the key cache (`key_cache[..., :Dv]`).
        block_table: int32 [S, max_blocks_per_seq]; entries past a sequence's keys are never read.
        seq_lens: int32 [S], keys per sequence, the new tokens included.
        cu_seqlens_q: int32 [S + 1], where each sequence's queries start; None: T / S queries each.
        scale: factor of the logits, any finite number; None: 1 / sqrt(D).
        causal: whether a query sees only the keys up to its position.
        options: the operator's further keywords; each raises NotImplementedError until it is implemented.

    Returns:
        Contiguous [T, H, Dv] in query's dtype.
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
        **options,
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
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`attention`, and the logarithm of each row's softmax denominator, for `merge_attention`.

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
        **options,
    )
    return output, lse


def merge_attention(output_a: Tensor, lse_a: Tensor, output_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys, from the attention over each (computed in fp32).

    Method: the rescaling of online softmax, Milakov and Gimelshein (2018), as in FlashAttention.

    Args:
        output_a, output_b: fp32, fp16 or bf16 [T, H, Dv].
        lse_a, lse_b: float32 [T, H], to base e.

    Returns:
        The output, contiguous [T, H, Dv] in output_a's dtype, and its lse, float32 [T, H].
    """
    output, lse = _ops.merge_attention(output_a, lse_a, output_b, lse_b)
    return output, lse


def append(
    key: Tensor,
    value: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor | None,
    slot_mapping: Tensor,
    **options: Any,
) -> None:
    """WRITES row i of `key` and `value` to slot `slot_mapping[i]` of the caches.

    Args:
        key: [T, Hk, D], any strides.
        value: [T, Hk, Dv], or None together with `value_cache` where the value is a view of the key cache.
        key_cache: [N, B, Hk, D] in key's dtype, MUTATED.
        value_cache: [N, B, Hk, Dv] likewise, MUTATED.
        slot_mapping: int64 [n], n <= T: block * B + offset. Negative: skip. Rows of key past n are not written.
        options: the operator's further keywords; each raises NotImplementedError until it is implemented.
    """
    _ops.append(key, value, key_cache, value_cache, slot_mapping, **options)


def copy_blocks(caches: Sequence[Tensor], block_pairs: Tensor) -> None:
    """WRITES each pair's source block to its destination block, in every cache, as if all at once.

    Args:
        caches: tensors of one first dimension N, any dtypes and shapes, MUTATED.
        block_pairs: int64 [n, 2] of (source, destination); a row with a negative entry is skipped.

    Raises:
        ValueError: a destination occurs twice or is also a source (on CPU, and on a GPU in debug mode).
    """
    _ops.copy_blocks(caches, block_pairs)


def gather_blocks(caches: Sequence[Tensor], blocks: Tensor, out: Tensor) -> None:
    """WRITES to row i of `out` block `blocks[i]` of every cache, one after another, each in row-major order.

    For two caches of block shape [2, 3], `out` may be [n, 2, 2, 3] in their dtype, or the bytes of the same.

    Args:
        caches: tensors of one first dimension N, any dtypes and shapes.
        blocks: int64 [n]; a negative entry leaves its row of `out` as it is.
        out: contiguous, n rows of as many bytes as a block has in all caches together; uint8, or the dtype that all
            caches share. MUTATED.
    """
    _ops.gather_blocks(caches, blocks, out)


def scatter_blocks(source: Tensor, blocks: Tensor, caches: Sequence[Tensor]) -> None:
    """WRITES row i of `source` to block `blocks[i]` of every cache: the inverse of `gather_blocks`.

    Args:
        source: as `out` of `gather_blocks`.
        blocks: int64 [n]; a negative entry is skipped.
        caches: as in `gather_blocks`, MUTATED.

    Raises:
        ValueError: a block occurs twice (on CPU, and on a GPU in debug mode).
    """
    _ops.scatter_blocks(source, blocks, caches)


def warmup(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    value_head_dim: int | None = None,
    block_size: int = 16,
    dtype: torch.dtype,
    device: torch.device | str,
    causal: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Compile every Triton kernel that a model needs, so that no request waits for the compiler.

    The kernels depend on neither lengths nor batch nor table width: after this nothing compiles while serving.

    Args:
        num_heads, num_kv_heads, head_dim, value_head_dim, block_size: of the model and its cache.
        dtype: of query and caches.
        device: a GPU; on CPU there is nothing to compile.
        causal: as attention will be called.
        progress: called with (done, total) after each kind of batch.

    Returns:
        How many kinds of batches were run; 0 on CPU.
    """
    device = torch.device(device)
    value_head_dim = head_dim if value_head_dim is None else value_head_dim
    return ops.warmup(
        device, num_heads, num_kv_heads, head_dim, value_head_dim, block_size, dtype, device, causal, progress
    )
