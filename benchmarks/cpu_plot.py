"""Draws what `cpu_attention.py --output FILE` measured: `python benchmarks/cpu_plot.py FILE --output FILE.png`."""

from typing import Any

from gpu_plot import main, panel, plt

PEERS = ("paged, eager PyTorch", "SDPA, contiguous", "FlexAttention, compiled", "gather + SDPA")


def rates(report: dict[str, Any], amounts: dict[str, int]) -> dict[str, dict[str, float]]:
    """Case -> path -> amount a second, in 10^9."""
    return {
        case: {path: amount / each["ms"] / 1e6 for path, each in report["cases"][case].items()}
        for case, amount in amounts.items()
        if case != "append"
    }


def draw(report: dict[str, Any]) -> Any:
    parts = (
        (rates(report, report["bytes"]), "plain read", "GB/s of keys and values"),
        (rates(report, report["flops"]), "plain product", "GFLOP/s of unmasked pairs"),
    )
    figure, axes = plt.subplots(2, 1, figsize=(9, 5), height_ratios=[4, 1.5])
    for part, (cases, ceiling, unit) in zip(axes, parts, strict=True):
        bars = {case: each["paged"] for case, each in cases.items()}
        peers = {case: {peer: each[peer] for peer in PEERS if peer in each} for case, each in cases.items()}
        panel(part, bars, peers, unit, max(each[ceiling] for each in cases.values()))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=3, fontsize=8)
    made_on = report["machine"]
    figure.suptitle(
        f"Attention on {made_on['cpu']}, {made_on['threads']} threads: PyTorch {made_on['torch']}, {made_on['date']}"
    )
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    return figure


if __name__ == "__main__":
    main(__doc__, draw)
