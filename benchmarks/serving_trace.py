"""The trace that serving is measured with, and ways to serve it in a given KV memory.

Prompts and outputs have log-normal lengths: medians 160 and 220, sigma 1.0, fixed seed, each cut at MOST_TOKENS, or
both together. Three ways keep keys and values; model, kernels and scheduler are the same:

    paged      blocks are given out as sequences grow, and requests are let in while there are blocks
    slots      every sequence has a place for the most tokens that a request can have, and the next one gets it when it
               ends
    batches    the same places, but the next sequences come when all of a batch have ended

Places are kept in blocks of 16 tokens as well, so that attention is as fast, and only needed keys are read.
"""

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from serving_graphs import BUCKETS, Graphed, capture_all

from torch_paged import PagedKVCache
from torch_paged.serving import Engine, Generation, Request

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from demo import WEIGHTS
from model import Decoder, load

MOST_TOKENS = 2048
WAYS = ("paged", "slots", "batches")


def trace(requests: int, cut_each: bool = True) -> list[Request]:
    """`cut_each`: MOST_TOKENS is the most of the prompt and of the output, each for itself; else of both together."""
    rng = np.random.default_rng(0)
    prompts, outputs = (
        np.clip(rng.lognormal(np.log(median), 1.0, requests), 1, MOST_TOKENS - (not cut_each)).astype(int)
        for median in (160, 220)
    )
    if not cut_each:
        outputs = np.minimum(outputs, MOST_TOKENS - prompts)
    return [
        Request(
            prompt=rng.integers(1, 256, prompt).tolist(),
            max_new_tokens=int(output),
            namespace=number,  # so that no prefix is found: this is about slots
        )
        for number, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))
    ]


class Memory(NamedTuple):
    """KV memory: `places` of `most_tokens` tokens.

    Attributes:
        model: False: nothing is computed, and every token is 0. For what depends on lengths alone.
        graphs: whether the model's steps are captured as CUDA graphs.
    """

    places: int
    most_tokens: int = 2 * MOST_TOKENS
    model: bool = True
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    graphs: bool = False

    def clock(self) -> float:
        """Seconds by which a way is stopped: of the CPU where that does the work, as others may use it too."""
        return time.process_time() if self.device == "cpu" else time.perf_counter()

    def build(self, block_size: int, most_seqs: int = 0) -> tuple[PagedKVCache, Callable[..., torch.Tensor]]:
        """`most_seqs`: of a batch, for whose shapes graphs are captured at once."""
        config, weights = load(WEIGHTS)
        cache = PagedKVCache(
            *((config.num_layers, config.num_kv_heads, config.head_dim) if self.model else (1, 1, 1)),
            block_size=block_size,
            num_blocks=self.places * self.most_tokens // block_size,
            max_seqs=1024,
            max_seq_len=self.most_tokens,
            dtype=self.dtype,
            device=self.device,
            buckets=BUCKETS if self.graphs else None,
        )
        if not self.model:
            return cache, lambda _, batch: torch.zeros(len(batch.last_token), 2)
        model = Decoder(config, cache.layers).to(self.device, self.dtype)
        model.load_state_dict(weights)
        if self.graphs:
            model = Graphed(model)
            capture_all(cache, model, most_seqs)
        return cache, model


class Steps(NamedTuple):
    """What was seen after each step.

    Attributes:
        waiting: whether requests waited.
        held: sequences that hold memory.
        live: share of all slots that hold a token of a sequence.
        filled: the same of the slots that are given out: of blocks, or of places (in `batches` until the last ends).
    """

    waiting: list[bool]
    held: list[int]
    live: list[float]
    filled: list[float]

    def while_waiting(self) -> dict[str, float]:
        """Means over the steps in which requests waited."""
        values = {"sequences": self.held, "live": self.live, "filled": self.filled}
        return {name: float(np.mean(np.array(each)[self.waiting])) for name, each in values.items()}


class Run(NamedTuple):
    """The trace, served.

    Attributes:
        figures: seconds, tokens written, those a second of all cores together, a second, and a second until nobody
            waits for the first time, steps, how often a sequence gave way, share of tokens read again, means of Steps.
        steps: of all.
    """

    figures: dict[str, Any]
    steps: Steps


def serve(
    memory: Memory,
    requests: list[Request],
    way: str,
    *,
    block_size: int = 16,
    seconds: float = math.inf,
    **options: Any,
) -> Run:
    """Serve all requests, which are there from the start, for `seconds` at most. `options`: of the Engine."""
    cache, model = memory.build(block_size, most_seqs=memory.places * (16 if way == "paged" else 1))
    read = 0

    def counting(tokens: torch.Tensor, batch: Any) -> torch.Tensor:
        nonlocal read
        read += engine._scheduler.open_plans[-1].num_tokens
        return model(tokens, batch)

    if way != "paged":
        options |= dict(max_running=memory.places, watermark=0.0)
    engine = Engine(cache, counting, **options)
    size = memory.places if way == "batches" else len(requests)
    generations, loaded = [], None
    steps = Steps([], [], [], [])
    start, cpu_start, end = time.perf_counter(), time.process_time(), memory.clock() + seconds
    for first in range(0, len(requests), size):
        generations += [engine.submit(request) for request in requests[first : first + size]]
        while memory.clock() < end and engine.step():
            waiting = engine.load.waiting + engine.load.swapped > 0 or first + size < len(requests)
            if loaded is None and not waiting:
                loaded = time.perf_counter() - start, written(generations)
            look(cache, steps, waiting)
            if way != "paged":
                places = memory.places if way == "batches" else steps.held[-1]
                steps.filled[-1] = steps.live[-1] * memory.places / max(places, 1)
        if engine.busy:
            break
    taken, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    tokens = written(generations)
    whole = tokens == sum(request.max_new_tokens for request in requests)
    loaded = loaded or (taken, tokens)
    close(engine, cache, generations)
    figures = dict(
        seconds=taken,
        tokens=tokens,
        whole=whole,
        tokens_per_cpu_second=tokens / cpu_seconds,
        tokens_per_second=tokens / taken,
        tokens_per_second_loaded=loaded[1] / loaded[0],
        steps=len(steps.held),
        gave_way=engine.load.preemptions,
        read_again=read / (tokens + sum(len(request.prompt) - 1 for request in requests)) - 1 if whole else None,
        **steps.while_waiting(),
    )
    return Run(figures, steps)


def written(generations: list[Generation]) -> int:
    return sum(len(generation.samples[0].written) for generation in generations)


def close(engine: Engine, cache: PagedKVCache, generations: list[Generation]) -> None:
    """Cancel what is left, and see to it that nothing else is."""
    for generation in generations:
        engine.cancel(generation)
    while engine.step():
        pass
    assert not any(generation.error for generation in generations)
    cache.check_integrity()
    assert cache.num_free_blocks == cache.num_blocks


def look(cache: PagedKVCache, steps: Steps, waiting: bool) -> None:
    """Note how full the memory is."""
    sequences = cache._manager.sequences
    rows = sequences.live_rows
    rows = rows[sequences.num_blocks[rows] > 0]
    tokens, blocks = int(sequences.length[rows].sum()), int(sequences.num_blocks[rows].sum())
    steps.waiting.append(waiting)
    steps.held.append(len(rows))
    steps.live.append(tokens / (cache.num_blocks * cache.block_size))
    steps.filled.append(tokens / max(blocks * cache.block_size, 1))
