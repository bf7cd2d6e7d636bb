"""The engine on a GPU: the same tokens as on the host, and a host that never waits for the step under way."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from torch_paged.serving import Engine, Request, Sampling
from torch_paged.serving.requests import Generation
from torch_paged.serving.sampling import draw, rules_of

pytest.importorskip("safetensors")
sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("examples", "benchmarks")]
contiguous, demo, llama = map(importlib.import_module, ("contiguous", "demo", "model"))
serving_trace = importlib.import_module("serving_trace")

pytestmark = pytest.mark.gpu
PROMPTS = [b"def main(argv):\n    ", b"import os\nimport sys\n\n\nclass Reader:\n    def", b"x", b"for i in range("] * 3
NEW_TOKENS = 32


@pytest.mark.parametrize("ahead", [False, True], ids=["in-turn", "ahead"])
@pytest.mark.parametrize("policy", ["wait", "recompute", "swap"])
@pytest.mark.parametrize("num_blocks", [14, 128])
def test_token_for_token(ahead, policy, num_blocks):
    config, weights = llama.load(demo.WEIGHTS)
    cache, model = demo.build(num_blocks, max_seqs=16, device="cuda")
    engine = Engine(cache, model, ahead=ahead, policy=policy, token_budget=48)
    generations = engine.run([Request(prompt=list(prompt), max_new_tokens=NEW_TOKENS) for prompt in PROMPTS])
    for prompt, generation in zip(PROMPTS, generations, strict=True):
        written = bytes(generation.samples[0].written)
        expected = contiguous.greedy(config, weights, prompt, NEW_TOKENS, torch.device("cuda"))
        assert written[: len(expected)] == expected  # which ends with the end of text
    cache.check_integrity()
    assert cache.num_free_blocks == cache.num_blocks


def test_captured_steps_write_the_same():
    """As the benchmarks run them: one CUDA graph for each shape of a batch, of decode steps and of mixed ones."""
    config, weights = llama.load(demo.WEIGHTS)
    cache, model = serving_trace.Memory(1, 1024, device="cuda", graphs=True).build(16, most_seqs=16)
    captured = len(model._captured)
    requests = [Request(prompt=list(prompt), max_new_tokens=NEW_TOKENS, stop_tokens=[0]) for prompt in PROMPTS]
    for prompt, generation in zip(PROMPTS, Engine(cache, model, token_budget=40).run(requests), strict=True):
        expected = contiguous.greedy(config, weights, prompt, NEW_TOKENS, torch.device("cuda"))
        assert bytes(generation.samples[0].written) == expected
    assert len(model._captured) - captured <= 2, "steps were replayed"
    cache.check_integrity()
    assert cache.num_free_blocks == cache.num_blocks


def test_sampling_is_that_of_the_host():
    samplings = [Sampling(temperature=0.1 * i, top_k=i % 3 * 5, top_p=1 - 0.05 * (i % 4), seed=i) for i in range(16)]
    samples = [Generation(Request(prompt=[1], sampling=sampling)).samples[0] for sampling in samplings]
    logits, positions = torch.randn(16, 1000), torch.arange(16)
    host = draw(logits, positions, rules_of(samples, 16, torch.device("cpu")))
    device = torch.device("cuda", 0)
    assert torch.equal(draw(logits.cuda(), positions.cuda(), rules_of(samples, 16, device)).tokens.cpu(), host.tokens)


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0.7, top_p=0.9, logprobs=2)], ids=["greedy", "drawn"]
)
def test_no_step_synchronises(sampling):
    """But for the event of the step before, which the debug mode does not count; requests come while it runs."""
    cache, model = demo.build(256, max_seqs=16, device="cuda")
    engine = Engine(cache, model)
    for prompt in PROMPTS:
        engine.submit(Request(prompt=list(prompt), max_new_tokens=NEW_TOKENS, sampling=sampling))
    for _ in range(5):  # kernels are compiled, and pinned memory is allocated
        engine.step()
    engine.submit(Request(prompt=list(PROMPTS[0]), max_new_tokens=NEW_TOKENS, sampling=sampling))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert engine.load.running == len(PROMPTS) + 1
