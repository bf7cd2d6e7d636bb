"""KV memory saved by sharing: samples of one prompt, beams, and a system prompt common to several requests.

    python benchmarks/serving_sharing.py --out benchmarks/results/serving_sharing.md

Peak of the blocks in use, beside the blocks that the same sequences take when each keeps all of its own.
"""

import argparse
import sys
from pathlib import Path

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

    def row(self, name: str) -> str:
        return f"| {name} | {self.shared} | {self.alone} | {1 - self.shared / self.alone:.0%} |"


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    lines = [
        f"The demo model, a prompt of {len(PROMPT)} tokens, {NEW_TOKENS} new ones, blocks of 16 tokens.",
        "",
        "| | most blocks in use | each alone | saved |",
        "|---|---|---|---|",
    ]
    for count in (2, 4, 8):
        lines.append(samples(count).row(f"{count} samples"))
    for count in (2, 4, 8):
        lines.append(beams(count).row(f"{count} beams"))
    for count in (2, 4, 8):
        lines.append(system_prompt(count).row(f"{count} requests with one system prompt"))
    print("\n".join(lines))
    if args.out:
        args.out.parent.mkdir(exist_ok=True)
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
