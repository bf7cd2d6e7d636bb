"""The native CPU kernels beside what PyTorch offers, and beside a plain read or copy of the same bytes.

`python benchmarks/cpu_attention.py --output benchmarks/results/cpu/attention.json` also writes the table (.md).
Every path is compared with SDPA in float32 before it is timed: a wrong result has no speed.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from attention_cases import DTYPES, Case, decode, make
from cpu_timing import QUICK, REPEATS, Paths, interleaved, machine
from torch import Tensor

import torch_paged
from torch_paged import ops
from torch_paged.cpu.choice import EAGER, NATIVE
from torch_paged.storage import empty_cache

BYTES = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}

DECODE = decode(16, 2048)
CASES = {
    "decode bf16, 16 x 2048": DECODE,
    "decode bf16, 1 x 8192": decode(1, 8192),
    "decode fp32, 16 x 2048": decode(16, 2048, dtype="fp32"),
    "short: 64 x 32, bf16": decode(64, 32),
    "prefill bf16, 2048 causal": Case((2048,), (2048,)),
}


def paged(case: Case, **options: Any) -> tuple[Any, tuple[Tensor, ...]]:
    """The call, and its tensors."""
    query, key_cache, value_cache, table, lens, bounds = make(case, torch.device("cpu"))
    arguments = (query, key_cache, value_cache, table, lens)
    return (lambda: torch.ops.paged.attention(*arguments, cu_seqlens_q=bounds, **options)), arguments


def contiguous(case: Case, arguments: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Query [S, H, q, D], key and value [S, Hk, keys, D] of a uniform batch, as SDPA wants them."""
    query, *caches, table, lens = arguments
    used = table[:, : -(-int(lens[0]) // case.block)].long()
    query = query.view(len(lens), -1, *query.shape[1:]).transpose(1, 2)
    key, value = (cache[used].flatten(1, 2)[:, : int(lens[0])].transpose(1, 2) for cache in caches)
    return query, key.contiguous(), value.contiguous()


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    causal = query.shape[2] > 1
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(query, key, value, is_causal=causal, enable_gqa=True).transpose(1, 2).flatten(0, 1)


def flex(dense: tuple[Tensor, ...]) -> Any:
    """Compiled FlexAttention over the contiguous keys."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    query, key, _ = dense
    mask = None
    if query.shape[2] > 1:
        mask = create_block_mask(
            lambda b, h, q, k: q >= k,  # noqa: ARG005
            None,
            None,
            query.shape[2],
            key.shape[2],
            device="cpu",
        )
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    return lambda: compiled(*dense, block_mask=mask, enable_gqa=True).transpose(1, 2).flatten(0, 1)


def check(actual: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(actual.float(), expected, rtol=0.05, atol=0.02, msg=lambda text: f"{what}: {text}")


def eager(call: Any) -> Any:
    def run() -> Any:
        chosen, ops._cpu_package = ops._cpu_package, lambda: EAGER
        try:
            return call()
        finally:
            ops._cpu_package = chosen

    return run


def paths_of(case: Case, with_flex: bool) -> Paths:
    call, arguments = paged(case)
    dense = contiguous(case, arguments)
    paths = {"paged": call, "paged, eager PyTorch": eager(call)}
    for name, change in (
        ("token-major", {"head_major": False}),
        ("consecutive blocks", {"shuffled": False}),
        ("one block a sequence", {"block": case.keys[0], "shuffled": False}),
    ):
        paths[f"paged, {name}"] = paged(replace(case, **change))[0]
    paths["SDPA, contiguous"] = lambda: sdpa(*dense)
    paths["gather + SDPA"] = lambda: sdpa(*contiguous(case, arguments))
    if with_flex:
        paths["FlexAttention, compiled"] = flex(dense)
    expected = sdpa(*(part.float() for part in dense))
    for name in ("paged", "paged, eager PyTorch", "gather + SDPA", *["FlexAttention, compiled"] * with_flex):
        check(paths[name](), expected, name)
    return paths | (plain_product(case) if case.queries[0] > 1 else plain_reads(case.bytes))


def plain_reads(size: int) -> Paths:
    """A sum over so many bytes: in memory as PyTorch gives it to every tensor, and in a cache's."""
    small = torch.ones(size // 4)
    large = empty_cache(1, size // 4096, 1, 1024, torch.float32, torch.device("cpu")).fill_(1)
    return {"plain read": lambda: small.sum(), "plain read, large pages": lambda: large.sum()}


def plain_product(case: Case) -> Paths:
    """One matrix product of as many operations."""
    a = torch.randn(2048, 2048, dtype=DTYPES[case.dtype])
    b = torch.randn(2048, case.flops // (2 * 2048 * 2048), dtype=a.dtype)
    return {"plain product": lambda: a @ b}


def quantised_paths(case: Case) -> Paths:
    """Decode over 8-bit caches beside the same in bf16."""
    call, (query, key_cache, value_cache, table, lens) = paged(case)
    paths = {"bf16": call}
    for name, dtype in BYTES.items():
        caches, scales = [], {}
        for side, cache in (("key", key_cache), ("value", value_cache)):
            factor = torch.tensor(4 / 127 if name == "int8" else 1.0)
            stored = (cache.float() / factor).nan_to_num()
            stored = (stored.round().clamp(-128, 127) if name == "int8" else stored).to(dtype)
            caches.append(empty_cache(*cache.shape, dtype, cache.device).copy_(stored))
            scales[f"{side}_scale"] = factor
        paths[name] = lambda caches=caches, scales=scales: torch.ops.paged.attention(
            query, *caches, table, lens, **scales
        )
        torch.testing.assert_close(paths[name]().float(), call().float(), rtol=0.2, atol=0.1)
    return paths


def append_paths(tokens: int = 2048) -> Paths:
    """To the blocks that a cache would hand out, and to slots in no order at all."""
    key, value = torch.randn(2, tokens, 8, 128).bfloat16()
    blocks = 2 * tokens // 16
    slots = (torch.randperm(blocks)[: tokens // 16, None] * 16 + torch.arange(16)).flatten()
    scattered = torch.randperm(16 * blocks)[:tokens]
    copies = torch.empty_like(key), torch.empty_like(value)
    paths: Paths = {"plain copy": lambda: (copies[0].copy_(key), copies[1].copy_(value))}
    for layout, shape in (("head-major", (16, 8)), ("token-major", (8, 16))):
        caches = [empty_cache(blocks, *shape, 128, key.dtype, key.device).zero_() for _ in range(2)]
        if layout == "token-major":
            caches = [cache.transpose(1, 2) for cache in caches]
        for order, where in (("", slots), (", scattered slots", scattered)):
            paths[f"append, {layout}{order}"] = lambda caches=caches, where=where: torch_paged.append(
                key, value, *caches, where
            )
    return paths


def verdicts(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What was aimed at, what was seen, and whether that is it: rows of (case, target, seen)."""
    rows = []

    def row(case: str, target: str, seen: float, wanted: float, form: str = "{:.1f}x", at_most: bool = False) -> None:
        met = seen <= wanted if at_most else seen >= wanted
        rows.append((case, target, f"{form.format(seen)}, {'met' if met else 'missed'}"))

    def ms(case: str, path: str) -> float:
        return float(report["cases"][case][path]["ms"])

    def against(case: str, path: str) -> float:
        return ms(case, path) / ms(case, "paged")

    bf16, one, fp32, short, prefill = CASES
    row(bf16, "25x SDPA on contiguous keys", against(bf16, "SDPA, contiguous"), 25)
    for read in ("plain read", "plain read, large pages"):
        row(bf16, f"60% of a {read}", 100 * against(bf16, read), 60, "{:.0f}%")
    row(one, "20x SDPA", against(one, "SDPA, contiguous"), 20)
    row(fp32, "3x SDPA", against(fp32, "SDPA, contiguous"), 3)
    for read in ("plain read", "plain read, large pages"):
        row(fp32, f"65% of a {read}", 100 * against(fp32, read), 65, "{:.0f}%")
    for name in BYTES:
        row(f"decode {name}, 16 x 2048", "faster than bf16", ms("8-bit", "bf16") / ms("8-bit", name), 1, "{:.2f}x")
    row(short, "no slower than SDPA", against(short, "SDPA, contiguous"), 1)
    row(prefill, "2.5x SDPA", against(prefill, "SDPA, contiguous"), 2.5)
    for path, limit in (("consecutive blocks", 3), ("one block a sequence", 5)):
        seen = 100 * (1 / against(bf16, f"paged, {path}") - 1)
        row(bf16, f"at most {limit}% over {path}", seen, limit, "{:+.1f}%", at_most=True)
    for path in list(report["cases"]["append"])[1:]:
        share = 100 * ms("append", "plain copy") / ms("append", path)
        row(path.replace("append", "append, 2048 tokens", 1), "70% of a copy", share, 70, "{:.0f}%")
    return rows


def table(report: dict[str, Any]) -> str:
    made_on = report["machine"]
    lines = [
        f"Measured on {made_on['cpu']}, {made_on['threads']} threads, PyTorch {made_on['torch']}, {made_on['date']},",
        f"by `python benchmarks/cpu_attention.py`: medians of {report['rounds']} interleaved rounds,",
        f"in which what takes less than {1e3 * QUICK:.0f} ms is run {REPEATS} times.",
        "",
        "| case | target | seen |",
        "|---|---|---|",
        *(f"| {case} | {target} | {seen} |" for case, target, seen in verdicts(report)),
        "",
    ]
    for case, paths in report["cases"].items():
        unit = "GFLOP/s" if case in report["flops"] else "GB/s"
        amount = report["flops"].get(case) or report["bytes"].get(case)
        lines += [f"| {case} | ms | fastest | {unit} |", "|---|---|---|---|"]
        for path, each in paths.items():
            rate = f"{amount / each['ms'] / 1e6:.1f}" if amount else ""
            lines.append(f"| {path} | {each['ms']:.3g} | {each['ms_min']:.3g} | {rate} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-flex", action="store_true", help="without FlexAttention, which takes minutes to compile")
    options = parser.parse_args()
    if ops._cpu_package() != NATIVE:
        raise SystemExit("the native CPU kernels are not here")
    report: dict[str, Any] = {"machine": machine(), "rounds": options.rounds, "cases": {}, "bytes": {}, "flops": {}}
    with torch.inference_mode():
        for name, case in CASES.items():
            report["cases"][name] = interleaved(paths_of(case, not options.no_flex), options.rounds)
            if case.queries[0] == 1:
                report["bytes"][name] = case.bytes
            else:
                report["flops"][name] = case.flops
        report["cases"]["8-bit"] = interleaved(quantised_paths(DECODE), options.rounds)
        other = torch.ones(64 << 18)  # 64 MB: a copy that stays in the caches says nothing of memory
        report["cases"]["append"] = interleaved(append_paths(), options.rounds, before=other.sum)
        report["bytes"]["append"] = 4 * 2048 * 8 * 128 * DTYPES["bf16"].itemsize
    print(table(report))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report, indent=1) + "\n")
        options.output.with_suffix(".md").write_text(table(report))


if __name__ == "__main__":
    main()
