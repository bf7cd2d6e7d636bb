"""Compares tensors with what an operator expects of them, and says what it expected and what came.

Sizes may be symbolic: relations between them go through `require`, never through `if`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Matcher:
    """Compares tensors with symbolic shapes: a dimension's name stands for the same size wherever it occurs."""

    __slots__ = ("device", "sizes")

    def __init__(self, first: Tensor | None) -> None:
        self.device = None if first is None else first.device
        self.sizes: dict[str, int] = {}

    def __call__(
        self,
        name: str,
        tensor: Tensor | None,
        dtypes: tuple[torch.dtype, ...],
        dims: tuple[str, ...],
        unit_last_stride: bool = False,
    ) -> None:
        if tensor is None or tensor.dtype not in dtypes:  # dispatchers let None through
            raise TypeError(f"{name} must be {_expected(dtypes, dims)}, got {form(tensor)}")
        shape = tensor.shape
        if len(shape) != len(dims):
            raise ValueError(f"{name} must be {_expected(dtypes, dims)}, got {form(tensor)}")
        if tensor.device != self.device:
            raise ValueError(f"{name} must be on {self.device} like the others, got {tensor.device}")
        for dim, size in zip(dims, shape, strict=True):
            known = self.sizes.setdefault(dim, size)
            if known is not size:
                require(
                    known == size,
                    lambda: f"{name} must be {_expected(dtypes, dims)} with {dim} = {known}, got {form(tensor)}",
                )
        if unit_last_stride:
            require(
                tensor.stride(-1) == 1,
                lambda: f"{name} must have a last stride of 1, got strides {list(tensor.stride())}",
            )


def require(condition: Any, message: Callable[[], str]) -> None:
    """Raise ValueError unless `condition`; a condition on symbolic sizes becomes an assertion of the graph."""
    if condition is not True:
        torch._check_value(condition, message)


def form(tensor: Tensor | None) -> str:
    """Its dtype and shape, as in `int32 [4, 8]`."""
    return "None" if tensor is None else f"{name_of(tensor.dtype)} {list(tensor.shape)}"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _expected(dtypes: tuple[torch.dtype, ...], dims: tuple[str, ...]) -> str:
    return f"{' or '.join(map(name_of, dtypes))} [{', '.join(dims)}]"
