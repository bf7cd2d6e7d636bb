"""Rows of keys and values into the slots of their caches, quantised where the cache is."""

import torch
from torch import Tensor

from torch_paged.cpu.gather_blocks import indexable
from torch_paged.options import largest


def append(
    key: Tensor,
    value: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor | None,
    slot_mapping: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    key_scale_cache: Tensor | None,
    value_scale_cache: Tensor | None,
) -> None:
    """WRITES row i of `key` and `value` to slot `slot_mapping[i]`, unless that is negative, and their scales."""
    keep = slot_mapping >= 0
    if not keep.all():
        rows = keep.nonzero()[:, 0]
        slot_mapping = slot_mapping[rows]
        key = key[rows]
        value = None if value is None else value[rows]
    block_size = key_cache.shape[1]
    place = (slot_mapping // block_size, slot_mapping % block_size)
    _store(key[: len(slot_mapping)], key_cache, place, key_scale, key_scale_cache)
    if value is not None and value_cache is not None:
        _store(value[: len(slot_mapping)], value_cache, place, value_scale, value_scale_cache)


def _store(
    rows: Tensor, cache: Tensor, place: tuple[Tensor, Tensor], scale: Tensor | None, scale_cache: Tensor | None
) -> None:
    if cache.dtype == rows.dtype:
        cache.index_put_(place, rows)
        return
    if scale_cache is not None:
        scale = _row_scales(rows, cache.dtype)
        scale_cache.index_put_(place, scale)
    indexable(cache).index_put_(place, _quantise(rows, scale, cache.dtype).view(torch.uint8))


def _row_scales(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Largest magnitude over the largest number of `dtype`: float32 [n, num_kv_heads]; 1 where that is no normal."""
    scale = rows.float().abs().amax(-1) / largest(dtype)
    return scale.masked_fill_(scale < torch.finfo(torch.float32).tiny, 1)


def _quantise(rows: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`rows / scale` rounded to the nearest number of `dtype`, ties to even; never past its largest."""
    exact = rows.float()
    if scale is not None:
        exact = exact / (scale[..., None] if scale.dim() else scale)
    limit = largest(dtype)
    if dtype == torch.int8:  # which has one more number below 0, and no NaN
        return exact.clamp(-limit - 1, limit).nan_to_num_().round_().to(dtype)
    return exact.clamp(-limit, limit).to(dtype)
