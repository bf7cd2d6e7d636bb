"""Beam search and parallel sampling over forks, against the same over separate contiguous caches."""

import math
import sys
from pathlib import Path

import pytest
import torch
from serving_fakes import VOCAB, make_cache

from torch_paged import OutOfBlocks, PagedKVCache
from torch_paged import steps as steps_module
from torch_paged.serving import Engine, Request, Sampling, beam_search
from torch_paged.serving.sampling import draw, rules_of

pytest.importorskip("safetensors")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import contiguous
import model as llama

TINY = llama.Config(dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, ffn_dim=48, context=64)
PROMPT = list(b"def fork(seq, n):")


@pytest.fixture
def weights():
    model = llama.Decoder(TINY, [torch.nn.Module() for _ in range(TINY.num_layers)])
    weights = model.state_dict()
    weights["embedding.weight"] *= 0.3  # or it would repeat its input
    return weights


def paged(weights, device="cpu", **options):
    sizes = dict(block_size=4, num_blocks=64, max_seqs=8, max_seq_len=TINY.context) | options
    shape = TINY.num_layers, TINY.num_kv_heads, TINY.head_dim
    cache = PagedKVCache(*shape, **sizes, dtype=torch.float32, device=device)
    model = llama.Decoder(TINY, list(cache.layers))
    model.load_state_dict(weights)
    return cache, model.to(device)


class Contiguous:
    """A model with its own contiguous cache for one beam or sample; a fork copies all of it."""

    def __init__(self, weights, device):
        self.weights, self.device = weights, torch.device(device)
        self.kv = [contiguous.ContiguousKV(TINY, self.device) for _ in range(TINY.num_layers)]
        self.model = llama.Decoder(TINY, self.kv)
        self.model.load_state_dict(weights)
        self.model.to(device)
        self.length = 0

    @torch.inference_mode()
    def read(self, tokens):
        positions = torch.arange(self.length, self.length + len(tokens), device=self.device)
        self.length += len(tokens)
        last_token = torch.tensor([len(tokens) - 1], device=self.device)
        return self.model(torch.tensor(tokens, device=self.device), contiguous.ContiguousBatch(positions, last_token))

    def fork(self):
        other = Contiguous(self.weights, self.device)
        other.length = self.length
        for mine, theirs in zip(self.kv, other.kv, strict=True):
            theirs.key.copy_(mine.key)
            theirs.value.copy_(mine.value)
        return other


def plain_beam_search(weights, device, num_beams, count, stop_tokens, length_penalty):
    """By definition: all extensions of all beams, sorted, every one that survives with its own copy of everything."""
    beams, complete = [([], 0.0, Contiguous(weights, device))], []
    width, unread = num_beams, PROMPT
    for _ in range(count):
        extensions = []
        for tokens, total, state in beams:
            logprobs = state.read(tokens[-1:] or unread)[0].log_softmax(-1).tolist()
            extensions += [(total + logprob, tokens, token, state) for token, logprob in enumerate(logprobs)]
        extensions.sort(key=lambda extension: -extension[0])
        beams = []
        for total, tokens, token, state in extensions[:width]:
            if token in stop_tokens:
                complete.append(([*tokens, token], total))
            else:
                beams.append(([*tokens, token], total, state.fork()))
        width = len(beams)
    complete += [(tokens, total) for tokens, total, _ in beams]
    return sorted(((tokens, total / len(tokens) ** length_penalty) for tokens, total in complete), key=lambda b: -b[1])


@pytest.mark.parametrize("num_beams", [1, 2, 3, 8])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
@pytest.mark.parametrize("stops", [(), range(0, 256, 9)], ids=["to-the-end", "stop-tokens"])
def test_beams_are_those_of_separate_contiguous_caches(weights, num_beams, length_penalty, stops, place):
    cache, model = paged(weights, place)
    options = dict(num_beams=num_beams, max_new_tokens=12, stop_tokens=stops, length_penalty=length_penalty)
    beams = beam_search(cache, model, PROMPT, **options)
    expected = plain_beam_search(weights, place, num_beams, 12, stops, length_penalty)
    assert [beam.tokens for beam in beams] == [tokens for tokens, _ in expected]
    torch.testing.assert_close(torch.tensor([b.score for b in beams]), torch.tensor([score for _, score in expected]))
    assert len(beams) == num_beams
    if stops and num_beams == 8:
        assert len({len(beam.tokens) for beam in beams}) > 1
    cache.check_integrity()
    assert cache.num_free_blocks == cache.num_blocks


class Copies:
    """Counts the block copies of each call of copy_blocks."""

    def __init__(self, monkeypatch):
        self.calls = []
        copy = steps_module.copy_blocks

        def counting(caches, pairs):
            self.calls.append(len(pairs))
            copy(caches, pairs)

        monkeypatch.setattr(steps_module, "copy_blocks", counting)


def test_one_copy_a_step_and_none_with_one_reference_left(weights, monkeypatch):
    """A step calls copy_blocks at most once; a search of width 1 frees and forks nothing, so nothing is copied."""
    cache, model = paged(weights)
    copies = Copies(monkeypatch)
    beam_search(cache, model, PROMPT, num_beams=1, max_new_tokens=20)
    assert copies.calls == []
    beam_search(cache, model, PROMPT, num_beams=6, max_new_tokens=20)
    assert 0 < len(copies.calls) <= 19
    assert max(copies.calls) <= 5  # one of those that share a block keeps it
    assert copies.calls[0] == 5


def scripted(table):
    """A model that looks its log-probabilities up by the token that it reads."""

    def model(tokens, batch):
        logits = torch.full((len(batch.last_token), VOCAB), -math.inf)
        for row, token in enumerate(tokens[batch.last_token].tolist()):
            for following, probability in table[token].items():
                logits[row, following] = math.log(probability)
        return logits

    return model


def test_a_stop_token_narrows_the_search():
    """By hand: 1 -> 2 (0.6), 3 (0.4); 2 -> stop (0.3), 4 (0.7); 3 -> 4 (1.0); 4 -> 5 (0.9), 6 (0.1)."""
    table = {1: {2: 0.6, 3: 0.4}, 2: {0: 0.7, 4: 0.3}, 3: {4: 1.0}, 4: {5: 0.9, 6: 0.1}}
    cache = make_cache()
    beams = beam_search(cache, scripted(table), [1], num_beams=2, max_new_tokens=3, stop_tokens=[0], length_penalty=0)
    assert [beam.tokens for beam in beams] == [[2, 0], [3, 4, 5]]
    assert [math.exp(beam.score) for beam in beams] == pytest.approx([0.42, 0.36])
    assert cache.num_free_blocks == cache.num_blocks


def test_what_the_model_rules_out_is_no_continuation():
    """By hand: 1 -> 2; 2 -> 3 (0.6), 4 (0.4): the search has one beam, then two, of the three that it may have."""
    cache = make_cache()
    beams = beam_search(cache, scripted({1: {2: 1.0}, 2: {3: 0.6, 4: 0.4}}), [1], num_beams=3, max_new_tokens=2)
    assert [beam.tokens for beam in beams] == [[2, 3], [2, 4]]
    beams = beam_search(cache, scripted({1: {2: 0.6, 3: 0.4}, 2: {}, 3: {4: 1.0}}), [1], num_beams=2, max_new_tokens=2)
    assert [beam.tokens for beam in beams] == [[3, 4]], "behind 2 nothing can follow"
    assert cache.num_free_blocks == cache.num_blocks


@pytest.mark.parametrize("fault", ["blocks", "model", "rows", "length"])
def test_a_search_that_fails_leaves_nothing_behind(weights, fault):
    options = {"blocks": dict(num_blocks=9), "rows": dict(max_seqs=3), "length": dict(max_seq_len=20)}
    cache, model = paged(weights, **options.get(fault, {}))
    calls = 0

    def failing(tokens, batch):
        nonlocal calls
        calls += 1
        if calls == 5:
            raise ArithmeticError("a fault")
        return model(tokens, batch)

    errors = {"blocks": OutOfBlocks, "model": ArithmeticError, "rows": ValueError, "length": ValueError}
    with pytest.raises(errors[fault]):
        beam_search(cache, failing if fault == "model" else model, PROMPT, num_beams=4, max_new_tokens=20)
    cache.check_integrity()
    assert cache.num_free_blocks == cache.num_blocks


def test_arguments_of_beam_search(weights):
    cache, model = paged(weights)
    defaults = dict(prompt=PROMPT, num_beams=2, max_new_tokens=3)
    for options, error, why in [
        (dict(prompt=[]), ValueError, "prompt must have at least one token"),
        (dict(prompt="abc"), ValueError, r"prompt must be flat: \[n\] integers"),
        (dict(num_beams=0), ValueError, "num_beams must be at least 1, got 0"),
        (dict(num_beams=2.5), TypeError, "num_beams must be an integer, got 2.5"),
        (dict(max_new_tokens=0), ValueError, "max_new_tokens must be at least 1, got 0"),
        (dict(stop_tokens=5), ValueError, "stop_tokens must be flat"),
        (dict(length_penalty="long"), TypeError, "length_penalty must be a real number, got 'long'"),
        (dict(length_penalty=math.nan), ValueError, r"length_penalty must lie in \[-10.0, 10.0\], got nan"),
        (dict(model=lambda tokens, _: torch.zeros(len(tokens), 256)), ValueError, "of the rows batch.last_token"),
        (dict(model=lambda *_: None), TypeError, "the model must return logits .* got NoneType"),
    ]:
        with pytest.raises(error, match=why):
            beam_search(cache, **dict(model=model) | defaults | options)
        assert cache.num_free_blocks == cache.num_blocks
    beams = beam_search(cache, model, **defaults)
    for prompt in (torch.tensor(PROMPT), bytes(PROMPT)):
        again = beam_search(cache, model, **defaults | dict(prompt=prompt))
        assert [beam.tokens for beam in again] == [beam.tokens for beam in beams]  # scores: to the model's rounding
        assert [beam.score for beam in again] == pytest.approx([beam.score for beam in beams], rel=1e-5)


@pytest.mark.parametrize("ahead", [False, True], ids=["in-turn", "ahead"])
def test_samples_are_those_of_separate_contiguous_caches(weights, ahead, place):
    """Six samples of one prompt, each drawn from its own contiguous cache by the same rules."""
    cache, model = paged(weights, place)
    sampling = Sampling(temperature=4.0, top_k=100, top_p=0.95, seed=12)
    engine = Engine(cache, model, ahead=ahead, token_budget=16)
    (generation,) = engine.run([Request(prompt=PROMPT, max_new_tokens=20, samples=6, sampling=sampling)])
    for sample in generation.samples:
        state, tokens = Contiguous(weights, place), list(PROMPT)
        rules = rules_of([sample], 1, torch.device(place))
        while len(tokens) < len(PROMPT) + 20:
            logits = state.read(tokens[state.length :])
            tokens += draw(logits, torch.tensor([len(tokens)], device=place), rules).tokens.tolist()
        assert sample.tokens == tokens
    assert len({tuple(sample.written) for sample in generation.samples}) == 6
    assert cache.num_free_blocks == cache.num_blocks
