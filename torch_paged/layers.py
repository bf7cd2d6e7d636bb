"""The layers that read and write a paged cache: one with its own buffers, one that takes them as arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from torch_paged.batch import PagedBatch
from torch_paged.functional import append, attention, schedule
from torch_paged.options import SCALES


class PagedKVLayer(nn.Module):
    """One layer's keys and values. A decoder layer keeps it as a submodule and calls it as its attention.

    The buffers are non-persistent: no checkpoint holds them. They stay where they were made: `model.to(...)`,
    `model.half()` and their like raise RuntimeError where they would move or convert them.

    Attributes:
        key_cache: [num_blocks, block_size, num_kv_heads, head_dim].
        value_cache: [num_blocks, block_size, num_kv_heads, value_head_dim].
        key_scale, value_scale: float32 [num_kv_heads] of a cache with `scales="static"`, else None. WRITE the scales of
            your model to them, with `copy_` for instance, before the first step; they begin as ones.
        key_scale_cache, value_scale_cache: float32 [num_blocks, block_size, num_kv_heads] of a cache with
            `scales="token"`, else None.
        group: the number of the layer's group in `PagedKVCache.groups`.
        sliding_window: of its attention, or None.
    """

    key_cache: Tensor
    value_cache: Tensor
    key_scale: Tensor | None
    value_scale: Tensor | None
    key_scale_cache: Tensor | None
    value_scale_cache: Tensor | None

    def __init__(
        self,
        tensors: dict[str, Tensor],
        *,
        dtype: torch.dtype,
        group: int,
        sliding_window: int | None,
    ) -> None:
        super().__init__()
        for name in ("key_cache", "value_cache", *SCALES):
            self.register_buffer(name, tensors.get(name), persistent=False)
        self.group = group
        self.sliding_window = sliding_window
        self._dtype = dtype

    def forward(self, query: Tensor, key: Tensor, value: Tensor, batch: PagedBatch, **options: Any) -> Tensor:
        """Store the new tokens' keys and values, then attend to everything their sequences hold.

        Args:
            query: [num_tokens, num_heads, head_dim], in the order of the batch, padding included.
            key: [num_tokens, num_kv_heads, head_dim].
            value: [num_tokens, num_kv_heads, value_head_dim].
            batch: from `PagedKVCache.prepare`, or from `PagedBatch.advance`.
            options: `scale`, `causal` and the other keywords of `attention`; the layer gives its `sliding_window` and
                scales by itself.

        Returns:
            [num_tokens, num_heads, value_head_dim]; zeros in padding.

        Raises:
            TypeError: `batch` is no PagedBatch.
            ValueError: query or key has fewer rows than the batch has tokens, those of its padding included, or more
                where the batch has no `cu_seqlens_q` (else rows past its last are padding); the layer has a sliding
                window, and another one is given.
        """
        return _append_and_attend(query, key, value, self.tensors(), batch, self.group, self.sliding_window, options)

    def scheduled(self, batch: PagedBatch, num_heads: int, **options: Any) -> PagedBatch:
        """`batch` with a schedule for the layers of this one's group: call it once a step, in the model, on a GPU.

        They then deal their work out once, not each by itself (see `torch_paged.schedule`); results are the same.

        Args:
            batch: as the layers will take it.
            num_heads: query heads of each.
            options: exactly those of their attention, as in `forward`; layers that are called otherwise may take no
                notice.

        Raises:
            TypeError: `batch` is no PagedBatch.
        """
        block_table, slot_mapping = _tables(batch, self.group)
        key_cache, value_cache, options = _cache_options(self.tensors(), self.sliding_window, options)
        shape = slot_mapping.shape[0], num_heads, key_cache.shape[3]
        query = torch.empty(shape, dtype=self._dtype, device=key_cache.device)
        made = schedule(
            query,
            key_cache,
            value_cache,
            block_table,
            batch.seq_lens,
            cu_seqlens_q=batch.cu_seqlens_q,
            **options,
        )
        return batch.with_schedule(made, self.group)

    def tensors(self) -> tuple[Tensor, ...]:
        """Key cache and value cache, then their scales if they have any."""
        scales = (self.key_scale, self.value_scale, self.key_scale_cache, self.value_scale_cache)
        return self.key_cache, self.value_cache, *(scale for scale in scales if scale is not None)

    def blocks(self) -> list[Tensor]:
        """Those of its tensors that are made of blocks."""
        return [tensor for tensor in self.tensors() if tensor.dim() > 1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PagedKVLayer:  # noqa: ARG002
        probe = fn(self.key_cache.new_empty(0, *self.key_cache.shape[1:], dtype=self._dtype))
        if (probe.dtype, probe.device) != (self._dtype, self.key_cache.device):
            raise RuntimeError(
                f"a paged cache stays {self._dtype} on {self.key_cache.device}, it cannot become "
                f"{probe.dtype} on {probe.device}: build the PagedKVCache with the dtype and device it shall have, "
                "and put its layers into the model when the model is there"
            )
        return self

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a PagedKVLayer cannot be copied or pickled: it belongs to one PagedKVCache")


class FunctionalKV(nn.Module):
    """A layer without buffers: the caches are arguments, so that an exported program holds none.

    Args:
        layers: the group and the sliding window of each layer.
    """

    def __init__(self, layers: Sequence[tuple[int, int | None]]) -> None:
        super().__init__()
        self._layers = list(layers)

    def forward(
        self,
        caches: Sequence[tuple[Tensor, ...]],
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        batch: PagedBatch,
        **options: Any,
    ) -> Tensor:
        """As `PagedKVLayer.forward`, on `caches[layer]`, which is MUTATED; `caches` as from `tensors()`."""
        return _append_and_attend(query, key, value, caches[layer], batch, *self._layers[layer], options)


def _tables(batch: Any, group: int) -> tuple[Tensor, Tensor]:
    """`batch.tables(group)` of what must be a PagedBatch."""
    if not isinstance(batch, PagedBatch):
        raise TypeError(f"batch must be a PagedBatch, got {type(batch).__name__}")
    return batch.tables(group)


def _check_rows(name: str, rows: int, tokens: int, ragged: bool) -> None:
    """Raise ValueError unless there is one for each token of the batch; in a ragged one more are padding."""
    if torch.compiler.is_compiling():
        if not ragged:
            torch._check(rows == tokens)  # takes no message with sizes in it
    else:
        torch._check_value(
            rows >= tokens if ragged else rows == tokens,
            lambda: f"{name} must have {tokens} rows, one for each token of the batch, padding included, got {rows}",
        )


def _append_and_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tensors: tuple[Tensor, ...],
    batch: PagedBatch,
    group: int,
    sliding_window: int | None,
    options: dict[str, Any],
) -> Tensor:
    block_table, slot_mapping = _tables(batch, group)
    for name, rows in (("query", query), ("key", key)):
        _check_rows(name, rows.shape[0], slot_mapping.shape[0], ragged=batch.cu_seqlens_q is not None)
    key_cache, value_cache, options = _cache_options(tensors, sliding_window, options)
    append_options = {name: options[name] for name in SCALES if name in options}
    append(key, value, key_cache, value_cache, slot_mapping, **append_options)
    if batch.schedules is not None:
        options.setdefault("schedule", batch.schedules[group])
    return attention(
        query,
        key_cache,
        value_cache,
        block_table,
        batch.seq_lens,
        cu_seqlens_q=batch.cu_seqlens_q,
        **options,
    )


def _cache_options(
    tensors: tuple[Tensor, ...], sliding_window: int | None, options: dict[str, Any]
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Key cache, value cache, and `options` with a layer's own."""
    key_cache, value_cache, *scales = tensors
    if scales:
        names = SCALES[:2] if scales[0].dim() < 2 else SCALES[2:]
        options = dict(zip(names, scales, strict=True)) | options
    if sliding_window is not None:
        if options.setdefault("sliding_window", sliding_window) != sliding_window:
            raise ValueError(
                f"the layer's sliding_window is {sliding_window}, got sliding_window={options['sliding_window']}"
            )
    return key_cache, value_cache, options


if TYPE_CHECKING:

    class PagedKVLayers(nn.ModuleList):
        """What a cache has: a ModuleList, of which type checkers know the elements."""

        def __getitem__(self, index: int) -> PagedKVLayer: ...  # type: ignore[override]
        def __iter__(self) -> Iterator[PagedKVLayer]: ...

else:
    PagedKVLayers = nn.ModuleList
