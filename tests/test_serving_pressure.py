"""Ten thousand random requests, and random faults: nothing leaks, nobody starves, nothing that was written is lost."""

import random
from bisect import bisect, insort

import pytest
from serving_fakes import VOCAB, make_cache

from torch_paged.serving import Request, Sampling, Scheduler
from torch_paged.serving.requests import Generation

PATIENCE = 30


def random_request(rng):
    shared = [7] * rng.choice([0, 0, 4, 9])
    return Request(
        prompt=shared + rng.choices(range(VOCAB), k=rng.randint(1, 24)),
        max_new_tokens=rng.randint(1, 20),
        samples=rng.choice([1, 1, 1, 1, 2, 3]),
        stop_tokens=[0, 1],
        priority=rng.choice([0, 0, 0, 1, 2]),
        namespace=rng.choice([None, "a", "b"]),
        sampling=Sampling(seed=0),
    )


def next_token(sample):
    """What follows the tokens of a sample: they alone decide."""
    return hash(tuple(sample.tokens)) % VOCAB


class Watch:
    """Notes when requests begin, and how many that came later began before each."""

    def __init__(self):
        self.waiting, self.begun = {}, []  # the latter sorted
        self.overtaken = 0

    def look(self, generations):
        for number, generation in generations:
            if generation.samples[0].seq >= 0 or generation.finished:
                del self.waiting[number]
                self.overtaken = max(self.overtaken, len(self.begun) - bisect(self.begun, number))
                insort(self.begun, number)


@pytest.mark.parametrize("policy", ["wait", "recompute", "swap"])
def test_ten_thousand_requests(policy):
    """They come faster than they can be served, of three priorities; one in fifty is cancelled somewhere."""
    rng = random.Random(policy)
    cache = make_cache(num_blocks=150, max_seqs=40)
    scheduler = Scheduler(cache, token_budget=80, policy=policy, patience=PATIENCE)
    watch, generations, steps = Watch(), [], 0
    while len(generations) < 10_000 or scheduler.busy:
        while len(generations) < 10_000 and scheduler.load.waiting < 60:
            generation = Generation(random_request(rng))
            scheduler.submit(generation)
            watch.waiting[len(generations)] = generation
            generations.append(generation)
        plan = scheduler.schedule()
        scheduler.complete(plan, [next_token(sample) for sample in plan.samples])
        watch.look(list(watch.waiting.items()))
        if rng.random() < 0.1:
            scheduler.cancel(rng.choice(generations[-200:]))
        steps += 1
        if steps % 200 == 0:
            cache.check_integrity()
    assert watch.overtaken <= 2 * PATIENCE  # priorities span 2
    assert len(watch.begun) == 10_000
    cancelled = 0
    for generation in generations:
        for sample in generation.samples:
            assert sample.finish_reason in ("stop", "length", "cancelled")
            cancelled += sample.finish_reason == "cancelled"
            length = len(sample.written)
            assert length == sample.limit - len(generation.request.prompt) or sample.finish_reason != "length"
            assert (length > 0 and sample.tokens[-1] in (0, 1)) or sample.finish_reason != "stop"
    assert 100 < cancelled < 2000
    assert (scheduler.load.preemptions > 500) == (policy != "wait")
    assert scheduler.load[:3] == (0, 0, 0)
    cache.check_integrity()
    assert cache.num_free_blocks == cache.num_blocks
