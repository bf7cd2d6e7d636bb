"""Writing operators on one GPU beside `copy_` of the same bytes, and the host's time of every operator.

    python benchmarks/gpu_ops.py --output ops.json

Bytes count both ways. Results are checked against indexing before anything is timed. Host times are of eager calls
that nothing waits for: 200 in a row of each operator in turn, the median of 21 rows.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpu_timing import Replay, header, in_turns, rotations, summary

import torch_paged  # noqa: F401 - registers the operators

ops = torch.ops.paged
BF16, BLOCK, HEADS, KV_HEADS, DIM = torch.bfloat16, 16, 32, 8, 128
BLOCK_BYTES = 2 * BLOCK * KV_HEADS * DIM
Run = tuple[int, Callable[[], object]]  # bytes moved, and what moves them


def cache(num_blocks: int) -> Tensor:
    """Random numbers in the layout of PagedKVCache."""
    return torch.randn(num_blocks, KV_HEADS, BLOCK, DIM, device="cuda").to(BF16).transpose(1, 2)


def append(tokens: int) -> Run:
    caches = [cache(4 * tokens // BLOCK) for _ in range(2)]
    key, value = torch.randn(2, tokens, KV_HEADS, DIM, device="cuda").to(BF16)
    slots = torch.randperm(4 * tokens // BLOCK, device="cuda")[: -(-tokens // BLOCK)].repeat_interleave(BLOCK) * BLOCK
    slots = (slots + torch.arange(len(slots), device="cuda") % BLOCK)[:tokens]
    ops.append(key, value, *caches, slots)
    assert torch.equal(caches[1][slots // BLOCK, slots % BLOCK], value)
    return 4 * key.nbytes, lambda: ops.append(key, value, *caches, slots)


def copy_blocks(pairs: int, layers: int) -> Run:
    caches = [cache(2 * pairs) for _ in range(2 * layers)]
    block_pairs = torch.randperm(2 * pairs, device="cuda").view(-1, 2)
    ops.copy_blocks(caches, block_pairs)
    assert all(torch.equal(*part[block_pairs.T]) for part in caches)
    return 2 * pairs * len(caches) * BLOCK_BYTES, lambda: ops.copy_blocks(caches, block_pairs)


def gather_blocks(blocks: int, layers: int) -> Run:
    caches, chosen = [cache(2 * blocks) for _ in range(2 * layers)], torch.randperm(2 * blocks, device="cuda")[:blocks]
    out = torch.empty(blocks, len(caches), BLOCK, KV_HEADS, DIM, dtype=BF16, device="cuda")
    ops.gather_blocks(caches, chosen, out)
    assert torch.equal(out[:, -1], caches[-1][chosen])
    return 2 * out.nbytes, lambda: ops.gather_blocks(caches, chosen, out)


def scatter_blocks(blocks: int, layers: int) -> Run:
    caches, chosen = [cache(2 * blocks) for _ in range(2 * layers)], torch.randperm(2 * blocks, device="cuda")[:blocks]
    source = torch.randn(blocks, len(caches), BLOCK, KV_HEADS, DIM, device="cuda").to(BF16)
    ops.scatter_blocks(source, chosen, caches)
    assert torch.equal(source[:, -1], caches[-1][chosen])
    return 2 * source.nbytes, lambda: ops.scatter_blocks(source, chosen, caches)


def merge_attention(tokens: int) -> Run:
    a, b = torch.randn(2, tokens, HEADS, DIM, device="cuda").to(BF16)
    lse = torch.randn(2, tokens, HEADS, device="cuda")
    merged, _ = ops.merge_attention(a, lse[0], b, lse[1])
    share = torch.sigmoid(lse[0] - lse[1])[..., None]
    torch.testing.assert_close(merged.float(), a.float() * share + b.float() * (1 - share), rtol=0.02, atol=0.02)
    return 3 * a.nbytes + 3 * lse[0].nbytes, lambda: ops.merge_attention(a, lse[0], b, lse[1])


CASES: dict[str, Callable[[], Run]] = {
    "append 64 tokens": lambda: append(64),
    "append 8192 tokens": lambda: append(8192),
    "copy_blocks 32 pairs x 32 layers": lambda: copy_blocks(32, 32),
    "copy_blocks 1024 pairs x 32 layers": lambda: copy_blocks(1024, 32),
    "gather_blocks 256 x 32 layers": lambda: gather_blocks(256, 32),
    "scatter_blocks 256 x 32 layers": lambda: scatter_blocks(256, 32),
    "merge_attention 8192 tokens": lambda: merge_attention(8192),
}


def device_times() -> dict[str, dict[str, Any]]:
    """Each operator and a copy of as many bytes, timed alike."""
    figures = {}
    for name, make in CASES.items():
        bytes_moved = make()[0]
        count = min(rotations(bytes_moved), 16)
        floor = bytes_moved / 4e12
        pairs = [torch.randn(2, bytes_moved // 8, device="cuda") for _ in range(count)]
        replays = {
            "ours": Replay([make()[1] for _ in range(count)], floor),
            "copy_": Replay([lambda pair=pair: pair[0].copy_(pair[1]) for pair in pairs], floor),
        }
        measured, copied = (summary(times) for times in in_turns(replays).values())
        figures[name] = measured | {
            "gb_s": bytes_moved / measured["us"] * 1e-3,
            "copy_us": copied["us"],
            "of_copy": copied["us"] / measured["us"],
        }
        print(
            f"{name:36s} {measured['us']:9.1f} us {figures[name]['gb_s']:7.0f} GB/s, copy_ {copied['us']:9.1f} us: "
            f"{figures[name]['of_copy']:.0%} of its speed",
            flush=True,
        )
        del pairs, replays
        torch.cuda.empty_cache()
    return figures


def host_time(call: Callable[[], object], calls: int = 200) -> float:
    """Microseconds of one call on the host."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls * 1e6


def host_times() -> dict[str, float]:
    caches, rows = [cache(64) for _ in range(2)], torch.randn(4, KV_HEADS, DIM, device="cuda").to(BF16)
    query, slots = torch.randn(4, HEADS, DIM, device="cuda").to(BF16), torch.arange(4, device="cuda")
    table = torch.arange(64, dtype=torch.int32, device="cuda").view(4, 16)
    lens, bounds = (torch.tensor(values, dtype=torch.int32, device="cuda") for values in ([9] * 4, [0, 1, 2, 3, 4]))
    output, lse = ops.attention_with_lse(query, *caches, table, lens)
    pairs, schedule = torch.tensor([[0, 1]], device="cuda"), ops.schedule(query, *caches, table, lens)
    calls = {
        "attention": lambda: ops.attention(query, *caches, table, lens),
        "attention, with a schedule": lambda: ops.attention(query, *caches, table, lens, schedule=schedule),
        "attention, cu_seqlens_q": lambda: ops.attention(query, *caches, table, lens, cu_seqlens_q=bounds),
        "append": lambda: ops.append(rows, rows, *caches, slots),
        "copy_blocks": lambda: ops.copy_blocks(caches, pairs),
        "merge_attention": lambda: ops.merge_attention(output, lse, output, lse),
        "torch.add, for comparison": lambda: torch.add(query, query),
    }
    with torch.inference_mode():
        times = [{name: host_time(call) for name, call in calls.items()} for _ in range(21)]  # clocks rise and fall
    figures = {name: sorted(row[name] for row in times)[10] for name in calls}
    for name, us in figures.items():
        print(f"{name:36s} {us:9.1f} us on the host", flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    report = {
        **header(),
        "ops": device_times(),
        "host_us": host_times(),
    }
    if options.output:
        options.output.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
