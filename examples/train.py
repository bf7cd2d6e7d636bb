"""Trains the demo's model on Python's standard library: `python examples/train.py --device cuda --minutes 3`.

Attention needs no cache here (`CausalAttention`); `generate.py` runs the same weights over a paged one. Muon
(Jordan et al., 2024) trains the matrices, AdamW the embedding and the norms, on one cosine schedule.

The weights that are shipped come from an hour on two busy CPU cores, `--minutes 60`; `--start` takes them further.
On a GPU, `--batch-size 128` keeps it busy.
"""

import argparse
import math
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import corpus
from contiguous import CausalAttention, ContiguousBatch
from model import Config, Decoder, load, save
from terminal import positive

WARMUP = 0.02  # of the run
SIZES = ("dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_dim", "context")
COMPILED_AFTER = 2  # steps; the clock of --minutes starts behind them


def build(config: Config, device: torch.device) -> Decoder:
    model = Decoder(config, [CausalAttention(config.context) for _ in range(config.num_layers)])
    for name, parameter in model.named_parameters():
        if name.endswith(("output.weight", "down.weight")):
            nn.init.zeros_(parameter)  # a new layer begins as the identity
        elif parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.02 if "embedding" in name else config.dim**-0.5)
    return model.to(device)


def optimizers(model: Decoder, rate: float) -> list[torch.optim.Optimizer]:
    matrices = [parameter for parameter in model.layers.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    adam_groups = [
        {"params": [model.embedding.weight], "weight_decay": 0.0},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(adam_groups, lr=rate, betas=(0.9, 0.98)),
    ]


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean nats a byte over uint8 windows `[sequences, context + 1]`, the matrix products in bfloat16."""
    count, length = windows.shape[0], windows.shape[1] - 1
    positions = torch.arange(length, device=windows.device).repeat(count)
    with torch.autocast(windows.device.type, torch.bfloat16):
        logits = model(windows[:, :-1].flatten().long(), ContiguousBatch(positions))
    return F.cross_entropy(logits.float(), windows[:, 1:].flatten().long())


@torch.no_grad()
def bits_per_byte(model: nn.Module, text: Tensor, context: int, batch_size: int) -> float:
    """Over consecutive windows of the text, each predicted from its own beginning on."""
    windows = text[: (len(text) - 1) // context * context + 1].unfold(0, context + 1, context)
    full = windows[: max(len(windows) // batch_size, 1) * batch_size]
    losses = [loss_of(model, part).item() for part in full.split(batch_size)]
    return sum(losses) / len(losses) / math.log(2)


def progress(steps: int | None, minutes: float) -> Iterator[float]:
    """The done share of the run, once a step, until it reaches 1."""
    step, start = 0, time.monotonic()
    while True:
        if step == COMPILED_AFTER:
            start = time.monotonic()
        spent = time.monotonic() - start if step >= COMPILED_AFTER else 0.0
        share = step / steps if steps is not None else spent / (60 * minutes)
        if share >= 1:
            return
        yield share
        step += 1


def train(model: nn.Module, text: Tensor, args: argparse.Namespace, context: int) -> int:
    """Updates the model IN PLACE and returns the number of bytes seen."""
    chosen = optimizers(model, args.rate)
    run = torch.compile(model) if args.compile else model
    offsets = torch.arange(context + 1, device=text.device)
    seen, start = 0, time.monotonic()
    for step, done in enumerate(progress(args.steps, args.minutes)):
        starts = torch.randint(len(text) - context, (args.batch_size,), device=text.device)
        loss = loss_of(run, text[starts[:, None] + offsets])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = args.rate * min(done / WARMUP, 0.5 + 0.5 * math.cos(math.pi * done))
        for optimizer in chosen:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        seen += args.batch_size * context
        if step % args.report == 0:
            bits = loss.item() / math.log(2)
            spent = time.monotonic() - start
            save(model, args.out)
            print(f"step {step:5} {100 * done:5.1f} % {spent:6.1f} s  {bits:.3f} bits a byte", flush=True)
    return seen


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", type=torch.device)
    parser.add_argument("--minutes", default=3.0, type=float, help="training time, compilation not counted")
    parser.add_argument("--steps", type=positive, help="how many steps to train, instead of --minutes")
    parser.add_argument("--batch-size", default=16, type=positive, help="sequences a step")
    parser.add_argument("--rate", default=4e-3, type=float, help="peak learning rate")
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--report", default=50, type=positive, help="steps between two reports, each of which saves")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--stdlib", default=corpus.STDLIB, type=Path, help="default: this interpreter's")
    parser.add_argument("--start", type=Path, help="weights to train on from, their sizes too")
    parser.add_argument("--out", default=Path(__file__).with_name("weights.safetensors"), type=Path)
    for size in SIZES:
        parser.add_argument(f"--{size.replace('_', '-')}", default=getattr(Config, size), type=positive)
    args = parser.parse_args()
    if not args.minutes > 0:
        parser.error(f"--minutes must be more than 0, got {args.minutes}")
    return args


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    config, weights = Config(**{size: getattr(args, size) for size in SIZES}), None
    if args.start is not None:
        config, weights = load(args.start)
    model = build(config, args.device)
    if weights is not None:
        model.load_state_dict(weights)
    texts = corpus.training_text(args.stdlib), corpus.validation_text(args.stdlib)
    text, held_out = (torch.frombuffer(bytearray(part), dtype=torch.uint8).to(args.device) for part in texts)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters:,} parameters, {len(text):,} bytes to train on, {len(held_out):,} held out")

    seen = train(model, text, args, config.context)
    bits = bits_per_byte(model, held_out, config.context, args.batch_size)
    trained_on = f"{seen:,} bytes of the standard library of Python {platform.python_version()}"
    save(model, args.out, trained_on=trained_on, bits_per_byte=f"{bits:.4f}")
    print(f"{bits:.4f} bits a byte on the held-out files after {trained_on}; wrote {args.out}")


if __name__ == "__main__":
    main()
