"""Cancelled, too large, or hit by a fault: nothing is lost, nothing leaks, and nobody else notices."""

import copy
import gc
import itertools
import pickle
import weakref

import pytest
import torch
from serving_fakes import PROMPTS, VOCAB, FakeModel, Faulty, assert_empty, decode, expected, make_cache, make_engine

from torch_paged import OutOfBlocks, OutOfSwapSpace
from torch_paged.serving import Engine, Request
from torch_paged.serving import engine as engine_module


@pytest.mark.parametrize("ahead", [False, True], ids=["in-turn", "ahead"])
@pytest.mark.parametrize("steps", range(7))
def test_cancelled_at_any_moment(ahead, steps):
    """Waiting, reading its prompt, about to fork, in flight, writing; what others write is as without it."""
    engine, cache, _ = make_engine(ahead=ahead, token_budget=6)
    kept = engine.submit(Request(prompt=PROMPTS[0], max_new_tokens=12))
    cancelled = engine.submit(Request(prompt=PROMPTS[1], max_new_tokens=12, samples=2))
    for _ in range(steps):
        engine.step()
    engine.cancel(cancelled)
    engine.cancel(cancelled)
    assert cancelled.finished
    cache.check_integrity()
    while engine.step():
        pass
    assert [sample.finish_reason for sample in cancelled.samples] == ["cancelled"] * 2
    assert kept.samples[0].written == expected(PROMPTS[0], 12)
    engine.cancel(kept)
    assert kept.samples[0].finish_reason == "length"
    assert_empty(engine, cache)


@pytest.mark.parametrize("policy", ["recompute", "swap"])
def test_cancelled_while_out_of_the_cache(policy):
    """Both samples of the request that gave way, and one of the two alone that stays in."""
    engine, cache, _ = make_engine(make_cache(num_blocks=12), policy=policy)
    kept = engine.submit(Request(prompt=[3] * 12, max_new_tokens=20))
    cancelled = engine.submit(Request(prompt=[4] * 12, max_new_tokens=20, samples=2))
    while not (engine.load.swapped if policy == "swap" else engine.load.preemptions):
        engine.step()
    engine.cancel(cancelled)
    assert engine.load[:3] == (1, 0, 0)
    assert cache.stats().bytes_swapped == 0
    cache.check_integrity()
    while engine.step():
        pass
    assert [sample.finish_reason for sample in cancelled.samples] == ["cancelled"] * 2
    assert kept.samples[0].written == expected([3] * 12, 20)
    assert_empty(engine, cache)


def test_a_stream_closed_early_cancels(place):
    engine, cache, _ = make_engine(make_cache(device=place))
    stream = engine.stream(Request(prompt=[1, 2, 3], max_new_tokens=30))
    assert next(stream).token == expected([1, 2, 3], 1)[0]
    stream.close()
    while engine.step():
        pass
    assert_empty(engine, cache)


@pytest.mark.parametrize("ahead", [False, True], ids=["in-turn", "ahead"])
def test_a_stream_loses_nothing_while_others_step(ahead):
    """Two streams in turns, and whole requests between the pieces of one."""
    engine, cache, _ = make_engine(ahead=ahead)
    streams = [engine.stream(Request(prompt=prompt, max_new_tokens=6)) for prompt in ([1], [2])]
    pieces = list(itertools.zip_longest(*streams))
    for prompt, its in zip(([1], [2]), zip(*pieces, strict=True), strict=True):
        its = [piece for piece in its if piece is not None]
        assert [piece.token for piece in its if piece.token is not None] == expected(prompt, 6)
        assert its[-1].finish_reason == "length"
    tokens = []
    for piece in engine.stream(Request(prompt=[3], max_new_tokens=6)):
        tokens.append(piece.token)
        engine.run([Request(prompt=[4], max_new_tokens=20)])
    assert tokens == expected([3], 6)
    assert piece.finish_reason == "length"
    assert_empty(engine, cache)


def test_of_requests_that_run_together_all_or_none_are_taken():
    engine, cache, _ = make_engine(vocab_size=VOCAB)
    with pytest.raises(ValueError, match="token ids below 97, got 200"):
        engine.run([Request(prompt=[1]), Request(prompt=[200])])
    assert not engine.busy
    assert_empty(engine, cache)


def test_a_generation_is_cancelled_where_it_was_submitted():
    engine, cache, _ = make_engine()
    other, other_cache, _ = make_engine()
    generation = engine.submit(Request(prompt=[3], max_new_tokens=9))
    for _ in range(3):
        with pytest.raises(ValueError, match="was not submitted here"):
            other.cancel(generation)
        with pytest.raises(TypeError, match="generation must be a Generation, got None"):
            other.cancel(None)
        engine.step()
    while engine.step():
        pass
    assert generation.samples[0].written == expected([3], 9)
    assert_empty(engine, cache)
    assert_empty(other, other_cache)


def test_results_outlive_their_engine():
    """They keep no cache alive, and can be copied."""
    engine, cache, _ = make_engine()
    (generation,) = engine.run([Request(prompt=[3], max_new_tokens=9)])
    memory = weakref.ref(cache)
    del engine, cache, _
    gc.collect()
    assert memory() is None
    for copied in (copy.deepcopy(generation), pickle.loads(pickle.dumps(generation))):
        assert copied.samples[0].written == expected([3], 9)


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (Request(prompt=[1] * 50, max_new_tokens=16), "take 65 places, max_seq_len is 64"),
        (Request(prompt=[1] * 30, max_new_tokens=20), "take 13 blocks, the cache has 12"),
        (Request(prompt=[1], max_new_tokens=2, samples=17), "17 samples cannot run at once, 16 can"),
    ],
    ids=["max_seq_len", "blocks", "rows"],
)
def test_what_can_never_fit_fails_alone(request_, why):
    engine, cache, _ = make_engine(make_cache(num_blocks=12))
    failed, other = engine.run([request_, Request(prompt=[3], max_new_tokens=9)])
    assert {sample.finish_reason for sample in failed.samples} == {"error"}
    with pytest.raises(ValueError, match=why):
        list(engine.stream(request_))
    assert other.samples[0].written == expected([3], 9)
    assert_empty(engine, cache)


def test_a_sample_that_does_not_fit_beside_a_foreign_sequence_fails_alone():
    """The cache is shared with a sequence of somebody else, so it has fewer blocks than it seems."""
    engine, cache, _ = make_engine(make_cache(num_blocks=12))
    foreign = cache.add()
    cache.commit(cache.prepare([foreign], 36))
    small, large = engine.run([Request(prompt=[3], max_new_tokens=9), Request(prompt=[4] * 5, max_new_tokens=20)])
    assert small.samples[0].written == expected([3], 9)
    assert large.samples[0].finish_reason == "error"
    assert "does not fit into the cache alone: the step needs 1 blocks, 0 are free" in str(large.error)
    assert large.samples[0].written == expected([4] * 5, 20)[:8]
    cache.free(foreign)
    assert_empty(engine, cache)


def faults_survived(engine, cache):
    """How many steps raised ArithmeticError until every prompt had its answer, the same as without."""
    generations = [engine.submit(Request(prompt=prompt, max_new_tokens=12)) for prompt in PROMPTS]
    busy, faults = True, 0
    while busy:
        try:
            busy = engine.step()
        except ArithmeticError:
            faults += 1
            cache.check_integrity()
    assert [generation.samples[0].written for generation in generations] == [expected(p, 12) for p in PROMPTS]
    assert_empty(engine, cache)
    return faults


@pytest.mark.parametrize("ahead", [False, True], ids=["in-turn", "ahead"])
def test_a_model_that_raises_loses_nothing(ahead):
    engine, cache, model = make_engine(make_cache(num_blocks=14), ahead=ahead, token_budget=16)
    calls = 0

    def failing(tokens, batch):
        nonlocal calls
        calls += 1
        logits = model(tokens, batch)
        if calls % 3 == 0:
            raise ArithmeticError("a fault")
        return logits

    engine._model = failing
    assert faults_survived(engine, cache) > 5


@pytest.mark.parametrize("ahead", [False, True], ids=["in-turn", "ahead"])
def test_results_that_do_not_arrive_lose_nothing(ahead, monkeypatch):
    engine, cache, _ = make_engine(make_cache(num_blocks=14), ahead=ahead, token_budget=16)
    calls = iter(range(10_000))

    def failing(_):
        if next(calls) % 5 == 4:
            raise ArithmeticError("a fault")

    monkeypatch.setattr(engine_module, "_logprobs", failing)
    assert faults_survived(engine, cache) > 3


@pytest.mark.parametrize("ahead", [False, True], ids=["in-turn", "ahead"])
@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("swap_out", OutOfSwapSpace(9, 8)),
        ("swap_in", MemoryError()),
        ("swap_in", OutOfBlocks(3, 1, 0)),
        ("fork", ValueError("rows")),
        ("prepare", OutOfBlocks(3, 1, 0)),
    ],
    ids=["swap-out", "swap-in", "swap-in-blocks", "fork", "prepare"],
)
def test_a_cache_that_raises_loses_nothing(name, fault, ahead):
    """In every third step; samples have too few blocks and rows."""
    cache = make_cache(num_blocks=16, max_seqs=5)
    faulty, model = Faulty(cache), FakeModel(cache)
    engine = Engine(faulty, model, policy="swap", ahead=ahead)
    prompts = [*PROMPTS[:2], *PROMPTS[3:5], [60] * 9]
    generations = [engine.submit(Request(prompt=p, max_new_tokens=24, samples=1 + (len(p) == 9))) for p in prompts]
    steps = 0
    while engine.step():
        cache.check_integrity()
        steps += 1
        if steps % 3 == 0 and engine.load.running > 1:
            faulty.faults = {name: fault}
    assert name in faulty.raised
    for prompt, generation in zip(prompts, generations, strict=True):
        assert [sample.written for sample in generation.samples] == [expected(prompt, 24)] * len(generation.samples)
    assert_empty(engine, cache)


def test_logits_of_the_wrong_rows_are_refused():
    cache = make_cache()
    engine = Engine(cache, lambda tokens, _: torch.zeros(len(tokens), VOCAB))
    engine.submit(Request(prompt=[1, 2, 3], max_new_tokens=4))
    with pytest.raises(ValueError, match=r"rows batch\.last_token, expected 1 rows, got shape \[3, 97\]"):
        engine.step()
    engine.fail(RuntimeError("no use"))
    assert_empty(engine, cache)


def test_a_decode_that_raises_ends_its_own_sample():
    def fragile(tokens):
        if 40 in tokens:
            raise UnicodeError("40")
        return decode(tokens)

    engine, cache, _ = make_engine(decode=fragile)
    first = [next(p for p in range(1, 97) if (40 in expected([p], 9)) == has) for has in (True, False)]
    broken, fine = engine.run(Request(prompt=[token], max_new_tokens=9) for token in first)
    assert isinstance(broken.error, UnicodeError)
    assert fine.samples[0].written == expected(first[1:], 9)
    assert_empty(engine, cache)
