"""KV memory saved by sharing: samples of one prompt, beams, and a system prompt common to several requests.

    python benchmarks/serving_sharing.py

Peak of the blocks in use, beside the blocks that the same sequences take when each keeps all of its own. Table, JSON
and a plot go to `benchmarks/results/serving/sharing.*`.
"""

import sys
from pathlib import Path
from typing import Any

from serving_report import BLUE, GREY, panels, parser, publish, table

from torch_paged.serving import Engine, Request, Sampling, beam_search

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from demo import build

PROMPT = list((b"class Stack:\n    def push(self, item):\n        self.items.append(item)\n\n" * 8)[:256])
NEW_TOKENS = 128


class Peak:
    """A model that notes the most blocks in use when it is called, and how many the sequences would take alone."""

    def __init__(self, num_seqs: int) -> None:
        self.cache, self.model = build(num_blocks=1024, max_seqs=num_seqs)
        self.shared = self.alone = 0

    def __call__(self, tokens, batch):
        self.shared = max(self.shared, self.cache.num_blocks - self.cache.num_free_blocks)
        blocks = (batch.seq_lens + self.cache.block_size - 1) // self.cache.block_size
        self.alone = max(self.alone, int(blocks.sum()))
        return self.model(tokens, batch)


def samples(count: int) -> Peak:
    peak = Peak(count)
    sampling = Sampling(temperature=1.0, seed=0)
    Engine(peak.cache, peak).run([Request(prompt=PROMPT, max_new_tokens=NEW_TOKENS, samples=count, sampling=sampling)])
    return peak


def beams(count: int) -> Peak:
    peak = Peak(count)
    beam_search(peak.cache, peak, PROMPT, num_beams=count, max_new_tokens=NEW_TOKENS)
    return peak


def system_prompt(count: int) -> Peak:
    peak = Peak(count)
    engine = Engine(peak.cache, peak)
    engine.run([Request(prompt=PROMPT, max_new_tokens=1)])
    sampling = Sampling(temperature=1.0)
    engine.run(
        [Request(prompt=[*PROMPT, number], max_new_tokens=NEW_TOKENS, sampling=sampling) for number in range(count)]
    )
    return peak


CASES = {"samples of a prompt": samples, "beams": beams, "requests with one system prompt": system_prompt}


def measure() -> dict[str, Any]:
    cases = {}
    for name, run in CASES.items():
        for count in (2, 4, 8):
            peak = run(count)
            cases[f"{count} {name}"] = dict(shared=peak.shared, alone=peak.alone)
    return dict(prompt=len(PROMPT), new_tokens=NEW_TOKENS, block_size=16, cases=cases)


def text(measured: dict[str, Any]) -> str:
    rows = [
        [name, f"{seen['shared']}", f"{seen['alone']}", f"{1 - seen['shared'] / seen['alone']:.0%}"]
        for name, seen in measured["cases"].items()
    ]
    return "\n\n".join(
        [
            "# Memory saved by sharing",
            f"`python benchmarks/serving_sharing.py`. The demo model, a prompt of {measured['prompt']} tokens, "
            f"{measured['new_tokens']} new ones, blocks of {measured['block_size']} tokens.",
            table(["", "most blocks in use", "each alone", "saved"], rows),
        ]
    )


def draw(measured: dict[str, Any]) -> Any:
    figure, (axis,) = panels("Most blocks in use, shared and each alone", width=8)
    names = list(measured["cases"])
    for offset, (way, color) in enumerate({"shared": BLUE, "alone": GREY}.items()):
        values = [measured["cases"][name][way] for name in names]
        axis.barh([i + 0.4 * offset - 0.2 for i in range(len(names))], values, height=0.38, color=color, label=way)
    for place, name in enumerate(names):
        seen = measured["cases"][name]
        axis.text(
            seen["shared"], place - 0.2, f" saves {1 - seen['shared'] / seen['alone']:.0%}", va="center", fontsize=8
        )
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.grid(visible=False)
    axis.legend(fontsize=8)
    return figure


def main() -> None:
    args = parser(__doc__).parse_args()
    publish("sharing", args.out, None if args.redraw else measure(), text, draw)


if __name__ == "__main__":
    main()
