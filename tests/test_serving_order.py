"""Who is served first, who waits and who gives way."""

import math

import pytest
from serving_fakes import assert_empty, expected, make_cache, make_engine

from torch_paged.serving import Request


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


@pytest.mark.parametrize(
    ("patience", "priorities", "order"),
    [
        (1000, [0, 0, 1, 2, 1, 0], [3, 2, 4, 0, 1, 5]),
        (math.inf, [0, 0, 1, 2, 1, 0], [3, 2, 4, 0, 1, 5]),
        (math.inf, [0, -0.1, 0.1, 0.2, 0.1, 0], [3, 2, 4, 0, 5, 1]),
        (10**400, [0, -0.1, 0.1, 0.2, 0.1, 0], [3, 2, 4, 0, 5, 1]),
        (5, [0, -0.1, 0.1, 0.2, 0.1, 0], [0, 1, 2, 3, 4, 5]),
        (0, [0, 0, 1, 2, 1, 0], [0, 1, 2, 3, 4, 5]),
    ],
    ids=["default", "inf", "inf-close", "huge", "five", "none"],
)
def test_the_more_urgent_go_first_and_the_first_come_first(patience, priorities, order):
    engine, _, _ = make_engine(max_running=1, patience=patience)
    generations = [
        engine.submit(Request(prompt=[i + 1], max_new_tokens=2, priority=p)) for i, p in enumerate(priorities)
    ]
    ended = []
    while engine.step():
        ended += [i for i, generation in enumerate(generations) if generation.finished and i not in ended]
    ended += [i for i in range(6) if i not in ended]
    assert ended == order


def test_an_endless_stream_of_urgent_requests_starves_nobody():
    engine, _, _ = make_engine(max_running=1, patience=10)
    patient = engine.submit(Request(prompt=[1], max_new_tokens=3))
    urgent = []
    while not patient.finished:
        urgent.append(engine.submit(Request(prompt=[2], max_new_tokens=2, priority=1)))
        engine.step()
        assert len(urgent) < 40
    assert 5 <= sum(generation.finished for generation in urgent) <= 12


def test_without_end_to_patience_the_urgent_always_go_first():
    """However many came later; and whoever runs gives way to them, never they to it."""
    engine, cache, _ = make_engine(make_cache(num_blocks=9), patience=math.inf)
    low = engine.submit(Request(prompt=[1] * 12, max_new_tokens=16, priority=-1e-9))
    engine.step()
    for _ in range(8):
        high = engine.submit(Request(prompt=[2] * 12, max_new_tokens=16))
        while not high.finished:
            engine.step()
        assert not low.finished
    assert engine.load.preemptions >= 1
    while engine.step():
        pass
    assert low.samples[0].written == expected([1] * 12, 16)
    assert_empty(engine, cache)


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
