"""Host work inside functions that are compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, at which torch.compile breaks the graph: it would trace NumPy, or fail at it.

    `torch.compiler.disable` does that for every call, and imports the tracer for it; this asks whether it is there.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_dynamo_compiling():
            result: R = torch.compiler.disable(function)(*args, **kwargs)
            return result
        return function(*args, **kwargs)

    return call
