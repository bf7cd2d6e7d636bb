"""Calls whose kernels are compiled ahead of time: small tensors on the CPU, with the dtypes and strides that matter.

Workers import this by name, so everything here is at the top level and takes picklable arguments.
"""

import functools

import torch

from torch_paged.kernels import append, copy_blocks, gather_blocks, merge_attention, rotary_append, scatter_blocks
from torch_paged.kernels import attention as attend
from torch_paged.kernels.attention import launch_attention
from torch_paged.kernels.attention_schedule import schedule_launcher
from torch_paged.kernels.copy_blocks import copy_blocks_kernel
from torch_paged.kernels.features import Features
from torch_paged.kernels.hopper_launch import HopperLauncher
from torch_paged.kernels.problem import Device
from torch_paged.kernels.shipped import ShippedVariant, shipped_option_variants, shipped_variants
from torch_paged.options import PLAIN, SCHEDULE_SHAPE, AttentionOptions

DEVICES = {
    "sm_80": Device(multiprocessors=108, shared_memory=163 * 1024, capability=80),
    "sm_90": Device(multiprocessors=132, shared_memory=227 * 1024, capability=90),
    "sm_100": Device(multiprocessors=148, shared_memory=227 * 1024, capability=100),
    "gfx942": Device(multiprocessors=304, shared_memory=64 * 1024, capability=94, amd=True),
}
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_STORED = {
    "e4m3": torch.float8_e4m3fn,
    "e4m3 bits": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "int8": torch.int8,
}


def shipped(target: str) -> dict[str, ShippedVariant]:
    """What is compiled ahead of time for `target`, by name."""
    device = DEVICES[target]
    return {variant.name: variant for variant in (*shipped_variants(device), *shipped_option_variants(device))}


def _options(has: Features, heads: int, num_heads: int, scale_cache: torch.Tensor) -> AttentionOptions:
    scales = {"": None, "scalar": torch.ones(()), "head": torch.ones(heads), "token": scale_cache}
    given = {
        f"{side}_scale{'_cache' if stored.scale == 'token' else ''}": scales[stored.scale]
        for side, stored in (("key", has.key), ("value", has.value))
    }
    return AttentionOptions(
        sliding_window=128 if has.window else None,
        softcap=30.0 * has.softcap,
        alibi_slopes=torch.ones(num_heads) if has.alibi else None,
        sinks=torch.ones(num_heads) if has.sinks else None,
        **given,
    )


def attention_launch(variant: ShippedVariant, misaligned: int = 0) -> None:
    """The launches of one shipped variant; rows of the caches `misaligned` elements longer than they need be."""
    v, dtype = variant.launch.variant, _DTYPES[variant.dtype]
    heads, tokens = 2, 8
    query = torch.zeros(tokens, heads * v.group, v.head_dim, dtype=dtype)
    caches = [
        torch.zeros(3, v.block_size, heads, dim + misaligned, dtype=_STORED.get(stored.dtype, dtype))[..., :dim]
        for dim, stored in ((v.head_dim, v.has.key), (v.value_dim, v.has.value))
    ]
    options = (
        _options(v.has, heads, heads * v.group, torch.ones(3, v.block_size, heads)) if v.has != Features() else PLAIN
    )
    output = torch.empty(tokens, heads * v.group, v.value_dim, dtype=dtype)
    lse = torch.empty(tokens, heads * v.group)
    table, lens = torch.zeros(4, 5, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    bounds = torch.zeros(5, dtype=torch.int32) if v.ragged else None
    launch_attention(variant.launch, query, *caches, table, lens, bounds, output, lse, 0.125, options)


def schedule_launch(variant: ShippedVariant) -> None:
    """What writes the schedule of one shipped variant."""
    v, ints = variant.launch.variant, functools.partial(torch.zeros, dtype=torch.int32)
    bounds = ints(5) if v.ragged else None
    write = HopperLauncher(variant.launch).schedule if v.copy_rows else schedule_launcher(variant.launch)
    write(ints(4), bounds, ints(SCHEDULE_SHAPE[1]), 8, 4, 2, 80, 0)


def attention(num_seqs: int, num_tokens: int, width: int, num_blocks: int, ragged: bool) -> None:
    """A call of the implementation, with these sizes."""
    query = torch.zeros(num_tokens, 8, 64, dtype=torch.bfloat16)
    cache = torch.zeros(num_blocks, 16, 2, 64, dtype=torch.bfloat16)
    table, lens = torch.zeros(num_seqs, width, dtype=torch.int32), torch.zeros(num_seqs, dtype=torch.int32)
    bounds = torch.zeros(num_seqs + 1, dtype=torch.int32) if ragged else None
    attend(query, cache, cache.clone(), table, lens, bounds, 0.125, True, PLAIN)


def attention_with_options(num_seqs: int, window: int, softcap: float) -> None:
    """A decode step with a window, a softcap and per-head numbers anywhere in memory."""
    query = torch.zeros(num_seqs, 8, 64, dtype=torch.bfloat16)
    cache = torch.zeros(9, 16, 2, 64, dtype=torch.int8)
    table, lens = torch.zeros(num_seqs, 5, dtype=torch.int32), torch.zeros(num_seqs, dtype=torch.int32)
    first = window % 3
    per_head, scale = torch.ones(8 + first)[first:], torch.ones(2 + first)[first:]
    options = AttentionOptions(window, softcap, per_head, per_head, scale, scale)
    attend(query, cache, cache.clone(), table, lens, None, 0.125, True, options)


def _written_scales(kind: str) -> list[torch.Tensor | None]:
    static = torch.ones(()) if kind == "scalar" else None
    of_tokens = torch.ones(7, 16, 8) if kind == "token" else None
    return [static, static, of_tokens, of_tokens]


def append_quantised(rows: int, stored: str, kind: str) -> None:
    """Keys and values of one packed projection into quantised caches."""
    key, value = torch.zeros(rows, 2, 8, 128, dtype=torch.bfloat16).unbind(1)
    caches = [torch.zeros(7, 16, 8, 128).to(_STORED[stored]) for _ in range(2)]
    append(key, value, *caches, torch.zeros(rows, dtype=torch.int64), *_written_scales(kind))


def rotate(rows: int, interleaved: bool, stored: str) -> None:
    """Queries, keys and values of 32 and 8 heads; `stored` in scales of their own, or as they are."""
    query, key = (torch.zeros(rows, heads, 128, dtype=torch.bfloat16) for heads in (32, 8))
    caches = [torch.zeros(7, 16, 8, 128).to(_STORED.get(stored, torch.bfloat16)) for _ in range(2)]
    angles, ids = torch.zeros(64, 64), torch.zeros(rows, dtype=torch.int64)
    scales = _written_scales("token" if stored else "")
    rotary_append(query, key, key.clone(), angles, angles, ids, *caches, ids, interleaved, *scales)


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
