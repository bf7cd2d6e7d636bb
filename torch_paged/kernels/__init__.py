"""Triton implementations of the operators: for CUDA tensors, and for CPU tensors under TRITON_INTERPRET=1."""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from torch_paged.kernels import interpreter_fixes  # noqa: F401

from torch_paged.kernels.append import append
from torch_paged.kernels.attention import attention, prepare_attention
from torch_paged.kernels.copy_blocks import copy_blocks
from torch_paged.kernels.gather_blocks import gather_blocks, scatter_blocks
from torch_paged.kernels.merge_attention import merge_attention
from torch_paged.kernels.rotary_append import rotary_append
from torch_paged.kernels.schedule import schedule
from torch_paged.kernels.warmup import warmup

__all__ = [
    "append",
    "attention",
    "copy_blocks",
    "gather_blocks",
    "merge_attention",
    "prepare_attention",
    "rotary_append",
    "scatter_blocks",
    "schedule",
    "warmup",
]

CHECKS_VALUES = False  # `bounds` has to look at them first
