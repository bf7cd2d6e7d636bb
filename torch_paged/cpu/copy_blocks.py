"""Blocks copied within their caches."""

from collections.abc import Sequence

from torch import Tensor

from torch_paged.cpu.gather_blocks import indexable


def copy_blocks(caches: Sequence[Tensor], block_pairs: Tensor) -> None:
    """WRITES each pair's source block to its destination in every cache; no destination is also a source."""
    sources, destinations = block_pairs[(block_pairs >= 0).all(1)].unbind(1)
    for cache in map(indexable, caches):
        cache.index_copy_(0, destinations, cache.index_select(0, sources))
