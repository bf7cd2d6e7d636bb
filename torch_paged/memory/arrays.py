"""Small array helpers: a caller's integers checked, and ranges of different lengths in one array."""

from __future__ import annotations

import operator
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]


def as_integers(name: str, values: Any) -> Ints:
    """An int64 copy, not to be written to, of a flat sequence (bytes too), array or CPU tensor of integers."""
    if type(values) is list and values and type(values[0]) is int:
        try:  # faster than NumPy alone, which looks for other types first
            return np.frombuffer(struct.pack(f"{len(values)}q", *values), dtype=np.int64)
        except struct.error:  # said below, unless NumPy would make other types of these
            if all(type(value) is int for value in values):
                largest = max(values, key=abs)
                raise ValueError(f"{name} must be integers of 64 bits with a sign, got {largest}") from None
    numbers = np.frombuffer(values, np.uint8) if isinstance(values, bytes) else np.asarray(values)
    if numbers.ndim != 1:
        actual = f"shape {list(numbers.shape)}" if numbers.ndim else f"{values!r:.60}"
        raise ValueError(f"{name} must be flat: [n] integers, got {actual}")
    if numbers.dtype.kind not in "iu" and numbers.size:
        raise TypeError(f"{name} must be integers, got {numbers.dtype} {numbers[:4].tolist()}")
    if numbers.dtype == np.uint64 and numbers.size and numbers.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name} must be integers of 64 bits with a sign, got {numbers.max()}")
    return numbers.astype(np.int64)


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


def as_counts(counts: Any, num_seqs: int) -> int | Ints:
    """`counts` as one int where all are equal, else as int64 [num_seqs]."""
    if isinstance(counts, int) or np.ndim(counts) == 0:
        return as_integer("counts", counts, at_least=1)
    each = as_integers("counts", counts)
    if len(each) != num_seqs:
        raise ValueError(f"counts must be one integer or one for each of {num_seqs} seqs, got {len(each)}")
    if not len(each):
        return 1
    lowest = int(each.min())
    if lowest < 1:
        raise ValueError(f"counts must be at least 1, got {lowest}")
    return lowest if lowest == each.max() else each


def distinct(values: Ints) -> Ints:
    """The different ones, ascending: a `np.unique` for short arrays."""
    ordered = np.sort(values)
    repeated = (ordered[1:] == ordered[:-1]).nonzero()[0]
    return np.delete(ordered, repeated) if len(repeated) else ordered


def expand(first: Ints, last: Ints) -> tuple[Ints, Ints]:
    """The half-open ranges `[first[i], last[i])` one after another, none of them negative.

    Returns:
        owner: [total], the `i` of each element.
        value: [total], the element. `expand([3, 7], [5, 8])` is `[0, 0, 1], [3, 4, 7]`.
    """
    counts = last - first
    if np.count_nonzero(counts == 1) == len(counts):  # steps of decoding fill or begin one block here and there
        return np.arange(len(counts)), first
    owner = np.repeat(np.arange(len(counts)), counts)
    ends = counts.cumsum()
    value = np.arange(len(owner)) + (first - ends + counts)[owner]
    return owner, value
