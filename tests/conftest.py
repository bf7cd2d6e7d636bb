"""Which tests this process can run: Triton is interpreted or compiled, never both in one process."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait by spinning keep other processes from working

import pytest
import torch

from torch_paged import cache as cache_module
from torch_paged import ops, staging
from torch_paged.cpu.choice import EAGER, NATIVE

# What their asserts compare is shown, as in tests.
pytest.register_assert_rewrite("cache_twins", "dealt_pieces", "memory_machine", "memory_model", "serving_fakes")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Where an operator runs, and for CPU tensors which package runs it.
DEVICES = [
    pytest.param(("cpu", NATIVE), id="native"),
    pytest.param(("cpu", EAGER), id="eager"),
    pytest.param(("cpu", "torch_paged.kernels"), id="interpreter", marks=pytest.mark.interpreter),
    pytest.param(("cuda", None), id="cuda", marks=pytest.mark.gpu),
]


def pytest_collection_modifyitems(config, items):
    """Deselect what cannot run here; `-m gpu` without a GPU is left with nothing, which pytest calls a failure."""
    here = [item for item in items if _can_run(item)]
    config.hook.pytest_deselected(items=[item for item in items if not _can_run(item)])
    items[:] = sorted(here, key=lambda item: hasattr(item.module, "begin"))


def pytest_collection_finish(session):
    """Work that takes minutes in processes of its own is begun here; the tests that ask for it are the last."""
    if not session.config.option.collectonly:
        for module in dict.fromkeys(item.module for item in session.items):
            if hasattr(module, "begin"):
                module.begin(session)


def _can_run(item):
    if "gpu" in item.keywords:
        return torch.cuda.is_available() and not INTERPRETED
    return ("interpreter" in item.keywords) == INTERPRETED


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request):
    """The device of what is built on the operators, whoever implements them there."""
    return request.param


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    """Where an operator runs: either CPU implementation, its Triton kernel interpreted, its Triton kernel on a GPU."""
    device, package = request.param
    if package == EAGER:
        monkeypatch.setattr(ops, "_cpu_package", lambda: EAGER)
    elif package == NATIVE and ops._cpu_package() != NATIVE:
        pytest.skip("no native kernels here: no C++ compiler, or TORCH_PAGED_CPU=eager")
    return device


@pytest.fixture(params=["in-place", "upload"])
def either_way(request, monkeypatch):
    """Written straight into host tensors, and sent through a buffer as to a GPU."""
    if request.param == "upload":
        monkeypatch.setattr(
            cache_module, "Staging", lambda *args, **options: staging.Staging(*args, **(options | {"in_place": False}))
        )
