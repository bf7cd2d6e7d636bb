"""The prefix cache on the host: looking up a prompt, entering its blocks, and making room.

OMP_NUM_THREADS=1 pytest benchmarks/test_bench_prefix.py
"""

import numpy as np
import pytest

from torch_paged.memory import MemoryManager, history

BLOCK_SIZE, LENGTH = 16, 32768


@pytest.fixture
def prompt():
    return np.random.default_rng(0).integers(0, 100000, LENGTH)


def manager_with(num_blocks, *prompts):
    """A pool whose only use is to keep the blocks of these prompts."""
    manager = MemoryManager(num_blocks, BLOCK_SIZE, max_seqs=4, max_seq_len=num_blocks * BLOCK_SIZE)
    for tokens in prompts:
        seq = manager.add()
        step = manager.prepare([seq], len(tokens))
        manager.commit(step)
        history.remember(manager, step, tokens)
        manager.free(seq)
    return manager


@pytest.mark.parametrize("given", ["array", "list"])
def test_lookup(benchmark, prompt, given):
    """A prompt of 32k tokens, all of whose blocks are found: the goal is 1 ms."""
    manager = manager_with(4096, prompt)
    tokens = prompt.tolist() if given == "list" else prompt
    live = []

    def forget():
        manager.free(live)
        live.clear()

    benchmark.pedantic(lambda: live.append(manager.add(tokens)), setup=forget, rounds=50, warmup_rounds=3)
    assert manager.length(live[0]) == LENGTH - BLOCK_SIZE


def test_enter(benchmark, prompt):
    """The 2048 blocks of a prompt of 32k tokens enter."""
    manager = manager_with(2048)

    def commit():
        manager.clear_prefixes()
        step = manager.prepare([manager.add()], LENGTH)
        manager.commit(step)
        return (step,), {}

    def remember(step):
        history.remember(manager, step, prompt)

    def tidy(step):
        assert len(manager.groups[0].cached) == 2048
        manager.free(step.handles)

    benchmark.pedantic(remember, setup=commit, teardown=tidy, rounds=20)


@pytest.mark.parametrize("num_blocks", [1_000, 10_000, 100_000])
@pytest.mark.parametrize("released", ["at-once", "mixed"])
def test_evict(benchmark, num_blocks, released):
    """Blocks are taken from a pool full of unused prefixes: the time of each should not depend on the pool's size.

    `mixed`: every other block was looked up and released again meanwhile, so that the queue has gaps.
    """
    benchmark.group = f"evict 16 blocks, {released}"
    tokens = np.random.default_rng(0).integers(0, 100000, num_blocks * BLOCK_SIZE)
    manager = manager_with(num_blocks, tokens)
    if released == "mixed":
        for _ in range(5):
            manager.pool.retain(np.arange(0, num_blocks, 2))
            manager.pool.release(np.arange(0, num_blocks, 2))
    assert manager.pool.num_evictable == num_blocks
    benchmark.pedantic(lambda: manager.pool.allocate(16), rounds=50, warmup_rounds=5)
    benchmark.extra_info["ns a block"] = round(benchmark.stats["median"] * 1e9 / 16)
    assert manager.pool.num_evictable == len(manager.groups[0].cached) == num_blocks - 55 * 16
