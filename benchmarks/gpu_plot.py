"""Draws what `gpu_attention.py --output FILE` measured: `python benchmarks/gpu_plot.py FILE --output FILE.png`."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

OURS, PEER, LINE = "#2a6f97", "#bc6c25", "#d9d9d9"
ALONE = "without a schedule"


def panel(
    axes: Any,
    bars: dict[str, float],
    peers: dict[str, dict[str, float]],
    marks: dict[str, Any],
    unit: str,
    ceiling: float,
) -> None:
    """Our figure as a bar, the peers' as marks, the device's ceiling as a line."""
    names = list(bars)[::-1]
    axes.barh(names, [bars[name] for name in names], color=OURS, height=0.7, label="torch_paged")
    for peer, marker in marks.items():
        seen = [(each[peer], name) for name, each in peers.items() if peer in each and name in bars]
        if seen:
            color = "white" if peer == ALONE else PEER
            axes.scatter(*zip(*seen, strict=True), color=color, marker=marker, zorder=3, label=peer)
    axes.axvline(ceiling, color="black", linewidth=1, linestyle=":", label="measured ceiling")
    for name in names:
        axes.text(0, name, f" {bars[name]:.0f}", va="center", fontsize=8, color="white")
    axes.set_xlabel(unit)
    axes.grid(axis="x", color=LINE)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def draw(report: dict[str, Any]) -> Any:
    cases, ceilings = report["cases"], report["ceilings"]
    compute = [name for name in cases if "prefill" in name or "chunk" in name]
    memory = [name for name in cases if name not in compute]
    beside = {name: {ALONE: case.get(ALONE, {}), **case.get("peers", {})} for name, case in cases.items()}
    names = sorted({peer for each in beside.values() for peer in each} - {ALONE})
    marks = {ALONE: "|", **{peer: f"${chr(ord('a') + number)}$" for number, peer in enumerate(names)}}
    height = 4.4 + 0.3 * len(cases)
    panels = (
        (memory, "gb_s", "GB/s of keys and values", ceilings["read_gb_s"]),
        (compute, "tflop_s", "TFLOP/s of unmasked pairs", ceilings["bf16_tflop_s"]),
    )
    measured = [each for each in panels if each[0]]
    ratios = [max(len(names), 3) for names, *_ in measured]
    figure, grid = plt.subplots(len(measured), 1, figsize=(9, height), height_ratios=ratios, squeeze=False)
    axes = grid[:, 0]
    for part, (names, key, unit, ceiling) in zip(axes, measured, strict=True):
        peers = {name: {peer: each[key] for peer, each in beside[name].items() if key in each} for name in names}
        panel(part, {name: cases[name][key] for name in names}, peers, marks, unit, ceiling)
    labelled = {label: handle for part in axes for handle, label in zip(*part.get_legend_handles_labels(), strict=True)}
    legend = figure.legend(labelled.values(), labelled, loc="lower center", ncols=3, fontsize=8, facecolor=LINE)
    legend.set_zorder(5)
    figure.suptitle(
        f"Attention on one {report['device']}: PyTorch {report['torch']}, Triton {report['triton']}, {report['date']}"
    )
    figure.tight_layout(rect=(0, 1 / height, 1, 1))
    return figure


def main(about: str | None, draw: Callable[[dict[str, Any]], Any]) -> None:
    """Saves what `draw` makes of the report that the command line names."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("report", type=Path)
    parser.add_argument("--output", type=Path, help="default: the report's name with .png")
    options = parser.parse_args()
    output = options.output or options.report.with_suffix(".png")
    draw(json.loads(options.report.read_text())).savefig(output, dpi=110)
    print(f"wrote {output}")


if __name__ == "__main__":
    main(__doc__, draw)
