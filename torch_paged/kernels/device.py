"""Properties of the devices that kernels are launched on, and memory there."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from torch_paged.kernels.problem import Device

# What the interpreter pretends to be: few programs, so that small tests divide their work unevenly among them.
INTERPRETED = Device(multiprocessors=3, shared_memory=64 * 1024, capability=80)


@functools.cache
def device_of(device: torch.device) -> Device:
    """Launch-relevant properties of `device`; of a small imaginary one for the CPU, where kernels are interpreted."""
    if device.type != "cuda":
        return INTERPRETED
    properties = torch.cuda.get_device_properties(device)
    return Device(
        multiprocessors=properties.multi_processor_count,
        shared_memory=getattr(properties, "shared_memory_per_multiprocessor", 64 * 1024),
        capability=10 * properties.major + properties.minor,
        amd=torch.version.hip is not None,
    )


@functools.cache
def empty_strided(device_type: str) -> Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]:
    """`torch.empty_strided` on the current device: in half the time, as Inductor's code does it, if there is that."""
    fast: Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor] | None
    guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
    fast = getattr(guards, f"_empty_strided_{device_type}", None)
    return fast or (lambda shape, stride, dtype: torch.empty_strided(shape, stride, dtype=dtype, device=device_type))
