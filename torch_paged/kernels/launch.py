"""Launches of Triton kernels: refused where a CUDA graph could not be captured, and cheap where they repeat."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver

_MAX_PLANS = 4096
_KNOWN_RELEASES = ("3.6.",)  # of Triton, whose compiled kernels are launched as `_direct` does it
Plan = TypeVar("Plan")
Grid = tuple[int, int, int]


def launch(kernel: Any, grid: Grid, *args: Any, **constants: Any) -> Any:
    """`kernel[grid](*args, **constants)`: the compiled kernel, or None where it is interpreted.

    Raises:
        RuntimeError: the kernel is not on the device yet, and CUDA graph capture forbids to load it.
    """
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        compiled = kernel.warmup(*args, grid=grid, **constants)
        if compiled.module is None:  # a failed attempt to load would leave it unusable for good
            raise RuntimeError(
                "the first call of an operator loads its kernel, which CUDA graph capture forbids: call the operator "
                "with tensors of these dtypes and shapes once before, or torch_paged.warmup"
            )
    return kernel[grid](*args, **constants)


class Plans(dict[tuple[Any, ...], Plan]):
    """What calls launch, by all that their tensors' metadata decide; everything is forgotten once there is too much."""

    def remember(self, metadata: tuple[Any, ...], plan: Plan) -> Plan:
        """Keeps `plan` and returns it."""
        if len(self) >= _MAX_PLANS:
            self.clear()
        self[metadata] = plan
        return plan


def layout(tensor: Tensor) -> tuple[Any, ...]:
    """What of a tensor decides how a kernel reads it."""
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr() % 16


class Launcher:
    """`launch` for calls that repeat: from the second on, Triton does not look for what it compiled.

    All calls of one launcher must be on one device and agree in what Triton compiles in: the arguments' dtypes, the
    alignment of tensors, which are None, and all of those ints that the kernel does not list as unspecialised.
    """

    def __init__(self, kernel: Any, grid: Grid, constants: dict[str, Any], options: dict[str, Any]) -> None:
        """`constants` are the last parameters of `kernel`, in their order; `options` are the compiler's."""
        self._kernel = kernel
        self._grid = grid
        self._constants = constants
        self._options = options
        self._loaded: Callable[..., None] | None = None

    def __call__(self, *args: Any) -> None:
        if self._loaded is not None:
            self._loaded(*args, *self._constants.values())
            return
        compiled = launch(self._kernel, self._grid, *args, **self._constants, **self._options)
        if getattr(compiled, "module", None) is not None:
            self._loaded = _direct(compiled, self._grid)


def _direct(compiled: Any, grid: Grid) -> Callable[..., None]:
    """`compiled[grid]` for the current device, which looks up less, and calls profilers' hooks where there are any."""
    looked_up = compiled[grid]
    if not triton.__version__.startswith(_KNOWN_RELEASES):
        return cast(Callable[..., None], looked_up)
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    stream_of, device = driver.active.get_current_stream, driver.active.get_current_device()

    def run_directly(*args: Any) -> None:
        if knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls:
            looked_up(*args)
        else:
            run(*grid, stream_of(device), function, metadata, None, None, None, *args)

    return run_directly
