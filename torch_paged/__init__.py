"""Paged attention as ordinary PyTorch operators, `torch.ops.paged.*`, and the cache that feeds them."""

from torch_paged.batch import PagedBatch, unbacked
from torch_paged.cache import PagedKVCache
from torch_paged.functional import (
    append,
    attention,
    attention_with_lse,
    copy_blocks,
    gather_blocks,
    merge_attention,
    rotary_append,
    scatter_blocks,
    schedule,
)
from torch_paged.layers import PagedKVLayer
from torch_paged.memory import IntegrityError, MemoryStats, OutOfBlocks, OutOfSwapSpace
from torch_paged.quantise import calibrate_scales, quantise_cache, slots_in_use
from torch_paged.warming import warmup

__version__ = "0.1.0"
__all__ = [
    "IntegrityError",
    "MemoryStats",
    "OutOfBlocks",
    "OutOfSwapSpace",
    "PagedBatch",
    "PagedKVCache",
    "PagedKVLayer",
    "append",
    "attention",
    "attention_with_lse",
    "calibrate_scales",
    "copy_blocks",
    "gather_blocks",
    "merge_attention",
    "quantise_cache",
    "rotary_append",
    "scatter_blocks",
    "schedule",
    "slots_in_use",
    "unbacked",
    "warmup",
]
