"""Many prompts that begin alike: `python examples/shared_prefix.py`.

Every prompt is the same system prompt and a question. The first request computes the system prompt and leaves its
blocks in the prefix cache; those after it find them there, and keep them once for all. The same requests also run each
in a namespace of its own, where nothing can be found: they must write the same bytes.
"""

import argparse
import time

import torch
from torch import nn

from demo import build
from torch_paged import MemoryStats, PagedKVCache

SYSTEM = b'''"""Geometry in the plane."""

import math
from dataclasses import dataclass


@dataclass
class Point:
    """A point with two coordinates."""

    x: float
    y: float


def distance(first, second):
    """Return the distance between two points."""
    return math.hypot(first.x - second.x, first.y - second.y)


'''
QUESTIONS = [
    b"def move(point",
    b"def scale(",
    b"class Circle",
    b"class Line:",
    b"def area(",
    b"def __init__",
    b"if __name__",
]
NEW_TOKENS = 32


def read_and_write(cache: PagedKVCache, model: nn.Module, seqs: list[int], prompts: list[bytes]) -> list[bytes]:
    """Runs what the cache has not found of each prompt, then writes greedily, all sequences in one batch."""
    unread = [prompt[cache.length(seq) :] for seq, prompt in zip(seqs, prompts, strict=True)]
    written = [b""] * len(seqs)
    for _ in range(NEW_TOKENS):
        batch = cache.prepare(seqs, [len(part) for part in unread])
        tokens = torch.tensor(list(b"".join(unread)))
        chosen = model(tokens, batch).argmax(-1)
        cache.commit(batch, tokens)  # with its tokens, so that full blocks enter the prefix cache
        unread = [bytes([token]) for token in chosen.tolist()]
        written = [text + token for text, token in zip(written, unread, strict=True)]
    return written


@torch.inference_mode()
def serve(shared: bool) -> tuple[list[bytes], MemoryStats, float]:
    """What all requests wrote, the figures while all were live, and the seconds it took after the first."""
    cache, model = build(num_blocks=256, max_seqs=len(QUESTIONS))
    prompts = [SYSTEM + question for question in QUESTIONS]
    namespaces = ["everybody" if shared else f"client {i}" for i in range(len(prompts))]

    first = cache.add(list(prompts[0]), namespaces[0])
    written = read_and_write(cache, model, [first], prompts[:1])
    start = time.perf_counter()
    seqs = [cache.add(list(prompt), namespace) for prompt, namespace in zip(prompts[1:], namespaces[1:], strict=True)]
    written += read_and_write(cache, model, seqs, prompts[1:])
    seconds = time.perf_counter() - start
    stats = cache.stats()
    cache.free([first, *seqs])
    return written, stats, seconds


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    alone, without, seconds_without = serve(shared=False)
    together, stats, seconds = serve(shared=True)
    for question, text in zip(QUESTIONS, together, strict=True):
        print(f"{question.decode()}|{text.decode(errors='replace')!r}")
    print(f"prompt tokens found   {stats.tokens_found} of {stats.tokens_looked_up}", end="")
    print(f" ({stats.tokens_found / stats.tokens_looked_up:.0%})")
    print(f"KV memory             {stats.bytes_used / 1e6:.1f} MB, {without.bytes_used / 1e6:.1f} MB without sharing")
    print(f"time after the first  {seconds:.2f} s, {seconds_without:.2f} s without sharing")
    if alone != together:
        raise SystemExit("check failed: sharing has changed what was written")
    print("check passed: with and without sharing, the same bytes were written")


if __name__ == "__main__":
    main()
