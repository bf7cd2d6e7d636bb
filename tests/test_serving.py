"""The engine over a model that reads everything from the cache: what is written, and from how much that was read."""

import pytest
import torch
from serving_fakes import PROMPTS, VOCAB, assert_empty, decode, expected, make_cache, make_engine

from torch_paged.serving import Request, Sampling


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
@pytest.mark.parametrize("buckets", [None, [2], [4], [4, 8], [4, 8, 16]], ids=str)
def test_a_step_may_be_padded_where_the_one_before_was_not(ahead, buckets):
    """Three equally long prompts, 9 tokens in all: past the last bucket they go as they are, what follows is padded."""
    engine, cache, _ = make_engine(make_cache(buckets=buckets), ahead=ahead)
    prompts = [[5, 17, 3], [8, 1, 1], [2, 4, 6]]
    generations = engine.run(Request(prompt=prompt, max_new_tokens=6) for prompt in prompts)
    assert [generation.samples[0].written for generation in generations] == [expected(p, 6) for p in prompts]
    assert_empty(engine, cache)


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


def test_the_first_word_keeps_its_space():
    """Of a tokenizer that drops that of whatever it decodes first."""

    def words(tokens):
        return "".join(f" {token}" for token in tokens)[1:]

    engine, _, _ = make_engine(decode=words)
    (generation,) = engine.run([Request(prompt=[3], max_new_tokens=3)])
    assert words([3]) + generation.samples[0].text.text == words([3, *expected([3], 3)])


@pytest.mark.parametrize("wanted", [0, 1])
def test_logprobs_are_as_many_as_were_asked_for(wanted):
    """Whatever others in the batch want."""
    engine, _, _ = make_engine()
    requests = [Request(prompt=[3], max_new_tokens=5, sampling=Sampling(logprobs=n)) for n in (wanted, 5)]
    few, many = (generation.samples[0].logprobs for generation in engine.run(requests))
    assert [len(entry.top) for entry in few] == [wanted] * 5
    assert [len(entry.top) for entry in many] == [5] * 5


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
