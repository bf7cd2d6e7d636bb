"""A small Llama end to end on a CPU: ragged prompts in, greedy tokens out, beside Hugging Face transformers.

`python benchmarks/cpu_llama.py --output benchmarks/results/cpu/llama.json`. 6 layers, 512 wide, 8/2 heads, vocabulary
32,000, bf16, 16 prompts of 32 to 900 tokens, 64 new tokens each; random weights, the same for all. What is compiled,
ours and theirs, has its weights packed once (`freezing`). transformers is an optional peer, listed as absent where it
cannot be imported. The first token of every prompt is compared.
"""

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cpu_timing import machine
from torch import Tensor
from torch._inductor import config as inductor
from torch.nn import functional as F
from transformers_llama import as_llama

from torch_paged import PagedBatch, PagedKVCache, append, ops, unbacked
from torch_paged import attention as attend

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from model import Config, Decoder, rotary, rotate

CONFIG = Config(dim=512, num_layers=6, num_heads=8, num_kv_heads=2, head_dim=64, ffn_dim=1408, vocab_size=32000)
NEW_TOKENS = 64


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(32, 900, 16).int().tolist()
    return [torch.randint(3, CONFIG.vocab_size, (n,), generator=generator).tolist() for n in lengths]


class LastRows(Decoder):
    """The last layer attends and feeds forward in the rows alone whose logits matter."""

    def forward(self, tokens: Tensor, batch: Any) -> Tensor:
        hidden = self.embedding(tokens)
        rotation = rotary(batch.positions, self.config, hidden.dtype)
        *layers, last = self.layers
        for layer in layers:
            hidden = layer(hidden, rotation, batch)
        normed, attention, rows = last.attention_norm(hidden), last.attention, batch.last_token
        projections = (attention.query, normed[rows]), (attention.key, normed), (attention.value, normed)
        query, key, value = (project(x).unflatten(-1, (-1, self.config.head_dim)) for project, x in projections)
        query, key = rotate(query, tuple(part[rows] for part in rotation)), rotate(key, rotation)
        table, slots = batch.tables(attention.kv.group)
        caches = attention.kv.key_cache, attention.kv.value_cache
        append(key, value, *caches, slots)
        attended = attend(query, *caches, table, batch.seq_lens)  # one query for each sequence
        hidden = hidden[rows] + attention.output(attended.flatten(-2))
        hidden = hidden + last.feed_forward(last.feed_forward_norm(hidden))
        return F.linear(self.norm(hidden), self.embedding.weight)


class Paged:
    """torch_paged: all prompts in one ragged call, then a token of every sequence at a time."""

    def __init__(self, compiled: bool) -> None:
        torch.manual_seed(0)
        sizes = dict(max_seqs=16, max_seq_len=1024, num_blocks=1024, dtype=torch.bfloat16, device="cpu")
        self.cache = PagedKVCache(CONFIG.num_layers, CONFIG.num_kv_heads, CONFIG.head_dim, **sizes)
        self.weights = weights = LastRows(CONFIG, self.cache.layers).bfloat16()
        torch.nn.init.normal_(weights.embedding.weight, std=0.05)

        def greedy(tokens: Tensor, batch: PagedBatch) -> Tensor:
            return weights(tokens, batch).argmax(-1)

        self.next_tokens = torch.compile(greedy, fullgraph=True) if compiled else greedy

    def __call__(self) -> list[list[int]]:
        cache = self.cache
        seqs = [cache.add() for _ in prompts()]
        tokens = torch.tensor([token for prompt in prompts() for token in prompt])
        counts: Any = [len(prompt) for prompt in prompts()]
        steps = []
        for _ in range(NEW_TOKENS):
            batch = cache.prepare(seqs, counts)
            tokens, counts = self.next_tokens(unbacked(tokens), batch), 1
            cache.commit(batch)
            steps.append(tokens)
        for seq in seqs:
            cache.free(seq)
        return torch.stack(steps, 1).tolist()


def padded_generate(model: Any, **options: Any) -> list[list[int]]:
    longest = max(map(len, prompts()))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts()])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts()])
    greedy = dict(max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    out = model.generate(ids, attention_mask=mask, **greedy, **options)
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
    agree = (Counter(began) & Counter(first or began)).total()  # continuous batching returns them in its own order
    rate = len(tokens) * NEW_TOKENS / statistics.median(times)
    return {"tokens_s": rate, "seconds": statistics.median(times), "same_first_tokens": agree}, began


def table(report: dict[str, Any]) -> str:
    made_on, paths = report["machine"], report["paths"]
    best = max(each["tokens_s"] for name, each in paths.items() if name.startswith("paged"))
    lines = [
        f"Measured on {made_on['cpu']}, {made_on['threads']} threads, PyTorch {made_on['torch']}, {made_on['date']},",
        f"by `python benchmarks/cpu_llama.py`: medians of {report['rounds']} runs, of continuous batching",
        f"{report['slow_rounds']}. Targets: 6x of padded generate, 25x of continuous batching.",
        "",
        "| path | tokens/s | the fastest paged one is | first tokens that agree |",
        "|---|---|---|---|",
    ]
    for name, each in paths.items():
        ratio = f"{best / each['tokens_s']:.1f}x"
        lines.append(f"| {name} | {each['tokens_s']:.1f} | {ratio} | {each['same_first_tokens']} of 16 |")
    return "\n".join([*lines, "", report.get("absent", "")]).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slow-rounds", type=int, default=1, help="of continuous batching")
    options = parser.parse_args()
    inductor.freezing = inductor.cpp.enable_concat_linear = True  # for all that are compiled
    report: dict[str, Any] = {"machine": machine(), "package": ops._cpu_package(), "paths": {}}
    report |= {"rounds": options.rounds, "slow_rounds": options.slow_rounds}
    with torch.inference_mode():
        eager, compiled = Paged(compiled=False), Paged(compiled=True)
        report["paths"]["paged"], first = timed(eager, options.rounds, None)
        report["paths"]["paged, compiled"], _ = timed(compiled, options.rounds, first)
    try:
        peer, compiled_peer = (
            as_llama(CONFIG, eager.weights.state_dict(), most_tokens=2048).bfloat16() for _ in range(2)
        )
    except ImportError as error:
        report["absent"] = f"transformers: {error}"
    else:
        compiled_peer.forward = torch.compile(compiled_peer.forward, fullgraph=True)
        calls = {
            "generate, padded": (lambda: padded_generate(peer), options.rounds),
            "generate, padded, compiled, static cache": (
                lambda: padded_generate(compiled_peer, cache_implementation="static"),
                options.rounds,
            ),
            "continuous batching": (lambda: continuous_batching(peer), options.slow_rounds),
        }
        for name, (call, rounds) in calls.items():
            with torch.inference_mode(name != "continuous batching"):
                report["paths"][f"transformers {name}"], _ = timed(call, rounds, first)
    print(table(report))
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")
        options.output.with_suffix(".md").write_text(table(report))


if __name__ == "__main__":
    main()
