"""Attention on one GPU: checks results, then measures the cases that decide, and sweeps launch parameters.

    python benchmarks/gpu_attention.py --output results.json [--sweep] [--only NAME ...]

Bytes are the keys and values that must be read once; FLOPs count unmasked pairs alone. Every case is verified before it
is timed, in float64 on a sample of its sequences; a wrong result ends the run. Times are of one call among many in a
CUDA graph, over inputs rotated so that none is still in the L2 cache. `--smoke` runs everything tiny, on any device.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if os.environ.get("TRITON_INTERPRET") == "1":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    import interpreter_fixes  # noqa: F401

from attention_cases import CASES, ODD, Arguments, Case, make

from torch_paged.kernels.attention import launch_attention
from torch_paged.kernels.attention_plan import problem_of
from torch_paged.kernels.device import device_of
from torch_paged.kernels.launch_config import AttentionLaunch, _paging, attention_launches

ROTATED_BYTES = 600 * 2**20  # of keys and values: ten times an H200's L2 cache


def run(launches: tuple[AttentionLaunch, ...], inputs: Arguments, output: Tensor, lse: Tensor) -> None:
    for launch in launches:
        launch_attention(launch, *inputs, output, lse, inputs[0].shape[2] ** -0.5)


def shipped(case: Case, inputs: Arguments) -> tuple[AttentionLaunch, ...]:
    query, key_cache, value_cache, table, _, bounds = inputs
    problem = problem_of(query, key_cache, value_cache, table, bounds, case.causal)
    return attention_launches(problem, device_of(query.device))


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


def timed(calls: list[Callable[[], None]], repeats: int) -> list[float]:
    """Seconds of one call, `repeats` times, from a graph of all calls."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        for call in calls:
            call()
        return [(time.perf_counter() - start) / len(calls)]
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    times = []
    for repeat in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if repeat >= 3:
            times.append(start.elapsed_time(end) * 1e-3 / len(calls))
    return times


def measure(
    case: Case, sets: list[Arguments], launches: tuple[AttentionLaunch, ...], repeats: int = 20
) -> dict[str, Any]:
    """Verifies, then times `launches` over the rotated input sets."""
    results = [outputs(case, inputs) for inputs in sets]
    run(launches, sets[0], *results[0])
    error = verify(case, sets[0], *results[0])
    calls = [lambda i=i, r=r: run(launches, i, *r) for i, r in zip(sets, results, strict=True)]
    if torch.cuda.is_available():
        floor = max(case.bytes / 4e12, case.flops / 6e14, 3e-6)
        calls = calls * max(1, math.ceil(min(50, 5e-3 / floor) / len(calls)))
    times = timed(calls, repeats)
    median = statistics.median(times)
    return {
        "us": median * 1e6,
        "us_p90": sorted(times)[int(0.9 * (len(times) - 1))] * 1e6,
        "gb_s": case.bytes / median * 1e-9,
        "tflop_s": case.flops / median * 1e-12,
        "error": error,
    }


@triton.jit
def _read(source, sink, count, CHUNK: tl.constexpr):
    total = tl.zeros([CHUNK], tl.int32)
    for first in tl.range(tl.program_id(0) * CHUNK, count, tl.num_programs(0) * CHUNK, num_stages=4):
        total += tl.load(source + first + tl.arange(0, CHUNK))
    tl.store(sink + tl.program_id(0), tl.sum(total))


def ceilings(device: torch.device, smoke: bool) -> dict[str, float]:
    """GB/s of a plain read, TFLOP/s of a large bf16 product on random data."""
    count, side = (2**13, 64) if smoke else (2**30, 8192)
    source = torch.randint(0, 9, (count,), dtype=torch.int32, device=device)
    sink = torch.empty(2**14, dtype=torch.int32, device=device)
    programs = 8 * device_of(device).multiprocessors
    read = min(timed([lambda: _read[(programs,)](source, sink, count, CHUNK=4096, num_warps=8)], 10))
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = statistics.median(timed([lambda: torch.mm(a, b)], 10))
    return {"read_gb_s": 4 * count / read * 1e-9, "bf16_tflop_s": 2 * side**3 / product * 1e-12}


def candidates(launch: AttentionLaunch, multiprocessors: int) -> Iterator[AttentionLaunch]:
    """Other launches of the same problem: tiles, warps, stages, resident programs, least piece of work."""
    v = launch.variant
    few = v.block_m <= 16
    shapes = [(32, 4), (64, 4), (128, 4), (64, 8)] if few else [(64, 8), (128, 8), (32, 8), (64, 4)]
    for keys, warps in shapes:
        for stages, resident in [(3, 2), (4, 2), (3, 3), (2, 4), (3, 1), (5, 1)] if few else [(2, 1), (3, 1), (4, 1)]:
            for least in (1, 2, 4) if few and (keys, stages, resident) == (v.tile, 4, 2) else (2,):
                variant = replace(
                    v,
                    tile=keys,
                    num_stages=stages,
                    paging=_paging(v.block_size, keys),
                    unit_cost=keys * v.group,
                    least_work=least * keys * v.group,
                )
                registers = min(65536 // (32 * warps * resident) // 8 * 8, 255)
                yield replace(
                    launch,
                    variant=variant,
                    num_warps=warps,
                    max_registers=registers,
                    programs=multiprocessors * resident,
                )


def compile_one(case: Case, launch: AttentionLaunch, device: torch.device) -> None:
    """Compiles into the cache on disk what `case` will launch; lengths and batch do not matter."""
    tiny = replace(case, keys=(1,), queries=(1,))
    inputs = make(tiny, device)
    try:
        run((launch,), inputs, *outputs(tiny, inputs))
    except Exception as problem:
        print(f"does not compile or launch: {launch}: {problem}", flush=True)


def compile_all(cases: dict[str, Case], swept: list[str], device: torch.device, workers: int) -> float:
    """Compiles everything that will be launched, in `workers` processes; returns the seconds it took."""
    start, jobs = time.perf_counter(), []
    for name, case in cases.items():
        inputs = make(replace(case, keys=(1,) * len(case.keys)), device)
        for launch in shipped(case, inputs):
            jobs.append((case, launch))
            if name in swept:
                jobs += [(case, other) for other in candidates(launch, device_of(device).multiprocessors)]
    jobs = list(dict.fromkeys(jobs))
    if workers:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            list(pool.map(compile_one, *zip(*jobs, strict=True), [device] * len(jobs)))
    return time.perf_counter() - start


def _at_most_70(lens: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(min(length, 70) for length in lens[-2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", nargs="*", default=list(CASES))
    parser.add_argument("--sweep", nargs="*", default=[], help="cases whose launch parameters are swept")
    parser.add_argument("--workers", type=int, default=12, help="processes that compile")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu", *([0] if torch.cuda.is_available() else []))
    cases = {name: CASES[name] for name in options.only}
    if options.smoke:
        cases = {
            name: replace(case, keys=_at_most_70(case.keys), queries=_at_most_70(case.queries))
            for name, case in cases.items()
        }
    multiprocessors = device_of(device).multiprocessors
    compile_s = compile_all({**ODD, **cases}, options.sweep, device, 0 if options.smoke else options.workers)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "compile_s": compile_s,
        "ceilings": ceilings(device, options.smoke),
        "odd": {},
        "cases": {},
        "sweeps": {},
    }
    print(json.dumps(report), flush=True)
    for name, case in ODD.items():
        inputs = make(case, device)
        result = outputs(case, inputs)
        run(shipped(case, inputs), inputs, *result)
        report["odd"][name] = verify(case, inputs, *result, sample=len(case.keys))
    print(f"{len(ODD)} odd shapes right", flush=True)
    for name, case in cases.items():
        count = 1 if options.smoke else max(2, min(50, math.ceil(ROTATED_BYTES / case.bytes)))
        sets = [make(case, device, seed) for seed in range(count)]
        launches = shipped(case, sets[0])
        entry = measure(case, sets, launches)
        entry["launches"] = [asdict(launch) for launch in launches]
        report["cases"][name] = entry
        share = entry["gb_s"] / report["ceilings"]["read_gb_s"]
        print(
            f"{name:32s} {entry['us']:10.1f} us (p90 {entry['us_p90']:.1f}) {entry['gb_s']:8.0f} GB/s {share:6.1%} "
            f"{entry['tflop_s']:7.1f} TFLOP/s  error {entry['error']:.1e}",
            flush=True,
        )
        if name in options.sweep:
            report["sweeps"][name] = sweep(case, sets, launches, multiprocessors)
        if options.output:
            options.output.write_text(json.dumps(report, indent=1))
        del sets


def sweep(
    case: Case, sets: list[Arguments], launches: tuple[AttentionLaunch, ...], multiprocessors: int
) -> list[dict[str, Any]]:
    """Every candidate for the last launch (which serves the few rows, or all), best first; prints the best."""
    tried = []
    for other in candidates(launches[-1], multiprocessors):
        v = other.variant
        label = f"tile {v.tile} warps {other.num_warps} stages {v.num_stages} programs {other.programs}"
        label += f" least {v.least_work}"
        try:
            tried.append({"launch": label, **measure(case, sets, (*launches[:-1], other), repeats=8)})
        except Exception as problem:
            tried.append({"launch": label, "us": math.inf, "failed": str(problem)[:200]})
    tried.sort(key=lambda entry: entry["us"])
    for entry in tried[:6]:
        print(f"    {entry['us']:10.1f} us  {entry['launch']}", flush=True)
    return tried


if __name__ == "__main__":
    main()
