"""Caches as kernels take them: what type they hold their numbers in, and whether as bytes."""

import torch
from torch import Tensor

from torch_paged.kernels.features import Stored
from torch_paged.kernels.vectors import effective_strides

_NAMES = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2", torch.int8: "int8"}


def stored_in(cache: Tensor, dtype: torch.dtype, scale: Tensor | None, scale_cache: Tensor | None) -> Stored:
    """How `cache` holds rows of `dtype`."""
    if cache.dtype == dtype:
        return Stored()
    if scale_cache is not None:
        kind = "token"
    else:
        kind = "" if scale is None else "head" if scale.dim() else "scalar"
    return Stored(_NAMES[cache.dtype], kind)


def as_bytes(cache: Tensor) -> Tensor:
    """A float8 cache as bytes: those that write one round by arithmetic, alike on every device."""
    return cache.view(torch.uint8) if cache.dtype.itemsize == 1 and cache.dtype.is_floating_point else cache


def viewed(cache: Tensor, dtype: torch.dtype) -> Tensor:
    """`cache` as numbers of `dtype`, also where dimensions of size 1 have strides that `view` would not take."""
    return (cache.as_strided(cache.shape, effective_strides(cache)) if 1 in cache.shape else cache).view(dtype)
