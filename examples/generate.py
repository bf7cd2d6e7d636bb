"""Completes real source files with a small language model over a paged KV cache: `python examples/generate.py`.

Prompts of many lengths are read in chunks while others are being completed, all in one ragged batch (`batching.py`).
Some are forked into samples that share the prompt's blocks. `--check` repeats the greedy completions with a plain
contiguous cache in float32 and fails at the first byte that differs.
"""

import argparse
import itertools
import re
import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor

import corpus
from batching import Generation, Request
from contiguous import greedy
from model import Config, Decoder, load
from terminal import Terminal, positive
from torch_paged import PagedKVCache

WEIGHTS = Path(__file__).with_name("weights.safetensors")
LONGEST_LINE = 100  # bytes; a prompt is a line at least

# Files that the model has not seen, the function to go on from, the bytes to read, and whether to fork into samples.
PROMPTS = (
    ("heapq.py", "heappop", 290, False),
    ("mailbox.py", "close", 200, False),
    ("shelve.py", "__getitem__", 60, False),
    ("configparser.py", "sections", 340, False),
    ("contextlib.py", "__exit__", 120, False),
    ("calendar.py", "weekday", 320, True),
    ("queue.py", "get", 90, True),
    ("configparser.py", "has_section", 230, True),
)


def read_prompt(name: str, function: str, size: int) -> bytes:
    """Whole lines of the file, `size` bytes at most, the last of which begins the function."""
    text = (corpus.STDLIB / name).read_bytes()
    end = re.compile(rb"def %s\(.*:\n" % function.encode()).search(text).end()
    return text[text.index(b"\n", max(end - size - 1, 0)) + 1 : end]


def complete(requests: list[Request], generation: Generation, limit: int, terminal: Terminal) -> list[Request]:
    """Runs the requests to their ends, showing progress; returns them in their order, samples side by side."""
    expected = limit * sum(request.samples for request in requests)
    order = [request.name for request in requests]
    seen: dict[int, Request] = {}
    for how, active in generation.run(requests, limit):
        seen |= {request.seq: request for request in active}
        stage = "compiling the decode step" if how == "compiled" and not generation.rates[how] else "running"
        share = sum(len(request.written) for request in seen.values()) / expected
        terminal.progress(share, stage, f"{len(active)} under way, {len(seen) - len(active)} done")
    return sorted(seen.values(), key=lambda request: order.index(request.name))


def report(done: list[Request], generation: Generation, terminal: Terminal) -> None:
    for name, group in itertools.groupby(done, key=lambda request: request.name):
        samples = list(group)
        how = f"{len(samples)} samples at temperature {samples[0].temperature}" if samples[0].temperature else "greedy"
        terminal.completions(f"{name}, {how}", samples[0].prompt, [sample.written for sample in samples])
    rates = {how: statistics.median(rates) for how, rates in generation.rates.items() if rates}
    fullest = generation.fullest
    terminal.table(
        [
            *((f"decode, {how}", f"{rate:,.0f} tokens/s") for how, rate in rates.items()),
            (
                "KV cache in use at its fullest",
                f"{fullest.bytes_used / 1e6:.1f} MB, {fullest.blocks_used} blocks",
            ),
            ("contiguous, room for the longest each", f"{fullest.bytes_contiguous / 1e6:.1f} MB"),
            ("blocks shared by samples", f"{fullest.blocks_shared}"),
            ("slots filled", f"{fullest.slots_filled:.0%}"),
        ]
    )


def check(done: list[Request], config: Config, weights: dict[str, Tensor], args: argparse.Namespace) -> None:
    """Exits with an error unless greedy decoding with a contiguous cache writes the same bytes."""
    for request in (request for request in done if not request.temperature):
        expected = greedy(config, weights, request.prompt, args.new_tokens, args.device)
        for i, (paged, contiguous) in enumerate(itertools.zip_longest(request.written, expected)):
            if paged != contiguous:
                sys.exit(f"check failed: {request.name}, token {i}: paged {paged}, contiguous {contiguous}")
    print("check passed: the greedy completions equal those of a contiguous float32 cache")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--new-tokens", default=160, type=positive, help="bytes to write, at most, for each prompt")
    parser.add_argument("--samples", default=4, type=positive, help="samples of each forked prompt")
    parser.add_argument("--temperature", default=0.5, type=float, help="of the samples; the rest is greedy")
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--check", action="store_true", help="compare with a contiguous float32 cache")
    parser.add_argument("--no-compile", action="store_true", help="run every step eagerly")
    args = parser.parse_args(arguments)
    if args.check and args.dtype != "float32":
        parser.error("--check compares in float32: leave --dtype out")
    return args


def main() -> None:
    args = parse_args()
    config, weights = load(WEIGHTS)
    if args.new_tokens > config.context - LONGEST_LINE:
        sys.exit(f"--new-tokens must leave room for prompts: at most {config.context - LONGEST_LINE}")
    max_seqs = sum(args.samples if forked else 1 for *_, forked in PROMPTS)
    cache = PagedKVCache(
        config.num_layers,
        config.num_kv_heads,
        config.head_dim,
        num_blocks=max_seqs * config.context // 16,
        max_seqs=max_seqs,
        max_seq_len=config.context,
        dtype=getattr(torch, args.dtype),
        device=args.device,
    )
    model = Decoder(config, cache.layers).to(args.device, getattr(torch, args.dtype))
    model.load_state_dict(weights)

    requests = []
    for name, function, size, forked in PROMPTS:
        prompt = read_prompt(name, function, min(size, config.context - args.new_tokens))
        samples, temperature = (args.samples, args.temperature) if forked else (1, 0.0)
        requests.append(Request(f"{name}: {function}", prompt, cache.add(), samples, temperature))
    generation, terminal = Generation(cache, model, args.seed, compiled=not args.no_compile), Terminal()
    done = complete(requests, generation, args.new_tokens, terminal)
    report(done, generation, terminal)
    if args.check:
        check(done, config, weights, args)


if __name__ == "__main__":
    main()
