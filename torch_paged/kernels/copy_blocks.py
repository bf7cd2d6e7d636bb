"""Copies blocks within every cache of a set, as copy-on-write does."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from torch_paged.kernels.block_groups import (
    BlockGroup,
    WordTiles,
    block_groups,
    cache_base,
    run_words,
    word_tiles,
)
from torch_paged.kernels.launch import Launcher, Plans


@triton.jit(
    do_not_specialize=["pair_stride", "column_stride", "num_blocks"], do_not_specialize_on_alignment=["block_pairs"]
)
def copy_blocks_kernel(
    block_pairs,
    pair_stride,
    column_stride,
    table,
    run_offsets,
    num_blocks,
    WORD: tl.constexpr,
    VECTOR: tl.constexpr,
    RUN_VECTORS: tl.constexpr,
    BLOCK_VECTORS: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """
    cache[destination] = cache[source] for every cache and (source, destination) in [0, num_blocks)^2 of block_pairs

    grid [pair, cache, tile]:   block |-- tile 0 --|-- tile 1 --|-- tile 2 --|   of VECTORS vectors of VECTOR words
    """
    pair = block_pairs + tl.program_id(0).to(tl.int64) * pair_stride
    source, destination = tl.load(pair), tl.load(pair + column_stride)
    if (source >= 0) & (source < num_blocks) & (destination >= 0) & (destination < num_blocks):
        vector = tl.program_id(2) * VECTORS + tl.arange(0, VECTORS)
        words = run_words(vector, run_offsets, WORD, VECTOR, RUN_VECTORS, BLOCK_VECTORS)
        mask = (vector < BLOCK_VECTORS)[:, None]
        tile = tl.load(cache_base(table, tl.program_id(1), source, WORD, VECTOR) + words, mask=mask)
        tl.store(cache_base(table, tl.program_id(1), destination, WORD, VECTOR) + words, tile, mask=mask)


def copy_blocks(caches: Sequence[Tensor], block_pairs: Tensor) -> None:
    """Copies block `block_pairs[i, 0]` over block `block_pairs[i, 1]` in every cache.

    No destination may be a source or occur twice: then every order of the copies gives the same, and so does none.

    Args:
        caches: tensors with the same first dimension, any dtypes and strides. MUTATED.
        block_pairs: int64 `[n, 2]`; a row with an entry outside `[0, num_blocks)` is skipped.

    Raises:
        RuntimeError: at the first call on these caches if that is during CUDA graph capture. A call with n = 0
            copies nothing, compiles what is needed and makes every later one capturable.
    """
    for group in block_groups(caches, packed=False):
        tiles = word_tiles(group, group.alignment)
        metadata = block_pairs.device, block_pairs.shape, block_pairs.stride(), group.table.shape, tiles
        launcher = _plans.get(metadata) or _plans.remember(metadata, _launcher(block_pairs, group, tiles))
        launcher(block_pairs, *block_pairs.stride(), group.table, group.run_offsets, caches[0].shape[0])


_plans: Plans[Launcher] = Plans()


def _launcher(block_pairs: Tensor, group: BlockGroup, tiles: WordTiles) -> Launcher:
    constants = dict(
        WORD=tiles.word,
        VECTOR=tiles.vector,
        RUN_VECTORS=tiles.run_vectors,
        BLOCK_VECTORS=tiles.block_vectors,
        VECTORS=tiles.vectors,
    )
    grid = (block_pairs.shape[0], group.table.shape[0], tiles.tiles)
    return Launcher(copy_blocks_kernel, grid, constants, dict(num_warps=4))
