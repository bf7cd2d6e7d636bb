"""A filled cache quantised after the fact: the scales that its numbers need, and the cache in fewer bits.

    slots = slots_in_use(block_table, seq_lens, block_size)
    key_scale = calibrate_scales(key_cache, slots, torch.int8)
    key_cache, _ = quantise_cache(key_cache, slots, torch.int8, key_scale)
    attention(query, key_cache, ..., key_scale=key_scale)

Ordinary functions for eager use, between steps: their results' sizes depend on data. What slots hold that are not
named, NaN included, has no influence.
"""

import torch
from torch import Tensor

from torch_paged.functional import append
from torch_paged.options import FLOAT_DTYPES, QUANTISED_DTYPES, largest

_ROWS = 1 << 16  # at a time, so that no second cache's worth of memory is needed


def slots_in_use(block_table: Tensor, seq_lens: Tensor, block_size: int, sliding_window: int | None = None) -> Tensor:
    """The slots that hold the keys of any sequence, each once; with a window, those that its last query sees.

    Args:
        block_table: int32 [num_seqs, max_blocks_per_seq].
        seq_lens: int32 [num_seqs], keys per sequence.
        block_size: slots a block.
        sliding_window: of the attention that reads the cache. What it has left behind is another's perhaps.

    Returns:
        int64 [n], increasing: block * block_size + offset.

    Raises:
        ValueError: `block_size` or `sliding_window` is below 1.
        IndexError: a length is negative, or more than the table holds.
    """
    for name, size in (("block_size", block_size), ("sliding_window", sliding_window)):
        if size is not None and size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    limit = block_table.shape[1] * block_size
    wrong = seq_lens[(seq_lens < 0) | (seq_lens > limit)]
    if len(wrong):
        raise IndexError(f"seq_lens must be 0 to max_blocks_per_seq * block_size = {limit}, got {int(wrong[0])}")
    positions = torch.arange(block_table.shape[1] * block_size, device=block_table.device)
    used = positions < seq_lens[:, None]
    if sliding_window is not None:
        used &= positions >= seq_lens[:, None] - sliding_window
    slots = block_table.long().repeat_interleave(block_size, 1) * block_size + positions % block_size
    distinct: Tensor = slots[used].unique()
    return distinct


def calibrate_scales(cache: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """The static scales that bring each head's largest magnitude to the largest number of `dtype`.

    Calibrate on more tokens than a few hundred, and leave room for what is to come: later tokens beyond the range are
    cut off at it. `scale.amax()` is the one scale for all heads.

    Args:
        cache: keys or values, fp32, fp16 or bf16 [num_blocks, block_size, num_kv_heads, head_dim].
        slots: int64 [n], those to look at, as from `slots_in_use`; negative: skip.
        dtype: float8_e4m3fn, float8_e5m2 or int8.

    Returns:
        float32 [num_kv_heads], `key_scale` or `value_scale` of `append` and `attention`; 1 for a head of zeros.

    Raises:
        TypeError, ValueError: a wrong dtype or shape; a number that is not finite, as no scale fits it.
        IndexError: a slot past the cache.
    """
    _check(cache, slots, dtype)
    slots = slots[slots >= 0]
    peaks = torch.zeros(cache.shape[2], dtype=torch.float32, device=cache.device)
    for part in slots.split(_ROWS):
        if len(part):
            peaks = torch.maximum(peaks, _rows(cache, part).float().abs().amax((0, 2)))
    if not peaks.isfinite().all():
        heads = (~peaks.isfinite()).nonzero()[:, 0].tolist()
        raise ValueError(f"cache must be finite in the slots to look at, got NaN or infinity in heads {heads}")
    scales = peaks / torch.full_like(peaks, largest(dtype))  # a GPU would multiply by a number's reciprocal
    return scales.masked_fill(scales < torch.finfo(torch.float32).tiny, 1)


def quantise_cache(
    cache: Tensor, slots: Tensor, dtype: torch.dtype, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A quantised copy of a cache, in the same layout, rounded as `append` rounds.

    Args:
        cache: keys or values, fp32, fp16 or bf16 [num_blocks, block_size, num_kv_heads, head_dim].
        slots: int64 [n], those to copy, as from `slots_in_use`; negative: skip. Other slots of the copy hold zeros, of
            scale 1.
        dtype: float8_e4m3fn, float8_e5m2 or int8.
        scale: float32, 0-dim or [num_kv_heads]; None: a scale for each token and head.

    Returns:
        The quantised cache, and its scale: the one given, or float32 [num_blocks, block_size, num_kv_heads], the
        `key_scale_cache` or `value_scale_cache` of `append` and `attention`.

    Raises:
        TypeError, ValueError: a wrong dtype or shape.
        IndexError: a slot past the cache.
    """
    _check(cache, slots, dtype)
    slots = slots[slots >= 0]
    quantised = torch.zeros_like(cache, dtype=torch.uint8).view(dtype)
    name = "_cache" if scale is None else ""
    if scale is None:
        scale = torch.ones(cache.shape[:3], dtype=torch.float32, device=cache.device)
    for part in slots.split(_ROWS):
        append(_rows(cache, part), None, quantised, None, part, **{f"key_scale{name}": scale})
    return quantised, scale


def check_dtype(dtype: torch.dtype) -> None:
    """That a cache can be quantised to `dtype`."""
    if dtype not in QUANTISED_DTYPES:
        raise TypeError(f"dtype must be float8_e4m3fn, float8_e5m2 or int8, got {dtype!r}")


def _check(cache: Tensor, slots: Tensor, dtype: torch.dtype) -> None:
    if cache.dtype not in FLOAT_DTYPES:
        raise TypeError(f"cache must be float32, float16 or bfloat16, got {cache.dtype}")
    if cache.dim() != 4:
        raise ValueError(f"cache must be [num_blocks, block_size, num_kv_heads, head_dim], got {list(cache.shape)}")
    if slots.dtype != torch.int64 or slots.dim() != 1:
        raise TypeError(f"slots must be int64 [n], got {slots.dtype} {list(slots.shape)}")
    check_dtype(dtype)
    num_slots = cache.shape[0] * cache.shape[1]
    past = slots[slots >= num_slots]
    if len(past):
        raise IndexError(f"slots must be below num_blocks * block_size = {num_slots}, got {int(past[0])}")


def _rows(cache: Tensor, slots: Tensor) -> Tensor:
    return cache[slots // cache.shape[1], slots % cache.shape[1]]
