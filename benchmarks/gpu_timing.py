"""Times on a GPU: medians over replays of a CUDA graph, and the device's own ceilings."""

import math
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


def timed(calls: list[Callable[[], object]], repeats: int = 20, floor: float = LEAST_SECONDS) -> list[float]:
    """Seconds of one call, `repeats` times, sorted; each from a graph that makes all calls, several times over.

    `floor` is about the time of one call: enough calls are captured for a replay to outlast its own launch.
    """
    if not torch.cuda.is_available():
        start = time.perf_counter()
        for call in calls:
            call()
        return [(time.perf_counter() - start) / len(calls)]
    calls = calls * max(1, math.ceil(min(50, LEAST_SECONDS / max(floor, 3e-6)) / len(calls)))
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    times = []
    for repeat in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if repeat >= 3:
            times.append(start.elapsed_time(end) * 1e-3 / len(calls))
    return sorted(times)


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
