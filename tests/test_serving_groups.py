"""The engine on caches with sliding windows and quantised numbers: the same tokens, however little room there is."""

import pytest
import torch
from serving_fakes import VOCAB, weight
from small_model import Model, make_cache

from torch_paged import PagedKVCache
from torch_paged.serving import Engine, Request

WINDOW = 6


def build(windows, **options):
    sizes = dict(block_size=4, num_blocks=32, max_seqs=16, max_seq_len=64, dtype=torch.float32, device="cpu")
    cache = PagedKVCache(len(windows), 1, 1, sliding_window=windows, **(sizes | options))
    for tensor in sum(cache.tensors(), ()):
        tensor.fill_(torch.nan)
    return cache


class WindowedModel:
    """As FakeModel, in every layer over the keys that its window shows."""

    def __init__(self, cache):
        self.layers = list(cache.layers)
        self.tokens = 0

    def __call__(self, tokens, batch):
        total = 0
        stored = batch.slot_mapping >= 0
        self.tokens += int(stored.sum())
        length = int(batch.seq_lens.max())
        positions = torch.arange(length, device=tokens.device)
        for layer in self.layers:
            keys, (table, slots) = layer.key_cache[..., 0, 0], batch.tables(layer.group)
            size = keys.shape[1]
            keys[slots[stored] // size, slots[stored] % size] = tokens[stored].float()
            seen = positions < batch.seq_lens[:, None]
            if layer.sliding_window is not None:
                seen &= positions >= batch.seq_lens[:, None] - layer.sliding_window
            held = keys[table[:, : -(-length // size)].long().clamp(min=0)].flatten(1)[:, :length]
            assert not held[seen].isnan().any()
            total = total + (torch.where(seen, held, 0).long() * weight(positions)).sum(1)
        return torch.nn.functional.one_hot(total % VOCAB, VOCAB).float()


def expected(windows, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        terms = [token * weight(i) for i, token in enumerate(tokens)]
        tokens.append(sum(sum(terms[-(window or 0) :]) for window in windows) % VOCAB)
    return tokens[len(prompt) :]


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("policy", ["wait", "recompute", "swap"])
@pytest.mark.parametrize(("windows", "num_blocks"), [([WINDOW], 12), ([None, WINDOW], 18), ([9, WINDOW], 12)], ids=str)
def test_every_way_of_serving_writes_the_same(windows, num_blocks, policy, ahead, place):
    cache = build(windows, num_blocks=num_blocks, device=place)
    engine = Engine(cache, WindowedModel(cache), policy=policy, ahead=ahead, token_budget=12)
    prompts = [[(3 * i + j) % 5 for j in range(3 + 4 * i)] for i in range(8)]
    requests = [Request(prompt=p, max_new_tokens=20, samples=1 + i % 2) for i, p in enumerate(prompts)]
    for generation, prompt in zip(engine.run(requests), prompts, strict=True):
        assert generation.error is None
        for sample in generation.samples:
            assert sample.written == expected(windows, prompt, 20)
    cache.check_integrity()
    assert all(group.num_free_blocks == group.num_blocks for group in cache.groups)


def test_windows_let_more_run_at_once():
    """40 blocks, less one for the watermark: 49 tokens take 13 of them, or (2 + 8) // 4 + 3 with a window."""
    running = []
    for windows in ([None], [2]):
        cache = build(windows, num_blocks=40)
        engine = Engine(cache, WindowedModel(cache), policy="wait", token_budget=8)
        for i in range(8):
            engine.submit(Request(prompt=[i] * 20, max_new_tokens=30))
        most = 0
        while engine.step():
            most = max(most, engine.load.running)
        running.append(most)
    assert running == [3, 7]


def test_what_no_group_could_hold_is_refused_on_arrival():
    cache = build([None, WINDOW], num_blocks=8)
    engine = Engine(cache, WindowedModel(cache))
    generation = engine.submit(Request(prompt=[1] * 30, max_new_tokens=10))
    assert "take 10 blocks, the cache has 8" in str(generation.error)
    cache = build([WINDOW], num_blocks=3)
    engine = Engine(cache, WindowedModel(cache), token_budget=64)
    assert "take 10 blocks, the cache has 3" in str(engine.submit(Request(prompt=[1] * 30, max_new_tokens=10)).error)


@pytest.mark.parametrize("windows", [None, [None, 6, None]], ids=["full", "mixed"])
def test_quantised_caches_are_swapped_with_their_scales(windows, place):
    """A model writes the same in a small cache, where samples leave and come back, and in a large one."""
    written = []
    for num_blocks in (20, 200):
        cache = make_cache(cache_dtype=torch.int8, num_blocks=num_blocks, sliding_window=windows, device=place)
        engine = Engine(cache, Model(cache.layers).to(place), policy="swap", token_budget=64)
        done = engine.run([Request(prompt=[3 * i + j for j in range(9)], max_new_tokens=24) for i in range(5)])
        assert not any(generation.error for generation in done)
        written.append([generation.samples[0].written for generation in done])
        assert (engine.load.preemptions > 0) == (num_blocks == 20)
    assert written[0] == written[1]
