"""What quantised caches cost in accuracy.

    python benchmarks/quantised_accuracy.py > benchmarks/results/quantised_accuracy.md

Attention's error against exact keys and values in float32, on random numbers and on numbers with outliers, and the
loss of the demo model on held-out text. Static scales are calibrated on the numbers at hand (of the model: on the first
windows of the text, which are not scored).
"""

import argparse
import math
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_paged import append, attention, calibrate_scales, quantise_cache

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
from corpus import validation_text  # noqa: E402
from model import Decoder, load  # noqa: E402

BLOCK_SIZE = 16
DTYPES = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2, "int8": torch.int8}
KINDS = {"none (1)": "one", "one, static": "scalar", "per head, static": "head", "per token and head": "token"}


class Storage(NamedTuple):
    """How keys and values are stored; without a dtype as bfloat16."""

    dtype: torch.dtype | None
    kind: str


def storages() -> Iterator[tuple[str, str, Storage]]:
    yield "bfloat16", "", Storage(None, "one")
    for name, dtype in DTYPES.items():
        for words, kind in KINDS.items():
            if (dtype, kind) != (torch.int8, "one"):
                yield name, words, Storage(dtype, kind)


def scale_of(cache: Tensor, slots: Tensor, storage: Storage) -> Tensor | None:
    """The static scale of a filled cache, or None where each token has its own."""
    if storage.kind == "token" or storage.dtype is None:
        return None
    if storage.kind == "one":
        return torch.ones(())
    scales = calibrate_scales(cache, slots, storage.dtype)
    return scales.amax() if storage.kind == "scalar" else scales


def keyword(side: str, kind: str) -> str:
    return f"{side}_scale_cache" if kind == "token" else f"{side}_scale"


def random_numbers(outliers: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [64, 8, 64], keys and values [128, 16, 4, 64] of one sequence.

    Outliers as language models have them: two channels of the keys 20 times as large, one token in 100 10 times as
    large, and heads of which each is twice as large as the one before.
    """
    generator = torch.Generator().manual_seed(0)
    query = 2 * torch.randn(64, 8, 64, generator=generator)
    key, value = torch.randn(2, 128, BLOCK_SIZE, 4, 64, generator=generator)
    if outliers:
        key[..., [5, 40]] *= 20
        query[..., [5, 40]] /= 20
        large = torch.rand(2, 128, BLOCK_SIZE, 1, 1, generator=generator) < 0.01
        key, value = (torch.where(mask, 10 * x, x) for mask, x in zip(large, (key, value), strict=True))
        heads = 2.0 ** torch.arange(4)[:, None]
        key, value, query = key * heads, value * heads, query / heads.repeat_interleave(2, 0)
    return query, key, value


def error_on(numbers: tuple[Tensor, Tensor, Tensor], storage: Storage) -> float:
    """The root mean square error of the output, relative to that of the output itself, head by head and averaged."""
    query, *exact = numbers
    table = torch.arange(128, dtype=torch.int32).expand(64, 128)
    lens = torch.arange(2048 - 63, 2049, dtype=torch.int32)
    slots = torch.arange(2048)
    caches, scales = [], {}
    for side, cache in zip(("key", "value"), exact, strict=True):
        if storage.dtype is None:
            caches.append(cache.bfloat16().float())
            continue
        quantised, scale = quantise_cache(cache, slots, storage.dtype, scale_of(cache, slots, storage))
        caches.append(quantised)
        scales[keyword(side, storage.kind)] = scale
    true = attention(query, *exact, table, lens)
    error = attention(query, *caches, table, lens, **scales) - true
    return (error.pow(2).mean((0, 2)) / true.pow(2).mean((0, 2))).sqrt().mean().item()


class Batch(NamedTuple):
    """Whole sequences of equal length, each in blocks of its own."""

    block_table: Tensor
    seq_lens: Tensor
    slot_mapping: Tensor
    positions: Tensor
    last_token: None = None


def batch_of(count: int, length: int) -> Batch:
    blocks = torch.arange(count * length // BLOCK_SIZE, dtype=torch.int32).view(count, -1)
    lens = torch.full((count,), length, dtype=torch.int32)
    return Batch(blocks, lens, torch.arange(count * length), torch.arange(length).repeat(count))


class QuantisedKV(nn.Module):
    """A layer's attention over caches of a storage, with scales that were found before."""

    def __init__(self, storage: Storage, key_scale: Tensor | None, value_scale: Tensor | None) -> None:
        super().__init__()
        self.storage, self.static = storage, (key_scale, value_scale)
        self.caches: list[Tensor] = []

    def forward(self, query: Tensor, key: Tensor, value: Tensor, batch: Batch) -> Tensor:
        shape = (len(key) // BLOCK_SIZE, BLOCK_SIZE, *key.shape[1:])
        self.caches = [torch.zeros(shape, dtype=self.storage.dtype or key.dtype) for _ in range(2)]
        scales = {}
        if self.storage.dtype is not None:
            for side, scale in zip(("key", "value"), self.static, strict=True):
                scales[keyword(side, self.storage.kind)] = torch.ones(shape[:3]) if scale is None else scale
        append(key, value, *self.caches, batch.slot_mapping, **scales)
        return attention(query, *self.caches, batch.block_table, batch.seq_lens, **scales)


class Demo:
    """The demo model in bfloat16, its held-out text in windows, and its keys and values on the first of them."""

    def __init__(self, windows: int) -> None:
        self.config, self.weights = load(EXAMPLES / "weights.safetensors")
        text = torch.frombuffer(bytearray(validation_text()), dtype=torch.uint8).long()
        context = self.config.context
        step = (len(text) - context - 1) // (windows + 1)
        self.windows = text.unfold(0, context + 1, step)[: windows + 2]
        layers = [QuantisedKV(Storage(None, "one"), None, None) for _ in range(self.config.num_layers)]
        self.loss(layers, self.windows[:2])
        self.calibration = [layer.caches for layer in layers]

    @torch.inference_mode()
    def loss(self, layers: list[QuantisedKV], windows: Tensor) -> float:
        """Bits a byte of the next byte."""
        model = Decoder(self.config, layers)
        model.load_state_dict(self.weights)
        logits = model.bfloat16()(windows[:, :-1].flatten(), batch_of(len(windows), self.config.context))
        return F.cross_entropy(logits.float(), windows[:, 1:].flatten()).item() / math.log(2)

    def loss_with(self, storage: Storage) -> float:
        slots = torch.arange(2 * self.config.context)
        layers = [
            QuantisedKV(storage, *(scale_of(cache, slots, storage) for cache in caches)) for caches in self.calibration
        ]
        return sum(self.loss(layers, part) for part in self.windows[2:].split(8)) / len(self.windows[2:].split(8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", default=16, type=int, help="of held-out text, a multiple of 8")
    args = parser.parse_args()
    torch.manual_seed(0)
    demo = Demo(args.windows)
    scored = args.windows * demo.config.context
    baseline = demo.loss_with(Storage(None, "one"))
    print(f"""# Accuracy of quantised caches

`python benchmarks/quantised_accuracy.py --windows {args.windows}`, on CPU, PyTorch {torch.__version__}, Python
{platform.python_version()} (whose standard library the text is). Errors are those of attention's output over 2048
keys, relative and root mean square, against float32 keys and values. The loss is that of the demo model in bfloat16 on
{scored:,} held-out bytes, windows of {demo.config.context}.

| stored as | scales | error, random | error, outliers | bits a byte | difference |
|---|---|---|---|---|---|""")
    for name, words, storage in storages():
        errors = [f"{100 * error_on(random_numbers(outliers), storage):.2f} %" for outliers in (False, True)]
        loss = demo.loss_with(storage)
        print(f"| {name} | {words} | {' | '.join(errors)} | {loss:.4f} | {loss - baseline:+.4f} |", flush=True)


if __name__ == "__main__":
    main()
