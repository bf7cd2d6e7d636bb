"""Launches, with a stand-in for Triton's kernels: what is refused under capture, and what a repeated call skips.

And what the copy engine is told of caches.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from torch_paged.kernels.hopper_launch import HopperLauncher
from torch_paged.kernels.launch import Launcher, Plans, launch
from torch_paged.kernels.launch_config import attention_launches
from torch_paged.kernels.problem import Device, Problem


class Kernel:
    """Counts launches through Triton's search and those of what it compiled."""

    def __init__(self, loaded):
        self.searched = []
        self.direct = []
        self.compiled = Compiled(self, loaded)

    def warmup(self, *_, **__):
        return self.compiled

    def __getitem__(self, grid):
        def run(*args, **constants):
            self.searched.append((grid, args, constants))
            return self.compiled

        return run


class Compiled(SimpleNamespace):
    def __init__(self, kernel, loaded):
        super().__init__(kernel=kernel, module=1 if loaded else None)

    def __getitem__(self, grid):
        return lambda *args: self.kernel.direct.append((grid, args))


def test_cold_kernel_is_refused_under_capture(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    cold, warm = Kernel(loaded=False), Kernel(loaded=True)
    with pytest.raises(RuntimeError, match="call the operator with tensors of these dtypes and shapes once before"):
        launch(cold, (1, 1, 1), 5)
    assert cold.searched == []
    launch(warm, (1, 1, 1), 5)
    assert len(warm.searched) == 1


def test_repeated_launches_pass_constants_in_order_and_search_once(monkeypatch):
    monkeypatch.setattr("torch_paged.kernels.launch._KNOWN_RELEASES", ())  # as in other releases of Triton
    kernel = Kernel(loaded=True)
    launcher = Launcher(kernel, (7, 2, 1), dict(WIDTH=16, ROWS=4), dict(num_warps=4))
    for argument in (5, 6, 7):
        launcher(argument)
    assert kernel.searched == [((7, 2, 1), (5,), dict(WIDTH=16, ROWS=4, num_warps=4))]
    assert kernel.direct == [((7, 2, 1), (6, 16, 4)), ((7, 2, 1), (7, 16, 4))]


def test_a_loaded_kernel_runs_without_what_its_launcher_looks_up_but_with_the_hooks_of_profilers(monkeypatch):
    enter, leave = SimpleNamespace(calls=[]), SimpleNamespace(calls=[])
    monkeypatch.setattr(
        "torch_paged.kernels.launch.knobs",
        SimpleNamespace(runtime=SimpleNamespace(launch_enter_hook=enter, launch_exit_hook=leave)),
    )
    active = SimpleNamespace(get_current_stream=lambda device: 100 + device, get_current_device=lambda: 3)
    monkeypatch.setattr("torch_paged.kernels.launch.driver", SimpleNamespace(active=active))
    monkeypatch.setattr("torch_paged.kernels.launch._KNOWN_RELEASES", ("",))
    kernel, ran = Kernel(loaded=True), []
    vars(kernel.compiled).update(run=lambda *args: ran.append(args), function=11, packed_metadata=(4,))
    launcher = Launcher(kernel, (7, 2, 1), dict(WIDTH=16), {})
    launcher(5)
    launcher(6)
    assert ran == [(7, 2, 1, 103, 11, (4,), None, None, None, 6, 16)]
    leave.calls.append(print)
    launcher(7)
    assert len(ran) == 1 and kernel.direct == [((7, 2, 1), (7, 16))]


def test_what_is_not_on_a_device_is_searched_for_again():
    kernel = Kernel(loaded=False)
    launcher = Launcher(kernel, (1, 1, 1), {}, {})
    launcher(5)
    launcher(6)
    assert len(kernel.searched) == 2
    assert kernel.direct == []


def test_plans_are_bounded(monkeypatch):
    monkeypatch.setattr("torch_paged.kernels.launch._MAX_PLANS", 3)
    plans = Plans()
    for number in range(10):
        assert plans.remember((number,), number) == number
        assert plans[(number,)] == number
        assert len(plans) <= 3


def test_a_loaded_kernel_is_launched_by_the_c_function_which_takes_addresses(monkeypatch):
    nvidia = pytest.importorskip("triton.backends.nvidia.driver")
    active = SimpleNamespace(get_current_stream=lambda device: 100 + device, get_current_device=lambda: 3)
    monkeypatch.setattr("torch_paged.kernels.launch.driver", SimpleNamespace(active=active))
    monkeypatch.setattr("torch_paged.kernels.launch._KNOWN_RELEASES", ("",))

    def launches(scratch):
        ran = []
        run = nvidia.CudaLauncher.__new__(nvidia.CudaLauncher)
        vars(run).update(launch_cooperative_grid=0, launch_pdl=1, global_scratch_size=scratch, profile_scratch_size=0)
        vars(run).update(launch=lambda *args: ran.append(args))
        kernel = Kernel(loaded=True)
        vars(kernel.compiled).update(run=run, function=11, packed_metadata=(4,))
        launcher = Launcher(kernel, (7, 2, 1), dict(WIDTH=16), {})
        assert not launcher.ready
        launcher(torch.zeros(1))
        assert launcher.ready
        return launcher, ran

    launcher, ran = launches(scratch=0)
    launcher(4096)
    assert ran == [(7, 2, 1, 103, 11, 0, 1, None, None, (4,), None, None, None, 4096, 16)]
    launcher, _ = launches(scratch=8)  # which Triton has to allocate
    assert launcher._direct.run is launcher._kernel.compiled.run


MEMORY = torch.zeros(100_000, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("strides", "blocks", "steps"),
    [
        ((12288, 256, 128, 1), 5, [12288, 4096, 256, 128, 1]),
        ((12288, 128, 6144, 1), 5, [12288, 2048, 128, 6144, 1]),
        ((24576, 512, 256, 1), 2, [24576, 8192, 512, 256, 1]),
        ((12288, 256, 128, 1), 1, [8, 4096, 256, 128, 1]),
    ],
    ids=["token-major", "head-major", "keys-beside-values", "one-block"],
)
def test_blocks_of_several_copies_have_a_dimension_for_them(strides, blocks, steps):
    problem = Problem(4096, 1, 8, 2, 128, 128, 48, itemsize=2, causal=True, ragged=False)
    (launch,) = attention_launches(problem, Device(132, 228 * 1024, 90))
    found = HopperLauncher(launch)._map(MEMORY.as_strided((blocks, 48, 2, 128), strides))
    assert (found.shape, found.strides, found.block_shape) == ([blocks, 3, 16, 2, 128], steps, [1, 1, 16, 1, 64])
    whole = attention_launches(replace(problem, block_size=16), Device(132, 228 * 1024, 90))[0]
    found = HopperLauncher(whole)._map(MEMORY[:20480].view(5, 16, 2, 128))
    assert (found.shape, found.block_shape) == ([5, 16, 2, 128], [1, 16, 1, 64])
    found = HopperLauncher(whole)._map(MEMORY[:6400].view(5, 16, 2, 40))  # past whose rows there are zeros
    assert (found.shape, found.block_shape) == ([5, 16, 2, 40], [1, 16, 1, 64])
