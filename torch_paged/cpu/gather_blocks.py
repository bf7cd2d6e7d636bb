"""Blocks of several caches to and from one staging tensor, a row for each block."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def gather_blocks(caches: Sequence[Tensor], blocks: Tensor, out: Tensor) -> None:
    """WRITES to row i of `out` the bytes of block `blocks[i]` of each cache in turn, unless that is negative."""
    rows = (blocks >= 0).nonzero()[:, 0]
    for cache, part in _parts(caches, out):
        gathered = indexable(cache).index_select(0, blocks[rows]).view(len(rows), math.prod(cache.shape[1:]))
        part[rows] = gathered.view(torch.uint8)


def scatter_blocks(source: Tensor, blocks: Tensor, caches: Sequence[Tensor]) -> None:
    """WRITES row i of `source` to block `blocks[i]` of each cache: the inverse of `gather_blocks`."""
    rows = (blocks >= 0).nonzero()[:, 0]
    for cache, part in _parts([indexable(cache) for cache in caches], source):
        if part.numel():
            stored = part[rows].view(cache.dtype).view(-1, *cache.shape[1:])
            cache.index_copy_(0, blocks[rows], stored)


def indexable(cache: Tensor) -> Tensor:
    """`cache`, as integers of the same size: PyTorch cannot write to rows of every type."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return cache.view(integers.get(cache.element_size(), cache.dtype))


def _parts(caches: Sequence[Tensor], staging: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Each cache with the columns of `staging`, as bytes, that hold its blocks."""
    block_bytes = [math.prod(cache.shape[1:]) * cache.element_size() for cache in caches]
    rows = staging.view(staging.shape[0], math.prod(staging.shape[1:])).view(torch.uint8)
    return zip(caches, rows.split(block_bytes, 1), strict=True) if caches else iter(())
