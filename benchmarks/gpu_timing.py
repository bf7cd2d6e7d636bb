"""Times on a GPU: medians over replays of a CUDA graph, and the device's own ceilings."""

import math
import random
import time
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from torch_paged.kernels.device import device_of

ROTATED_BYTES = 600 * 2**20  # of inputs: ten times an H200's L2 cache
LEAST_SECONDS = 5e-3  # of one replay


def header() -> dict[str, Any]:
    """What every report begins with."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def rotations(bytes_moved: int) -> int:
    """How many sets of inputs of so many bytes no cache can hold."""
    return max(2, min(50, math.ceil(ROTATED_BYTES / max(bytes_moved, 1))))


class Replay:
    """A CUDA graph of all `calls`, several times over: enough to outlast its own launch. On a CPU, the calls.

    `floor` is about the time of one call.
    """

    def __init__(self, calls: list[Callable[[], object]], floor: float = LEAST_SECONDS) -> None:
        self._calls, self._graph = calls, None
        if torch.cuda.is_available():
            self._calls = calls * max(1, math.ceil(min(50, LEAST_SECONDS / max(floor, 3e-6)) / len(calls)))
            self._graph = torch.cuda.CUDAGraph()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                calls[0]()
            torch.cuda.synchronize()
            with torch.cuda.graph(self._graph, stream=stream):
                self._run()

    def _run(self) -> None:
        for call in self._calls:
            call()

    def seconds(self) -> float:
        """Of one call."""
        if self._graph is None:
            begun = time.perf_counter()
            self._run()
            return (time.perf_counter() - begun) / len(self._calls)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self._graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / len(self._calls)


def in_turns(replays: dict[str, Replay], repeats: int = 20) -> dict[str, list[float]]:
    """Sorted seconds of one call of each, `repeats` times in turns, each time in a random order.

    How fast a device runs depends on what ran before: all share the same power limit.
    """
    times: dict[str, list[float]] = {name: [] for name in replays}
    for _ in range(3 + repeats if torch.cuda.is_available() else 1):
        for name in random.sample(list(replays), len(replays)):
            times[name].append(replays[name].seconds())
    return {name: sorted(found[-repeats:]) for name, found in times.items()}


def timed(calls: list[Callable[[], object]], repeats: int = 20, floor: float = LEAST_SECONDS) -> list[float]:
    """Sorted seconds of one call, `repeats` times: see `Replay`."""
    return in_turns({"": Replay(calls, floor)}, repeats)[""]


def summary(times: list[float]) -> dict[str, float]:
    """Median and 90th percentile of sorted seconds, in microseconds."""
    return {"us": times[len(times) // 2] * 1e6, "us_p90": times[int(0.9 * (len(times) - 1))] * 1e6}


@triton.jit
def _read(source, sink, count, CHUNK: tl.constexpr):
    total = tl.zeros([CHUNK], tl.int32)
    for first in tl.range(tl.program_id(0) * CHUNK, count, tl.num_programs(0) * CHUNK, num_stages=4):
        total += tl.load(source + first + tl.arange(0, CHUNK))
    tl.store(sink + tl.program_id(0), tl.sum(total))


def ceilings(device: torch.device, smoke: bool) -> dict[str, float]:
    """GB/s of a plain read and of a copy (read and written bytes), TFLOP/s of a large bf16 product of random data."""
    count, side = (2**13, 64) if smoke else (2**30, 8192)
    source = torch.randint(0, 9, (count,), dtype=torch.int32, device=device)
    copy, sink = torch.empty_like(source), torch.empty(2**14, dtype=torch.int32, device=device)
    programs = 8 * device_of(device).multiprocessors
    read = timed([lambda: _read[(programs,)](source, sink, count, CHUNK=4096, num_warps=8)], 10)[0]
    copied = timed([lambda: copy.copy_(source)], 10)[0]
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = summary(timed([lambda: torch.mm(a, b)], 10))["us"] * 1e-6
    return {
        "read_gb_s": 4 * count / read * 1e-9,
        "copy_gb_s": 8 * count / copied * 1e-9,
        "bf16_tflop_s": 2 * side**3 / product * 1e-12,
    }
