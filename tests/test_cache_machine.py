"""A PagedKVCache under random use, with faults, beside a list of tokens for each sequence."""

from itertools import chain

import numpy as np
import pytest
import torch
from test_cache import either_way  # noqa: F401 - a fixture

from torch_paged import OutOfBlocks, OutOfSwapSpace, append, transfer
from torch_paged import cache as cache_module
from torch_paged.cache import PagedKVCache

BLOCKS, BLOCK_SIZE, MAX_SEQS, MAX_SEQ_LEN = 24, 4, 6, 40
WEIGHTS = dict(add=3, step=14, fork=1, truncate=1, free=2, swap_out=2, swap_in=4)


class Fault(Exception):
    pass


class User:
    """Keys of both layers are a number that stands for the namespace and all tokens up to it, as in a model."""

    def __init__(self, monkeypatch, device, buckets):
        self.monkeypatch, self.device = monkeypatch, device
        sizes = dict(block_size=BLOCK_SIZE, num_blocks=BLOCKS, max_seqs=MAX_SEQS, max_seq_len=MAX_SEQ_LEN)
        space = PagedKVCache.kv_bytes(2, 15 * BLOCK_SIZE, 1, 16, dtype=torch.float32)
        self.cache = PagedKVCache(
            2, 1, 16, **sizes, dtype=torch.float32, device=device, buckets=buckets, swap_space=space
        )
        self.random = np.random.default_rng(0)
        self.keys, self.tokens, self.namespace, self.outside = {}, {}, {}, set()
        self.seen = dict.fromkeys(["fault", "out of blocks", "out of swap space", "found", "swapped in"], 0)

    def keys_of(self, seq):
        keys, key = [], self.namespace[seq]
        for token in self.tokens[seq]:
            key = self.keys.setdefault((key, token), len(self.keys))
            keys.append(key)
        return keys

    def some(self, seqs):
        seqs = sorted(seqs)
        return self.random.permutation(seqs)[: self.random.integers(1, 4)].tolist() if seqs else []

    def inside(self):
        return self.some(self.tokens.keys() - self.outside)

    def new_tokens(self, most):
        return (self.random.random(self.random.integers(1, most)) < 0.1).astype(int).tolist()

    def add(self):
        if len(self.tokens) < MAX_SEQS:
            prompt, namespace = self.new_tokens(30), self.random.choice(["a", "b"])
            seq = self.cache.add(prompt, namespace)
            self.tokens[seq], self.namespace[seq] = prompt[: self.cache.length(seq)], namespace
            self.seen["found"] += len(self.tokens[seq])

    def step(self):
        seqs = self.inside()
        new = [self.new_tokens(6) for _ in seqs]
        if any(len(self.tokens[seq]) + len(part) > MAX_SEQ_LEN for seq, part in zip(seqs, new, strict=True)):
            return
        batch = self.cache.prepare(seqs, list(map(len, new)))
        before = [len(self.tokens[seq]) for seq in seqs]
        for seq, part in zip(seqs, new, strict=True):
            self.tokens[seq] += part
        keys = [self.keys_of(seq) for seq in seqs]
        written = list(chain(*(part[start:] for part, start in zip(keys, before, strict=True))))
        rows = torch.zeros(len(batch.slot_mapping), 1, 16)
        rows[: len(written)] = torch.tensor(written, dtype=torch.float32).view(-1, 1, 1)
        for layer, pair in enumerate(self.cache.tensors()):
            append(rows.to(self.device) + layer, -rows.to(self.device), *pair, batch.slot_mapping)
        self.everyone_reads_their_own_keys(batch, keys)
        if self.random.random() < 0.15:
            self.cache.rollback(batch)
            for seq, start in zip(seqs, before, strict=True):
                del self.tokens[seq][start:]
        else:
            told = torch.tensor(list(chain(*new)), device=self.device if self.random.random() < 0.3 else "cpu")
            self.cache.commit(batch, told if self.random.random() < 0.95 else None)

    def everyone_reads_their_own_keys(self, batch, keys):
        for row, expected in zip(batch.block_table.long().cpu(), keys, strict=False):
            blocks = row[: -(-len(expected) // BLOCK_SIZE)].to(self.device)
            for layer, (key_cache, value_cache) in enumerate(self.cache.tensors()):
                assert (key_cache[blocks, :, 0, 3].flatten()[: len(expected)] - layer).tolist() == expected
                assert (-value_cache[blocks, :, 0, 5].flatten()[: len(expected)]).tolist() == expected

    def fork(self):
        for seq in self.inside()[:1]:
            if len(self.tokens) < MAX_SEQS:
                (child,) = self.cache.fork(seq, 1)
                self.tokens[child], self.namespace[child] = list(self.tokens[seq]), self.namespace[seq]

    def truncate(self):
        for seq in self.inside()[:1]:
            length = max(0, len(self.tokens[seq]) - int(self.random.integers(6)))
            self.cache.truncate(seq, length)
            del self.tokens[seq][length:]

    def free(self):
        seqs = self.some(self.tokens)[:2]
        self.cache.free(seqs)
        for seq in seqs:
            del self.tokens[seq]
            self.outside.discard(seq)

    def swap_out(self):
        seqs = self.inside()
        self.cache.swap_out(seqs)
        self.outside |= {*seqs}

    def swap_in(self):
        seqs = self.some(self.outside)
        self.cache.swap_in(seqs)
        self.outside -= {*seqs}
        self.seen["swapped in"] += len(seqs)

    def act(self, name):
        """Do it; one time in ten copying, gathering or scattering raises. Whatever raises has changed nothing."""
        if self.device == "cuda":  # tokens that are late arrive now, not in the middle of what may fail
            torch.cuda.synchronize()
            self.cache._feed.deliver()
        before = self.cache.stats()
        with self.monkeypatch.context() as patch:
            if self.random.random() < 0.1:
                for module, function in [(cache_module, "copy_blocks"), *((transfer, f) for f in MOVES)]:
                    patch.setattr(module, function, fail)
            try:
                getattr(self, name)()
            except (Fault, OutOfBlocks, OutOfSwapSpace) as error:
                kinds = {Fault: "fault", OutOfBlocks: "out of blocks", OutOfSwapSpace: "out of swap space"}
                self.seen[kinds[type(error)]] += 1
                cached = dict(blocks_cached=0, blocks_evictable=0)  # what was evicted does not come back
                assert self.cache.stats()._replace(**cached) == before._replace(**cached)
        self.cache.check_integrity()
        assert {seq: self.cache.length(seq) for seq in self.tokens} == {s: len(t) for s, t in self.tokens.items()}


MOVES = ["gather_blocks", "scatter_blocks"]


def fail(*_):
    raise Fault


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("buckets", [None, [4, 16]], ids=["unpadded", "buckets"])
def test_random_use(monkeypatch, device, buckets):
    user = User(monkeypatch, device, buckets)
    weights = np.array(list(WEIGHTS.values()))
    for name in user.random.choice(list(WEIGHTS), size=1500, p=weights / weights.sum()):
        user.act(name)
    assert min(user.seen.values()) >= 10, user.seen
    user.cache.free(list(user.tokens))
    user.cache.clear_prefixes()
    user.cache.check_integrity()
    stats = user.cache.stats()
    assert (stats.blocks_free, stats.blocks_evictable, stats.bytes_swapped) == (BLOCKS, 0, 0)
