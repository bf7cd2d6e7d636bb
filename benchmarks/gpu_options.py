"""What options cost, or save, on one GPU: quantised caches, windows, softcap and others beside the plain call.

    python benchmarks/gpu_options.py --output options.json [--peers] [--only NAME ...]

Calls of the operator in a CUDA graph over rotated inputs, with a schedule made before, as `gpu_attention.py` measures.
Each result is compared with the reference on a few of its rows before it is timed, and a peer's with ours. Bytes
are those of the keys and values that a query sees.
"""

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import torch
from attention_cases import Arguments, Case, decode, make
from gpu_engines import flash_attention, vllm_attention
from gpu_timing import Replay, ceilings, header, in_turns, rotations, summary
from torch import Tensor

import torch_paged
from torch_paged import reference

DECODE, FEW_HEADS = (
    decode(64, 8192),
    {keys: decode(1, keys, heads=32, kv_heads=4) for keys in (4096, 16384, 65536, 262144)},
)
PREFILL = Case((8192,), (8192,))
GPT_OSS = Case((8192,), (8192,), heads=64, dim=64, value_dim=64)
GEMMA_2 = Case((8192,), (8192,), heads=16, dim=256, value_dim=256)
E4M3, E5M2, INT8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8
CASES: dict[str, tuple[Case, torch.dtype | None, str, dict[str, Any]]] = {
    "decode 64 x 8k": (DECODE, None, "", {}),
    "decode 64 x 8k, e4m3": (DECODE, E4M3, "head", {}),
    "decode 64 x 8k, e5m2": (DECODE, E5M2, "head", {}),
    "decode 64 x 8k, int8": (DECODE, INT8, "head", {}),
    "decode 64 x 8k, e4m3, token scales": (DECODE, E4M3, "token", {}),
    "decode 64 x 8k, int8, token scales": (DECODE, INT8, "token", {}),
    **{f"decode 1 x {keys}, 32/4 heads, e4m3": (case, E4M3, "head", {}) for keys, case in FEW_HEADS.items()},
    "decode 64 x 8k, window 1k": (DECODE, None, "", dict(sliding_window=1024)),
    "decode 64 x 1k": (decode(64, 1024), None, "", {}),
    "decode 64 x 8k, softcap": (DECODE, None, "", dict(softcap=30.0)),
    "decode 64 x 8k, ALiBi": (DECODE, None, "", dict(alibi_slopes=0.1)),
    "decode 64 x 8k, sinks": (DECODE, None, "", dict(sinks=0.5)),
    "prefill 8k": (PREFILL, None, "", {}),
    "prefill 8k, window 1k": (PREFILL, None, "", dict(sliding_window=1024)),
    "prefill 8k, window 4k": (PREFILL, None, "", dict(sliding_window=4096)),
    "prefill 32k, window 4k": (Case((32768,), (32768,)), None, "", dict(sliding_window=4096)),
    "prefill 16 x 1k, window 512": (Case((1024,) * 16, (1024,) * 16, ragged=True), None, "", dict(sliding_window=512)),
    "prefill 8k, sinks": (PREFILL, None, "", dict(sinks=0.5)),
    "prefill 8k, softcap": (PREFILL, None, "", dict(softcap=30.0)),
    "prefill 8k, window 128, sinks, 64/8 heads of dim 64": (GPT_OSS, None, "", dict(sliding_window=128, sinks=0.5)),
    "prefill 8k, sinks, 64/8 heads of dim 64": (GPT_OSS, None, "", dict(sinks=0.5)),
    "prefill 8k, softcap, 64/8 heads of dim 64": (GPT_OSS, None, "", dict(softcap=30.0)),
    "prefill 8k, softcap, 16/8 heads of dim 256": (GEMMA_2, None, "", dict(softcap=50.0)),
    "prefill 8k, window 4k, softcap, 16/8 heads of dim 256": (
        GEMMA_2,
        None,
        "",
        dict(sliding_window=4096, softcap=50.0),
    ),
    "prefill 8k, e4m3": (PREFILL, E4M3, "head", {}),
    "prefill 8k, int8": (PREFILL, INT8, "head", {}),
}


def stored(inputs: Arguments, dtype: torch.dtype | None, scales: str) -> tuple[Arguments, dict[str, Tensor]]:
    """`inputs` with caches of `dtype`, and their scales."""
    if dtype is None:
        return inputs, {}
    options, caches = {}, []
    for side, cache in (("key", inputs[1]), ("value", inputs[2])):
        # Unused slots are NaN: as good as 0 in a type without it.
        floats = cache.transpose(1, 2).float().nan_to_num()
        if scales == "token":
            scale = options[f"{side}_scale_cache"] = (floats.abs().amax(-1) / reference.largest(dtype)).transpose(1, 2)
            scale = scale.transpose(1, 2)[..., None].clamp(min=1e-6)
        else:
            scale = floats.abs().amax() / reference.largest(dtype)
            options[f"{side}_scale"] = scale.expand(cache.shape[2]).contiguous()
        exact = floats / scale
        caches.append((exact.round() if dtype == INT8 else exact).to(dtype).transpose(1, 2))
    return (inputs[0], *caches, *inputs[3:]), options


def with_per_head(options: dict[str, Any], case: Case, device: torch.device) -> dict[str, Any]:
    """`options`, with a number for every head where they have one for all."""
    per_head = {name: options[name] for name in ("alibi_slopes", "sinks") if name in options}
    return options | {name: torch.full((case.heads,), value, device=device) for name, value in per_head.items()}


def verify(case: Case, inputs: Arguments, options: dict[str, Any], output: Tensor) -> float:
    """Relative error of the first and last rows of two sequences, causal; raises if it is none of rounding."""
    worst, ends = 0.0, torch.tensor(case.queries).cumsum(0).tolist()
    query, keys, values, table, lens, _ = inputs
    for seq in {0, len(case.keys) - 1}:
        count, begin = min(case.queries[seq], 16), ends[seq] - case.queries[seq]
        for first in {begin, ends[seq] - count}:
            rows = slice(first, first + count)
            seen = lens[seq, None] - (ends[seq] - rows.stop)
            exact = reference.attention(query[rows].double(), keys, values, table[seq, None], seen, **options)
            worst = max(worst, ((output[rows] - exact).norm() / exact.norm()).item())
    if not worst < 1e-2:
        raise AssertionError(f"WRONG RESULT: {case}, {list(options)}: error {worst:.2e}")
    return worst


PEERS = {
    "FlashAttention 3 of vLLM": functools.partial(flash_attention, 3),
    "vLLM (Triton)": vllm_attention,
}


def prepared_peers(
    case: Case, sets: list[tuple[Arguments, dict[str, Tensor]]], options: dict[str, Any], ours: Tensor, least: float
) -> tuple[dict[str, Replay], dict[str, str]]:
    """Peers that serve `options`, and why the others do not."""
    ready, not_served = {}, {}
    for name, peer in PEERS.items():
        try:
            calls = [peer(case, inputs, **options) for inputs, _ in sets]
            output = calls[0]()
        except (NotImplementedError, ImportError, RuntimeError) as problem:
            not_served[name] = (str(problem).splitlines() or [type(problem).__name__])[0][:100]
            continue
        error = ((output.float() - ours[: len(output)].float()).norm() / ours.float().norm()).item()
        if not error < 1e-2:
            raise AssertionError(f"{name} differs: {case}, {list(options)}: error {error:.2e}")
        ready[name] = Replay(calls, least)
    return ready, not_served


def measure(
    case: Case, dtype: torch.dtype | None, scales: str, options: dict[str, Any], with_peers: bool
) -> dict[str, Any]:
    device = torch.device("cuda", 0)
    window = min(options.get("sliding_window", 1 << 40), min(case.keys))
    seen = sum(min(window + q - 1, k) for k, q in zip(case.keys, case.queries, strict=True))
    flops = case.flops_within(window)
    size = seen * case.kv_heads * (case.dim + case.value_dim) * (2 if dtype is None else 1)
    options = with_per_head(options, case, device)
    sets = [stored(make(case, device, seed), dtype, scales) for seed in range(rotations(size))]

    schedules = [torch_paged.schedule(*i[:5], cu_seqlens_q=i[5], **its, **options) for i, its in sets]

    def call(inputs: Arguments, its: dict[str, Tensor], schedule: Tensor) -> Tensor:
        return torch_paged.attention(*inputs[:5], cu_seqlens_q=inputs[5], **its, **options, schedule=schedule)

    ours = call(*sets[0], schedules[0])
    error = verify(case, sets[0][0], sets[0][1] | options, ours)
    calls = [lambda i=i, its=its, s=s: call(i, its, s) for (i, its), s in zip(sets, schedules, strict=True)]
    least = max(size / 4e12, flops / 6e14)
    served = with_peers and dtype is None and "alibi_slopes" not in options
    peers, not_served = prepared_peers(case, sets, options, ours, least) if served else ({}, {})
    times = in_turns({"": Replay(calls, least)} | peers)
    figures = summary(times.pop(""))
    seconds = figures["us"] * 1e-6
    figures |= {"gb_s": size / seconds * 1e-9, "tflop_s": flops / seconds * 1e-12, "error": error}
    return figures | {"peers": {name: summary(seconds)["us"] for name, seconds in times.items()} | not_served}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument(
        "--peers", action="store_true", help="measure those that serve an option, if they are installed"
    )
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=CASES, metavar="NAME")
    chosen = parser.parse_args()
    report: dict[str, Any] = {
        **header(),
        "ceilings": ceilings(torch.device("cuda", 0), False),
        "cases": {},
    }
    for name in chosen.only:
        try:
            report["cases"][name] = figures = measure(*CASES[name], chosen.peers)
        except torch.cuda.OutOfMemoryError as problem:
            report["cases"][name] = figures = {"absent": str(problem).splitlines()[0][:100]}
        print(_line(name, figures, report["ceilings"]["read_gb_s"]), flush=True)
        torch.cuda.empty_cache()
        if chosen.output:  # after each case, as the machine may be taken away
            chosen.output.write_text(json.dumps(report, indent=1))


def _line(name: str, figures: dict[str, Any], read_gb_s: float) -> str:
    if "absent" in figures:
        return f"{name:40s} {figures['absent']}"
    ours = (
        f"{figures['us']:9.1f} us {figures['gb_s'] / read_gb_s:6.1%} of a plain read {figures['tflop_s']:7.1f} TFLOP/s"
    )
    others = (
        f"{peer} {its:.1f}" if isinstance(its, float) else f"{peer}: {its}" for peer, its in figures["peers"].items()
    )
    return "; ".join((f"{name:40s} {ours}", *others))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
