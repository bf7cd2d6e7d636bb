"""The options of attention, as the operator hands them to its implementations, and the dtypes that are served."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
QUANTISED_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
SCALES = ("key_scale", "value_scale", "key_scale_cache", "value_scale_cache")  # as arguments are named


class AttentionOptions(NamedTuple):
    """What changes the logits, the mask, the denominator, or how stored numbers are read; a default is off.

    Attributes:
        sliding_window: a query sees itself and the `sliding_window - 1` keys before it; only with `causal`.
        softcap: c > 0 makes c * tanh(logit / c) of a scaled logit.
        alibi_slopes: float32 [num_heads]; slope * |query position - key position| is taken off a logit.
        sinks: float32 [num_heads], one extra logit in each row's denominator, neither scaled nor capped.
        key_scale, value_scale: float32, 0-dim or [num_kv_heads]; true value = stored value * scale.
        key_scale_cache, value_scale_cache: float32 [num_blocks, block_size, num_kv_heads], instead of those.
    """

    sliding_window: int | None = None
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None
    key_scale_cache: Tensor | None = None
    value_scale_cache: Tensor | None = None


PLAIN = AttentionOptions()
SCHEDULE_SHAPE = (2, 32768)  # of every schedule: a call has up to two launches


def largest(dtype: torch.dtype) -> float:
    """The largest finite number of a quantised type: 448, 57344 or 127."""
    return torch.iinfo(dtype).max if dtype == torch.int8 else torch.finfo(dtype).max
