"""What the serving benchmarks leave behind: NAME.json as measured, and from it NAME.md and NAME.png."""

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results" / "serving"
BLUE, ORANGE, GREY, GREEN, LINE = "#2a6f97", "#bc6c25", "#8d99ae", "#588157", "#d9d9d9"


def parser(description: str) -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(description=description.splitlines()[0])
    arguments.add_argument("--out", default=RESULTS, type=Path, help="folder of the results")
    arguments.add_argument("--redraw", action="store_true", help="tables and plots of what was measured before")
    return arguments


def machine(device: str = "cpu") -> str:
    threads = f"{torch.get_num_threads()} CPU threads"
    where = threads if device == "cpu" else torch.cuda.get_device_name(device)
    return f"{where}, PyTorch {torch.__version__}, Python {platform.python_version()}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def publish(
    name: str,
    out: Path,
    measured: dict[str, Any] | None,
    text: Callable[[dict[str, Any]], str],
    draw: Callable[[dict[str, Any]], Any],
) -> None:
    """Write what was measured (None: it stands there already), then its tables and its plot."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{name}.json"
    if measured is not None:
        file.write_text(json.dumps(measured, indent=1) + "\n")
    measured = json.loads(file.read_text())
    (out / f"{name}.md").write_text(text(measured).strip() + "\n")
    print(text(measured))
    try:
        import matplotlib
    except ImportError:
        print(f'no plot without matplotlib: pip install -c constraints.txt -e ".[bench]", then {name} --redraw')
        return
    matplotlib.use("Agg")
    draw(measured).savefig(out / f"{name}.png", dpi=130, bbox_inches="tight")


def panels(*titles: str, width: float = 5.2, height: float = 3.6) -> tuple[Any, Any]:
    """A figure with a plot for each title, side by side."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(titles), figsize=(width * len(titles), height), squeeze=False, layout="tight")
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.grid(axis="y", color=LINE)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]
