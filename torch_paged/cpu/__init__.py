"""The operators on CPU tensors: vectorised PyTorch, one function an operator."""

from torch_paged.cpu.append import append
from torch_paged.cpu.attention import attention
from torch_paged.cpu.copy_blocks import copy_blocks
from torch_paged.cpu.gather_blocks import gather_blocks, scatter_blocks
from torch_paged.cpu.merge_attention import merge_attention
from torch_paged.cpu.rotary_append import rotary_append

__all__ = ["append", "attention", "copy_blocks", "gather_blocks", "merge_attention", "rotary_append", "scatter_blocks"]
