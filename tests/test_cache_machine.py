"""A PagedKVCache under random use, with faults, beside a list of tokens for each sequence."""

from itertools import chain

import numpy as np
import pytest
import torch
from memory_model import Keys

from torch_paged import OutOfBlocks, OutOfSwapSpace, append, transfer
from torch_paged import steps as steps_module
from torch_paged.cache import PagedKVCache

BLOCK_SIZE, MAX_SEQS, MAX_SEQ_LEN = 4, 6, 40
WEIGHTS = dict(add=3, step=14, fork=1, truncate=1, free=2, swap_out=2, swap_in=4)


class Fault(Exception):
    pass


class User:
    """Keys of both layers are a number that stands for the namespace and all tokens up to it, as in a model."""

    def __init__(self, monkeypatch, device, buckets, windows, num_blocks):
        self.monkeypatch, self.device, self.windows = monkeypatch, device, windows
        sizes = dict(block_size=BLOCK_SIZE, num_blocks=num_blocks, max_seqs=MAX_SEQS, max_seq_len=MAX_SEQ_LEN)
        space = PagedKVCache.kv_bytes(2, num_blocks * 5 // 8 * BLOCK_SIZE, 1, 16, dtype=torch.float32)
        self.cache = PagedKVCache(
            2,
            1,
            16,
            **sizes,
            dtype=torch.float32,
            device=device,
            buckets=buckets,
            swap_space=space,
            sliding_window=windows,
        )
        self.random = np.random.default_rng(0)
        self.keys, self.tokens, self.namespace, self.outside = Keys(), {}, {}, set()
        self.seen = dict.fromkeys(["fault", "out of blocks", "out of swap space", "found", "swapped in"], 0)

    def keys_of(self, seq):
        return self.keys.of(self.namespace[seq], self.tokens[seq])

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
            _, slots = batch.tables(self.cache.layers[layer].group)
            append(rows.to(self.device) + layer, -rows.to(self.device), *pair, slots)
        self.everyone_reads_their_own_keys(batch, keys, before)
        if self.random.random() < 0.15:
            self.cache.rollback(batch)
            for seq, start in zip(seqs, before, strict=True):
                del self.tokens[seq][start:]
        else:
            told = torch.tensor(
                list(chain(*new)), dtype=torch.int64, device=self.device if self.random.random() < 0.3 else "cpu"
            )
            self.cache.commit(batch, told if self.random.random() < 0.95 else None)

    def everyone_reads_their_own_keys(self, batch, keys, before):
        """Those that the window of the first new token shows, and later ones."""
        for layer, (key_cache, value_cache) in enumerate(self.cache.tensors()):
            table, _ = batch.tables(self.cache.layers[layer].group)
            for row, every, length in zip(table.long().cpu(), keys, before, strict=False):
                window = self.windows[layer]
                start = 0 if window is None else max(length - window + 1, 0)
                first = start // BLOCK_SIZE
                blocks = row[first : -(-len(every) // BLOCK_SIZE)].to(self.device)
                seen, place = every[start:], slice(start - first * BLOCK_SIZE, len(every) - first * BLOCK_SIZE)
                assert (key_cache[blocks, :, 0, 3].flatten()[place] - layer).tolist() == seen
                assert (-value_cache[blocks, :, 0, 5].flatten()[place]).tolist() == seen

    def fork(self):
        for seq in self.inside()[:1]:
            if len(self.tokens) < MAX_SEQS:
                (child,) = self.cache.fork(seq, 1)
                self.tokens[child], self.namespace[child] = list(self.tokens[seq]), self.namespace[seq]

    def truncate(self):
        for seq in self.inside()[:1]:
            length = max(0, len(self.tokens[seq]) - int(self.random.integers(6)))
            try:
                self.cache.truncate(seq, length)
            except ValueError as error:
                assert any(self.windows), error
                assert "have released the keys before" in str(error)
            else:
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
                for module, function in [(steps_module, "copy_blocks"), *((transfer, f) for f in MOVES)]:
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
@pytest.mark.parametrize(("windows", "num_blocks"), [((None, None), 24), ((None, 7), 24), ((9, 9), 16)], ids=str)
def test_random_use(monkeypatch, device, buckets, windows, num_blocks):
    user = User(monkeypatch, device, buckets, windows, num_blocks)
    weights = np.array(list(WEIGHTS.values()))
    for name in user.random.choice(list(WEIGHTS), size=2000, p=weights / weights.sum()):
        user.act(name)
    assert min(user.seen.values()) >= 10, user.seen
    user.cache.free(list(user.tokens))
    user.cache.clear_prefixes()
    user.cache.check_integrity()
    stats = user.cache.stats()
    total = sum(group.num_blocks for group in user.cache.groups)
    assert (stats.blocks_free, stats.blocks_evictable, stats.bytes_swapped) == (total, 0, 0)
