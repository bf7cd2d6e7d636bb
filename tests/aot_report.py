"""Figures of all attention kernels that are shipped, each beside the digest of what it was compiled from.

Tests take them from here. While the sources are those of the report nothing is compiled to know a launch's kernels.
After a change each launch is compiled as far as its first code, and to the end where that is not here: after a change
of the kernel, of its launch, of the target, of Triton or of what reads the figures. One kernel in 128 is compiled all
the same, another one every day.

    python tests/aot_report.py            rewrites the report, compiling what it lacks
    python tests/aot_report.py sm_90      ... of one target
    python tests/aot_report.py --all      ... compiling everything
"""

import csv
import functools
import os
import sys
from collections import defaultdict
from collections.abc import Hashable, Iterable
from datetime import date
from pathlib import Path
from typing import Any

import aot
import aot_calls as calls
import aot_sources
import triton

DIRECTORY = Path(__file__).parent / "aot_figures" / triton.__version__
PINNED = f"triton=={triton.__version__}" in (Path(__file__).parent.parent / "constraints.txt").read_text().split()
ONE_IN = 128


@functools.cache
def _rows(target: str, directory: Path) -> tuple[str, list[dict[str, str]]]:
    """The digest of the sources that the report of `target` is of, and its lines.

    A version of Triton may have no report, and one that lacks some of the figures is as good as none.
    """
    path = directory / f"{target}.csv"
    if not path.exists():
        return "", []
    with path.open(newline="") as file:
        sources, rows = next(file).removeprefix("sources ").strip(), csv.DictReader(file)
        complete = set(aot.Kernel._fields) - {"identity", "instructions"} <= set(rows.fieldnames or ())
        return (sources, list(rows)) if complete else ("", [])


@functools.cache
def read(target: str, directory: Path = DIRECTORY) -> dict[str, aot.Kernel]:
    """The kernels in the report of `target`, by digest."""
    return {row["ir"]: _kernel(row) for row in _rows(target, directory)[1]}


@functools.cache
def all_but_a_sample(target: str, directory: Path = DIRECTORY) -> dict[str, aot.Kernel]:
    """The kernels without those that are compiled today."""
    today = date.today().toordinal()
    return {ir: kernel for ir, kernel in read(target, directory).items() if (int(ir, 16) + today) % ONE_IN}


def is_current(target: str, directory: Path = DIRECTORY) -> bool:
    """Whether the report is of the sources as they are."""
    return _rows(target, directory)[0] == aot_sources.digest(target)


@functools.cache
def launched(target: str, directory: Path = DIRECTORY) -> dict[Hashable, list[aot.Kernel]]:
    """Kernels by the call that launches them; without calls of which one is compiled today, or of other sources."""
    if not is_current(target, directory):
        return {}
    names: dict[str, list[str]] = defaultdict(list)
    for row in _rows(target, directory)[1]:
        names[row["variant"]].append(row["ir"])
    known, shipped = all_but_a_sample(target, directory), calls.shipped(target)
    return {
        (calls.attention_launch, shipped[name]): [known[ir] for ir in irs]
        for name, irs in names.items()
        if known.keys() >= set(irs)
    }


def nothing(_target: str) -> dict[Any, Any]:
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


def write(target: str, sources: str, kernels: Iterable[tuple[str, aot.Kernel]], directory: Path = DIRECTORY) -> int:
    """Writes each variant's kernels in the order of their launches, and returns how many there are."""
    rows = [{"variant": variant, **figures(kernel)} for variant, kernel in kernels]
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / f"{target}.csv").open("w", newline="") as file:
        file.write(f"sources {sources}\n")
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return len({row["ir"] for row in rows})


def main() -> None:
    """Rewrites the report of the targets that are named, else of all."""
    sources = {target: aot_sources.digest(target) for target in aot.TARGETS}
    workers = aot.Workers(nothing if "--all" in sys.argv else read, nothing, os.cpu_count() or 2)
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
                write(target, "not all", [*kernels, *(("not seen yet", kernel) for kernel in read(target).values())])
        print(f"{target}: {len(variants)} variants, {write(target, sources[target], kernels)} kernels", flush=True)
    workers.shutdown()


if __name__ == "__main__":
    main()
