"""Blocks and slots of one cache, gathered as the numbers that they stand for."""

import torch
from torch import Tensor


class Stored:
    """A cache whose keys or values are read in `dtype`: true value = stored value * scale."""

    def __init__(self, cache: Tensor, scale: Tensor | None, scale_cache: Tensor | None, dtype: torch.dtype) -> None:
        self.cache, self.scale, self.scale_cache, self.dtype = cache, scale, scale_cache, dtype
        # Reused by every chunk: fresh memory would cost more than the copy into it.
        self.buffer = cache.new_empty(0)

    def same_as(self, other: "Stored") -> bool:
        """Whether the first columns of this are all of `other`, which then need not be read."""
        cache, view = self.cache, other.cache
        return (
            cache.data_ptr() == view.data_ptr()
            and cache.stride() == view.stride()
            and cache.dtype == view.dtype
            and cache.shape[3] >= view.shape[3]
            and self.scale is other.scale
            and self.scale_cache is other.scale_cache
        )

    def blocks(self, blocks: Tensor) -> Tensor:
        """Whole blocks [n, columns]: [n, num_kv_heads, columns * block_size, head_dim], until the next call."""
        rows = _gather(self.cache, blocks, self.buffer)
        if rows.dtype == self.dtype:
            return rows
        scale = self.scale
        if self.scale_cache is not None:
            scale = self.scale_cache.index_select(0, blocks.flatten()).view(len(blocks), -1, rows.shape[1]).mT
        return self._true(rows, scale)

    def slots(self, blocks: Tensor, offsets: Tensor) -> Tensor:
        """Single slots, each [n, count]: [n, num_kv_heads, count, head_dim]."""
        rows = self.cache[blocks, offsets].transpose(1, 2)
        if rows.dtype == self.dtype:
            return rows
        scale = self.scale if self.scale_cache is None else self.scale_cache[blocks, offsets].mT
        return self._true(rows, scale)

    def _true(self, rows: Tensor, scale: Tensor | None) -> Tensor:
        """`rows` [n, num_kv_heads, keys, head_dim] in `dtype`, times a `scale` that is 0-dim, a head's or a row's."""
        true = rows.to(self.dtype)
        if scale is None:
            return true
        return true.mul_(scale[:, None, None] if scale.dim() == 1 else scale[..., None] if scale.dim() else scale)


def _gather(cache: Tensor, blocks: Tensor, out: Tensor) -> Tensor:
    """Keys or values [n, num_kv_heads, columns * block_size, head_dim] of the blocks [n, columns], in `out`."""
    num_blocks, block_size, num_heads, head_dim = cache.shape
    n, columns = blocks.shape
    head_major = cache.transpose(1, 2)
    if head_major.is_contiguous():  # a block of one head lies in one piece: put those of a head together
        rows = head_major.view(num_blocks * num_heads, block_size * head_dim)
        indices = blocks[:, None] * num_heads + torch.arange(num_heads)[:, None]
        return torch.index_select(rows, 0, indices.flatten(), out=out.resize_(0)).view(
            n, num_heads, columns * block_size, head_dim
        )
    gathered = torch.index_select(cache, 0, blocks.flatten(), out=out.resize_(0))
    return gathered.view(n, columns * block_size, num_heads, head_dim).transpose(1, 2)
