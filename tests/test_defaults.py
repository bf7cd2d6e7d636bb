"""What a program has set as PyTorch's default dtype and device is its own affair."""

import pytest
import torch
from cache_twins import make_cache

from torch_paged import calibrate_scales, quantise_cache, reference
from torch_paged.serving import Engine, Request, Sampling, beam_search
from torch_paged.testing import attention_inputs

DEFAULTS = {"bfloat16": (torch.bfloat16, None), "float64": (torch.float64, None), "device": (torch.float32, "other")}


@pytest.fixture(params=DEFAULTS)
def defaults(request):
    """Returns a function that sets them, for tests whose own tensors are made before."""
    dtype, device = DEFAULTS[request.param]
    before = torch.get_default_dtype()

    def change(place):
        torch.set_default_dtype(dtype)
        if device is not None:  # a GPU, as programs do; beside a CPU, no device could be further from it
            torch.set_default_device("meta" if place == "cpu" else place)

    yield change
    torch.set_default_dtype(before)
    torch.set_default_device(None)


@pytest.mark.parametrize("options", [dict(sliding_window=5), dict(softcap=3.0), dict()], ids=str)
def test_attention(options, defaults, device):
    inputs = attention_inputs([1, 9], [30, 9], device=device)
    defaults(device)
    output = inputs.call(torch.ops.paged.attention, **options)
    torch.set_default_device(None)
    torch.testing.assert_close(output, inputs.call(reference.attention, **options))


def test_quantisation(defaults, place):
    cache, slots = torch.randn(3, 4, 2, 16, device=place), torch.arange(9, device=place)
    defaults(place)
    scales = calibrate_scales(cache, slots, torch.int8)
    quantised, token_scales = quantise_cache(cache, slots, torch.int8)
    assert scales.dtype == token_scales.dtype == torch.float32
    assert quantise_cache(cache, slots, torch.int8, scales)[0].device == quantised.device == cache.device


def test_serving(defaults, place):
    """Samples and beams over a cache that swaps."""
    results = []
    for change in (lambda _: None, defaults):
        torch.manual_seed(0)
        cache = make_cache([None], place, num_blocks=12)
        embedding = torch.randn(32, 24, device=place)
        change(place)

        def model(tokens, batch, cache=cache, embedding=embedding):
            rows = embedding[tokens][:, None]
            query, pair = rows[..., :16].expand(-1, 4, -1), rows.expand(-1, 2, -1)
            attended = cache.layers[0](query, pair[..., :16], pair, batch)
            return attended[batch.last_token].mean(1) @ embedding.T

        engine = Engine(cache, model, policy="swap")
        sampling = Sampling(temperature=1.0, top_p=0.9, top_k=9, seed=1, logprobs=2)
        done = engine.run([Request(prompt=[i, 2, 3], max_new_tokens=20, sampling=sampling) for i in range(4)])
        assert not any(generation.error for generation in done)
        assert engine.load.preemptions > 0
        beams = beam_search(cache, model, [1, 2], num_beams=2, max_new_tokens=3)
        results.append([generation.samples[0].written for generation in done] + [beam.tokens for beam in beams])
    assert results[0] == results[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, dict(softcap=5.0), dict(softcap=5.0, sinks=torch.ones(4))], ids=str)
def test_autocast_changes_nothing(options, dtype, device):
    """Types are those of the arguments, inside as well."""
    query, caches = torch.randn(6, 4, 32, dtype=dtype), torch.randn(2, 2, 16, 2, 32, dtype=dtype)
    table, lens = torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([20], dtype=torch.int32)
    call = [part.to(device) for part in (query, *caches, table, lens)]
    options = {name: each.to(device) if torch.is_tensor(each) else each for name, each in options.items()}
    expected = torch.ops.paged.attention(*call, **options)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        output = torch.ops.paged.attention(*call, **options)
    assert torch.equal(output, expected)
