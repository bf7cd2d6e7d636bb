"""Small array helpers: a caller's integers checked, and ranges of different lengths in one array."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]


def as_integers(name: str, values: Any) -> Ints:
    """A fresh int64 copy of a flat sequence, array or CPU tensor of integers."""
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name} must be flat: [n] integers, got shape {list(array.shape)}")
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"{name} must be integers, got {array.dtype} {array[:4].tolist()}")
    return array.astype(np.int64)


def as_integer(name: str, value: Any, at_least: int) -> int:
    """A single integer of at least `at_least`."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if number < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {number}")
    return number


def expand(first: Ints, last: Ints) -> tuple[Ints, Ints]:
    """The half-open ranges `[first[i], last[i])` one after another, none of them negative.

    Returns:
        owner: [total], the `i` of each element.
        value: [total], the element. `expand([3, 7], [5, 8])` is `[0, 0, 1], [3, 4, 7]`.
    """
    counts = last - first
    owner = np.repeat(np.arange(len(counts)), counts)
    ends = counts.cumsum()
    value = np.arange(len(owner)) + (first - ends + counts)[owner]
    return owner, value
