"""Attention on one GPU: checks results, then measures the cases that decide, beside the peers that are installed.

    python benchmarks/gpu_attention.py --output results.json [--peers] [--only NAME ...] [--resume]

Bytes are the keys and values that must be read once; FLOPs count unmasked pairs alone. Every case is verified before it
is timed, in float64 on a sample of its sequences; a wrong result ends the run. Times are of one call among many in a
CUDA graph, over inputs rotated so that none is still in the L2 cache, with a schedule made before, and without; all
that a case compares take turns.
`--smoke` runs everything tiny, on any device.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from attention_cases import CASES, ODD, ODD_PREFILL, Arguments, Case, make
from gpu_peers import PEERS, absent, versions
from gpu_timing import Replay, ceilings, header, in_turns, rotations, summary

import torch_paged  # noqa: F401 - registers the operators
from torch_paged.kernels.attention import launch_attention
from torch_paged.kernels.attention_plan import problem_of
from torch_paged.kernels.device import device_of
from torch_paged.kernels.launch_config import AttentionLaunch, attention_launches

ops = torch.ops.paged
Launches = tuple[AttentionLaunch, ...]
WITH_PEERS = (
    "decode 64 x 8k",
    "decode 1 x 4k",
    "decode 1 x 128k",
    "decode 256 x 128",
    "decode 40 x 500",
    "decode ragged",
    "mha 16 x 2000, block 8",
    "q 4, 32 x 8k",
    "q 16, 32 x 8k",
    "q 4, 16 x 1000",
    "q 8, 1 x 8k",
    "prefill 8k",
    "prefill 8k, dim 64",
    "prefill 8k, dim 256",
    "prefill 32k",
    "prefill 1k",
    "prefill 16 x 1k",
    "prefill 512 on 8k",
    "prefill 1k on 16k",
    "prefill 128 on 128k",
    "prefill 2k on 8k, 32 KV heads",
    "prefill 4 x 1k on 4k, 32 KV heads",
    "mixed",
)


def run(launches: Launches, inputs: Arguments, output: Tensor, lse: Tensor, schedule: Tensor | None = None) -> None:
    for row, launch in zip((1, 0)[-len(launches) :], launches, strict=True):
        its = None if schedule is None else schedule[row]
        launch_attention(launch, *inputs, output, lse, inputs[0].shape[2] ** -0.5, schedule=its)


def shipped(case: Case, inputs: Arguments) -> Launches:
    query, key_cache, value_cache, table, _, bounds = inputs
    problem = problem_of(query, key_cache, value_cache, table, bounds, case.causal)
    return attention_launches(problem, device_of(query.device))


def general(case: Case, inputs: Arguments) -> Launches:
    """What serves `case` where the Hopper kernel cannot."""
    query, key_cache, value_cache, table, _, bounds = inputs
    problem = problem_of(query, key_cache, value_cache, table, bounds, case.causal)
    return attention_launches(replace(problem, copyable=False), device_of(query.device))


def outputs(case: Case, inputs: Arguments) -> tuple[Tensor, Tensor]:
    query = inputs[0]
    output = query.new_full((query.shape[0], case.heads, case.value_dim), math.nan)
    return output, query.new_full(output.shape[:2], math.nan, dtype=torch.float32)


def verify(case: Case, inputs: Arguments, output: Tensor, lse: Tensor, sample: int = 5) -> float:
    """Largest relative error over a sample of sequences; raises if it is none of rounding."""
    query, key_cache, value_cache, table, _, _ = inputs
    starts = [0, *torch.tensor(case.queries).cumsum(0).tolist()]
    worst = 0.0
    for seq in range(0, len(case.keys), max(1, len(case.keys) // sample)):
        keys, count, first = case.keys[seq], case.queries[seq], max(0, case.queries[seq] - 300)
        if count == 0:
            continue
        used = table[seq, : -(-keys // case.block)].long()
        key, value = (cache[used].flatten(0, 1)[:keys].double() for cache in (key_cache, value_cache))
        rows = query[starts[seq] + first : starts[seq] + count].double()
        rows = rows.unflatten(1, (case.kv_heads, -1)) * case.dim**-0.5
        logits = torch.einsum("qhgd,khd->hgqk", rows, key)
        if case.causal:
            position = torch.arange(keys - count + first, keys, device=query.device)[:, None]
            logits = logits.masked_fill(torch.arange(keys, device=query.device) > position, -math.inf)
        exact = torch.einsum("hgqk,khd->qhgd", logits.softmax(-1).nan_to_num(0), value).flatten(1, 2)
        got = output[starts[seq] + first : starts[seq] + count].double()
        exact_lse = logits.logsumexp(-1).permute(2, 0, 1).flatten(1)
        got_lse = lse[starts[seq] + first : starts[seq] + count].double()
        seen = exact_lse.isfinite()
        error = ((got - exact).norm() / exact.norm().clamp(min=1e-9)).item()
        error_lse = (got_lse - exact_lse)[seen].abs().max().item() if seen.any() else 0.0
        limit = {"fp32": 2e-6, "fp16": 2e-3, "bf16": 1e-2}[case.dtype]
        if not (error < limit and error_lse < 10 * limit and bool((got_lse.isfinite() == seen).all())):
            raise AssertionError(f"WRONG RESULT: {case}, sequence {seq}: error {error:.2e}, lse {error_lse:.2e}")
        worst = max(worst, error)
    spare = output[starts[-1] :]
    if not (bool((spare == 0).all()) and bool((lse[starts[-1] :] == -math.inf).all())):
        raise AssertionError(f"WRONG RESULT: {case}: rows past the last query")
    return worst


def _figures(case: Case, times: list[float]) -> dict[str, float]:
    figures = summary(times)
    seconds = figures["us"] * 1e-6
    return figures | {"gb_s": case.bytes / seconds * 1e-9, "tflop_s": case.flops / seconds * 1e-12}


def _floor(case: Case) -> float:
    """About the least seconds that any implementation needs."""
    return max(case.bytes / 4e12, case.flops / 6e14)


def prepared(case: Case, sets: list[Arguments], launches: Launches, scheduled: bool = False) -> tuple[Replay, float]:
    """`launches` over the rotated input sets, and their error; their schedules are made before, as a model does."""
    results, schedules = [outputs(case, inputs) for inputs in sets], [None] * len(sets)
    if scheduled:
        schedules = [ops.schedule(*inputs[:5], cu_seqlens_q=inputs[5], causal=case.causal) for inputs in sets]
    run(launches, sets[0], *results[0], schedules[0])
    error = verify(case, sets[0], *results[0])
    calls = [lambda i=i, r=r, s=s: run(launches, i, *r, s) for i, r, s in zip(sets, results, schedules, strict=True)]
    return Replay(calls, _floor(case)), error


def prepared_peers(case: Case, sets: list[Arguments]) -> tuple[dict[str, Replay], dict[str, dict[str, Any]]]:
    """Peers that serve the case, and why the others do not."""
    ready, not_served = {}, {}
    expected, lse = outputs(case, sets[0])
    run(shipped(case, sets[0]), sets[0], expected, lse)
    for name, peer in PEERS.items():
        try:
            calls = [peer(case, inputs) for inputs in sets]
            torch.testing.assert_close(calls[0](), expected[: sum(case.queries)], rtol=0.05, atol=0.02)
            replay = Replay(calls, _floor(case))
            replay.seconds()
            ready[name] = replay
        except Exception as problem:
            not_served[name] = {"absent": f"{type(problem).__name__}: {str(problem).strip().splitlines()[0][:150]}"}
        torch.cuda.empty_cache()
    return ready, not_served


def compile_one(case: Case, launch: AttentionLaunch, device: torch.device) -> None:
    """Compiles into the cache on disk what `case` will launch; lengths and batch do not matter."""
    tiny = replace(case, keys=(1,), queries=(1,), pool=0)
    inputs = make(tiny, device)
    try:
        run((launch,), inputs, *outputs(tiny, inputs))
    except Exception as problem:
        print(f"does not compile or launch: {launch}: {problem}", flush=True)


def compile_all(jobs: Iterable[tuple[Case, AttentionLaunch]], device: torch.device, workers: int) -> float:
    """Compiles everything that will be launched, in `workers` processes; returns the seconds it took."""
    start, different = time.perf_counter(), list(dict.fromkeys(jobs))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_one, *zip(*different, strict=True), [device] * len(different)))
    return time.perf_counter() - start


def launches_of(case: Case, device: torch.device, choose: Callable[..., Launches] = shipped) -> Launches:
    return choose(case, make(replace(case, keys=(1,) * len(case.keys), pool=0), device))


def show(name: str, figures: dict[str, Any], read_gb_s: float) -> None:
    if "absent" in figures:
        print(f"{name:44s} {figures['absent']}", flush=True)
        return
    share = figures["gb_s"] / read_gb_s
    print(
        f"{name:44s} {figures['us']:10.1f} us (p90 {figures['us_p90']:.1f}) {figures['gb_s']:8.0f} GB/s {share:6.1%} "
        f"{figures['tflop_s']:7.1f} TFLOP/s",
        flush=True,
    )


def _at_most_70(lens: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(min(length, 70) for length in lens[-2:])


def measure(case: Case, sets: list[Arguments], with_peers: bool) -> dict[str, Any]:
    """A case with a schedule, without, by the general kernel where another serves it, and by its peers, in turns."""
    launches, without = shipped(case, sets[0]), general(case, sets[0])
    ours = {"": prepared(case, sets, launches, scheduled=True), "without a schedule": prepared(case, sets, launches)}
    if without != launches:
        ours["general"] = prepared(case, sets, without)
    peers, not_served = prepared_peers(case, sets) if with_peers else ({}, {})
    times = in_turns({name: replay for name, (replay, _) in ours.items()} | peers, 12)
    figures = {name: _figures(case, seconds) for name, seconds in times.items()}
    measured: dict[str, Any] = {name: figures[name] | {"error": error} for name, (_, error) in ours.items()}
    entry = measured.pop("") | measured
    if with_peers:
        entry["peers"] = {name: figures.get(name) or not_served[name] for name in PEERS}
    return entry


def show_all(name: str, entry: dict[str, Any], read_gb_s: float) -> None:
    show(name, entry, read_gb_s)
    for other in ("without a schedule", "general"):
        if other in entry:
            show(f"    {other}", entry[other], read_gb_s)
    for peer, figures in entry.get("peers", {}).items():
        show(f"    {peer}", figures, read_gb_s)


def kept(output: Path, peers: bool) -> dict[str, Any]:
    """The cases that an unfinished report has already; it must be of such a device, with the packages of today."""
    if not output.exists():
        return {}
    report, now = json.loads(output.read_text()), header() | {"peers": versions()}
    for key in ("device", "torch", "triton", "peers"):
        if report[key] != now[key]:
            raise ValueError(f"{output} cannot be resumed: it was measured with {key} {report[key]}, not {now[key]}")
    cases = report["cases"].items()
    return {name: case for name, case in cases if "peers" in case or not (peers and name in WITH_PEERS)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--resume", action="store_true", help="keep the cases that OUTPUT has, measure the rest")
    parser.add_argument("--only", nargs="*", default=list(CASES))
    parser.add_argument("--peers", action="store_true", help=f"measure them too, on {', '.join(WITH_PEERS)}")
    parser.add_argument("--workers", type=int, default=12, help="processes that compile")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    if options.resume and (options.output is None or options.smoke):
        parser.error("--resume needs --output, and goes on with no --smoke")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    measured = kept(options.output, options.peers) if options.resume else {}
    cases = {name: CASES[name] for name in options.only if name not in measured}
    odd = ODD if options.smoke else ODD | ODD_PREFILL
    if options.smoke:
        cases = {
            name: replace(case, keys=_at_most_70(case.keys), queries=_at_most_70(case.queries), pool=0)
            for name, case in cases.items()
        }
    else:
        jobs = [(case, launch) for case in (*odd.values(), *cases.values()) for launch in launches_of(case, device)]
        jobs += [(case, launch) for case in cases.values() for launch in launches_of(case, device, general)]
        print(f"compiled in {compile_all(jobs, device, options.workers):.0f} s", flush=True)
    report: dict[str, Any] = {
        **header(),
        "ceilings": ceilings(device, options.smoke),
        "peers": versions(),
        "absent_peers": absent(),
        "cases": measured,
    }
    print(json.dumps(report), flush=True)
    for case in odd.values():
        inputs = make(case, device)
        result = outputs(case, inputs)
        run(shipped(case, inputs), inputs, *result)
        verify(case, inputs, *result, sample=len(case.keys))
    print(f"{len(odd)} odd shapes right", flush=True)
    for name, case in cases.items():
        sets = [make(case, device, seed) for seed in range(1 if options.smoke or case.pool else rotations(case.bytes))]
        report["cases"][name] = measure(case, sets, options.peers and name in WITH_PEERS)
        show_all(name, report["cases"][name], report["ceilings"]["read_gb_s"])
        if options.output:
            options.output.write_text(json.dumps(report, indent=1))
        del sets


if __name__ == "__main__":
    main()
