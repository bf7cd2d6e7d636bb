"""The memory that caches lie in."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

_LARGE_PAGE = 2 * 2**20  # bytes; what holds none of them is left alone


def empty_cache(
    num_blocks: int, block_size: int, num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """An uninitialised cache, `[num_blocks, block_size, num_heads, head_dim]`.

    The operators take any strides. Here the tokens of one block and head are adjacent: one stretch of memory.
    """
    shape = num_blocks, num_heads, block_size, head_dim
    size = num_blocks * num_heads * block_size * head_dim * dtype.itemsize
    if device.type == "cpu" and size >= _LARGE_PAGE:
        return _in_large_pages(size).view(dtype).view(shape).transpose(1, 2)
    return torch.empty(shape, dtype=dtype, device=device).transpose(1, 2)


def _in_large_pages(size: int) -> Tensor:
    """Bytes that begin where a page does, with a hint to systems that have larger pages.

    Scattered blocks cost the processor a search for each page that they touch: a block's part should not lie in two.
    """
    room = torch.empty(size + _LARGE_PAGE, dtype=torch.uint8, device="cpu")
    if type(room) is not Tensor:  # a fake one has no address
        return room[:size]
    start = -room.data_ptr() % _LARGE_PAGE
    if hasattr(mmap, "MADV_HUGEPAGE"):
        whole = size // _LARGE_PAGE * _LARGE_PAGE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(room.data_ptr() + start), ctypes.c_size_t(whole), mmap.MADV_HUGEPAGE)
    return room[start : start + size]


def empty_scales(num_blocks: int, block_size: int, num_heads: int, device: torch.device) -> Tensor:
    """An uninitialised scale for each token and head of a cache, `[num_blocks, block_size, num_heads]`, likewise."""
    return empty_cache(num_blocks, block_size, num_heads, 1, torch.float32, device)[..., 0]
