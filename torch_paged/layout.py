"""What the arguments of a cache come to: its groups of layers, what is stored, and each layer's tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torch_paged.capacity import empty_cache, empty_scales
from torch_paged.memory.arrays import as_integer, as_integers

_QUANTISED = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)


class LayerGroup(NamedTuple):
    """Layers that see equally far back: they share blocks and tables, and release what their window leaves behind.

    Attributes:
        sliding_window: of their attention; None: they see everything, or all that `max_seq_len` tokens are.
        layers: their numbers.
        num_blocks: blocks, each of which serves all of these layers.
        num_free_blocks: those that a step can get now.
    """

    sliding_window: int | None
    layers: tuple[int, ...]
    num_blocks: int
    num_free_blocks: int


def check_quantisation(
    dtype: torch.dtype, cache_dtype: torch.dtype | None, scales: str | None
) -> tuple[torch.dtype, str | None]:
    """What is stored, and its scales."""
    stored = dtype if cache_dtype is None else cache_dtype
    if stored != dtype and stored not in _QUANTISED:
        names = ", ".join(str(each).removeprefix("torch.") for each in _QUANTISED)
        raise TypeError(f"cache_dtype must be {names}, or dtype = {dtype}, got {stored}")
    if scales not in (None, "token", "static"):
        raise ValueError(f"scales must be 'token', 'static' or None, got {scales!r}")
    if scales is not None and stored == dtype:
        raise ValueError(f"scales must be None with an unquantised cache of {stored}, got {scales!r}")
    return stored, "token" if scales is None and stored == torch.int8 else scales


def check_windows(sliding_window: int | Sequence[int | None] | None, num_layers: int) -> list[int | None]:
    """The window of each layer."""
    if sliding_window is None or not isinstance(sliding_window, Sequence):
        sliding_window = [sliding_window] * num_layers
    if len(sliding_window) != num_layers:
        raise ValueError(
            f"sliding_window must be one int or one for each of {num_layers} layers, got {len(sliding_window)}"
        )
    return [None if window is None else as_integer("sliding_window", window, 1) for window in sliding_window]


def check_buckets(buckets: Sequence[int] | None) -> list[int]:
    """Sizes of padded batches, none if None."""
    sizes: list[int] = as_integers("buckets", [] if buckets is None else buckets).tolist()
    if any(size <= before for before, size in zip([0, *sizes], sizes, strict=False)):
        raise ValueError(f"buckets must increase from at least 1, got {sizes}")
    return sizes


def group_layers(windows: list[int | None], max_seq_len: int) -> dict[int | None, tuple[int, ...]]:
    """The layers of each window, the widest first. None is the widest; what shows all tokens is none."""
    seen = [None if window is None or window >= max_seq_len else window for window in windows]
    ordered = sorted(set(seen), key=lambda window: -max_seq_len if window is None else -window)
    return {window: tuple(i for i, other in enumerate(seen) if other == window) for window in ordered}


def layer_tensors(
    num_blocks: int,
    block_size: int,
    num_kv_heads: int,
    head_dims: tuple[int, int],
    stored: torch.dtype,
    scales: str | None,
    device: torch.device,
) -> dict[str, Tensor]:
    """A layer's tensors by their names; `head_dims` of keys and values."""
    tensors = {}
    for side, dim in zip(("key", "value"), head_dims, strict=True):
        tensors[f"{side}_cache"] = empty_cache(num_blocks, block_size, num_kv_heads, dim, stored, device)
        if scales == "token":
            tensors[f"{side}_scale_cache"] = empty_scales(num_blocks, block_size, num_kv_heads, device)
        if scales == "static":
            tensors[f"{side}_scale"] = torch.ones(num_kv_heads, dtype=torch.float32, device=device)
    return tensors
