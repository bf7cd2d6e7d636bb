"""Tokens a second in the same KV memory: paged, against places, against batches, against Hugging Face Transformers.

    python benchmarks/serving_throughput.py                      six minutes; the peers need pip install transformers
    python benchmarks/serving_throughput.py --ways paged swap    some of the ways; the others' figures are kept
    python benchmarks/serving_throughput.py --device cuda --dtype bfloat16 --requests 512 --seconds 25

Tables, JSON and a plot go to `benchmarks/results/serving/throughput.*`. See serving_trace.py for the trace and the
ways, serving_peers.py for the peers. Written tokens that were asked for count, over the whole trace or as much of it as
comes in `--seconds`; all is greedy. On a GPU, our ways run their steps as CUDA graphs (`--eager`: they do not).
"""

import json
import math
import traceback
from pathlib import Path
from typing import Any

import serving_peers
import torch
from serving_report import BLUE, GREY, machine, panels, parser, publish, table
from serving_trace import Memory, serve, trace

from torch_paged.serving import Request

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
RATES = {"tokens_per_second": "tokens/s", "tokens_per_second_loaded": "tokens/s, loaded"}
CPU_RATES = {"tokens_per_cpu_second": "tokens/CPU s"}  # others may use the machine too
DEFAULT = ("paged", "swap", "slots", "batches", *PEERS)


def measure(file: Path, ways: list[str], count: int, memory: Memory, seconds: float) -> dict[str, Any]:
    """What `file` has of the same trace and machine, with these ways measured anew."""
    requests = trace(count)
    about = dict(
        requests=count,
        written=sum(request.max_new_tokens for request in requests),
        memory=f"{memory.places} x {memory.most_tokens}",
        steps="as CUDA graphs" if memory.graphs else "eager",
        dtype=str(memory.dtype).removeprefix("torch."),
        machine=machine(memory.device),
    )
    before = json.loads(file.read_text()) if file.exists() else {}
    results = before["ways"] if before.get("about") == about else {}
    why_not = serving_peers.available()
    serve(memory._replace(graphs=False), requests[: memory.places], "paged", seconds=10)  # what is set up once
    for way in ways:
        print(f"{way}: at most {seconds:.0f} s", flush=True)
        if way in OURS:
            results[way] = serve(memory, requests, seconds=seconds, **OURS[way][1]).figures
        elif why_not is None:
            results[way] = peer(memory, requests, seconds, PEERS[way][1])
        else:
            results[way] = dict(absent=why_not)
        print(results[way], flush=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(dict(about=about, ways=results)))  # in case that it is stopped
    return dict(about=about, ways=results)


def peer(memory: Memory, requests: list[Request], seconds: float, options: dict[str, Any]) -> dict[str, Any]:
    try:
        return serving_peers.timed(memory=memory, requests=requests, seconds=seconds, **options) | dict(
            version=serving_peers.version()
        )
    except Exception as error:  # of a peer, on a device that it may not know: the others' figures count all the same
        traceback.print_exc()
        return dict(absent=repr(error).splitlines()[0])


def names(measured: dict[str, Any]) -> dict[str, str]:
    return {way: name for way, (name, _) in (OURS | PEERS).items() if way in measured["ways"]}


def text(measured: dict[str, Any]) -> str:
    about, ways = measured["about"], measured["ways"]
    rates = rates_of(about)
    rows = []
    for way, name in names(measured).items():
        seen = ways[way]
        if "absent" in seen:
            rows.append([name, f"absent: {seen['absent']}", *[""] * (2 * len(rates) + 1)])
            continue
        notes = [seen["version"]] if "version" in seen else []
        if not seen["whole"]:
            notes.append(f"stopped after {seen['tokens']} tokens")
        row = [f"{name} ({', '.join(notes)})" if notes else name]
        row += [cell for rate in rates for cell in against(ways, way, rate)]
        if way in OURS:
            row += [f"{seen['sequences']:.1f}", f"{seen['live']:.1%}"]
        rows.append(row + ["not seen"] * (2 * len(rates) + 3 - len(row)))
    head = ["", *(cell for name in rates.values() for cell in (name, "paged is")), "sequences", "memory live"]
    return "\n\n".join(
        [
            "# Tokens a second in the same KV memory",
            f"`{command(about)}`. {about['requests']} requests that write {about['written']} "
            f"tokens, KV memory of {about['memory']} tokens, the demo model in {about['dtype']}, greedy, our steps "
            f"{about['steps']}; {about['machine']}.",
            table(head, rows),
            "Sequences and shares are means over the steps in which requests waited. Loaded: until nobody waits for "
            "the first time; after that the last long sequences write alone, in any memory. CPU seconds are those of "
            "all threads together. Some ways were stopped before the end, and what they wrote by then counts."
            + of_peers(ways, about),
        ]
    )


def rates_of(about: dict[str, Any]) -> dict[str, str]:
    return CPU_RATES if "CPU threads" in about["machine"] else RATES


def command(about: dict[str, Any]) -> str:
    words = ["python benchmarks/serving_throughput.py --requests", about["requests"], "--dtype", about["dtype"]]
    if rates_of(about) == RATES:
        words += ["--device cuda", *["--eager"] * (about["steps"] == "eager")]
    return " ".join(map(str, words))


def of_peers(ways: dict[str, Any], about: dict[str, Any]) -> str:
    text = ""
    if ways.keys() & PEERS.keys() and rates_of(about) == RATES:
        text += " C and D attend without cuDNN's kernels: with them, C wrote 57 tokens/s on an H100."
    of_d = ways.get("continuous", {})
    if of_d.get("whole") is False:
        rate, name = next(iter(rates_of(about).items()))
        most = of_d[rate] * about["written"] / of_d["tokens"]
        text += (
            " Of D counts what belongs to requests that came to their ends; if all others were as good as written "
            f"when it was stopped, it would stand at {most:.0f} {name}."
        )
    return text


def against(ways: dict[str, Any], way: str, rate: str) -> list[str]:
    """A rate, and how many times as much the paged cache reaches."""
    value, ours = (ways.get(name, {}).get(rate, math.nan) for name in (way, "paged"))
    return ["not seen"] * 2 if math.isnan(value) else [f"{value:.0f}", f"{ours / value:.2f}x"]


def draw(measured: dict[str, Any]) -> Any:
    about = measured["about"]
    rate, rate_name = next(iter(rates_of(about).items()))
    figure, (axis,) = panels(
        f"{rate_name}, KV memory of {about['memory']} tokens, {about['dtype']}\n{about['machine']}", width=8
    )
    ways = {way: name for way, name in names(measured).items() if "absent" not in measured["ways"][way]}
    values = [measured["ways"][way][rate] for way in ways]
    axis.barh(list(ways.values()), values, color=[BLUE if name.startswith("paged") else GREY for name in ways.values()])
    for place, value in enumerate(values):
        axis.text(value, place, f" {value:.0f}", va="center", fontsize=8)
    axis.invert_yaxis()
    axis.grid(visible=False)
    return figure


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--ways", nargs="+", choices=[*OURS, *PEERS], default=DEFAULT)
    arguments.add_argument("--requests", default=192, type=int)
    arguments.add_argument("--seconds", default=60.0, type=float, help="for each way, at most; on a CPU, of its time")
    arguments.add_argument("--places", default=8, type=int, help="KV memory, in sequences of the most tokens")
    arguments.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--eager", action="store_true", help="no CUDA graphs")
    arguments.add_argument("--name", default="throughput", help="of the results")
    args = arguments.parse_args()
    graphs = args.device != "cpu" and not args.eager
    memory = Memory(args.places, dtype=getattr(torch, args.dtype), device=args.device, graphs=graphs)
    measured = None
    if not args.redraw:
        measured = measure(args.out / f"{args.name}.json", args.ways, args.requests, memory, args.seconds)
    publish(args.name, args.out, measured, text, draw)


if __name__ == "__main__":
    main()
