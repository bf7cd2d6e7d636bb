"""What the arguments of a cache come to: its groups of layers, what is stored, and each layer's tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torch_paged.memory.arrays import as_integer, as_integers
from torch_paged.options import FLOAT_DTYPES, QUANTISED_DTYPES
from torch_paged.storage import empty_cache, empty_scales


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


class Stored(NamedTuple):
    """What a layer keeps of each token.

    Attributes:
        num_kv_heads: its heads.
        head_dim, value_head_dim: numbers of a key and of a value.
        dtype: of these numbers.
        scales: "token": besides, one for each head and key, and value; "static": one for each head in all; None: none.
    """

    num_kv_heads: int
    head_dim: int
    value_head_dim: int
    dtype: torch.dtype
    scales: str | None

    @property
    def bytes_per_token(self) -> int:
        scales = 2 * torch.float32.itemsize if self.scales == "token" else 0
        return self.num_kv_heads * ((self.head_dim + self.value_head_dim) * self.dtype.itemsize + scales)

    def allocate(self, num_blocks: int, block_size: int, device: torch.device) -> dict[str, Tensor]:
        """A layer's tensors by their names."""
        tensors = {}
        for side, dim in (("key", self.head_dim), ("value", self.value_head_dim)):
            shape = num_blocks, block_size, self.num_kv_heads
            tensors[f"{side}_cache"] = empty_cache(*shape, dim, self.dtype, device)
            if self.scales == "token":
                tensors[f"{side}_scale_cache"] = empty_scales(*shape, device)
            if self.scales == "static":
                tensors[f"{side}_scale"] = torch.ones(self.num_kv_heads, dtype=torch.float32, device=device)
        return tensors


def check_stored(
    num_kv_heads: int,
    head_dim: int,
    value_head_dim: int | None,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None,
    scales: str | None,
) -> Stored:
    """What is stored by arguments of these names."""
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype must be float32, float16 or bfloat16, got {dtype!r}")
    stored = dtype if cache_dtype is None else cache_dtype
    if stored != dtype and stored not in QUANTISED_DTYPES:
        names = ", ".join(str(each).removeprefix("torch.") for each in QUANTISED_DTYPES)
        raise TypeError(f"cache_dtype must be {names}, or dtype = {dtype}, got {stored!r}")
    if scales not in (None, "token", "static"):
        raise ValueError(f"scales must be 'token', 'static' or None, got {scales!r}")
    if scales is not None and stored == dtype:
        raise ValueError(f"scales must be None with an unquantised cache of {stored}, got {scales!r}")
    num_kv_heads = as_integer("num_kv_heads", num_kv_heads, at_least=1)
    head_dim = as_integer("head_dim", head_dim, at_least=1)
    value_head_dim = head_dim if value_head_dim is None else as_integer("value_head_dim", value_head_dim, at_least=1)
    scales = "token" if scales is None and stored == torch.int8 else scales
    return Stored(num_kv_heads, head_dim, value_head_dim, stored, scales)


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
