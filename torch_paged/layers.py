"""The layers that read and write a paged cache: one with its own buffers, one that takes them as arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from torch import Tensor, nn

from torch_paged.batch import PagedBatch
from torch_paged.functional import append, attention


class PagedKVLayer(nn.Module):
    """One layer's keys and values. A decoder layer keeps it as a submodule and calls it as its attention.

    The buffers are non-persistent: no checkpoint holds them. They stay where they were made: `model.to(...)`,
    `model.half()` and their like raise RuntimeError where they would move or convert them.

    Attributes:
        key_cache: [num_blocks, block_size, num_kv_heads, head_dim].
        value_cache: [num_blocks, block_size, num_kv_heads, value_head_dim].
    """

    key_cache: Tensor
    value_cache: Tensor

    def __init__(self, key_cache: Tensor, value_cache: Tensor) -> None:
        super().__init__()
        self.register_buffer("key_cache", key_cache, persistent=False)
        self.register_buffer("value_cache", value_cache, persistent=False)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, batch: PagedBatch, **options: Any) -> Tensor:
        """Store the new tokens' keys and values, then attend to everything their sequences hold.

        Args:
            query: [num_tokens, num_heads, head_dim], in the order of the batch, padding included.
            key: [num_tokens, num_kv_heads, head_dim].
            value: [num_tokens, num_kv_heads, value_head_dim].
            batch: from `PagedKVCache.prepare`, or from `PagedBatch.advance`.
            options: `scale`, `causal` and the other keywords of `attention`.

        Returns:
            [num_tokens, num_heads, value_head_dim]; zeros in padding.
        """
        return _append_and_attend(query, key, value, self.key_cache, self.value_cache, batch, options)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PagedKVLayer:  # noqa: ARG002
        probe = fn(self.key_cache.new_empty(0, *self.key_cache.shape[1:]))
        if (probe.dtype, probe.device) != (self.key_cache.dtype, self.key_cache.device):
            raise RuntimeError(
                f"a paged cache stays {self.key_cache.dtype} on {self.key_cache.device}, it cannot become "
                f"{probe.dtype} on {probe.device}: build the PagedKVCache with the dtype and device it shall have, "
                "and put its layers into the model when the model is there"
            )
        return self

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a PagedKVLayer cannot be copied or pickled: it belongs to one PagedKVCache")


class FunctionalKV(nn.Module):
    """A layer without buffers: the caches are arguments, so that an exported program holds none."""

    def forward(
        self,
        caches: Sequence[tuple[Tensor, Tensor]],
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        batch: PagedBatch,
        **options: Any,
    ) -> Tensor:
        """As `PagedKVLayer.forward`, on `caches[layer]`, which is MUTATED; `caches` as from `tensors()`."""
        key_cache, value_cache = caches[layer]
        return _append_and_attend(query, key, value, key_cache, value_cache, batch, options)


def _append_and_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: PagedBatch,
    options: dict[str, Any],
) -> Tensor:
    append(key, value, key_cache, value_cache, batch.slot_mapping)
    return attention(
        query,
        key_cache,
        value_cache,
        batch.block_table,
        batch.seq_lens,
        cu_seqlens_q=batch.cu_seqlens_q,
        **options,
    )
