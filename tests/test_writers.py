"""What is known of decoding samples all together agrees with what each of them says."""

import random

import pytest
from serving_fakes import VOCAB, make_cache

from torch_paged.serving import Request, Sampling, Scheduler
from torch_paged.serving.requests import Generation, TokenLogprobs
from torch_paged.serving.text import TextStop
from torch_paged.serving.writers import Writers


def decoding(*lengths, **options):
    """Samples with so many tokens, the last one unread, that may write 3 more."""
    samples = []
    for number, length in enumerate(lengths):
        prompt = [100 * (number + 1) + place for place in range(length)]
        (sample,) = Generation(Request(prompt=prompt, **(dict(max_new_tokens=3) | options))).samples
        sample.seq, sample.cached = 10 + number, length - 1
        samples.append(sample)
    return samples


def step(writers, drawn, logprobs=None):
    writers.open()
    read = writers.tokens(writers.steps).tolist()
    ended = {}
    writers.write(writers.steps, drawn, logprobs, ended)
    return read, ended


def test_they_read_what_they_drew_and_end_at_their_limits():
    short, long = samples = decoding(2, 4)
    long.limit = 9
    writers = Writers.of(samples)
    assert step(writers, [5, 6]) == ([101, 203], {})
    assert step(writers, [7, 8]) == ([5, 6], {})
    assert writers.at_limit(2) == []
    assert step(writers, [9, 9]) == ([7, 8], {"length": [short]})
    assert writers.at_limit(3) == [0]
    assert (short.tokens, long.tokens) == ([100, 101, 5, 7, 9], [200, 201, 202, 203, 6, 8, 9])
    assert [sample.cached for sample in samples] == [4, 6]


def test_a_stop_token_ends_its_own_sample():
    first, second = decoding(1, 1, stop_tokens=[5])
    second.stop_tokens = frozenset({6})
    writers = Writers.of([first, second])
    assert step(writers, [6, 5]) == ([100, 200], {})
    assert step(writers, [5, 5]) == ([6, 5], {"stop": [first]})


def test_who_wants_text_or_logprobs_gets_them():
    plain, text = decoding(1, 1)
    (logprobs,) = decoding(1, sampling=Sampling(logprobs=0))
    text.text = TextStop(lambda tokens: "".join(map(chr, tokens)), ["b"])
    writers = Writers.of([plain, text, logprobs])
    numbers = [TokenLogprobs(-float(i), []) for i in range(3)]
    _, ended = step(writers, [ord("b")] * 3, numbers)
    assert ended == {"stop": [text]}
    assert text.text.stopped
    assert (plain.logprobs, logprobs.logprobs) == ([], numbers[2:])


def test_the_last_ones_take_the_places_of_those_that_leave():
    samples = decoding(1, 2, 3, 4, 5)
    (joining,) = decoding(7)
    writers = Writers.of(samples)
    step(writers, [1, 2, 3, 4, 5])
    following = writers.followed_by([0, 3], [joining])
    assert following.samples == [samples[4], samples[1], samples[2], joining]
    assert following.seqs.tolist() == [sample.seq for sample in following.samples]
    assert step(following, [1, 2, 3, 4])[0] == [5, 2, 3, 106]
    assert [following.at_limit(number) for number in (1, 2, 3)] == [[], [0, 1, 2], [0, 1, 2, 3]]
    assert writers.samples == samples, "a step in flight still has them"


def test_what_is_in_flight_is_read_from_the_device():
    samples = decoding(1, 2)
    for row, sample in enumerate(samples):
        sample.row = row
    writers = Writers.of(samples)
    writers.open()
    following = writers.followed_by([0], [])
    following.open()
    assert following.tokens(1).tolist() == [~1]
    writers.write(1, [5, 6], None, {})
    assert following.tokens(1).tolist() == [6]


def test_who_has_ended_is_given_nothing():
    samples = decoding(1, 1)
    writers = Writers.of(samples)
    samples[0].finish_reason = "cancelled"
    writers.whole = False
    assert step(writers, [5, 6])[1] == {}
    assert [len(sample.written) for sample in samples] == [0, 1]


def test_an_undone_step_was_none():
    (sample,) = decoding(3)
    writers = Writers.of([sample])
    step(writers, [5])
    writers.open()
    writers.undo()
    assert (sample.cached, writers.steps) == (3, 1)
    assert step(writers, [6])[0] == [5]


@pytest.mark.parametrize("policy", ["wait", "recompute", "swap"])
@pytest.mark.parametrize("in_flight", [0, 1, 2])
def test_every_plan_reads_what_its_samples_hold(policy, in_flight):
    """With steps undone, samples cancelled and blocks short. What is not known yet, the step before draws."""
    rng = random.Random(f"{policy} {in_flight}")
    cache = make_cache(num_blocks=40, max_seqs=12)
    scheduler = Scheduler(cache, token_budget=40, policy=policy)
    generations, opened, lengths, drawn = [], [], {}, []
    while len(generations) < 300 or scheduler.busy:
        if len(generations) < 300 and scheduler.load.waiting < 6:
            prompt, new = rng.choices(range(2, VOCAB), k=rng.randint(1, 30)), rng.randint(1, 20)
            request = Request(prompt=prompt, max_new_tokens=new, samples=rng.randint(1, 2), stop_tokens=[0])
            generations.append(Generation(request))
            scheduler.submit(generations[-1])
        plan = scheduler.schedule()
        if plan is not None:
            reads = [(sample, range(sample.cached - 1, sample.cached)) for sample in plan.writers.samples]
            reads += [(sample, range(start, start + size)) for sample, start, size, _ in plan.chunks]
            opened.append((plan, reads, plan.tokens().tolist()))
            for row, sample in enumerate(plan.samples):
                sample.row = row
        if opened and rng.random() < 0.1:
            scheduler.undo(opened.pop()[0])
            for row, sample in enumerate(opened[-1][0].samples if opened else []):
                sample.row = row
        if generations and rng.random() < 0.1:
            generation = rng.choice(generations[-20:])
            scheduler.cancel(generation)
            lengths |= {sample: len(sample.tokens) for sample in generation.samples}
        while opened and len(opened) > (in_flight if plan else 0):
            plan, reads, early = opened.pop(0)
            tokens = zip(plan.tokens().tolist(), early, strict=True)
            for sample, places in reads:
                for place, (token, before) in zip(places, tokens, strict=False):
                    if sample.finish_reason is None:
                        assert token == (before if before >= 0 else drawn[~before]) == sample.tokens[place]
            assert next(tokens, None) is None
            drawn = [rng.randrange(VOCAB) for _ in plan.samples]
            scheduler.complete(plan, drawn)
    assert all(len(sample.tokens) == length for sample, length in lengths.items()), "who has ended is given nothing"
    assert cache.num_free_blocks == cache.num_blocks
    cache.check_integrity()


def test_who_did_not_fit_is_let_in_when_its_prompt_has_been_read_by_another():
    """32 blocks of 4 tokens; two prompts of 80 tokens fit only if they share them."""
    cache = make_cache(max_seq_len=128)
    scheduler = Scheduler(cache, token_budget=100, watermark=0.0)
    first, second = (Generation(Request(prompt=[9] * 81, max_new_tokens=4)) for _ in range(2))
    scheduler.submit(first)
    scheduler.submit(second)
    steps = []
    while scheduler.busy:
        plan = scheduler.schedule()
        steps.append(scheduler.load.running)
        scheduler.complete(plan, [5] * len(plan.samples))
    assert max(steps) == 2
    assert scheduler.load.preemptions == 0
    assert all(generation.samples[0].finish_reason == "length" for generation in (first, second))
