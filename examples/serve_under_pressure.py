"""Many requests in too little memory, with a live table: `python examples/serve_under_pressure.py --policy recompute`.

`wait` lets a request in when all that it may come to need is there. `recompute` and `swap` let it in when its prompt
fits; when blocks run out, the least urgent sample gives way, and is read again or brought back later. Whatever happens,
every request that has room in the cache writes what it would write alone.
"""

import argparse
import random
import sys

from demo import build, decode
from terminal import positive
from torch_paged.serving import Engine, Request

STARTS = ["def main(", "import ", "class Error(", "for line in ", "if __name__ == ", "    return self.", "# Copyright "]


def table(engine: Engine, cache, step: int, done: int) -> str:
    load = engine.load
    used = cache.num_blocks - cache.num_free_blocks
    bar = "#" * round(20 * used / cache.num_blocks)
    return (
        f"{step:5}  {load.running:7}  {load.waiting:7}  {load.swapped:7}  {load.preemptions:8}  {done:4}  [{bar:.<20}]"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", default="recompute", choices=["wait", "recompute", "swap"])
    parser.add_argument("--requests", default=40, type=positive)
    parser.add_argument("--blocks", default=48, type=positive, help="of 16 tokens")
    parser.add_argument("--seed", default=0, type=int)
    args = parser.parse_args()

    cache, model = build(num_blocks=args.blocks, max_seqs=32)
    engine = Engine(cache, model, decode=decode, policy=args.policy, token_budget=128)
    rng = random.Random(args.seed)
    generations = [
        engine.submit(
            Request(
                prompt=list((rng.choice(STARTS) * rng.randint(1, 8)).encode()),
                max_new_tokens=rng.randint(8, 120),
                priority=rng.choice([0, 0, 0, 1]),
            )
        )
        for _ in range(args.requests)
    ]
    live = sys.stdout.isatty()
    print(" step  running  waiting  swapped  gave way  done  blocks in use")
    step = 0
    while engine.step():
        step += 1
        if live or step % 20 == 0:
            done = sum(generation.finished for generation in generations)
            print(table(engine, cache, step, done), end="\r" if live else "\n", flush=True)
    written = sum(len(sample.written) for generation in generations for sample in generation.samples)
    print(f"{table(engine, cache, step, len(generations))}\n{written} tokens written in {step} steps")
    assert cache.num_free_blocks == cache.num_blocks  # nothing leaked
    errors = [generation.error for generation in generations if generation.error is not None]
    if errors:
        raise SystemExit(f"{len(errors)} of {args.requests} requests could not be served, one because {errors[0]}")


if __name__ == "__main__":
    main()
