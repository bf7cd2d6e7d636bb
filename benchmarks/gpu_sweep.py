"""Sweeps launch parameters of attention on one GPU: `python benchmarks/gpu_sweep.py "decode 64 x 8k" [CASE ...]`.

Prints the best of each case; `launch_config` ships what won. Every candidate is verified before it is timed.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace

import torch
from attention_cases import CASES, make
from gpu_attention import compile_all, launches_of, prepared
from gpu_timing import in_turns, rotations, summary

from torch_paged.kernels.device import device_of
from torch_paged.kernels.launch_config import AttentionLaunch
from torch_paged.kernels.launch_tiles import paging

FEW_TILES = ((64, 4, 3, 2), (64, 4, 3, 3), (64, 4, 4, 2), (64, 4, 2, 3), (32, 4, 3, 4), (128, 4, 3, 2), (128, 8, 3, 1))
MANY_TILES = ((64, 8, 2, 1), (64, 8, 3, 1), (64, 8, 4, 1), (128, 8, 2, 1), (64, 4, 3, 2), (32, 8, 3, 1))


def candidates(launch: AttentionLaunch, multiprocessors: int) -> Iterator[AttentionLaunch]:
    """Other launches of the same problem: keys of a tile, warps, stages, resident programs."""
    v = launch.variant
    for keys, warps, stages, resident in FEW_TILES if v.block_m <= 16 else MANY_TILES:
        cost = keys * v.group
        variant = replace(v, tile=keys, num_stages=stages, paging=paging(v.block_size, keys), unit_cost=cost)
        registers = min(65536 // (32 * warps * resident) // 8 * 8, 255) if warps == 4 else None
        yield replace(
            launch,
            variant=replace(variant, least_work=2 * cost, resident=resident),
            num_warps=warps,
            max_registers=registers,
            programs=multiprocessors * resident,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="+", choices=list(CASES))
    parser.add_argument("--workers", type=int, default=12, help="processes that compile")
    options = parser.parse_args()
    device = torch.device("cuda", 0)
    multiprocessors = device_of(device).multiprocessors
    tried = {
        name: [
            (*launches_of(CASES[name], device)[:-1], other)
            for other in candidates(launches_of(CASES[name], device)[-1], multiprocessors)
        ]
        for name in options.cases
    }
    jobs = [(CASES[name], launch) for name, many in tried.items() for launches in many for launch in launches]
    print(f"compiled in {compile_all(jobs, device, options.workers):.0f} s", flush=True)
    for name in options.cases:
        case = CASES[name]
        sets = [make(case, device, seed) for seed in range(rotations(case.bytes))]
        replays, failed = {}, {}
        for launches in tried[name]:
            v = launches[-1].variant
            label = (
                f"tile {v.tile} warps {launches[-1].num_warps} stages {v.num_stages} programs {launches[-1].programs}"
            )
            try:
                replays[label], _ = prepared(case, sets, launches)
            except Exception as problem:
                failed[label] = str(problem)[:100]
        print(name, flush=True)
        found = {label: summary(times)["us"] for label, times in in_turns(replays, 8).items()}
        for label in sorted(found, key=found.__getitem__):
            print(f"    {found[label]:10.1f} us  {label}", flush=True)
        for label, problem in failed.items():
            print(f"    {label}: {problem}", flush=True)
        del sets, replays


if __name__ == "__main__":
    main()
