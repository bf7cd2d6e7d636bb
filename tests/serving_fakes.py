"""A model without weights that reads all it knows from the cache, what it must write, and engines over it."""

import torch

from torch_paged import PagedKVCache
from torch_paged.serving import Engine

VOCAB = 97
PROMPTS = [[5, 17, 3], [11] * 9, list(range(1, 31)), [8], [2, 4, 6, 8, 10, 12, 14], list(range(60, 40, -1))]


def make_cache(**options):
    """One layer of one number a token; blocks of 4 tokens."""
    defaults = dict(block_size=4, num_blocks=32, max_seqs=16, max_seq_len=64, dtype=torch.float32, device="cpu")
    cache = PagedKVCache(1, 1, 1, **(defaults | options))
    for tensor in sum(cache.tensors(), ()):
        tensor.fill_(torch.nan)
    return cache


class FakeModel:
    """Stores tokens as keys, and predicts from the sum over a sequence's keys, each times a number of its place.

    One wrong token in the cache, or one in a wrong place, and it writes something else.
    """

    def __init__(self, cache):
        self.keys = cache.layers[0].key_cache[..., 0, 0]  # [num_blocks, block_size]
        self.steps = []

    def __call__(self, tokens, batch):
        self.steps.append((int((batch.slot_mapping >= 0).sum()), int((batch.seq_lens > 0).sum())))
        stored = batch.slot_mapping >= 0
        size = self.keys.shape[1]
        slots = batch.slot_mapping[stored]
        self.keys[slots // size, slots % size] = tokens[stored].float()
        length = int(batch.seq_lens.max())
        table = batch.block_table[:, : -(-length // size)].long()
        keys = self.keys[table.clamp(min=0)].flatten(1)[:, :length]
        positions = torch.arange(length, device=tokens.device)
        visible = positions < batch.seq_lens[:, None]
        terms = torch.where(visible, keys, 0).long() * weight(positions)
        return torch.nn.functional.one_hot(terms.sum(1) % VOCAB, VOCAB).float()


class Faulty:
    """A cache whose methods fail once where a fault was planted, before they have changed anything."""

    def __init__(self, cache):
        self.cache = cache
        self.faults = {}
        self.raised = []

    def __getattr__(self, name):
        attribute = getattr(self.cache, name)
        if name not in ("prepare", "swap_out", "swap_in", "fork"):
            return attribute

        def call(*arguments, **options):
            if name in self.faults:
                self.raised.append(name)
                raise self.faults.pop(name)
            return attribute(*arguments, **options)

        return call


def weight(position):
    return (position * position * 31 + position * 17 + 5) % VOCAB


def expected(prompt, count, stop=()):
    """What FakeModel writes greedily."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count and not (len(tokens) > len(prompt) and tokens[-1] in stop):
        tokens.append(sum(token * weight(i) for i, token in enumerate(tokens)) % VOCAB)
    return tokens[len(prompt) :]


def decode(tokens):
    """One character a token."""
    return "".join(chr(32 + token) for token in tokens)


def make_engine(cache=None, **options):
    cache = make_cache() if cache is None else cache
    model = FakeModel(cache)
    return Engine(cache, model, **options), cache, model


def assert_empty(engine, cache):
    assert engine.load[:3] == (0, 0, 0)
    residents = engine._scheduler._residents
    assert (residents._running_rows, residents._swapped_rows) == (0, 0)
    cache.check_integrity()
    assert cache.num_free_blocks == cache.num_blocks
