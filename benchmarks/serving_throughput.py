"""Tokens a second in the same KV memory: paged, against places, against batches, against Hugging Face Transformers.

    python benchmarks/serving_throughput.py                      five minutes; the peers need pip install transformers
    python benchmarks/serving_throughput.py --ways paged swap    some of the ways; the others' figures are kept

Tables, JSON and a plot go to `benchmarks/results/serving/throughput.*`. See serving_trace.py for the trace and the
ways, serving_peers.py for the peers. Written tokens that were asked for count, over the whole trace; the demo model
runs eagerly and greedily everywhere.
"""

import json
import math
from pathlib import Path
from typing import Any

import serving_peers
import torch
from serving_report import BLUE, GREY, machine, panels, parser, publish, table
from serving_trace import MOST_TOKENS, Memory, serve, trace

OURS = {
    "paged": ("paged, recompute", dict(way="paged", policy="recompute")),
    "swap": ("paged, swap", dict(way="paged", policy="swap")),
    "wait": ("paged, wait", dict(way="paged", policy="wait")),
    "slots": ("A: slots of the maximum length", dict(way="slots")),
    "batches": ("B: run-to-completion batches", dict(way="batches")),
}
PEERS = {
    "generate": ("C: Transformers, padded generate", dict(serve=serving_peers.generate)),
    "continuous": ("D: Transformers, continuous batching", dict(serve=serving_peers.continuous, page_size=16)),
}
RATES = {
    "tokens_per_second": "tokens/s",
    "tokens_per_second_loaded": "tokens/s, loaded",
    "tokens_per_cpu_second": "tokens/CPU s",
}
DEFAULT = ("paged", "swap", "slots", "batches", *PEERS)


def measure(file: Path, ways: list[str], count: int, memory: Memory) -> dict[str, Any]:
    """What `file` has of the same trace and machine, with these ways measured anew."""
    requests = trace(count)
    about = dict(
        requests=count,
        written=sum(request.max_new_tokens for request in requests),
        memory=f"{memory.places} x {memory.most_tokens}",
        dtype=str(memory.dtype).removeprefix("torch."),
        machine=machine(memory.device),
    )
    before = json.loads(file.read_text()) if file.exists() else {}
    results = before["ways"] if before.get("about") == about else {}
    why_not = serving_peers.available()
    serve(memory, trace(4), "paged")  # what is set up once
    for way in ways:
        if way in OURS:
            results[way] = serve(memory, requests, **OURS[way][1]).figures
        elif why_not is None:
            results[way] = serving_peers.timed(memory=memory, requests=requests, **PEERS[way][1])
            results[way]["version"] = serving_peers.version()
        else:
            results[way] = dict(absent=why_not)
        print(way, results[way], flush=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(dict(about=about, ways=results)))  # in case that it is stopped
    return dict(about=about, ways=results)


def names(measured: dict[str, Any]) -> dict[str, str]:
    return {way: name for way, (name, _) in (OURS | PEERS).items() if way in measured["ways"]}


def text(measured: dict[str, Any]) -> str:
    about, ways = measured["about"], measured["ways"]
    rows = []
    for way, name in names(measured).items():
        seen = ways[way]
        if "absent" in seen:
            rows.append([name, f"absent: {seen['absent']}", *[""] * 7])
            continue
        row = [f"{name} ({seen['version']})" if "version" in seen else name]
        row += [cell for rate in RATES for cell in against(ways, way, rate)]
        if way in OURS:
            row += [f"{seen['sequences']:.1f}", f"{seen['live']:.1%}"]
        rows.append(row + ["not seen"] * (9 - len(row)))
    head = ["", *(cell for name in RATES.values() for cell in (name, "paged is")), "sequences", "memory live"]
    return "\n\n".join(
        [
            "# Tokens a second in the same KV memory",
            f"`python benchmarks/serving_throughput.py`. {about['requests']} requests that write {about['written']} "
            f"tokens, KV memory of {about['memory']} tokens, the demo model in {about['dtype']}, greedy, eager; "
            f"{about['machine']}. Sequences and shares are means over the steps in which requests waited. Loaded: "
            "until nobody waits for the first time; after that the last long sequences write alone, in any memory. C "
            "gets more memory than the others: its padded prompts and outputs together can be longer than the places. "
            "Where others use the machine too, only the CPU seconds, of all threads together, say much.",
            table(head, rows),
        ]
    )


def against(ways: dict[str, Any], way: str, rate: str) -> list[str]:
    """A rate, and how many times as much the paged cache reaches."""
    value, ours = (ways.get(name, {}).get(rate, math.nan) for name in (way, "paged"))
    return ["not seen"] * 2 if math.isnan(value) else [f"{value:.0f}", f"{ours / value:.2f}x"]


def draw(measured: dict[str, Any]) -> Any:
    about = measured["about"]
    figure, (axis,) = panels(
        f"Tokens a second, KV memory of {about['memory']} tokens, {about['dtype']}\n{about['machine']}", width=8
    )
    ways = {way: name for way, name in names(measured).items() if "absent" not in measured["ways"][way]}
    values = [measured["ways"][way]["tokens_per_second"] for way in ways]
    axis.barh(list(ways.values()), values, color=[BLUE if name.startswith("paged") else GREY for name in ways.values()])
    for place, value in enumerate(values):
        axis.text(value, place, f" {value:.0f}", va="center", fontsize=8)
    axis.invert_yaxis()
    axis.grid(visible=False)
    return figure


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--ways", nargs="+", choices=[*OURS, *PEERS], default=DEFAULT)
    arguments.add_argument("--requests", default=96, type=int)
    arguments.add_argument("--places", default=8, type=int, help=f"KV memory, in sequences of {MOST_TOKENS} tokens")
    arguments.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--name", default="throughput", help="of the results")
    args = arguments.parse_args()
    memory = Memory(args.places, dtype=getattr(torch, args.dtype), device=args.device)
    measured = None
    if not args.redraw:
        measured = measure(args.out / f"{args.name}.json", args.ways, args.requests, memory)
    publish(args.name, args.out, measured, text, draw)


if __name__ == "__main__":
    main()
