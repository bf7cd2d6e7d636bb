"""Machine code of every kernel for GPUs that need not be there: what would make it slow is a failure here.

Compiling all that is shipped takes a quarter of an hour of two cores, and TORCH_PAGED_TEST_ALL_VARIANTS=1 does that.
Without it, figures of what was compiled before come from `aot_report`, and what is not there is compiled.
"""

import functools
import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs compiled kernels: run without TRITON_INTERPRET=1", allow_module_level=True)

from dataclasses import replace

import aot
import aot_calls as calls
import aot_report
import triton

from torch_paged.kernels.hopper_products import PART_ROWS

pytestmark = pytest.mark.aot
NVIDIA = ("sm_80", "sm_90", "sm_100")
REGISTER_FILE = 65536  # registers of one NVIDIA multiprocessor
SHARED_MEMORY = 228 * 1024  # bytes of one of Hopper's
ALL_VARIANTS = os.environ.get("TORCH_PAGED_TEST_ALL_VARIANTS") == "1"
MATRIX_UNIT = {"sm_80": "tensor_core", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "tensor_core"}


def hopper_faults(variant, kernel):
    """What `attention_hopper` lacks."""
    v = variant.launch.variant
    parts = v.block_m // PART_ROWS.value
    demands = {
        "products under way": kernel.pipelined_loops == 2 * parts,
        # The assembler has the wait for a product ahead of them up to dim 64, and the wait for two products of values,
        # which are faster all the same. One part has them all, or none, and was seen to be faster without: there other
        # programs' products hide them. Under a softcap it has but tanh meanwhile, for which each row's maximum waits.
        "exponentials meanwhile": kernel.overlapped > 0 or parts == 1 or v.head_dim <= 64 or v.value_widths[1] > 0,
        "no spilled registers": kernel.instructions["spill"] == 0,
        "matrix unit": kernel.instructions["wgmma"] > 0 and kernel.instructions["tensor_core"] == 0,
        "copy engine": kernel.instructions["copy_engine"] > 0,
        "16-byte copies of queries": kernel.instructions["async128"] > 0 and kernel.instructions["async_narrow"] == 0,
        "registers for all warps": kernel.registers == variant.launch.max_registers,
        "shared memory for all programs": shared_memory_share(kernel) * v.resident <= SHARED_MEMORY,
    }
    return [what for what, met in demands.items() if not met]


def attention_faults(target, variant, kernel):
    """What the attention kernel lacks of what its launch was made for."""
    if variant.launch.variant.copy_rows:
        return hopper_faults(variant, kernel)
    launch, count = variant.launch, kernel.instructions
    many_rows = launch.variant.block_m >= 64
    demands = {"no spilled registers": count["spill"] == 0}
    if variant.dtype != "fp32":
        demands["matrix unit"] = count[MATRIX_UNIT[target] if many_rows else "tensor_core"] > 0
    if target in NVIDIA:
        resident = max(1, launch.programs // calls.DEVICES[target].multiprocessors)
        # Values of one byte come 8 of them at a time, and tokens' scales one by one, in each of the loops.
        scales = launch.variant.num_stages * (2 if launch.variant.unmasked_first else 1)
        narrow = 0 if plain_caches(launch.variant.has) else 2 * (count["async128"] + scales)
        demands["16-byte asynchronous copies"] = 0 < count["async128"] and count["async_narrow"] <= narrow
        demands["registers for all programs"] = resident * register_share(kernel, launch.num_warps) <= REGISTER_FILE
        demands["shared memory for all programs"] = (
            resident * kernel.shared_memory <= calls.DEVICES[target].shared_memory
        )
        if launch.variant.single_tile:
            demands["more than one tile of keys in flight"] = kernel.buffers >= 2 and kernel.pending >= 2
    else:
        demands["16-byte loads"] = count["load128"] > 0 and count["load_element"] == 0
    return [what for what, met in demands.items() if not met]


def plain_caches(features):
    return not (features.key.dtype or features.value.dtype)


def register_share(kernel, num_warps):
    """Registers that a thread block occupies: a thread's come in eights."""
    return -(-kernel.registers // 8) * 8 * 32 * num_warps


def shared_memory_share(kernel):
    """Bytes of a multiprocessor's shared memory that a thread block occupies: 1024 are the driver's."""
    return -(-kernel.shared_memory // 128) * 128 + 1024


def copying_faults(kernel, narrow_stores=0):
    """What a kernel lacks that does little but move bytes."""
    count = kernel.instructions
    demands = {
        "no spilled registers": count["spill"] == 0,
        "16-byte loads": count["load128"] > 0,
        "16-byte stores": count["store128"] > 0 and count["store_narrow"] <= narrow_stores,
        "registers for eight thread blocks": kernel.registers <= 64,
        "no shared memory": kernel.shared_memory == 0,
    }
    return [what for what, met in demands.items() if not met]


# Spilled between two units: 13 registers, where with 32 keys or two stages there are none, and it is slower; and those
# of three parts, since output is written 16 bytes at a time.
KNOWN_FAULTS = {
    ("sm_90", "int8-token-several-bf16-dim128-block16-rows64"): ["no spilled registers"],
    ("sm_90", "sinks-prefill-bf16-dim64-block16-rows192"): ["no spilled registers"],
    ("sm_90", "chunks-bf16-dim64-block16-rows192"): ["no spilled registers"],
    ("sm_90", "chunks-bf16-dim64-block64-rows192"): ["no spilled registers"],
}
# Instructions that move what was spilled, where parts of float32 attention are combined eight rows at a time.
SPILLS_OF_COMBINE = {("sm_100", f"{kind}-fp32-dim128-block16-rows32"): 8 for kind in ("prefill", "mixed")}
SHIPPED = [
    pytest.param((target, calls.attention_launch, variant), id=f"{target}-{name}")
    for target in aot.TARGETS
    for name, variant in calls.shipped(target).items()
]
COPYING = [
    pytest.param((target, call, *arguments), id="-".join(map(str, (target, call.__name__, *arguments[1:]))))
    for target in aot.TARGETS
    for call, *arguments in [
        (calls.append_rows, 5),
        (calls.append_rows, 5, "fp32", 2, (80, 64)),
        (calls.append_rows, 5, "fp16", 1, (576, 512)),
        (calls.copy, 3, "token-major"),
        (calls.copy, 3, "head-major"),
        (calls.copy, 3, "sliced"),
        (calls.gather, 3, "token-major"),
        (calls.gather, 3, "head-major"),
        (calls.scatter, 3, "head-major"),
        (calls.merge, 5, "bf16", 128),
        (calls.merge, 5, "fp32", 80),
    ]
]
QUANTISING = [
    pytest.param((target, call, *arguments), id="-".join(map(str, (target, call.__name__, *arguments[1:]))))
    for target in aot.TARGETS
    for call, *arguments in [
        (calls.append_quantised, 5, "e4m3", "token"),
        (calls.append_quantised, 5, "int8", "scalar"),
        (calls.rotate, 5, False, ""),
        (calls.rotate, 5, True, "e4m3"),
    ]
]

SCHEDULING = [
    pytest.param((target, calls.schedule_launch, calls.shipped(target)[name]), id=f"{target}-{name}")
    for target in aot.TARGETS
    for name in (
        "decode-bf16-dim128-block16-rows16",
        "mixed-bf16-dim128-block16-rows16",
        "mixed-bf16-dim128-block16-rows128",
        "window-sinks-decode-bf16-dim64-block16-rows16",
    )
    if name in calls.shipped(target)
]


@functools.cache
def _workers():
    if ALL_VARIANTS:
        return aot.Workers(aot_report.nothing, aot_report.nothing)
    return aot.Workers(aot_report.all_but_a_sample, aot_report.launched)


def begin(session):
    """Has processes compile what the tests of this run will ask for."""
    session.config.add_cleanup(_workers().shutdown)
    for item in session.items:
        job = getattr(item, "callspec", None) and item.callspec.params.get("job")
        if job:
            _workers().submit(*job)


@pytest.fixture
def workers():
    """The processes that compile."""
    return _workers()


@pytest.mark.parametrize("job", SHIPPED)
def test_shipped_attention(job, workers):
    target, _, variant = job
    *dealt, attention, combine = workers.submit(*job).result()
    v = variant.launch.variant
    if v.copy_rows:
        assert [kernel.name for kernel in dealt] in (["deal_pieces"], ["begin_rounds", "deal_pieces"])
        assert all(kernel.waits_first for kernel in (*dealt, attention, combine)), "see `deal_pieces`"
    else:
        assert dealt == []
    known = KNOWN_FAULTS.get((target, variant.name), [])
    assert attention_faults(target, variant, attention) == known, attention
    assert all(kernel.instructions["spill"] == 0 for kernel in dealt), dealt
    assert combine.instructions["spill"] == SPILLS_OF_COMBINE.get((target, variant.name), 0), combine


@pytest.mark.skipif(not aot_report.PINNED, reason="another Triton than CI's: all variants were compiled")
@pytest.mark.parametrize("target", aot.TARGETS)
def test_report_says_what_is_compiled(target, workers):
    """Of these kernels and no others, and the same of those that were compiled in this run."""
    needed = [
        k for v in calls.shipped(target).values() for k in workers.submit(target, calls.attention_launch, v).result()
    ]
    report = aot_report.read(target)
    rewrite = "python tests/aot_report.py rewrites the report"
    assert aot_report.is_current(target), rewrite
    assert {kernel.ir for kernel in needed} == set(report), rewrite
    assert all(aot_report.figures(kernel) == aot_report.figures(report[kernel.ir]) for kernel in needed), rewrite


REPORTED = next(iter(calls.shipped("sm_80").values()))
UNREPORTED = {
    "option-of-the-compiler": replace(REPORTED.launch, max_registers=128),
    "number-in-the-kernel": replace(
        REPORTED.launch, variant=replace(REPORTED.launch.variant, least_work=REPORTED.launch.variant.least_work + 1)
    ),
}


@pytest.mark.parametrize(
    "job",
    [("sm_80", calls.attention_launch, replace(REPORTED, launch=launch)) for launch in UNREPORTED.values()],
    ids=UNREPORTED,
)
def test_what_is_not_in_the_report_is_compiled(job, workers):
    known, _ = workers.submit("sm_80", calls.attention_launch, REPORTED).result()
    compiled, _ = workers.submit(*job).result()
    assert compiled.ir != known.ir
    assert compiled.ir not in aot_report.read("sm_80")


@pytest.mark.parametrize("job", COPYING)
def test_copying_kernels(job, workers):
    (kernel,) = workers.submit(*job).result()
    assert copying_faults(kernel, narrow_stores=2 if job[1] is calls.merge else 0) == [], kernel


@pytest.mark.parametrize("job", QUANTISING)
def test_quantising_kernels(job, workers):
    """Few registers and wide loads; what is stored is narrower, and shared memory is for sums over a row."""
    (kernel,) = workers.submit(*job).result()
    assert kernel.instructions["spill"] == 0, kernel
    assert kernel.instructions["load128"] > 0, kernel
    assert kernel.registers <= 128, kernel


@pytest.mark.parametrize("job", SCHEDULING)
def test_scheduling_kernels(job, workers):
    kernels = workers.submit(*job).result()
    assert kernels
    assert all(kernel.instructions["spill"] == 0 for kernel in kernels), kernels


# Registers and instructions without any option, of Triton 3.6, to which options that are off may not add. A schedule,
# and pieces that end where units do, took 136 to 567 instructions outside the loops.
PLAIN_LIMITS = {
    ("sm_80", "decode-bf16-dim128-block16-rows16"): (236, 2416),
    ("sm_90", "decode-bf16-dim128-block16-rows16"): (237, 2552),
    ("sm_100", "decode-bf16-dim128-block16-rows16"): (237, 2552),
    ("gfx942", "decode-bf16-dim128-block16-rows16"): (204, 3045),
    ("sm_80", "prefill-fp16-dim64-block64-rows128"): (255, 2928),
}


@pytest.mark.skipif(not triton.__version__.startswith("3.6."), reason="the figures are of Triton 3.6")
@pytest.mark.parametrize(
    "job",
    [
        pytest.param((target, calls.attention_launch, calls.shipped(target)[name]), id=f"{target}-{name}")
        for target, name in PLAIN_LIMITS
    ],
)
def test_options_that_are_off_cost_nothing(job, workers):
    attention, _ = workers.submit(*job).result()
    registers, instructions = PLAIN_LIMITS[job[0], job[2].name]
    assert attention.registers <= registers, attention
    assert attention.instructions["all"] <= instructions, attention


def planted(kind, target="sm_90", block=16, misaligned=0, **changes):
    """The job of a shipped bf16 variant of head dim 128, spoilt."""
    name, variant = next(
        (n, v) for n, v in calls.shipped(target).items() if n.startswith(f"{kind}-bf16-dim128-block{block}-")
    )
    launch = variant.launch
    of_launch = {key: changes.pop(key) for key in list(changes) if hasattr(launch, key)}
    launch = replace(launch, variant=replace(launch.variant, **changes), **of_launch)
    return target, calls.attention_launch, replace(variant, name=f"spoilt-{name}", launch=launch), misaligned


@pytest.mark.parametrize(
    ("job", "fault"),
    [
        pytest.param(planted("prefill", block=1, num_warps=4), "no spilled registers", id="half-the-warps"),
        pytest.param(planted("prefill", max_registers=144), "products under way", id="hopper-few-registers"),
        pytest.param(planted("prefill", num_stages=4), "shared memory for all programs", id="hopper-four-stages"),
        pytest.param(planted("decode", aligned=False, misaligned=1), "16-byte asynchronous copies", id="scalar-loads"),
        pytest.param(planted("decode", num_stages=1), "16-byte asynchronous copies", id="no-pipeline"),
        pytest.param(planted("decode", num_stages=2), "more than one tile of keys in flight", id="two-stages"),
        pytest.param(planted("several", num_stages=2), "more than one tile of keys in flight", id="several-two-stages"),
        pytest.param(planted("decode", num_warps=8), "registers for all programs", id="too-many-warps"),
        pytest.param(planted("decode", num_stages=5), "shared memory for all programs", id="five-stages"),
    ],
)
def test_spoilt_attention_is_found_out(job, fault, workers):
    *_, attention, _ = workers.submit(*job).result()
    assert fault in attention_faults(job[0], job[2], attention), attention


@pytest.mark.parametrize("job", [planted("decode", "gfx942", aligned=False, misaligned=1)], ids=["scalar-loads"])
def test_spoilt_attention_is_found_out_on_amd(job, workers):
    attention, _ = workers.submit(*job).result()
    assert attention_faults(job[0], job[2], attention) == ["16-byte loads"], attention


@pytest.mark.parametrize(
    ("job", "faults"),
    [
        (("sm_90", calls.append_rows, 5, "bf16", 8, (17, 17)), ["16-byte loads", "16-byte stores"]),
        (("sm_90", calls.spilling_copy), ["no spilled registers"]),
    ],
    ids=["scalar", "spilling"],
)
def test_spoilt_copies_are_found_out(job, faults, workers):
    (kernel,) = workers.submit(*job).result()
    assert copying_faults(kernel) == faults


LENGTHS = {
    calls.attention: [
        [
            (batch, batch, width, blocks, False)
            for batch in (1, 2, 7, 64)
            for width, blocks in ((1, 1), (16, 9), (33, 64))
        ],
        [(batch, tokens, 5, 9, True) for batch, tokens in ((1, 64), (16, 100), (3, 300), (2, 4096))],
    ],
    calls.attention_with_options: [
        [(batch, window, softcap) for batch in (1, 16) for window, softcap in ((1, 1.0), (16, 30.0), (1000, 50.5))]
    ],
    calls.append_quantised: [[(rows, "e4m3", kind) for rows in (1, 2, 16, 37, 4096)] for kind in ("scalar", "token")],
    calls.rotate: [[(rows, False, "e4m3") for rows in (1, 2, 16, 37)]],
    calls.append_rows: [[(rows,) for rows in (1, 2, 16, 37, 4096)]],
    calls.copy: [[(pairs,) for pairs in (1, 2, 16, 37)]],
    calls.gather: [[(rows,) for rows in (1, 2, 16, 37)]],
    calls.scatter: [[(rows,) for rows in (1, 2, 16, 37)]],
    calls.merge: [[(tokens,) for tokens in (1, 2, 16, 37)]],
}


@pytest.mark.parametrize("call", LENGTHS, ids=lambda call: call.__name__)
def test_lengths_never_recompile(call, workers):
    for shapes in LENGTHS[call]:
        jobs = [workers.submit("sm_90", call, *shape) for shape in shapes]
        compiled = {kernel.identity for job in jobs for kernel in job.result()}
        assert len(compiled) <= max(len(job.result()) for job in jobs)
