"""Serving a trace in the same KV memory: paged, against contiguous slots and run-to-completion batches.

    python benchmarks/serving_trace.py --requests 192 --slots 8 --out benchmarks/results/serving_trace.md

Prompts and outputs have log-normal lengths (medians 160 and 220, sigma 1.0, fixed seed), cut so that no request has
more than 2048 tokens. All ways run the same model, kernels, scheduler and sampling; they differ in the cache alone:

    paged          blocks of 16 tokens, for each of the policies
    contiguous     one block of 2048 tokens a sequence: a slot of the maximum length, refilled when its sequence ends
    batches        the same slots, refilled when all sequences of a batch have ended

What is measured while requests wait: the share of the memory's slots that hold live tokens, the share of allocated ones
that do, and the sequences held. Throughput counts written tokens, over the whole trace.
"""

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from torch_paged import PagedKVCache
from torch_paged.serving import Engine, Request

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from demo import WEIGHTS
from model import Decoder, load

MOST_TOKENS = 2048
COLUMNS = "tokens/s | sequences | pool live | slots filled | gave way | read again | steps"


def trace(requests: int) -> list[Request]:
    rng = np.random.default_rng(0)
    prompts, outputs = (
        np.clip(rng.lognormal(np.log(median), 1.0, requests), 1, MOST_TOKENS - 1).astype(int) for median in (160, 220)
    )
    return [
        Request(
            prompt=rng.integers(1, 256, prompt).tolist(),
            max_new_tokens=min(int(output), MOST_TOKENS - int(prompt)),
            namespace=number,  # so that no prefix is found: this is about slots
        )
        for number, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))
    ]


class Result(NamedTuple):
    seconds: float
    written: int
    read: int
    steps: int
    preemptions: int
    held: list[int]  # sequences, of each step in which requests waited
    live: list[float]
    filled: list[float]

    def row(self, name: str, needed: int) -> str:
        held, live, filled = (statistics.fmean(values or [0]) for values in (self.held, self.live, self.filled))
        again = f"{self.read / needed - 1:.1%}"
        return (
            f"| {name} | {self.written / self.seconds:.0f} | {held:.1f} | {live:.1%} | {filled:.1%} "
            f"| {self.preemptions} | {again} | {self.steps} |"
        )


class Memory:
    """The KV memory of `slots` sequences of the maximum length, in blocks of any size."""

    def __init__(self, slots: int, dtype: torch.dtype, device: str) -> None:
        self.slots, self.dtype, self.device = slots, dtype, device
        self.config, self.weights = load(WEIGHTS)

    def model(self, block_size: int) -> tuple[PagedKVCache, torch.nn.Module]:
        config = self.config
        cache = PagedKVCache(
            config.num_layers,
            config.num_kv_heads,
            config.head_dim,
            block_size=block_size,
            num_blocks=self.slots * MOST_TOKENS // block_size,
            max_seqs=256,
            max_seq_len=MOST_TOKENS,
            dtype=self.dtype,
            device=self.device,
        )
        model = Decoder(config, cache.layers).to(self.device, self.dtype)
        model.load_state_dict(self.weights)
        return cache, model


def serve(memory: Memory, requests: list[Request], *, block_size: int, batches: bool = False, **options) -> Result:
    """The whole trace; with `batches`, as many at a time as there are slots, until all of them have ended."""
    cache, model = memory.model(block_size)
    read = 0

    def counting(tokens, batch):
        nonlocal read
        read += len(tokens)
        return model(tokens, batch)

    engine = Engine(cache, counting, **options)
    size = memory.slots if batches else len(requests)
    held, live, filled, steps = [], [], [], 0
    start = time.perf_counter()
    for first in range(0, len(requests), size):
        for request in requests[first : first + size]:
            engine.submit(request)
        while engine.step():
            steps += 1
            if engine.load.waiting or engine.load.swapped or (batches and first + size < len(requests)):
                sequences = cache._manager.sequences
                rows = sequences.live_rows
                rows = rows[sequences.num_blocks[rows] > 0]
                tokens, slots = sequences.length[rows].sum(), sequences.num_blocks[rows].sum() * block_size
                held.append(len(rows))
                live.append(tokens / (cache.num_blocks * block_size))
                filled.append(tokens / max(slots, 1))
    seconds = time.perf_counter() - start
    cache.check_integrity()
    assert cache.num_free_blocks == cache.num_blocks
    written = sum(request.max_new_tokens for request in requests)
    return Result(seconds, written, read, steps, engine.load.preemptions, held, live, filled)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", default=192, type=int)
    parser.add_argument("--slots", default=8, type=int, help="KV memory, in sequences of the maximum length")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--token-budget", default=512, type=int)
    parser.add_argument("--block-sizes", default=[1, 4, 64, 256], type=int, nargs="*", help="also, with recompute")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    memory = Memory(args.slots, getattr(torch, args.dtype), args.device)
    requests = trace(args.requests)
    needed = sum(len(request.prompt) + request.max_new_tokens - 1 for request in requests)
    device = (
        torch.cuda.get_device_name(args.device) if args.device != "cpu" else f"CPU, {torch.get_num_threads()} threads"
    )
    versions = f"PyTorch {torch.__version__}, Python {platform.python_version()}"
    lines = [
        f"{args.requests} requests of {needed / args.requests:.0f} tokens on average, KV memory of {args.slots} x "
        f"{MOST_TOKENS} tokens, {args.dtype}, {device}, {versions}.",
        "",
        f"| | {COLUMNS} |",
        "|---" * (COLUMNS.count("|") + 2) + "|",
    ]
    print("\n".join(lines), flush=True)
    ways = {f"paged, {policy}": dict(block_size=16, policy=policy) for policy in ("recompute", "swap", "wait")}
    ways |= {f"paged, recompute, blocks of {size}": dict(block_size=size) for size in args.block_sizes}
    slotted = dict(block_size=MOST_TOKENS, watermark=0.0)
    ways |= {"contiguous slots": slotted, "run-to-completion batches": slotted | dict(batches=True)}
    for name, options in ways.items():
        lines.append(serve(memory, requests, **options, token_budget=args.token_budget).row(name, needed))
        print(lines[-1], flush=True)
    if args.out:
        args.out.parent.mkdir(exist_ok=True)
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
