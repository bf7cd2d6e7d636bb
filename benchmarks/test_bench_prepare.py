"""The host's work for a decode step: `prepare` + `commit`, beside a loop over sequences and a copy of the same bytes.

    OMP_NUM_THREADS=1 pytest benchmarks/test_bench_prepare.py

The lengths of the sequences are spread, so that one in sixteen needs a new block in each step, as in steady decoding.
"""

import numpy as np
import pytest
import torch

from torch_paged.cache import PagedKVCache

BLOCK_SIZE, LONGEST_PROMPT, ROUNDS = 16, 200, 200


def decoding(num_seqs, max_seq_len):
    """A cache with sequences of 1 to 200 tokens."""
    blocks = num_seqs * -(-(LONGEST_PROMPT + 2 * ROUNDS) // BLOCK_SIZE)
    sizes = dict(num_blocks=blocks, block_size=BLOCK_SIZE, max_seqs=num_seqs, max_seq_len=max_seq_len)
    cache = PagedKVCache(1, 1, 16, **sizes, dtype=torch.float16, device="cpu")
    seqs = [cache.add() for _ in range(num_seqs)]
    lengths = np.random.default_rng(0).integers(1, LONGEST_PROMPT, num_seqs)
    cache.commit(cache.prepare(seqs, lengths), np.random.default_rng(1).integers(0, 100000, lengths.sum()))
    return cache, seqs


class Loop:
    """The same bookkeeping as a loop over sequences, each with a list of blocks: the floor of that design."""

    def __init__(self, cache, seqs):
        self.lengths = {seq: cache.length(seq) for seq in seqs}
        rows = cache._staging.block_tables[0][: len(seqs)].tolist()
        self.blocks = {seq: [block for block in row if block >= 0] for seq, row in zip(seqs, rows, strict=True)}
        self.free = cache._manager.pool.free_blocks.tolist()

    def step(self, seqs):
        slots, positions = [], []
        for seq in seqs:
            length, blocks = self.lengths[seq], self.blocks[seq]
            if length % BLOCK_SIZE == 0:
                blocks.append(self.free.pop())
            slots.append(blocks[-1] * BLOCK_SIZE + length % BLOCK_SIZE)
            positions.append(length)
            self.lengths[seq] = length + 1
        return torch.tensor(slots), torch.tensor(positions), torch.tensor([p + 1 for p in positions]).int()


@pytest.mark.parametrize("path", ["list", "array", "tokens", "loop", "copy"])
@pytest.mark.parametrize("max_seq_len", [2048, 32768])
@pytest.mark.parametrize("num_seqs", [256, 4096])
def test_prepare(benchmark, num_seqs, max_seq_len, path):
    """The goal is 100 us at 256 sequences and 500 us at 4096.

    `list` and `array`: how the sequences are given. `tokens`: their tokens are committed, so that blocks enter the
    prefix cache.
    """
    benchmark.group = f"prepare + commit, {num_seqs} sequences of up to {max_seq_len} tokens"
    cache, seqs = decoding(num_seqs, max_seq_len)
    loop = Loop(cache, seqs)
    given = np.array(seqs) if path == "array" else seqs
    tokens = np.random.default_rng(2).integers(0, 100000, num_seqs) if path == "tokens" else None

    def step():
        batch = cache.prepare(given, 1)
        cache.commit(batch, tokens)
        return batch

    for _ in range(20):
        batch = step()
        expected = loop.step(seqs)
        for actual, part in zip((batch.slot_mapping, batch.positions, batch.seq_lens), expected, strict=True):
            assert torch.equal(actual, part)
    parts = [part.numpy() for part in batch[1:6] if part is not None]
    copies = [part.copy() for part in parts]

    def copy():
        for part, kept in zip(parts, copies, strict=True):
            np.copyto(part, kept)

    run = {"list": step, "array": step, "tokens": step, "loop": lambda: loop.step(seqs), "copy": copy}[path]
    benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=5)
    benchmark.extra_info["p90 us"] = round(float(np.quantile(benchmark.stats.stats.sorted_data, 0.9)) * 1e6, 1)
