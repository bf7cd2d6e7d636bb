"""Who implements the operators on CPU tensors: native kernels, or vectorised PyTorch where there are none."""

import importlib
import os
import warnings

NATIVE, EAGER = "torch_paged.cpu.native", "torch_paged.cpu"


def package() -> str:
    """`TORCH_PAGED_CPU` may be "native" or "eager"; otherwise native, and eager with a warning where that cannot be.

    Loads the native library, and builds it on the first call that this user ever makes.

    Raises:
        ValueError: another value.
        RuntimeError: "native", and the library can be neither found nor built.
    """
    wanted = os.environ.get("TORCH_PAGED_CPU", "")
    if wanted not in ("", "native", "eager"):
        raise ValueError(f"TORCH_PAGED_CPU must be native or eager, or not be set, got {wanted!r}")
    if wanted == "eager":
        return EAGER
    try:
        importlib.import_module(NATIVE)
    except (ImportError, OSError, RuntimeError) as error:
        if wanted == "native":
            raise RuntimeError(
                f"TORCH_PAGED_CPU=native, but the native CPU kernels cannot be loaded: {error}"
            ) from error
        warnings.warn(
            f"torch_paged has no native CPU kernels here, the slower PyTorch path runs instead: {error} "
            "(TORCH_PAGED_CPU=eager chooses it without this warning)",
            stacklevel=2,
        )
        return EAGER
    return NATIVE
