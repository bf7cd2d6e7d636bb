"""The demo model in float32: greedy tokens are those of a contiguous cache, however they are served."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from serving_fakes import FakeModel, make_cache

from torch_paged import unbacked
from torch_paged.serving import Engine, Request

pytest.importorskip("safetensors")
EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
contiguous, demo, llama = map(importlib.import_module, ("contiguous", "demo", "model"))

NEW_TOKENS = 32
SYSTEM = b'"""Tools for reading files."""\n\nimport os\nimport sys\n\n\n'
PROMPTS = [
    SYSTEM + b"def main(argv):\n    ",
    SYSTEM + b"class Reader:\n    def __init__(self, path):\n        ",
    b"for i in range(",
    SYSTEM,
    b"x",
    b"    def test_empty(self):\n        self.assertEqual(",
]


@pytest.fixture(scope="module")
def expected():
    config, weights = llama.load(demo.WEIGHTS)
    device = torch.device("cpu")
    return [contiguous.greedy(config, weights, prompt, NEW_TOKENS, device) for prompt in PROMPTS]


def serve(num_blocks, *, shared, model_of=lambda model: model, **options):
    cache, model = demo.build(num_blocks, max_seqs=8)
    engine = Engine(cache, model_of(model), **options)
    requests = [
        Request(
            prompt=list(prompt),
            max_new_tokens=NEW_TOKENS,
            stop_tokens=[llama.END_OF_TEXT],
            namespace=None if shared else number,
        )
        for number, prompt in enumerate(PROMPTS)
    ]
    generations = engine.run(requests)
    cache.check_integrity()
    assert cache.num_free_blocks == cache.num_blocks
    return engine, [bytes(generation.samples[0].written) for generation in generations]


@pytest.mark.parametrize("token_budget", [5, 48, 512])
@pytest.mark.parametrize("policy", ["wait", "recompute", "swap"])
@pytest.mark.parametrize("num_blocks", [12, 64])
@pytest.mark.parametrize("shared", [True, False], ids=["prefix-cache", "no-prefix-cache"])
def test_token_for_token(expected, token_budget, policy, num_blocks, shared):
    engine, written = serve(num_blocks, shared=shared, token_budget=token_budget, policy=policy, ahead=True)
    assert written == expected
    if num_blocks == 12 and token_budget == 512:
        assert (engine.load.preemptions > 0) == (policy != "wait")


def test_compiled(expected):
    """One graph serves every step."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def compiled(model):
        return torch.compile(model, fullgraph=True, backend="eager")

    _, written = serve(12, shared=True, model_of=compiled, token_budget=48)
    assert written == expected
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 1 <= graphs <= 2  # uniform and ragged


def decoded_after(swap):
    """32 tokens after two prompts of two blocks; `swap`: the second blocks change places in between."""
    cache, model = demo.build(16, max_seqs=2)
    prompts = [list(b"import os\nimport sys\nimport re\n\nd"), list(b"class Point:\n    def __init__(self")]
    assert all(32 < len(prompt) <= 48 for prompt in prompts)
    seqs, tokens, written = [cache.add(), cache.add()], [prompt[:32] for prompt in prompts], []
    with torch.inference_mode():
        for step in range(NEW_TOKENS + 2):
            batch = cache.prepare(seqs, [len(part) for part in tokens])
            logits = model(unbacked(torch.tensor([token for part in tokens for token in part])), batch)
            if swap and step == 0:
                one, other = batch.block_table[:2, 1].tolist()
                for tensor in sum(cache.tensors(), ()):
                    tensor[[one, other]] = tensor[[other, one]]
            cache.commit(batch)
            tokens = logits.argmax(-1)[:, None].tolist() if step else [prompt[32:] for prompt in prompts]
            written += tokens if step else []
    return torch.tensor(written)


def test_the_model_notices_its_cache():
    """With two blocks exchanged at least half of the tokens differ: the tests above would see a wrong block."""
    differing = (decoded_after(swap=False) != decoded_after(swap=True)).float().mean()
    assert differing >= 0.5


def test_the_fake_model_notices_its_cache_too():
    """Which weighs keys by their places: two blocks of one sequence exchanged change its results as well."""
    cache = make_cache()
    model, written = FakeModel(cache), []
    for swap in (False, True):
        seq, tokens, results = cache.add(), list(range(12)), []
        for step in range(20):
            batch = cache.prepare([seq], len(tokens))
            tokens = model(torch.tensor(tokens), batch).argmax(-1).tolist()
            if swap and step == 0:
                one, other = batch.block_table[0, :2].tolist()
                model.keys[[one, other]] = model.keys[[other, one]]
                tokens = written[0][:1]
            cache.commit(batch)
            results += tokens
        cache.free(seq)
        written.append(results)
    differing = sum(a != b for a, b in zip(*written, strict=True))
    assert differing >= 10
