"""Batches for a checker of memory or of races, each compared with the reference.

    compute-sanitizer --tool memcheck python benchmarks/gpu_checked.py [--only NAME ...]
    compute-sanitizer --tool racecheck python benchmarks/gpu_checked.py [--only NAME ...]
    compute-sanitizer --tool racecheck python benchmarks/gpu_checked.py --least

Attention without a schedule, with its own, and with one that was made for other lengths, of which only the results are
wrong. `--least` runs a kernel for Hopper whose warps share nothing. What racecheck reports of it, it reports of all
whose warps have parts of their own: one reads which part it has while another writes it. Triton does both.
"""

import argparse
from typing import Any

import torch
from attention_cases import Case, decode, make
from gpu_options import E4M3, INT8, stored, verify, with_per_head
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

import torch_paged
from torch_paged.kernels.hopper_tiles import barrier

NARROW, WIDE = dict(heads=64, dim=64, value_dim=64), dict(heads=16, dim=256, value_dim=256)
CASES: dict[str, tuple[Case, torch.dtype | None, str, dict[str, Any]]] = {
    "decode": (decode(3, 700), None, "", {}),
    "decode, ALiBi, e4m3": (decode(3, 700), E4M3, "head", dict(alibi_slopes=0.1)),
    "decode, int8, token scales": (decode(3, 700), INT8, "token", {}),
    "several tokens": (decode(3, 700, queries=4), None, "", dict(softcap=20.0)),
    "float32": (Case((90, 300), (90, 70), dtype="fp32", ragged=True), None, "", {}),
    "mixed": (Case((700, 90, 3000, 900), (700, 90, 1, 40), ragged=True), None, "", {}),
    "prompt": (Case((1500,), (1500,)), None, "", {}),
    "prompts, blocks of 8": (Case((500, 900), (500, 900), block=8, ragged=True), None, "", dict(sinks=0.5)),
    "prompts, blocks of 48": (Case((700,) * 3, (700,) * 3, block=48), None, "", dict(softcap=20.0)),
    "three parts": (Case((2100, 2100), (2100, 2100), **NARROW), None, "", {}),
    "wide heads": (Case((700, 90), (700, 90), ragged=True, **WIDE), None, "", {}),
    "dims 24 and 40": (Case((2100, 300), (2100, 300), dim=24, value_dim=40, ragged=True), None, "", {}),
    "short window": (Case((700, 900), (700, 70), ragged=True), None, "", dict(sliding_window=100)),
    "short window, wide heads": (Case((600, 700), (600, 70), ragged=True, **WIDE), None, "", dict(sliding_window=37)),
    "window": (Case((2900,), (1500,)), None, "", dict(sliding_window=1100)),
    "window, blocks of 48": (
        Case((1400, 2000), (1400, 70), block=48, ragged=True),
        None,
        "",
        dict(sliding_window=1030),
    ),
    "window, blocks of 256": (Case((2600,), (1300,), block=256, **NARROW), None, "", dict(sliding_window=1100)),
}


def check(case: Case, dtype: torch.dtype | None, scales: str, options: dict[str, Any]) -> float:
    """Relative error of some rows; raises if it is none of rounding. What a window hides from all is NaN."""
    device = torch.device("cuda", 0)
    options = with_per_head(options, case, device)
    inputs, its = stored(make(case, device, 0), dtype, scales)
    query, keys, values, table, lens, bounds = inputs
    if "sliding_window" in options:
        for row, k, q in zip(table, case.keys, case.queries, strict=True):
            hidden = torch.arange(max(k - q - options["sliding_window"] + 1, 0), device=device)
            for cache in (keys, values):
                cache[row[hidden // case.block], hidden % case.block] = torch.nan
    given = dict(cu_seqlens_q=bounds, **its, **options)
    schedules = [torch_paged.schedule(query, keys, values, table, of, **given) for of in (lens, (lens // 2).flip(0))]
    *outputs, _anything = [
        torch_paged.attention(query, keys, values, table, lens, schedule=schedule, **given)
        for schedule in (None, *schedules)
    ]
    return max(verify(case, inputs, its | options, output) for output in outputs)


@gluon.jit
def _part(output, PART: gl.constexpr):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    place = 384 * gl.program_id(0) + 128 * PART + gl.arange(0, 128, LAYOUT)
    barrier()
    gl.store(output + place, place)
    barrier()


@gluon.jit
def _least(output):
    gl.warp_specialize([(_part, (output, 0)), (_part, (output, 1)), (_part, (output, 2))], [4, 1], [168, 24])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=CASES, metavar="NAME")
    parser.add_argument("--least", action="store_true", help="only a kernel whose warps share nothing")
    chosen = parser.parse_args()
    if chosen.least:
        output = torch.empty(132 * 384, dtype=torch.int32, device="cuda")
        _least[(132,)](output, num_warps=4)
        torch.testing.assert_close(output.cpu(), torch.arange(len(output), dtype=torch.int32))
        return
    for name in chosen.only:
        print(f"{name}: right, to {check(*CASES[name]):.1e}", flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
