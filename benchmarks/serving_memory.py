"""How full the KV memory is while requests wait, and how many sequences it holds: blocks against places.

    python benchmarks/serving_memory.py            two minutes; no model runs, as lengths alone decide

Tables, JSON and a plot go to `benchmarks/results/serving/memory.*`. See serving_trace.py for the trace and the ways.
"""

from typing import Any

from serving_report import BLUE, GREEN, GREY, ORANGE, panels, parser, publish, table
from serving_trace import MOST_TOKENS, WAYS, Memory, Run, serve, trace

POLICIES = ("recompute", "swap", "wait")
CASES = ((8, True), (8, False), (32, False))  # places, and whether prompt and output are cut each for itself
REQUESTS = 64  # for each place
POINTS = 400  # of a line in the plot


def measure() -> dict[str, Any]:
    cases: dict[str, Any] = {}
    lines: dict[str, Any] = {}
    for places, cut_each in CASES:
        memory = Memory(places, MOST_TOKENS * (1 + cut_each), model=False)
        served = trace(REQUESTS * places, cut_each)
        runs = {f"paged, {policy}": serve(memory, served, "paged", policy=policy) for policy in POLICIES}
        runs |= {way: serve(memory, served, way) for way in WAYS[1:]}
        cases[f"{places} x {memory.most_tokens}"] = dict(
            requests=len(served), ways={name: without_times(run) for name, run in runs.items()}
        )
        lines = lines or {name: line(run) for name, run in runs.items() if name != "paged, swap"}
    return dict(cases=cases, lines=lines)


def without_times(run: Run) -> dict[str, Any]:
    return {name: value for name, value in run.figures.items() if "second" not in name}


def line(run: Run) -> dict[str, list[float]]:
    """Step, and share of the memory that is live, thinned out."""
    stride = max(len(run.steps.live) // POINTS, 1)
    return dict(step=list(range(len(run.steps.live)))[::stride], live=[round(x, 4) for x in run.steps.live[::stride]])


def text(measured: dict[str, Any]) -> str:
    parts = [
        "# How full the memory is while requests wait",
        "`python benchmarks/serving_memory.py`. Blocks of 16 tokens. No model runs: lengths alone decide. Means over "
        "all steps in which requests waited, those in which an empty memory fills up included.",
    ]
    for name, case in measured["cases"].items():
        slots = case["ways"]["slots"]["sequences"]
        rows = [
            [
                way,
                f"{seen['live']:.1%}",
                f"{seen['filled']:.1%}",
                f"{seen['sequences']:.1f}",
                f"{seen['sequences'] / slots:.2f}x",
                f"{seen['gave_way']}",
                f"{seen['read_again']:.1%}",
            ]
            for way, seen in case["ways"].items()
        ]
        most = int(name.split()[-1])
        cut = "prompt and output together" if most == MOST_TOKENS else f"prompt and output {MOST_TOKENS} each"
        parts.append(f"## Memory of {name} tokens, {case['requests']} requests of at most {most}: {cut}")
        head = ["", "memory live", "held slots filled", "sequences", "against slots", "gave way", "read again"]
        parts.append(table(head, rows))
        ours = case["ways"]["paged, recompute"]
        tokens = int(name.split()[0]) * most
        parts.append(
            f"A held sequence has {ours['live'] * tokens / ours['sequences']:.0f} tokens on average, as the long ones "
            f"stay longest: without any waste there would be {ours['sequences'] / ours['live']:.1f} of them, "
            f"{ours['sequences'] / ours['live'] / slots:.2f}x the slots."
        )
    return "\n\n".join(parts)


def draw(measured: dict[str, Any]) -> Any:
    figure, (over_time, bars) = panels(
        f"Share of the memory that is live ({next(iter(measured['cases']))} tokens)",
        "Sequences held while requests wait",
    )
    colors = {"paged, recompute": BLUE, "paged, wait": GREEN, "slots": ORANGE, "batches": GREY}
    for name, points in measured["lines"].items():
        over_time.plot(points["step"], points["live"], color=colors[name], label=name, linewidth=1.2)
    over_time.set_ylim(0, 1)
    over_time.set_xlabel("step")
    over_time.legend(fontsize=8, loc="upper right")
    names = list(measured["cases"])
    for offset, (way, color) in enumerate({"paged, recompute": BLUE, "slots": ORANGE, "batches": GREY}.items()):
        values = [measured["cases"][name]["ways"][way]["sequences"] for name in names]
        places = [i + 0.27 * (offset - 1) for i in range(len(names))]
        bars.bar(places, values, width=0.25, color=color, label=way)
        for place, value in zip(places, values, strict=True):
            bars.text(place, value, f"{value:.0f}", ha="center", va="bottom", fontsize=8)
    bars.set_xticks(range(len(names)), [f"{name}\ntokens" for name in names], fontsize=8)
    bars.legend(fontsize=8)
    return figure


def main() -> None:
    args = parser(__doc__).parse_args()
    publish("memory", args.out, None if args.redraw else measure(), text, draw)


if __name__ == "__main__":
    main()
