"""What paging costs: waste and speed by block size, and where it does not pay, or loses.

    python benchmarks/serving_limits.py            three minutes

Tables, JSON and a plot go to `benchmarks/results/serving/limits.*`. Times are medians of the CPU time of decode steps
of the demo model, eager, taken by turns with those that they stand beside. One of these is the same model over keys and
values in one piece, for sequences of equal length, which needs neither a table nor metadata: what paging can at best
reach.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from serving_report import BLUE, GREY, ORANGE, machine, panels, parser, publish, table
from serving_trace import MOST_TOKENS, WEIGHTS, Decoder, Memory, load, serve, trace
from torch import Tensor, nn
from torch.nn import functional as F

from torch_paged.serving import Engine, Request

BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SHAPES = ((1, 16), (1, 512), (1, 1900), (64, 16), (64, 512))  # sequences, keys of each
STEPS = 30


class OnePiece(NamedTuple):
    """A decode step of sequences that all have `length` keys, the new one included."""

    positions: Tensor
    last_token: Tensor
    length: int


class OnePieceKV(nn.Module):
    """Keys and values [num_seqs, num_kv_heads, most, head_dim] of a layer."""

    def __init__(self, num_seqs: int, num_kv_heads: int, most: int, head_dim: int) -> None:
        super().__init__()
        self.key, self.value = (torch.randn(num_seqs, num_kv_heads, most, head_dim) for _ in range(2))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, batch: OnePiece) -> Tensor:
        self.key[:, :, batch.length - 1] = key
        self.value[:, :, batch.length - 1] = value
        keys, values = self.key[:, :, : batch.length], self.value[:, :, : batch.length]
        return F.scaled_dot_product_attention(query[:, :, None], keys, values, enable_gqa=True)[:, :, 0]


@torch.inference_mode()
def medians_ms(steps: dict[str, Callable[[], None]]) -> dict[str, float]:
    """A step of each by turns, so that all see the machine at its better and worse times."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(STEPS + 3):
        for name, step in steps.items():
            start = time.process_time()
            step()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(each[3:]) * 1e3 for name, each in times.items()}


@torch.inference_mode()
def in_one_piece(num_seqs: int, length: int) -> Callable[[], None]:
    config, weights = load(WEIGHTS)
    layers = [
        OnePieceKV(num_seqs, config.num_kv_heads, length + STEPS + 3, config.head_dim) for _ in range(config.num_layers)
    ]
    model = Decoder(config, layers)
    model.load_state_dict(weights)
    tokens, rows = torch.ones(num_seqs, dtype=torch.int64), torch.arange(num_seqs)

    def step() -> None:
        nonlocal length
        model(tokens, OnePiece(torch.full((num_seqs,), length), rows, length + 1)).argmax(-1).tolist()
        length += 1

    return step


def paged(num_seqs: int, length: int, block_size: int = 16) -> Callable[[], None]:
    """`prepare`, the model, `commit`."""
    cache, model = Memory(max(num_seqs // 2, 1), MOST_TOKENS).build(block_size)
    for tensor in sum(cache.tensors(), ()):
        tensor.normal_()  # memory that nobody wrote is one page of zeros, read from the processor's cache
    seqs = [cache.add() for _ in range(num_seqs)]
    for seq in seqs:
        cache.commit(cache.prepare([seq], length))
    tokens = torch.ones(num_seqs, dtype=torch.int64)

    def step() -> None:
        batch = cache.prepare(seqs, 1)
        model(tokens, batch).argmax(-1).tolist()
        cache.commit(batch)

    return step


def engine(num_seqs: int, length: int) -> Callable[[], None]:
    """The same through the scheduler, with prefix cache."""
    cache, model = Memory(max(num_seqs // 2, 1), MOST_TOKENS).build(16)
    serving = Engine(cache, model, token_budget=4096)
    for number in range(num_seqs):
        serving.submit(Request(prompt=[1 + number] * length, max_new_tokens=STEPS + 10))
    while any(sample.unread > 1 for sample in serving._scheduler._residents.running) or serving.load.waiting:
        serving.step()
    return lambda: serving.step() and None


def measure() -> dict[str, Any]:
    times = medians_ms({str(size): paged(32, 512, size) for size in BLOCK_SIZES})
    blocks = {}
    for size in BLOCK_SIZES:
        figures = serve(Memory(8, MOST_TOKENS, model=False), trace(192, False), "paged", block_size=size).figures
        kept = {name: figures[name] for name in ("live", "filled", "sequences")}
        blocks[str(size)] = kept | dict(decode_ms=times[str(size)])
        print(size, blocks[str(size)], flush=True)
    shapes = {}
    for num_seqs, length in SHAPES:
        name = f"{num_seqs} x {length}"
        ways = {way.__name__: way(num_seqs, length) for way in (in_one_piece, paged, engine)}
        shapes[name] = medians_ms(ways)
        print(name, shapes[name], flush=True)
    return dict(machine=machine(), blocks=blocks, shapes=shapes, short=short())


def short() -> dict[str, Any]:
    """512 requests of 4 to 12 tokens in the memory of 32 places of 32 tokens: who asks for little is known to."""
    requests = [Request(prompt=[1] * (2 + i % 5), max_new_tokens=2 + i % 5, namespace=i) for i in range(512)]
    memory = Memory(32, 32)
    return {
        "paged, blocks of 16": serve(memory, requests, "paged").figures,
        "paged, blocks of 4": serve(memory, requests, "paged", block_size=4).figures,
        "slots of 16 tokens": serve(Memory(64, 16), requests, "slots").figures,
    }


def text(measured: dict[str, Any]) -> str:
    blocks = [
        [size, f"{s['filled']:.1%}", f"{s['live']:.1%}", f"{s['sequences']:.1f}", f"{s['decode_ms']:.2f}"]
        for size, s in measured["blocks"].items()
    ]
    shapes = [
        [
            name, f"{s['in_one_piece']:.2f}", f"{s['paged']:.2f}", f"{s['paged'] / s['in_one_piece']:.2f}x",
            f"{s['engine']:.2f}", f"{s['engine'] / s['in_one_piece']:.2f}x",
        ]
        for name, s in measured["shapes"].items()
    ]  # fmt: skip
    short = [
        [name, f"{s['tokens_per_cpu_second']:.0f}", f"{s['sequences']:.1f}", f"{s['live']:.1%}", f"{s['filled']:.1%}"]
        for name, s in measured["short"].items()
    ]
    return "\n\n".join(
        [
            "# What paging costs",
            f"`python benchmarks/serving_limits.py`. The demo model, float32, eager; {measured['machine']}. "
            "Times are of the CPU, all threads together.",
            "## Block size: waste against speed",
            "192 requests of the trace in the memory of 8 x 2048 tokens, while requests wait; and a decode step of 32 "
            "sequences with 512 keys.",
            table(["block size", "given slots filled", "memory live", "sequences", "decode step, ms"], blocks),
            "## Where paging does not pay",
            "A decode step, ms: of equal sequences whose keys and values lie in one piece each, without table and "
            "metadata; over the paged cache; and through the engine, with scheduler and prefix cache. Memory is not "
            "short here, so paging has nothing to give.",
            table(["sequences x keys", "in one piece", "paged", "", "engine", ""], shapes),
            "Very short requests, 4 to 12 tokens each, in the memory of 1024 tokens. Where no request outgrows a "
            "block, a block is a slot.",
            table(["", "tokens/CPU s", "sequences", "memory live", "given slots filled"], short),
        ]
    )


def draw(measured: dict[str, Any]) -> Any:
    figure, (waste, speed, cost) = panels(
        "Given slots without a token, by block size", "Decode step, 32 sequences x 512 keys, ms", "Decode step, ms",
        width=4.6,
    )  # fmt: skip
    sizes = list(measured["blocks"])
    waste.bar(sizes, [100 * (1 - s["filled"]) for s in measured["blocks"].values()], color=ORANGE)
    waste.set_ylabel("%")
    waste.set_xlabel("block size")
    speed.bar(sizes, [s["decode_ms"] for s in measured["blocks"].values()], color=BLUE)
    speed.set_xlabel("block size")
    names = list(measured["shapes"])
    for offset, (way, color) in enumerate({"in_one_piece": GREY, "paged": BLUE, "engine": ORANGE}.items()):
        values = [measured["shapes"][name][way] for name in names]
        label = way.replace("_", " ")
        cost.bar([i + 0.27 * (offset - 1) for i in range(len(names))], values, width=0.25, color=color, label=label)
    cost.set_xticks(range(len(names)), names, fontsize=8)
    cost.set_xlabel("sequences x keys")
    cost.set_yscale("log")
    cost.legend(fontsize=8)
    return figure


def main() -> None:
    args = parser(__doc__).parse_args()
    publish("limits", args.out, None if args.redraw else measure(), text, draw)


if __name__ == "__main__":
    main()
