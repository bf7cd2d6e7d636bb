"""Paged attention as ordinary PyTorch operators: `torch.ops.paged.*` and the cache that feeds them."""

import torch_paged.ops  # noqa: F401 - registers the operators
from torch_paged.functional import (
    append,
    attention,
    attention_with_lse,
    copy_blocks,
    gather_blocks,
    merge_attention,
    scatter_blocks,
)

__version__ = "0.1.0"
__all__ = [
    "append",
    "attention",
    "attention_with_lse",
    "copy_blocks",
    "gather_blocks",
    "merge_attention",
    "scatter_blocks",
]
