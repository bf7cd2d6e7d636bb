"""Caches of layers with sliding windows, each beside one of full attention that keeps everything."""

import math
from itertools import chain

import torch

from torch_paged import PagedKVCache

HEADS, KV_HEADS, DIM, VALUE_DIM, SIZE = 4, 2, 16, 24, 4
WINDOWS = {"window": [6, 6, 6], "mixed": [None, 6, None], "three": [9, None, 1], "plain": [None] * 3}
STORED = {
    "float32": dict(),
    "e4m3": dict(cache_dtype=torch.float8_e4m3fn),
    "e4m3-token": dict(cache_dtype=torch.float8_e4m3fn, scales="token"),
    "e5m2-static": dict(cache_dtype=torch.float8_e5m2, scales="static"),
    "int8": dict(cache_dtype=torch.int8),
    "int8-static": dict(cache_dtype=torch.int8, scales="static"),
}


def make_cache(windows, device="cpu", **options):
    defaults = dict(block_size=SIZE, num_blocks=64, max_seqs=8, max_seq_len=80, dtype=torch.float32, device=device)
    cache = PagedKVCache(
        len(windows), KV_HEADS, DIM, value_head_dim=VALUE_DIM, sliding_window=windows, **(defaults | options)
    )
    poison(cache)
    for layer in cache.layers:
        if layer.key_scale is not None:
            layer.key_scale.copy_(torch.tensor([0.03, 0.05]))
            layer.value_scale.copy_(torch.tensor([0.04, 0.025]))
    return cache


def poison(cache):
    for tensor in chain(*(layer.blocks() for layer in cache.layers)):
        tensor.view(torch.uint8 if tensor.element_size() == 1 else tensor.dtype).fill_(
            0x7F if tensor.element_size() == 1 else math.nan
        )


class Twin:
    """A cache beside one of full attention that keeps everything: both get the same rows and must give the same.

    Rows follow from their token, position and layer, so that prefixes that are found hold what would be computed.
    """

    def __init__(self, windows, device="cpu", **options):
        self.windows, self.device = windows, device
        self.cache = make_cache(windows, device, **options)
        quantised = {name: options[name] for name in ("cache_dtype", "scales") if name in options}
        self.plain = make_cache([None] * len(windows), device, num_blocks=256, max_seqs=64, **quantised)
        self.seqs, self.tokens = {}, {}
        for group in self.cache._manager.groups[1:]:  # so that groups do not hand out the same numbers
            group.pool.free_blocks[:] = group.pool.free_blocks[::-1].copy()

    def rows(self, heads, dim, tokens, positions, salt):
        """[n, heads, dim], a function of each token and its position."""
        phase = torch.tensor(tokens)[:, None] * 1.7 + torch.tensor(positions)[:, None] * 0.61 + salt
        wave = torch.arange(heads * dim) * (0.37 + 0.11 * salt)
        return (torch.sin(phase + wave) * 2).view(-1, heads, dim).to(self.device)

    def add(self, prompt=()):
        """A sequence, its prompt not read but as far as it is found."""
        seq = self.cache.add(list(prompt))
        found = self.cache.length(seq)
        self.tokens[seq], self.seqs[seq] = [], self.plain.add()
        if found:
            self.read(self.plain, [self.seqs[seq]], [list(prompt[:found])], [0])
            self.tokens[seq] = list(prompt[:found])
        return seq

    def read(self, cache, seqs, new, starts, commit=True):
        """The outputs of all layers for a step."""
        batch = cache.prepare(seqs, [len(tokens) for tokens in new])
        tokens = [token for part in new for token in part]
        positions = [start + i for start, part in zip(starts, new, strict=True) for i in range(len(part))]
        padding = [0] * (len(batch.positions) - len(tokens))
        outputs = []
        for layer, window in enumerate(self.windows):
            parts = [
                self.rows(*shape, tokens + padding, positions + padding, layer + salt)
                for salt, shape in enumerate([(HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, VALUE_DIM)])
            ]
            own = {} if cache is self.cache else dict(sliding_window=window)
            outputs.append(cache.layers[layer](*parts, batch, **own)[: len(tokens)])
        if commit:
            cache.commit(batch, tokens)
        else:
            cache.rollback(batch)
        cache.check_integrity()
        return outputs

    def step(self, new, commit=True):
        """`new`: {sequence: tokens}."""
        starts = [len(self.tokens[seq]) for seq in new]
        assert starts == [self.cache.length(seq) for seq in new]
        twins = [self.seqs[seq] for seq in new]
        expected = self.read(self.plain, twins, list(new.values()), starts, commit)
        actual = self.read(self.cache, list(new), list(new.values()), starts, commit)
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        if commit:
            for seq, tokens in new.items():
                self.tokens[seq] += tokens

    def fork(self, seq):
        (child,), (twin,) = self.cache.fork(seq, 1), self.plain.fork(self.seqs[seq], 1)
        self.seqs[child], self.tokens[child] = twin, list(self.tokens[seq])
        return child

    def truncate(self, seq, forgotten):
        length = len(self.tokens[seq]) - forgotten
        self.cache.truncate(seq, length)
        self.plain.truncate(self.seqs[seq], length)
        del self.tokens[seq][length:]


def some(count, salt=0):
    return [(7 * i + 3 * salt) % 11 for i in range(count)]
