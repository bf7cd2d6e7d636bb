"""Times on a CPU: every path of a case in turn, round after round, so that a busy moment falls on all alike.

Each round has its own order: what a path leaves in the caches, and threads that fell asleep, fall on all alike too.
"""

import platform
import random
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

Paths = dict[str, Callable[[], Any]]


QUICK, REPEATS = 0.02, 5  # a path that takes less seconds is run so many times a round: it is more easily disturbed


def interleaved(
    paths: Paths, rounds: int, warmups: int = 2, before: Callable[[], Any] = lambda: None
) -> dict[str, dict[str, float]]:
    """Median and fastest milliseconds of every path; `before` each runs what is not measured."""
    entries: list[str] = []
    for name, call in paths.items():
        seconds = min(_seconds(call) for _ in range(warmups))
        entries += [name] * (REPEATS if seconds < QUICK else 1)
    times: dict[str, list[float]] = {name: [] for name in paths}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(entries, len(entries)):
            before()
            times[name].append(1e3 * _seconds(paths[name]))
    return {name: {"ms": statistics.median(each), "ms_min": min(each)} for name, each in times.items()}


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        model = {name.strip(): value.strip() for name, value in lines.items()}.get("model name", model)
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": str(date.today()),
    }
