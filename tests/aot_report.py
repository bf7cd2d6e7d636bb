"""Figures of all attention kernels that are shipped, each beside the digest of what it was compiled from.

Tests take them from here, and compile a kernel where what it would be compiled from is not here: after a change of the
kernel, of its launch, of the target, of Triton or of what reads the figures. One in 128 is compiled all the same,
another one every day.

    python tests/aot_report.py            rewrites the report, compiling what it lacks
    python tests/aot_report.py sm_90      ... of one target
    python tests/aot_report.py --all      ... compiling everything
"""

import csv
import functools
import os
import sys
from collections.abc import Iterable
from datetime import date
from pathlib import Path

import aot
import aot_calls as calls
import triton

DIRECTORY = Path(__file__).parent / "aot_figures" / triton.__version__
PINNED = f"triton=={triton.__version__}" in (Path(__file__).parent.parent / "constraints.txt").read_text().split()
ONE_IN = 128


@functools.cache
def read(target: str) -> dict[str, aot.Kernel]:
    """The report of `target`, by digest; empty for a version of Triton that has none."""
    path = DIRECTORY / f"{target}.csv"
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {row["ir"]: _kernel(row) for row in csv.DictReader(file)}


@functools.cache
def all_but_a_sample(target: str) -> dict[str, aot.Kernel]:
    """The report without those kernels that are compiled today."""
    today = date.today().toordinal()
    return {ir: kernel for ir, kernel in read(target).items() if (int(ir, 16) + today) % ONE_IN}


def nothing(_target: str) -> dict[str, aot.Kernel]:
    """What is known if everything shall be compiled."""
    return {}


def figures(kernel: aot.Kernel) -> dict[str, str]:
    """What a report says of a kernel."""
    own = {name: value for name, value in kernel._asdict().items() if name not in ("identity", "instructions")}
    return {name: str(value) for name, value in (own | kernel.instructions).items()}


def _kernel(row: dict[str, str]) -> aot.Kernel:
    numbers = {name: int(value) for name, value in row.items() if name not in ("variant", "name", "ir")}
    own = {name: numbers.pop(name) for name in aot.Kernel._fields if name in numbers}
    return aot.Kernel(name=row["name"], ir=row["ir"], identity="", instructions=numbers, **own)


def _write(target: str, kernels: Iterable[tuple[str, aot.Kernel]]) -> int:
    """Writes each kernel once, beside the first variant that needs it."""
    rows: dict[str, dict[str, str]] = {}
    for variant, kernel in kernels:
        rows.setdefault(kernel.ir, {"variant": variant, **figures(kernel)})
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    with (DIRECTORY / f"{target}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, next(iter(rows.values())), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows.values())
    return len(rows)


def main() -> None:
    """Rewrites the report of the targets that are named, else of all."""
    workers = aot.Workers(nothing if "--all" in sys.argv else read, os.cpu_count() or 2)
    jobs = {
        target: {name: workers.submit(target, calls.attention_launch, it) for name, it in calls.shipped(target).items()}
        for target in aot.TARGETS
        if target in sys.argv or not set(aot.TARGETS) & set(sys.argv)
    }
    for target, variants in jobs.items():
        kernels: list[tuple[str, aot.Kernel]] = []
        for number, (name, job) in enumerate(variants.items(), 1):
            kernels += [(name, kernel) for kernel in job.result()]
            if number % 12 == 0:  # what is interrupted goes on from here
                _write(target, [*kernels, *(("not seen yet", kernel) for kernel in read(target).values())])
        print(f"{target}: {len(variants)} variants, {_write(target, kernels)} kernels", flush=True)
    workers.shutdown()


if __name__ == "__main__":
    main()
