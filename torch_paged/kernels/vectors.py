"""Width of the widest memory access that a set of strides and sizes allows."""

import math
from collections.abc import Iterable

from torch import Tensor

VECTOR_BYTES = 16


def vector_width(itemsize: int, numbers: Iterable[int]) -> int:
    """Elements of `itemsize` bytes in one access: 16 bytes, or less where a number is no multiple of that."""
    return math.gcd(max(VECTOR_BYTES // itemsize, 1), *numbers)


def effective_strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides of `tensor`, 0 along dimensions of size 1, where any stride is legal and would compile a kernel anew."""
    return tuple(0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
