"""The operators on CPU tensors in C++: one function an operator, as in `torch_paged.cpu`, values checked on the way.

Importing this package loads the library, and builds it if need be: `torch_paged.cpu.choice` decides who may.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torch_paged.cpu import build
from torch_paged.options import AttentionOptions

__all__ = [
    "append",
    "attention",
    "copy_blocks",
    "gather_blocks",
    "merge_attention",
    "rotary_append",
    "scatter_blocks",
]

CHECKS_VALUES = True  # an IndexError or ValueError comes before any write

torch.ops.load_library(str(build.library()))

_ops = torch.ops.paged_native
_cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


def _kernel(op: Any) -> Callable[..., None]:
    """The C++ function behind `op`; `torch_paged.ops` has been through Autograd's keys already."""
    return partial(op.default.redispatch, _cpu)


_attention = _kernel(_ops.attention)
_merge_attention = _kernel(_ops.merge_attention)
_rotary_append = _kernel(_ops.rotary_append)
append = _kernel(_ops.append)
copy_blocks = _kernel(_ops.copy_blocks)
gather_blocks = _kernel(_ops.gather_blocks)
scatter_blocks = _kernel(_ops.scatter_blocks)

_NO_WINDOW = 1 << 62


def attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor | None,
    scale: float,
    causal: bool,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """Output [num_tokens, num_heads, value_head_dim] and float32 lse [num_tokens, num_heads]."""
    num_tokens, num_heads, _ = query.shape
    output = query.new_empty(num_tokens, num_heads, value_cache.shape[3])
    lse = query.new_empty(num_tokens, num_heads, dtype=torch.float32)
    window, *rest = options
    _attention(
        query, key_cache, value_cache, block_table, seq_lens, cu_seqlens_q, scale, causal,
        _NO_WINDOW if window is None else window, *rest, output, lse,
    )  # fmt: skip
    return output, lse


def rotary_append(query: Tensor, *arguments: Tensor | bool | None) -> Tensor:
    """WRITES the rotated key and the value to their slots; returns the rotated query."""
    rotated = torch.empty_like(query, memory_format=torch.contiguous_format)
    _rotary_append(query, *arguments, rotated)
    return rotated


def merge_attention(output_a: Tensor, lse_a: Tensor, output_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """output = (e^lse_a output_a + e^lse_b output_b) / (e^lse_a + e^lse_b), in float32."""
    output = torch.empty_like(output_a, memory_format=torch.contiguous_format)
    lse = torch.empty_like(lse_a, memory_format=torch.contiguous_format)
    _merge_attention(output_a, lse_a, output_b, lse_b, output, lse)
    return output, lse
