"""What requests, samplings and engines are made of: refused on arrival, in words, or served."""

import numpy as np
import pytest
import torch
from serving_fakes import VOCAB, assert_empty, expected, make_cache, make_engine

from torch_paged.serving import Engine, Request, Sampling


def submit(request, **options):
    engine, _, _ = make_engine(**options)
    return engine.submit(request)


def test_a_stop_string_needs_decode():
    engine, _, _ = make_engine()
    with pytest.raises(ValueError, match="stop_strings need an Engine with decode="):
        engine.submit(Request(prompt=[1], stop_strings=["x"]))


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
        (lambda: make_engine(watermark=float("nan")), r"watermark must lie in \[0, 1\), got nan"),
        (lambda: make_engine(patience=-1), "patience must be at least 0, got -1"),
        (lambda: make_engine(patience=float("nan")), "patience must be at least 0, got nan"),
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
        (lambda: make_engine(watermark="low"), "watermark must be a real number, got 'low'"),
        (lambda: make_engine(patience=None), "patience must be a real number, got None"),
        (lambda: make_engine(vocab_size="many"), "vocab_size must be an integer, got 'many'"),
        (lambda: make_engine(ahead="no"), "ahead must be True, False or None, got 'no'"),
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
