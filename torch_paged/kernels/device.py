"""Properties of the devices that kernels are launched on."""

import functools

import torch

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
