"""Prefix cache and swap under a model: greedy decoding gives the same tokens with and without them."""

import contextlib
import math
import pickle
from itertools import chain

import numpy as np
import pytest
import torch
from small_model import VOCABULARY, Model, make_cache

from torch_paged import OutOfBlocks, OutOfSwapSpace, PagedKVCache, transfer

SYSTEM = [7 * i % VOCABULARY for i in range(1, 24)]
PROMPTS = [[*SYSTEM, 3], [*SYSTEM, 3], [*SYSTEM, 4, 5, 6, 7, 8], SYSTEM[:9], [9, 9, 9]]
COUNT, BLOCKS = 20, 64


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


class Decoding:
    """Greedy decoding of several sequences in one batch. Attention weighs more than usual, so that keys matter."""

    def __init__(self, device="cpu", **options):
        self.cache = make_cache(device=device, num_blocks=BLOCKS, **options)
        self.model = Model(self.cache.layers).to(device)
        for layer in self.model.layers:
            for projection in (layer.query, layer.key, layer.value, layer.output):
                projection.weight.data.mul_(6)
        self.poison(range(BLOCKS))
        self.seqs, self.unread, self.written = [], [], []

    def poison(self, blocks):
        for tensor in chain(*self.cache.tensors()):
            tensor[list(blocks)] = math.nan

    def add(self, prompts, told=True, namespace=None):
        for prompt in prompts:
            self.seqs.append(self.cache.add(prompt if told else None, namespace))
            self.unread.append(prompt[self.cache.length(self.seqs[-1]) :])
            self.written.append([])

    @torch.no_grad()
    def run(self, count, told=True):
        for _ in range(count):
            batch = self.cache.prepare(self.seqs, [len(tokens) for tokens in self.unread])
            tokens = torch.tensor([token for tokens in self.unread for token in tokens])
            chosen = self.model(tokens.to(batch.positions.device), batch).argmax(-1).tolist()
            self.cache.commit(batch, tokens if told else None)
            self.cache.check_integrity()
            for written, token in zip(self.written, chosen, strict=True):
                written.append(token)
            self.unread = [[token] for token in chosen]
        return self.written


@pytest.fixture(scope="module")
def expected():
    """What every prompt leads to, in a cache that is told no tokens."""
    decoding = Decoding()
    decoding.add(PROMPTS, told=False)
    written = decoding.run(COUNT, told=False)
    assert decoding.cache.stats().blocks_cached == 0
    return written


def test_prefixes_found_lead_to_the_same_tokens(device, expected):
    """Prompts one after another, live ones and freed ones, in two namespaces."""
    for namespace in ("one", "two"):
        decoding = Decoding(device)
        decoding.add(PROMPTS[:1], namespace=namespace)
        assert decoding.run(COUNT) == expected[:1]
        for prompt, written, found in zip(PROMPTS[1:], expected[1:], (20, 20, 8, 0), strict=True):
            if prompt is PROMPTS[2]:
                decoding.cache.free(decoding.seqs)
            decoding.seqs, decoding.unread, decoding.written = [], [], []
            decoding.add([prompt], namespace=namespace)
            assert decoding.cache.length(decoding.seqs[0]) == found
            assert decoding.run(COUNT) == [written]
            other = decoding.cache.add(prompt, "another")
            assert decoding.cache.length(other) == 0
            decoding.cache.free(other)
        assert decoding.cache.stats().tokens_found == 48


def test_conversations_find_their_own_past(device, expected):
    """What was written is found as well, by a prompt that goes on from it."""
    decoding = Decoding(device)
    decoding.add(PROMPTS)
    decoding.run(12)
    decoding.cache.free(decoding.seqs)
    continued = [prompt + written for prompt, written in zip(PROMPTS, decoding.written, strict=True)]
    decoding.seqs, decoding.unread, decoding.written = [], [], []
    decoding.add(continued)
    assert [decoding.cache.length(seq) for seq in decoding.seqs] == [(len(c) - 1) // 4 * 4 for c in continued]
    assert decoding.run(COUNT - 12) == [written[12:] for written in expected]


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("together", [True, False])
def test_swapped_sequences_go_on_as_if_nothing_had_been(device, expected, told, together):
    """Everything in the cache is overwritten while they are out; a fork returns to the blocks that it shared."""
    decoding = Decoding(device)
    decoding.add(PROMPTS, told)
    decoding.run(7, told)
    decoding.seqs += decoding.cache.fork(decoding.seqs[2], 1)
    decoding.unread.append(decoding.unread[2])
    decoding.written.append(list(decoding.written[2]))
    before = decoding.cache.stats()
    for seqs in [decoding.seqs] if together else [[seq] for seq in decoding.seqs]:
        decoding.cache.swap_out(seqs)
        decoding.cache.check_integrity()
    out = decoding.cache.stats()
    assert (out.blocks_used, out.tokens, out.seqs_swapped) == (0, 0, 6)
    assert (out.bytes_swapped == before.bytes_used) == together, "shared blocks move once, if they move together"
    if told:  # what is in the prefix cache must be evicted before it may be overwritten
        intruder = decoding.cache.add()
        decoding.cache.commit(decoding.cache.prepare([intruder], 4 * BLOCKS))
        decoding.cache.free(intruder)
        assert decoding.cache.stats().blocks_cached == 0
    decoding.poison(range(BLOCKS))
    decoding.cache.swap_in(decoding.seqs[3:])
    decoding.cache.swap_in(decoding.seqs[:3])
    decoding.cache.check_integrity()
    assert decoding.run(COUNT - 7, told) == [*expected, expected[2]]
    assert decoding.cache.stats().bytes_swapped == 0


def test_the_model_notices_its_cache():
    """Two sequences exchange a block in every layer: at least half of the tokens after that are others.

    Within a sequence it would not matter where a key lies, as it knows its position.
    """
    prompts = [[(7 * i + shift) % VOCABULARY for i in range(9)] for shift in (1, 2)]
    written = []
    for exchange in (False, True):
        decoding = Decoding()
        decoding.add(prompts, told=False)
        decoding.run(1, told=False)
        if exchange:
            blocks = decoding.cache._manager.groups[0].table[:2, 0].tolist()
            for tensor in chain(*decoding.cache.tensors()):
                tensor[blocks] = tensor[blocks[::-1]]
        written.append(decoding.run(COUNT, told=False))
    changed = [a != b for one, other in zip(*written, strict=True) for a, b in zip(one[1:], other[1:], strict=True)]
    assert sum(changed) >= len(changed) / 2


@pytest.mark.parametrize("fault", ["gather_blocks", "empty"])
def test_a_swap_that_fails_on_its_way_out_changes_nothing(monkeypatch, expected, fault):
    decoding = Decoding()
    decoding.add(PROMPTS)
    decoding.run(7)
    before = decoding.cache.stats()
    with monkeypatch.context() as patch:
        patch.setattr(transfer if fault == "gather_blocks" else torch, fault, fail)
        with pytest.raises(MemoryError):
            decoding.cache.swap_out(decoding.seqs)
    decoding.cache.check_integrity()
    assert decoding.cache.stats() == before
    assert decoding.run(COUNT - 7) == expected


def test_a_swap_that_fails_on_its_way_in_changes_nothing(monkeypatch, expected):
    """Two parcels, the second of which cannot be stored; the first try has filled blocks that were free."""
    decoding = Decoding()
    decoding.add(PROMPTS)
    decoding.run(7)
    decoding.cache.swap_out(decoding.seqs[0])
    decoding.cache.swap_out(decoding.seqs[2:])
    decoding.cache.clear_prefixes()
    before, store = decoding.cache.stats(), iter([transfer.scatter_blocks, fail])
    with monkeypatch.context() as patch:
        patch.setattr(transfer, "scatter_blocks", lambda *args: next(store)(*args))
        with pytest.raises(MemoryError):
            decoding.cache.swap_in([decoding.seqs[0], *decoding.seqs[2:]])
    decoding.cache.check_integrity()
    assert decoding.cache.stats() == before
    decoding.cache.swap_in([decoding.seqs[0], *decoding.seqs[2:]])
    assert decoding.run(COUNT - 7) == expected


def fail(*_, **__):
    raise MemoryError("no room")


def test_swap_space_is_limited():
    block = PagedKVCache.kv_bytes(3, 4, 2, 16, dtype=torch.float32)
    cache = make_cache(num_blocks=16, swap_space=3 * block)
    seqs = [cache.add(), cache.add()]
    cache.commit(cache.prepare(seqs, [8, 5]))
    cache.swap_out(seqs[0])
    before = cache.stats()
    with pytest.raises(OutOfSwapSpace, match=f"need {2 * block} bytes of swap space, {block} are free") as caught:
        cache.swap_out([seqs[1]])
    assert (cache.stats(), before.bytes_swapped) == (before, 2 * block)
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), OutOfSwapSpace)
    cache.free(seqs[0])
    cache.swap_out(seqs[1])
    with pytest.raises(ValueError, match=f"sequence {seqs[1]} is swapped out: swap it in first"):
        cache.prepare([seqs[1]], 1)
    cache.commit(cache.prepare([cache.add()], 60))
    with pytest.raises(OutOfBlocks, match="the step needs 2 blocks, 1 are free"):
        cache.swap_in(seqs[1])
    cache.check_integrity()


@pytest.mark.parametrize(
    ("tokens", "error", "match"),
    [
        ([1.5, 2.5], TypeError, "tokens must be integers, got float64"),
        (torch.ones(2, 1, dtype=torch.int64), ValueError, r"tokens must be flat: \[n\] integers, got shape \[2, 1\]"),
        ([1], ValueError, "tokens must be the 2 tokens of the step, got 1"),
        (7, ValueError, r"tokens must be flat: \[n\] integers, got 7"),
        (iter([1, 2]), ValueError, "tokens must be flat"),
    ],
)
def test_a_commit_of_bad_tokens_changes_nothing(tokens, error, match):
    cache = make_cache()
    seq = cache.add()
    batch = cache.prepare([seq], 2)
    with pytest.raises(error, match=match):
        cache.commit(batch, tokens)
    cache.rollback(batch)
    assert cache.length(seq) == 0


class Copied:
    """An event of a copy to the host that is over when the test says so."""

    over = False

    def record(self):
        pass

    def query(self):
        return Copied.over


@pytest.mark.parametrize(
    ("tokens", "error", "match"),
    [
        (torch.ones(2, 1, dtype=torch.int64), ValueError, r"tokens must be flat: \[n\] integers, got shape \[2, 1\]"),
        (torch.tensor(7), ValueError, r"tokens must be flat: \[n\] integers, got shape \[\]"),
        (torch.ones(2), TypeError, "tokens on a GPU must be integers that int64 can hold, got torch.float32"),
        (torch.ones(2, dtype=torch.bool), TypeError, "integers that int64 can hold, got torch.bool"),
        (torch.tensor([1, (1 << 63) + 1], dtype=torch.uint64), TypeError, "that int64 can hold, got torch.uint64"),
        (torch.ones(3, dtype=torch.int32), ValueError, "tokens must be the 2 tokens of the step, got 3"),
    ],
    ids=["column", "number", "float32", "bool", "uint64", "three"],
)
def test_a_commit_of_bad_tokens_on_a_gpu_changes_nothing(monkeypatch, tokens, error, match):
    """What a GPU holds is not waited for, so it is judged before it is known. Tensors of the CPU pass for such here."""
    cache = make_cache()
    seq = cache.add()
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "Event", Copied)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(Copied, "over", False)
    cache.commit(cache.prepare([seq], 2), torch.tensor([5, 6], dtype=torch.uint8))
    batch = cache.prepare([seq], 2)
    with pytest.raises(error, match=match):
        cache.commit(batch, tokens)
    cache.commit(batch, torch.tensor([7, 8], dtype=torch.uint32))
    assert cache.length(cache.add([5, 6, 7, 8, 9])) == 0, "nothing has arrived"
    monkeypatch.setattr(Copied, "over", True)
    assert cache.length(cache.add([5, 6, 7, 8, 9])) == 4
    cache.check_integrity()


def test_free_blocks_are_counted():
    cache = make_cache(num_blocks=8)
    seq = cache.add()
    batch = cache.prepare([seq], 9)
    assert cache.num_free_blocks == 5
    cache.commit(batch, range(9))
    cache.free(seq)
    assert (cache.num_free_blocks, cache.stats().blocks_evictable) == (8, 2)
    cache.clear_prefixes()
    assert (cache.num_free_blocks, cache.stats().blocks_evictable) == (8, 0)


@pytest.mark.parametrize(
    ("rows", "runs"),
    [([3, 4, 8], [(3, 5, 0), (8, 9, 2)]), ([0, 1], [(0, 2, 0)]), ([0, 2, 3], [(0, 1, 0), (2, 4, 1)])],
)
def test_consecutive_rows_are_copied_at_once(rows, runs):
    assert list(transfer._runs(np.array(rows))) == runs
