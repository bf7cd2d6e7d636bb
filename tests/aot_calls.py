"""Calls whose kernels are compiled ahead of time: small tensors on the CPU, with the dtypes and strides that matter.

Workers import this by name, so everything here is at the top level and takes picklable arguments.
"""

import functools

import torch

from torch_paged.kernels import append, copy_blocks, gather_blocks, merge_attention, scatter_blocks
from torch_paged.kernels import attention as attend
from torch_paged.kernels.attention import launch_attention
from torch_paged.kernels.copy_blocks import copy_blocks_kernel
from torch_paged.kernels.launch_config import Device, ShippedVariant, shipped_variants
from torch_paged.options import PLAIN

DEVICES = {
    "sm_80": Device(multiprocessors=108, shared_memory=163 * 1024, capability=80),
    "sm_90": Device(multiprocessors=132, shared_memory=227 * 1024, capability=90),
    "sm_100": Device(multiprocessors=148, shared_memory=227 * 1024, capability=100),
    "gfx942": Device(multiprocessors=304, shared_memory=64 * 1024, capability=94, amd=True),
}
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def shipped(target: str) -> dict[str, ShippedVariant]:
    """What is compiled ahead of time for `target`, by name."""
    return {variant.name: variant for variant in shipped_variants(DEVICES[target])}


def attention_launch(variant: ShippedVariant, misaligned: int = 0) -> None:
    """The launches of one shipped variant; rows of the caches `misaligned` elements longer than they need be."""
    v, dtype = variant.launch.variant, _DTYPES[variant.dtype]
    heads, tokens = 2, 8
    query = torch.zeros(tokens, heads * v.group, v.head_dim, dtype=dtype)
    caches = [
        torch.zeros(3, v.block_size, heads, dim + misaligned, dtype=dtype)[..., :dim]
        for dim in (v.head_dim, v.value_dim)
    ]
    output = torch.empty(tokens, heads * v.group, v.value_dim, dtype=dtype)
    lse = torch.empty(tokens, heads * v.group)
    table, lens = torch.zeros(4, 5, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    bounds = torch.zeros(5, dtype=torch.int32) if v.ragged else None
    launch_attention(variant.launch, query, *caches, table, lens, bounds, output, lse, 0.125)


def attention(num_seqs: int, num_tokens: int, width: int, num_blocks: int, ragged: bool) -> None:
    """A call of the implementation, with these sizes."""
    query = torch.zeros(num_tokens, 8, 64, dtype=torch.bfloat16)
    cache = torch.zeros(num_blocks, 16, 2, 64, dtype=torch.bfloat16)
    table, lens = torch.zeros(num_seqs, width, dtype=torch.int32), torch.zeros(num_seqs, dtype=torch.int32)
    bounds = torch.zeros(num_seqs + 1, dtype=torch.int32) if ragged else None
    attend(query, cache, cache.clone(), table, lens, bounds, 0.125, True, PLAIN)


def append_rows(rows: int, dtype: str = "bf16", heads: int = 8, dims: tuple[int, int] = (128, 128)) -> None:
    """Keys and values sliced out of one packed projection."""
    packed = torch.zeros(rows, heads * (dims[0] + dims[1]), dtype=_DTYPES[dtype])
    key, value = packed.split([heads * dims[0], heads * dims[1]], dim=1)
    caches = [torch.zeros(7, 16, heads, dim, dtype=_DTYPES[dtype]) for dim in dims]
    slots = torch.zeros(rows, dtype=torch.int64)
    append(key.view(rows, heads, dims[0]), value.view(rows, heads, dims[1]), *caches, slots)


def merge(tokens: int, dtype: str = "bf16", dim: int = 128) -> None:
    """Two outputs of 32 heads."""
    output, lse = torch.zeros(tokens, 32, dim, dtype=_DTYPES[dtype]), torch.zeros(tokens, 32)
    merge_attention(output, lse, output.clone(), lse)


def _caches(layout: str) -> list[torch.Tensor]:
    if layout == "head-major":
        return [torch.zeros(7, 8, 16, 128, dtype=torch.bfloat16).transpose(1, 2) for _ in range(2)]
    if layout == "sliced":
        return [torch.zeros(7, 16, 1, 576, dtype=torch.bfloat16)[..., :512]]
    return [torch.zeros(7, 16, 8, 80, dtype=torch.bfloat16) for _ in range(2)]


def copy(pairs: int, layout: str = "token-major") -> None:
    """Copy-on-write of `pairs` blocks."""
    copy_blocks(_caches(layout), torch.zeros(pairs, 2, dtype=torch.int64))


def gather(rows: int, layout: str = "token-major") -> None:
    """Blocks of all caches into packed rows."""
    caches = _caches(layout)
    gather_blocks(caches, torch.zeros(rows, dtype=torch.int64), _packed(caches, rows))


def scatter(rows: int, layout: str = "token-major") -> None:
    """Packed rows into blocks of all caches."""
    caches = _caches(layout)
    scatter_blocks(_packed(caches, rows), torch.zeros(rows, dtype=torch.int64), caches)


def _packed(caches: list[torch.Tensor], rows: int) -> torch.Tensor:
    return torch.zeros(rows, sum(cache[0].numel() for cache in caches), dtype=caches[0].dtype)


def spilling_copy() -> None:
    """A copy whose kernel gets fewer registers than it needs."""
    launch = copy_blocks_kernel.run
    copy_blocks_kernel.run = functools.partial(launch, maxnreg=24)
    try:
        copy(3)
    finally:
        del copy_blocks_kernel.run
