"""Moves blocks between the caches and packed rows, as swapping sequences out and in does."""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_paged.kernels.block_groups import block_groups, cache_base, run_words, word_tiles
from torch_paged.kernels.launch import launch


@triton.jit(
    do_not_specialize=["block_stride", "row_words", "num_blocks"], do_not_specialize_on_alignment=["packed", "blocks"]
)
def _move_blocks(
    packed,
    blocks,
    block_stride,
    table,
    run_offsets,
    row_words,
    num_blocks,
    GATHER: tl.constexpr,
    WORD: tl.constexpr,
    VECTOR: tl.constexpr,
    RUN_VECTORS: tl.constexpr,
    BLOCK_VECTORS: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """
    packed[i] = [cache 0's block | cache 1's block | ...],  each block number blocks[i] in [0, num_blocks)

    grid [i, cache, tile];  GATHER writes packed, else the caches are written
    """
    row = tl.program_id(0).to(tl.int64)
    cache = tl.program_id(1)
    block = tl.load(blocks + row * block_stride)
    if (block >= 0) & (block < num_blocks):
        vector = tl.program_id(2) * VECTORS + tl.arange(0, VECTORS)
        mask = (vector < BLOCK_VECTORS)[:, None]
        words = run_words(vector, run_offsets, WORD, VECTOR, RUN_VECTORS, BLOCK_VECTORS)
        in_cache = cache_base(table, cache, block, WORD, VECTOR) + words
        # The row is the block in one run, after the blocks of the caches before.
        first = tl.load(table + cache * 3 + 2) // (WORD.primitive_bitwidth // 8)
        in_row = tl.multiple_of(packed.to(tl.pointer_type(WORD)), VECTOR * WORD.primitive_bitwidth // 8)
        in_row += tl.multiple_of(row * row_words + first, VECTOR)
        in_row += run_words(vector, run_offsets, WORD, VECTOR, BLOCK_VECTORS, BLOCK_VECTORS)
        if GATHER:
            tl.store(in_row, tl.load(in_cache, mask=mask), mask=mask)
        else:
            tl.store(in_cache, tl.load(in_row, mask=mask), mask=mask)


def gather_blocks(caches: Sequence[Tensor], blocks: Tensor, out: Tensor) -> None:
    """Copies block `blocks[i]` of every cache, one after another in logical order, to row i of `out`.

    Args:
        caches: tensors with the same first dimension, any dtypes and strides.
        blocks: int64 `[n]`; one outside `[0, num_blocks)` leaves its row untouched.
        out: contiguous, first dimension n, a row as large as one block of every cache. MUTATED.

    Raises:
        RuntimeError: at the first call on these caches if that is during CUDA graph capture.
    """
    _launch(caches, blocks, out, gather=True)


def scatter_blocks(source: Tensor, blocks: Tensor, caches: Sequence[Tensor]) -> None:
    """Copies row i of `source` back to block `blocks[i]` of every cache: the inverse of `gather_blocks`.

    Args:
        source: contiguous, first dimension n, as `gather_blocks` writes it.
        blocks: int64 `[n]`, no block twice; one outside `[0, num_blocks)` is skipped.
        caches: tensors with the same first dimension, any dtypes and strides. MUTATED.

    Raises:
        RuntimeError: at the first call on these caches if that is during CUDA graph capture.
    """
    _launch(caches, blocks, source, gather=False)


def _launch(caches: Sequence[Tensor], blocks: Tensor, packed: Tensor, gather: bool) -> None:
    for group in block_groups(caches, packed=True):
        row_bytes = math.prod(packed.shape[1:]) * packed.element_size()
        tiles = word_tiles(group, math.gcd(group.alignment, row_bytes, packed.data_ptr()))
        launch(
            _move_blocks,
            (blocks.shape[0], group.table.shape[0], tiles.tiles),
            packed.view(-1).view(torch.uint8),
            blocks,
            blocks.stride(0),
            group.table,
            group.run_offsets,
            row_bytes * 8 // tiles.word.primitive_bitwidth,
            caches[0].shape[0],
            GATHER=gather,
            WORD=tiles.word,
            VECTOR=tiles.vector,
            RUN_VECTORS=tiles.run_vectors,
            BLOCK_VECTORS=tiles.block_vectors,
            VECTORS=tiles.vectors,
            num_warps=4,
        )
