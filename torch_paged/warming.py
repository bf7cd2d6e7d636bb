"""`warmup`: what a model needs is compiled before its first request, once it is known that the operators serve it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_paged import checks, ops
from torch_paged.memory.arrays import as_integer


def warmup(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    value_head_dim: int | None = None,
    block_size: int = 16,
    dtype: torch.dtype,
    device: torch.device | str,
    causal: bool = True,
    sliding_window: bool = False,
    softcap: bool = False,
    alibi_slopes: bool = False,
    sinks: bool = False,
    cache_dtype: torch.dtype | None = None,
    scales: str | None = None,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Compile every Triton kernel that a model needs, so that no request waits for the compiler.

    Which kernel runs depends on shapes, dtypes and options, here and there also on the size of the batch and on
    whether a window is short, never on lengths or the table's width. All of these are compiled: after this nothing
    compiles while serving. A model whose layers differ in their options calls it once for each kind of layer.

    Args:
        num_heads, num_kv_heads, head_dim, value_head_dim, block_size: of the model and its cache.
        dtype: of query and, without `cache_dtype`, caches.
        device: a GPU; on CPU there is nothing to compile.
        causal: as attention will be called.
        sliding_window, softcap, alibi_slopes, sinks: whether attention will be called with them.
        cache_dtype: of both caches, where they are quantised.
        scales: of those, "scalar", "head" (one each) or "token" (scale caches); None: float8 without scales.
        rotary_dim: columns that `rotary_append` rotates, with angles in float32 or `dtype`; None: it is not called.
        interleaved: as `rotary_append` will be called.
        progress: called with (done, total) after each kind of batch.

    Returns:
        How many kinds of batches were run; 0 on CPU.

    Raises:
        TypeError, ValueError: no operator serves such a model, on whatever device.
    """
    model = num_heads, num_kv_heads, head_dim, head_dim if value_head_dim is None else value_head_dim, block_size, dtype
    checked: dict[str, Any] = dict(
        cache_dtype=dtype if cache_dtype is None else cache_dtype,
        scales=scales,
        rotary_dim=rotary_dim,
        causal=causal,
        sliding_window=sliding_window,
    )
    _check(*model, **checked)
    unchecked = dict(softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks, interleaved=interleaved)
    device = torch.empty(0, device=device).device  # says so if it is not there
    package = ops.package_on(device.type)
    if package is None or not hasattr(package, "warmup"):
        return 0
    with torch.cuda.device(device if device.type == "cuda" else -1):
        done: int = package.warmup(device, *model, **checked, **unchecked, progress=progress)
    return done


def _check(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    value_head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    *,
    cache_dtype: torch.dtype,
    scales: str | None,
    rotary_dim: int | None,
    causal: bool,
    sliding_window: bool,
) -> None:
    """What the operators demand of a model of this kind, by tensors without memory that it would bring."""
    sizes = dict(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, value_head_dim=value_head_dim)
    sizes |= dict(block_size=block_size) | ({} if rotary_dim is None else dict(rotary_dim=rotary_dim))
    for name, size in sizes.items():
        as_integer(name, size, at_least=1)
    for name, it in (("dtype", dtype), ("cache_dtype", cache_dtype)):
        if not isinstance(it, torch.dtype):
            raise TypeError(f"{name} must be a torch.dtype, got {it!r}")
    if scales not in (None, "scalar", "head", "token"):
        raise ValueError(f"scales must be 'scalar', 'head', 'token' or None, got {scales!r}")

    def rows(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(1, *shape, dtype=of, device="meta")

    keys, values = (rows(block_size, num_kv_heads, dim, of=cache_dtype) for dim in (head_dim, value_head_dim))
    given: dict[str, Any] = {}
    if scales is not None:
        scale = rows(block_size, num_kv_heads, of=torch.float32)
        scale = {"scalar": scale[0, 0, 0], "head": scale[0, 0], "token": scale}[scales]
        given = {f"{side}_scale{'_cache' * (scales == 'token')}": scale for side in ("key", "value")}
    query, table, slots = rows(num_heads, head_dim), rows(1, of=torch.int32), rows(of=torch.int64)
    window = 1 if sliding_window else None
    checks.attention(query, keys, values, table, table[0], causal=causal, sliding_window=window, **given)
    if rotary_dim is not None:
        if rotary_dim % 2:
            raise ValueError(f"rotary_dim must be even, got {rotary_dim}")
        key, value, angles = rows(num_kv_heads, head_dim), rows(num_kv_heads, value_head_dim), rows(rotary_dim // 2)
        checks.rotary_append(query, key, value, angles, angles, slots, keys, values, slots, **given)
