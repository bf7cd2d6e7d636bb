"""Rows of keys and values into the slots of their caches."""

from torch import Tensor


def append(
    key: Tensor,
    value: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor | None,
    slot_mapping: Tensor,
    *scales: Tensor | None,
) -> None:
    """WRITES row i of `key` and `value` to slot `slot_mapping[i]`, unless that is negative."""
    if any(scale is not None for scale in scales) or key_cache.dtype != key.dtype:
        raise NotImplementedError(f"not supported here yet: caches of {key_cache.dtype}")
    keep = slot_mapping >= 0
    if not keep.all():
        rows = keep.nonzero()[:, 0]
        slot_mapping = slot_mapping[rows]
        key = key[rows]
        value = None if value is None else value[rows]
    block_size = key_cache.shape[1]
    place = (slot_mapping // block_size, slot_mapping % block_size)
    key_cache.index_put_(place, key[: len(slot_mapping)])
    if value is not None and value_cache is not None:
        value_cache.index_put_(place, value[: len(slot_mapping)])
