"""Several continuations of one prompt that share its blocks: `python examples/parallel_sampling.py`.

The prompt is read once, then forked. Full blocks of it are kept once for all samples; the half-full last one is copied
when a sample first writes to it. The same seed gives the same texts, alone or beside other requests.
"""

import argparse

from demo import build, decode
from terminal import positive
from torch_paged.serving import Engine, Request, Sampling

PROMPT = '''class Stack:
    """A last-in, first-out container."""

    def __init__(self):
        self.items = []

    def pop(self):
'''


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", default=4, type=positive)
    parser.add_argument("--temperature", default=0.6, type=float)
    parser.add_argument("--seed", default=0, type=int)
    args = parser.parse_args()

    cache, model = build(num_blocks=128, max_seqs=args.samples)
    engine = Engine(cache, model, decode=decode)
    generation = engine.submit(
        Request(
            prompt=list(PROMPT.encode()),
            max_new_tokens=60,
            samples=args.samples,
            stop_strings=["\n\n"],
            sampling=Sampling(temperature=args.temperature, top_p=0.95, seed=args.seed),
        )
    )
    if generation.error is not None:
        raise SystemExit(f"not served: {generation.error}")
    fullest = cache.stats()
    while engine.step():
        fullest = max(fullest, cache.stats(), key=lambda stats: stats.tokens)

    print(PROMPT, end="")
    for sample in generation.samples:
        print(f"--- sample {sample.index}, {sample.finish_reason}\n{sample.text.text.rstrip()}")
    slots = fullest.blocks_used * cache.block_size
    print(f"\n{fullest.tokens} tokens of {args.samples} samples in {slots} slots")


if __name__ == "__main__":
    main()
