"""Launches of Triton kernels: refused where a CUDA graph could not be captured, and cheap where they repeat."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITCallable

_MAX_PLANS = 4096
_KNOWN_RELEASES = ("3.6.",)  # of Triton, whose compiled kernels are launched as `direct` does it
Plan = TypeVar("Plan")
Grid = tuple[int, int, int]


def launch(kernel: Any, grid: Grid, *args: Any, **constants: Any) -> Any:
    """`kernel[grid](*args, **constants)`: the compiled kernel, or None where it is interpreted.

    Raises:
        RuntimeError: the kernel is not on the device yet, and CUDA graph capture forbids to load it.
    """
    settle_key(kernel)
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        compiled = kernel.warmup(*args, grid=grid, **constants)
        if compiled.module is None:  # a failed attempt to load would leave it unusable for good
            raise RuntimeError(
                "the first call of an operator loads its kernel, which CUDA graph capture forbids: call the operator "
                "with tensors of these dtypes and shapes once before, or torch_paged.warmup"
            )
    return kernel[grid](*args, **constants)


def settle_key(kernel: Any) -> None:
    """Has Triton compute what it finds a compiled `kernel` by, after that of all functions that it calls.

    Triton (3.6) lets the globals of a function count only if its own key is known by then. So keys would depend on
    which kernel was launched first, and the next process might not find what this one compiled.
    """
    if isinstance(kernel, JITCallable) and kernel.hash is None:
        for name in kernel.fn.__code__.co_names:
            settle_key(kernel.fn.__globals__.get(name))
        kernel.cache_key  # noqa: B018 - computed and kept


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


def addresses(tensors: Iterable[Tensor | None]) -> list[Any]:
    """Where `tensors` begin, to be launched with in their place: Triton would ask the driver about every tensor."""
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


class Launcher:
    """`launch` for calls that repeat: from the second on, Triton does not look for what it compiled.

    All calls of one launcher must be on one device and agree in what Triton compiles in: the arguments' dtypes, the
    alignment of tensors, which are None, and all of those ints that the kernel does not list as unspecialised.
    """

    ready = False  # once it is, addresses may stand for tensors, as nobody looks at more of them

    def __init__(self, kernel: Any, grid: Grid, constants: dict[str, Any], options: dict[str, Any]) -> None:
        """`constants` are the last parameters of `kernel`, in their order; `options` are the compiler's."""
        self._kernel = kernel
        self._grid = grid
        self._constants = constants
        self._options = options
        self._values = tuple(constants.values())
        self._loaded: Callable[..., None] | None = None
        self._direct: Direct | None = None

    def __call__(self, *args: Any) -> None:
        hooks = knobs.runtime
        if self._direct is None or hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:
            self._launch(*args)
        else:
            run, stream_of, device, known = self._direct
            run(*self._grid, stream_of(device), *known, *args, *self._values)

    def _launch(self, *args: Any) -> None:
        if self._loaded is not None:
            self._loaded(*args, *self._values)
            return
        compiled = launch(self._kernel, self._grid, *args, **self._constants, **self._options)
        if getattr(compiled, "module", None) is not None:
            self._loaded, self._direct = compiled[self._grid], direct(compiled)
            self.ready = self._direct is not None


class Direct(NamedTuple):
    """How `compiled[grid]` ends up launching: `run(*grid, stream_of(device), *known, *arguments)`."""

    run: Callable[..., None]
    stream_of: Callable[[int], int]
    device: int
    known: tuple[Any, ...]


def direct(compiled: Any) -> Direct | None:
    """The launch of `compiled` on the current device without lookups and hooks; None where Triton may differ."""
    if not triton.__version__.startswith(_KNOWN_RELEASES):
        return None
    from triton.backends.nvidia.driver import CudaLauncher

    run, function, metadata = compiled.run, compiled.function, (compiled.packed_metadata, None, None, None)
    stream_of, device = driver.active.get_current_stream, driver.active.get_current_device()
    if isinstance(run, CudaLauncher) and run.global_scratch_size == run.profile_scratch_size == 0:
        known = function, run.launch_cooperative_grid, run.launch_pdl, None, None, *metadata
        return Direct(run.launch, stream_of, device, known)
    return Direct(run, stream_of, device, (function, *metadata))
