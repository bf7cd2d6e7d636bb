"""A small Llama end to end on a CPU: ragged prompts in, greedy tokens out, beside Hugging Face transformers.

`python benchmarks/cpu_llama.py --output benchmarks/results/cpu/llama.json`. 6 layers, 512 wide, 8/2 heads, vocabulary
32,000, bf16, 16 prompts of 32 to 900 tokens, 64 new tokens each; random weights, the same for all. transformers is an
optional peer, listed as absent where it cannot be imported. The first token of every prompt is compared.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cpu_timing import machine
from transformers_llama import as_llama

from torch_paged import PagedKVCache, ops, unbacked

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from model import Config, Decoder

CONFIG = Config(dim=512, num_layers=6, num_heads=8, num_kv_heads=2, head_dim=64, ffn_dim=1408, vocab_size=32000)
NEW_TOKENS = 64


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(32, 900, 16).int().tolist()
    return [torch.randint(3, CONFIG.vocab_size, (n,), generator=generator).tolist() for n in lengths]


class Paged:
    """torch_paged: all prompts in one ragged call, then a token of every sequence at a time."""

    def __init__(self, compiled: bool) -> None:
        torch.manual_seed(0)
        sizes = dict(max_seqs=16, max_seq_len=1024, num_blocks=1024, dtype=torch.bfloat16, device="cpu")
        self.cache = PagedKVCache(CONFIG.num_layers, CONFIG.num_kv_heads, CONFIG.head_dim, **sizes)
        self.weights = Decoder(CONFIG, self.cache.layers).bfloat16()
        torch.nn.init.normal_(self.weights.embedding.weight, std=0.05)
        self.model = torch.compile(self.weights, fullgraph=True) if compiled else self.weights

    def __call__(self) -> list[list[int]]:
        cache = self.cache
        seqs = [cache.add() for _ in prompts()]
        tokens = torch.tensor([token for prompt in prompts() for token in prompt])
        counts: Any = [len(prompt) for prompt in prompts()]
        steps = []
        for _ in range(NEW_TOKENS):
            batch = cache.prepare(seqs, counts)
            tokens, counts = self.model(unbacked(tokens), batch).argmax(-1), 1
            cache.commit(batch)
            steps.append(tokens)
        for seq in seqs:
            cache.free(seq)
        return torch.stack(steps, 1).tolist()


def padded_generate(model: Any) -> list[list[int]]:
    longest = max(map(len, prompts()))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts()])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts()])
    out = model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    return out[:, longest:].tolist()


def continuous_batching(model: Any) -> list[list[int]]:
    from transformers import GenerationConfig

    config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)
    results = model.generate_batch(inputs=prompts(), generation_config=config)
    return [result.generated_tokens for result in results.values()]


def timed(
    call: Callable[[], list[list[int]]], rounds: int, first: list[int] | None
) -> tuple[dict[str, Any], list[int]]:
    """Tokens a second, and the first token of every prompt; how many of those agree with `first`."""
    call()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        tokens = call()
        times.append(time.perf_counter() - start)
    assert all(len(each) == NEW_TOKENS for each in tokens)
    began = [each[0] for each in tokens]
    agree = sum(a == b for a, b in zip(sorted(began), sorted(first or began), strict=True))
    rate = len(tokens) * NEW_TOKENS / statistics.median(times)
    return {"tokens_s": rate, "seconds": statistics.median(times), "same_first_tokens": agree}, began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slow-rounds", type=int, default=1, help="of continuous batching")
    options = parser.parse_args()
    report: dict[str, Any] = {"machine": machine(), "package": ops._cpu_package(), "paths": {}}
    with torch.inference_mode():
        eager, compiled = Paged(compiled=False), Paged(compiled=True)
        report["paths"]["paged"], first = timed(eager, options.rounds, None)
        report["paths"]["paged, compiled"], _ = timed(compiled, options.rounds, first)
    try:
        peer = as_llama(CONFIG, eager.weights.state_dict(), most_tokens=2048).bfloat16()
    except ImportError as error:
        report["absent"] = f"transformers: {error}"
    else:
        with torch.inference_mode():
            report["paths"]["transformers generate, padded"], _ = timed(
                lambda: padded_generate(peer), options.rounds, first
            )
        report["paths"]["transformers continuous batching"], _ = timed(
            lambda: continuous_batching(peer), options.slow_rounds, first
        )
    best = max(each["tokens_s"] for name, each in report["paths"].items() if name.startswith("paged"))
    print(f"{'path':<36} {'tokens/s':>9} {'paged is':>9}  first tokens that agree")
    for name, each in report["paths"].items():
        print(f"{name:<36} {each['tokens_s']:9.1f} {best / each['tokens_s']:8.1f}x  {each['same_first_tokens']} of 16")
    print(report.get("absent", ""))
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
