"""The host's work for one step of serving: schedule (with `prepare`), the tokens to read, complete (with `commit`).

    OMP_NUM_THREADS=1 pytest benchmarks/test_bench_scheduler.py

`decode`: all sequences write a token, the same in every step. `waiting`: the same, with a request in the queue that
there is no place for; `blocked`: there is a place, but the blocks do not suffice. `churn`: every fourth step one
request ends and another, with a prompt of 100 tokens, is let in.
"""

import numpy as np
import pytest
import torch

from torch_paged.cache import PagedKVCache
from torch_paged.serving import Request, Scheduler
from torch_paged.serving.requests import Generation

ROUNDS = 400
TOKENS = list(range(512))  # what sequences write: one each, so that no two share a block


def serving(num_seqs, policy, waiting, most, spare=0):
    """A scheduler whose sequences have read prompts of 1 to 200 tokens."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 200, num_seqs)
    blocks = num_seqs * 1200 // 16 + 1024  # so that none waits for blocks under either policy
    cache = PagedKVCache(
        1, 1, 16, num_blocks=blocks, max_seqs=num_seqs + spare, max_seq_len=2048, dtype=torch.float16, device="cpu"
    )
    scheduler = Scheduler(cache, token_budget=2 * num_seqs, policy=policy)
    for i, length in enumerate(lengths):
        new = 30 + 4 * i if most is None else most
        scheduler.submit(
            Generation(Request(prompt=generator.integers(0, 1 << 15, length).tolist(), max_new_tokens=new))
        )
    while scheduler.load.waiting or any(sample.unread > 1 for sample in scheduler._residents.running):
        step(scheduler)
    if spare:
        scheduler._residents._reserve += blocks
    for _ in range(waiting):
        scheduler.submit(Generation(Request(prompt=generator.integers(0, 1 << 15, 100).tolist(), max_new_tokens=1000)))
    return scheduler


def step(scheduler):
    plan = scheduler.schedule()
    plan.tokens()
    scheduler.complete(plan, TOKENS[: len(plan.samples)])


@pytest.mark.parametrize("kind", ["decode", "waiting", "blocked", "churn"])
@pytest.mark.parametrize("policy", ["wait", "recompute", "swap"])
@pytest.mark.parametrize("num_seqs", [256])
def test_scheduler_step(benchmark, num_seqs, policy, kind):
    """The goal is 300 us at 256 sequences."""
    benchmark.group = f"scheduler step, {num_seqs} sequences"
    waiting = {"decode": 0, "waiting": 1, "blocked": 1, "churn": 500}[kind]
    most = None if kind == "churn" else 900
    scheduler = serving(num_seqs, policy, waiting, most, spare=kind == "blocked")
    benchmark.pedantic(step, args=(scheduler,), rounds=ROUNDS, warmup_rounds=5)
    assert scheduler.load.running >= num_seqs - 4
    assert scheduler.load.preemptions == 0
    benchmark.extra_info["p90 us"] = round(float(np.quantile(benchmark.stats.stats.sorted_data, 0.9)) * 1e6, 1)
