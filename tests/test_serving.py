"""The engine over a model that reads everything from the cache: results, order, pressure, endings."""

import numpy as np
import pytest
import torch
from serving_fakes import VOCAB, FakeModel, Faulty, expected, make_cache

from torch_paged import OutOfBlocks, OutOfSwapSpace
from torch_paged.serving import Engine, Request, Sampling
from torch_paged.serving import engine as engine_module

PROMPTS = [[5, 17, 3], [11] * 9, list(range(1, 31)), [8], [2, 4, 6, 8, 10, 12, 14], list(range(60, 40, -1))]


def decode(tokens):
    return "".join(chr(32 + token) for token in tokens)


def make_engine(cache=None, **options):
    cache = make_cache() if cache is None else cache
    model = FakeModel(cache)
    return Engine(cache, model, **options), cache, model


def submit(request, **options):
    engine, _, _ = make_engine(**options)
    return engine.submit(request)


def assert_empty(engine, cache):
    assert engine.load[:3] == (0, 0, 0)
    residents = engine._scheduler._residents
    assert (residents._running_rows, residents._swapped_rows) == (0, 0)
    cache.check_integrity()
    assert cache.num_free_blocks == cache.num_blocks


@pytest.mark.parametrize("ahead", [False, True], ids=["in-turn", "ahead"])
@pytest.mark.parametrize("policy", ["wait", "recompute", "swap"])
@pytest.mark.parametrize("num_blocks", [14, 200])
@pytest.mark.parametrize("token_budget", [3, 16, 512])
@pytest.mark.parametrize("buckets", [None, (1, 2, 4, 8, 16, 64)], ids=["unpadded", "buckets"])
def test_every_way_of_serving_writes_the_same(ahead, policy, num_blocks, token_budget, buckets):
    cache = make_cache(num_blocks=num_blocks, buckets=buckets)
    engine, _, model = make_engine(cache, ahead=ahead, policy=policy, token_budget=token_budget)
    generations = engine.run(Request(prompt=prompt, max_new_tokens=20, stop_tokens=[7]) for prompt in PROMPTS)
    for prompt, generation in zip(PROMPTS, generations, strict=True):
        written = generation.samples[0].written
        assert written == expected(prompt, 20, stop=[7])
        assert generation.samples[0].finish_reason == ("stop" if written[-1] == 7 else "length")
    assert max(tokens for tokens, _ in model.steps) <= token_budget
    assert_empty(engine, cache)
    if num_blocks == 14 and token_budget == 512:
        assert (engine.load.preemptions > 0) == (policy != "wait")


@pytest.mark.parametrize("ahead", [False, True], ids=["in-turn", "ahead"])
def test_a_cached_prefix_is_not_read_again(ahead):
    """A system prompt of 24 tokens before each of these: read once in a namespace, and never found in another."""
    system = list(range(30, 54))
    for own_namespaces in (False, True):
        engine, cache, model = make_engine(make_cache(num_blocks=200), ahead=ahead)
        for number, prompt in enumerate(PROMPTS):
            namespace = number if own_namespaces else "all"
            request = Request(prompt=system + prompt, max_new_tokens=6, namespace=namespace)
            assert engine.run([request])[0].samples[0].written == expected(system + prompt, 6)
        read = sum(tokens for tokens, _ in model.steps)
        every_token = sum(len(system) + len(prompt) + 5 for prompt in PROMPTS)
        assert read == every_token - (0 if own_namespaces else (len(PROMPTS) - 1) * len(system))
        assert_empty(engine, cache)


def test_what_gave_way_is_found_in_the_prefix_cache():
    """Nothing else has taken the blocks of the sample that gave way: it reads little again."""
    engine, cache, model = make_engine(make_cache(num_blocks=12))
    first, second = [3] * 4 + list(range(8)), list(range(20, 32))
    generations = engine.run([Request(prompt=prompt, max_new_tokens=16) for prompt in (first, second)])
    assert [g.samples[0].written for g in generations] == [expected(prompt, 16) for prompt in (first, second)]
    assert engine.load.preemptions == 1
    assert sum(tokens for tokens, _ in model.steps) < 2 * (12 + 15) + 12
    assert_empty(engine, cache)


def test_what_is_swapped_out_is_not_read_again():
    """Three samples of a prompt and another request in 14 blocks: some leave for host memory and come back."""
    engine, cache, model = make_engine(make_cache(num_blocks=14), policy="swap")
    forked = engine.submit(Request(prompt=range(9), max_new_tokens=20, samples=3))
    other = engine.submit(Request(prompt=[50] * 9, max_new_tokens=20, namespace="other"))
    swapped = 0
    while engine.step():
        swapped = max(swapped, engine.load.swapped)
    assert swapped >= 1
    assert engine.load.preemptions >= 1
    assert [sample.written for sample in forked.samples] == [expected(range(9), 20)] * 3
    assert other.samples[0].written == expected([50] * 9, 20)
    assert sum(tokens for tokens, _ in model.steps) == 8 + 3 * 20 + 9 + 19
    assert_empty(engine, cache)


def test_swapped_samples_give_up_their_rows_to_a_more_urgent_request():
    """All rows of the cache are taken by samples in host memory, nothing runs, and the head of the queue needs one."""
    engine, cache, _ = make_engine(make_cache(num_blocks=8, max_seqs=2), policy="swap")
    slow = [engine.submit(Request(prompt=[1 + i] * 12, max_new_tokens=16)) for i in range(2)]
    while not engine.load.swapped:
        engine.step()
    urgent = engine.submit(Request(prompt=[9] * 3, max_new_tokens=4, samples=2, priority=1))
    while engine.step():
        pass
    assert [generation.samples[0].written for generation in slow] == [expected([1 + i] * 12, 16) for i in range(2)]
    assert [sample.written for sample in urgent.samples] == [expected([9] * 3, 4)] * 2
    assert_empty(engine, cache)


@pytest.mark.parametrize("ahead", [False, True], ids=["in-turn", "ahead"])
@pytest.mark.parametrize("num_blocks", [9, 64])
def test_samples_of_one_prompt_share_it(ahead, num_blocks):
    """Four samples of a prompt of 18 tokens, which is read once and kept once."""
    engine, cache, model = make_engine(make_cache(num_blocks=num_blocks), ahead=ahead)
    sampling = Sampling(temperature=1.0, seed=1)
    request = Request(prompt=range(1, 19), max_new_tokens=5, samples=4, sampling=sampling)
    generation = engine.submit(request)
    fullest = 0
    while engine.step():
        fullest = max(fullest, cache.stats().blocks_used)
    assert len({tuple(sample.written) for sample in generation.samples}) == 4
    if num_blocks == 64:
        assert fullest == 4 + 4 * 2  # 16 tokens shared; the last two and what follows, each for itself
        assert sum(tokens for tokens, _ in model.steps) == 17 + 4 * 5
    alone = Request(prompt=range(1, 19), max_new_tokens=5, sampling=sampling)
    assert engine.run([alone])[0].samples[0].written == generation.samples[0].written
    assert_empty(engine, cache)


def test_prompts_of_any_integers():
    engine, _, _ = make_engine()
    prompts = torch.tensor([5, 17, 3]), torch.tensor([5, 17, 3]).numpy(), (5, 17, 3)
    for prompt in prompts:
        assert engine.run([Request(prompt=prompt, max_new_tokens=4)])[0].samples[0].written == expected([5, 17, 3], 4)
    with pytest.raises(TypeError, match="prompt must be integers, got float64"):
        Request(prompt=[0.5])


def test_a_prompt_of_one_token_is_forked_at_once():
    engine, cache, _ = make_engine()
    (generation,) = engine.run([Request(prompt=[9], max_new_tokens=3, samples=3)])
    assert [sample.written for sample in generation.samples] == [expected([9], 3)] * 3
    assert_empty(engine, cache)


def test_stop_strings_cut_the_text(place):
    engine, cache, _ = make_engine(make_cache(device=place), decode=decode)
    whole = decode(expected([5, 17, 3], 20))
    stop = whole[6:9]
    pieces = list(engine.stream(Request(prompt=[5, 17, 3], max_new_tokens=20, stop_strings=["never", stop])))
    assert "".join(piece.text for piece in pieces) == whole[: whole.index(stop)]
    assert [piece.token for piece in pieces] == expected([5, 17, 3], 20)[: whole.index(stop) + 3]
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["stop"]
    while engine.step():  # on a GPU one is still in flight
        pass
    assert_empty(engine, cache)


def test_a_stop_string_needs_decode():
    engine, _, _ = make_engine()
    with pytest.raises(ValueError, match="stop_strings need an Engine with decode="):
        engine.submit(Request(prompt=[1], stop_strings=["x"]))


def test_logprobs_are_those_of_the_model():
    engine, _, _ = make_engine()
    sampling = Sampling(temperature=0.5, top_k=1, logprobs=2)
    with_them, without = engine.run(
        [Request(prompt=[3], max_new_tokens=5, sampling=sampling), Request(prompt=[4], max_new_tokens=5)]
    )
    (sample,) = with_them.samples
    hit = torch.nn.functional.one_hot(torch.tensor(0), VOCAB).float().log_softmax(0)
    assert [entry.top[0] for entry in sample.logprobs] == [(token, pytest.approx(hit[0])) for token in sample.written]
    assert all(
        entry.logprob == entry.top[0][1] and entry.top[1][1] == pytest.approx(hit[1]) for entry in sample.logprobs
    )
    assert without.samples[0].logprobs == []


def test_requests_come_at_any_moment():
    engine, cache, _ = make_engine(token_budget=8)
    generations = []
    for prompt in PROMPTS:
        generations.append(engine.submit(Request(prompt=prompt, max_new_tokens=10)))
        engine.step()
        engine.step()
    while engine.step():
        pass
    assert [generation.samples[0].written for generation in generations] == [expected(p, 10) for p in PROMPTS]
    assert_empty(engine, cache)


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


def test_the_more_urgent_go_first_and_the_first_come_first():
    engine, _, _ = make_engine(max_running=1)
    priorities = [0, 0, 1, 2, 1, 0]
    generations = [
        engine.submit(Request(prompt=[i + 1], max_new_tokens=2, priority=p)) for i, p in enumerate(priorities)
    ]
    ended = []
    while engine.step():
        ended += [i for i, generation in enumerate(generations) if generation.finished and i not in ended]
    ended += [i for i in range(6) if i not in ended]
    assert ended == [3, 2, 4, 0, 1, 5]


def test_an_endless_stream_of_urgent_requests_starves_nobody():
    engine, _, _ = make_engine(max_running=1, patience=10)
    patient = engine.submit(Request(prompt=[1], max_new_tokens=3))
    urgent = []
    while not patient.finished:
        urgent.append(engine.submit(Request(prompt=[2], max_new_tokens=2, priority=1)))
        engine.step()
        assert len(urgent) < 40
    assert 5 <= sum(generation.finished for generation in urgent) <= 12


@pytest.mark.parametrize("policy", ["wait", "recompute", "swap"])
@pytest.mark.parametrize("watermark", [0.0, 0.25, 0.5])
def test_admission_leaves_the_watermark_free(policy, watermark):
    """Requests that never grow past their prompts' last blocks: 3 of 20 blocks each, so that 6, 5 or 3 fit at once."""
    engine, cache, _ = make_engine(make_cache(num_blocks=20), policy=policy, watermark=watermark)
    generations = [engine.submit(Request(prompt=[i + 1] * 9, max_new_tokens=3)) for i in range(10)]
    most, fewest_free = 0, 20
    while engine.step():
        most, fewest_free = max(most, engine.load.running), min(fewest_free, cache.num_free_blocks)
    assert most == {0.0: 6, 0.25: 5, 0.5: 3}[watermark]
    assert fewest_free == 20 - 3 * most >= 20 * watermark
    assert all(generation.samples[0].finish_reason == "length" for generation in generations)
    assert_empty(engine, cache)


def test_the_watermark_holds_nobody_back_who_is_alone():
    engine, cache, _ = make_engine(make_cache(num_blocks=10), watermark=0.9)
    (generation,) = engine.run([Request(prompt=[1] * 20, max_new_tokens=20)])
    assert generation.samples[0].written == expected([1] * 20, 20)
    assert_empty(engine, cache)


def test_who_gives_way_is_the_least_urgent():
    engine, _, _ = make_engine(make_cache(num_blocks=9))
    low = engine.submit(Request(prompt=[1] * 12, max_new_tokens=16, priority=-1))
    engine.step()
    high = engine.submit(Request(prompt=[2] * 12, max_new_tokens=16))
    while not high.finished:
        engine.step()
    assert engine.load.preemptions >= 1
    assert not low.finished
    while engine.step():
        pass
    assert low.samples[0].written == expected([1] * 12, 16)


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
    generations = [engine.submit(Request(prompt=prompt, max_new_tokens=12)) for prompt in PROMPTS]
    busy, faults = True, 0
    while busy:
        try:
            busy = engine.step()
        except ArithmeticError:
            faults += 1
            cache.check_integrity()
    assert faults > 5
    assert [generation.samples[0].written for generation in generations] == [expected(p, 12) for p in PROMPTS]
    assert_empty(engine, cache)


@pytest.mark.parametrize("ahead", [False, True], ids=["in-turn", "ahead"])
def test_results_that_do_not_arrive_lose_nothing(ahead, monkeypatch):
    engine, cache, _ = make_engine(make_cache(num_blocks=14), ahead=ahead, token_budget=16)
    calls = iter(range(10_000))

    def failing(_):
        if next(calls) % 5 == 4:
            raise ArithmeticError("a fault")

    monkeypatch.setattr(engine_module, "_logprobs", failing)
    generations = [engine.submit(Request(prompt=prompt, max_new_tokens=12)) for prompt in PROMPTS]
    busy, faults = True, 0
    while busy:
        try:
            busy = engine.step()
        except ArithmeticError:
            faults += 1
            cache.check_integrity()
    assert faults > 3
    assert [generation.samples[0].written for generation in generations] == [expected(p, 12) for p in PROMPTS]
    assert_empty(engine, cache)


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


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Request(prompt=[]), "prompt must have at least one token"),
        (lambda: Request(prompt=[3, -1]), "prompt must be token ids of at least 0, got -1"),
        (lambda: Request(prompt=[1], max_new_tokens=0), "max_new_tokens must be at least 1, got 0"),
        (lambda: Request(prompt=[1], samples=0), "samples must be at least 1, got 0"),
        (lambda: Request(prompt=[1], stop_strings="x"), "stop_strings must be a list of strings, got 'x'"),
        (lambda: Request(prompt=[1], stop_strings=[""]), "stop_strings must not be empty"),
        (lambda: Request(prompt=[1], priority=float("nan")), "priority must be finite, got nan"),
        (lambda: Sampling(temperature=-1), "temperature must be at least 0 and finite, got -1"),
        (lambda: Sampling(top_k=-1), "top_k must be at least 0, got -1"),
        (lambda: Sampling(top_p=0), r"top_p must lie in \(0, 1\], got 0"),
        (lambda: Sampling(min_p=2), r"min_p must lie in \[0, 1\], got 2"),
        (lambda: Sampling(logprobs=-1), "logprobs must be at least 0, got -1"),
        (lambda: Request(prompt=[1], priority=10**400), "priority must be finite, got inf"),
        (lambda: Request(prompt=[1], stop_tokens=5), r"stop_tokens must be flat: \[n\] integers, got 5"),
        (lambda: Request(prompt="Hello"), r"prompt must be flat: \[n\] integers, got 'Hello'"),
        (lambda: Sampling(seed=-(1 << 64)), "seed must be at least -9223372036854775808, got"),
        (lambda: submit(Request(prompt=[3, 97]), vocab_size=97), "prompt must be token ids below 97, got 97"),
        (lambda: make_engine(policy="hope"), "policy must be one of wait, recompute, swap, got 'hope'"),
        (lambda: make_engine(token_budget=0), "token_budget must be at least 1, got 0"),
        (lambda: make_engine(max_running=0), "max_running must be at least 1, got 0"),
        (lambda: make_engine(watermark=1), r"watermark must lie in \[0, 1\), got 1"),
        (lambda: make_engine(patience=-1), "patience must be at least 0, got -1"),
        (lambda: make_engine(vocab_size=0), "vocab_size must be at least 1, got 0"),
    ],
)
def test_errors_say_what_was_expected(make, why):
    with pytest.raises(ValueError, match=why):
        make()


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Request(prompt=[1], max_new_tokens=2.5), "max_new_tokens must be an integer, got 2.5"),
        (lambda: Request(prompt=[1], samples=2.0), "samples must be an integer, got 2.0"),
        (lambda: Request(prompt=[1], stop_tokens=[0.5]), "stop_tokens must be integers, got float64"),
        (
            lambda: Request(prompt=[1], sampling=dict(temperature=1)),
            "sampling must be a Sampling, got {'temperature': 1}",
        ),
        (lambda: Request(prompt=[1], stop_strings=["x", 5]), r"stop_strings must be strings, got \('x', 5\)"),
        (lambda: Request(prompt=[1], stop_strings=5), "stop_strings must be a list of strings, got 5"),
        (lambda: Request(prompt=[1], priority="high"), "priority must be a real number, got 'high'"),
        (lambda: Request(prompt=[1], namespace=[]), r"namespace must be hashable, got \[\]"),
        (lambda: submit([1, 2, 3]), r"request must be a Request, got \[1, 2, 3\]"),
        (lambda: Engine(make_cache(), None), "model must be callable, got None"),
        (lambda: make_engine(decode="utf-8"), "decode must be callable, got 'utf-8'"),
        (lambda: make_engine(token_budget=1.5), "token_budget must be an integer, got 1.5"),
        (lambda: make_engine(max_running=2.0), "max_running must be an integer, got 2.0"),
        (lambda: make_engine(vocab_size="many"), "vocab_size must be an integer, got 'many'"),
        (lambda: Sampling(temperature="hot"), "temperature must be a real number, got 'hot'"),
        (lambda: Sampling(top_p=None), "top_p must be a real number, got None"),
        (lambda: Sampling(min_p=1j), "min_p must be a real number, got 1j"),
        (lambda: Sampling(top_k=1.5), "top_k must be an integer, got 1.5"),
        (lambda: Sampling(seed=1.5), "seed must be an integer, got 1.5"),
        (lambda: Sampling(logprobs=1.5), "logprobs must be an integer, got 1.5"),
    ],
)
def test_what_no_step_could_serve_is_refused_on_arrival(make, why):
    """In a step it would hit everybody else's requests too."""
    with pytest.raises(TypeError, match=why):
        make()


def test_extremes_are_served():
    """Integers beyond 64 bits, stop tokens as a tensor, numbers of NumPy."""
    engine, cache, _ = make_engine()
    stop = torch.tensor(expected([3], 3)[2:])
    sampling = Sampling(temperature=np.float32(1e-30), top_k=1 << 70, seed=1 << 90, logprobs=1 << 70)
    request = Request(prompt=[3], max_new_tokens=np.int64(9), sampling=sampling, stop_tokens=stop)
    (generation,) = engine.run([request])
    assert generation.samples[0].written == expected([3], 3)
    assert len(generation.samples[0].logprobs[0].top) == VOCAB
    assert_empty(engine, cache)
