"""The native CPU kernels: how they are built, chosen and given up on, and how they hold up against random calls."""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torch_paged import ops, reference
from torch_paged.cpu import build
from torch_paged.cpu.choice import NATIVE
from torch_paged.testing import attention_inputs

FUZZ = Path(__file__).parent / "native_fuzz.py"
CALL = """
import torch, torch_paged
query, cache = torch.ones(2, 4, 32), torch.ones(3, 4, 2, 32)
table, lens = torch.tensor([[0], [2]], dtype=torch.int32), torch.tensor([3, 4], dtype=torch.int32)
print(torch.ops.paged.attention(query, cache, cache, table, lens).sum().item(), torch_paged.ops._cpu_package())
"""


def has_compiler():
    try:
        return bool(build.find_compiler())
    except build.BuildError:
        return False


pytestmark = pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="the interpreter runs Triton kernels")
needs_compiler = pytest.mark.skipif(not (build.SOURCES.exists() and has_compiler()), reason="no C++ compiler")


def python(*arguments, **environment):
    """A fresh Python; variables given as None are taken away."""
    merged = {**os.environ, **environment}
    command = [sys.executable, *map(str, arguments)]
    known = {name: str(value) for name, value in merged.items() if value is not None}
    return subprocess.run(command, env=known, capture_output=True, text=True, check=False)


def levels():
    """The instruction sets that this processor has."""
    names = build.machine_levels()
    return names[names.index(build.best_level()) :]


@needs_compiler
def test_first_use_builds_once_for_processes_that_start_together(tmp_path):
    """By a compiler that takes little time over it."""
    hasty = tmp_path / "hasty-c++"
    hasty.write_text(f'#!/bin/sh\nexec {build.find_compiler()} "$@" -O0\n')
    hasty.chmod(0o755)
    cache = tmp_path / "cache"
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "TORCH_PAGED_CPU": "native", "CXX": str(hasty)}
    command = [sys.executable, "-c", CALL]
    runs = [subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True) for _ in range(3)]
    outputs = [run.communicate() for run in runs]
    assert all(out == f"256.0 {NATIVE}\n" for out, _ in outputs), outputs
    messages = "".join(err for _, err in outputs).splitlines()
    assert len(messages) == 2, messages
    assert messages[0].startswith("torch_paged: building the native CPU kernels")
    built = [path for path in (cache / "torch_paged").iterdir() if path.suffix != ".lock"]
    assert [path.suffix for path in built] == [".so"]
    again = python("-c", CALL, XDG_CACHE_HOME=cache, CXX=hasty)
    assert (again.stdout, again.stderr) == (f"256.0 {NATIVE}\n", "")


def test_no_compiler_is_one_warning_and_the_same_result(tmp_path):
    run = python("-c", CALL + CALL, XDG_CACHE_HOME=tmp_path, CXX="no-such-compiler", TORCH_PAGED_CPU=None)
    assert run.stdout == "256.0 torch_paged.cpu\n" * 2, run.stderr
    assert run.stderr.count("UserWarning: torch_paged has no native CPU kernels here") == 1
    assert "no C++ compiler: no-such-compiler not found" in run.stderr


def test_failed_build_is_one_warning_and_the_same_result(tmp_path):
    run = python("-c", CALL, XDG_CACHE_HOME=tmp_path, CXX="false", TORCH_PAGED_CPU=None)
    assert run.stdout == "256.0 torch_paged.cpu\n", run.stderr
    assert run.stderr.count("UserWarning: torch_paged has no native CPU kernels here") == 1
    assert "the C++ compiler failed" in run.stderr
    assert not [path for path in (tmp_path / "torch_paged").iterdir() if path.suffix != ".lock"]


def test_an_unwritable_cache_is_one_warning(tmp_path):
    (tmp_path / "file").write_text("")
    run = python("-c", CALL, XDG_CACHE_HOME=tmp_path / "file", TORCH_PAGED_CPU=None)
    assert run.stdout == "256.0 torch_paged.cpu\n", run.stderr
    assert run.stderr.count("UserWarning: torch_paged has no native CPU kernels here") == 1


def test_forced_native_without_compiler_raises(tmp_path):
    run = python("-c", CALL, XDG_CACHE_HOME=tmp_path, CXX="no-such-compiler", TORCH_PAGED_CPU="native")
    assert run.returncode == 1
    assert "RuntimeError: TORCH_PAGED_CPU=native, but the native CPU kernels cannot be loaded: no C++" in run.stderr


def test_forced_eager_builds_nothing(tmp_path):
    run = python("-W", "error", "-c", CALL, XDG_CACHE_HOME=tmp_path, TORCH_PAGED_CPU="eager")
    assert (run.stdout, run.stderr) == ("256.0 torch_paged.cpu\n", "")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("TORCH_PAGED_CPU", "TORCH_PAGED_CPU must be native or eager, or not be set, got 'fast'"),
        (
            "TORCH_PAGED_CPU_LEVEL",
            "TORCH_PAGED_CPU_LEVEL must be one of avx512bf16, avx512, avx2, portable, got 'fast'",
        ),
    ],
)
def test_unknown_choices_raise(name, message):
    run = python("-c", CALL, **{"TORCH_PAGED_CPU": None, name: "fast"})
    assert run.returncode == 1
    assert f"ValueError: {message}" in run.stderr


@needs_compiler
def test_another_source_or_flag_is_another_library(tmp_path, monkeypatch):
    compiler = build.find_compiler()
    before = build.fingerprint(compiler, "portable")
    assert before == build.fingerprint(compiler, "portable")
    assert before != build.fingerprint(compiler, "avx2")
    for path in build.SOURCES.iterdir():
        if path.suffix in (".cpp", ".h"):
            (tmp_path / path.name).write_text(path.read_text())
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    assert before == build.fingerprint(compiler, "portable")
    (tmp_path / "paged.h").write_text((tmp_path / "paged.h").read_text() + "\n")
    assert before != build.fingerprint(compiler, "portable")


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("level", levels())
def test_every_instruction_set_matches_the_reference(level):
    run = python(FUZZ, build.library(level), 0, 150)
    assert "150 calls agree" in run.stdout, run.stdout + run.stderr


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("level", levels()[::3])
def test_sanitizers_find_nothing(level, tmp_path):
    """Under address and undefined-behaviour sanitizers: the first finding ends the process."""
    compiler, library = build.find_compiler(), tmp_path / f"{level}.so"
    runtimes = [
        subprocess.run([compiler, f"-print-file-name=lib{name}.so"], capture_output=True, text=True, check=True).stdout
        for name in ("asan", "ubsan")
    ]
    if not all(Path(runtime.strip()).is_absolute() for runtime in runtimes):
        pytest.skip("this compiler has no sanitizer runtime of its own")
    build.build(compiler, level, library, ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"])
    preload = " ".join(runtime.strip() for runtime in runtimes)
    run = python(FUZZ, library, 10_000, 60, LD_PRELOAD=preload, ASAN_OPTIONS="detect_leaks=0")
    assert "60 calls agree" in run.stdout, run.stdout + run.stderr


@pytest.fixture
def native():
    if ops._cpu_package() != NATIVE:
        pytest.skip("no native kernels here")


@pytest.mark.parametrize("head_major", [False, True])
@pytest.mark.parametrize("dim", [41, 128])  # rows of 41 begin at any address
@pytest.mark.usefixtures("native")
def test_many_rows_arrive_past_the_caches(dim, head_major):
    """Several threads write a megabyte and more without looking at what was there."""
    key, value = torch.randn(2, 4000, 8, dim).bfloat16()
    shape = (260, 8, 16, dim) if head_major else (260, 16, 8, dim)
    caches = [torch.full(shape, math.nan, dtype=torch.bfloat16) for _ in range(2)]
    if head_major:
        caches = [cache.transpose(1, 2) for cache in caches]
    slots = torch.randperm(260 * 16)[:4000]
    expected = [cache.clone() for cache in caches]
    reference.append(key, value, *expected, slots)
    torch.ops.paged.append(key, value, *caches, slots)
    for cache, wanted in zip(caches, expected, strict=True):
        assert torch.equal(cache.view(torch.int16), wanted.view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.usefixtures("native")
def test_results_depend_on_neither_threads_nor_the_other_sequences(dtype):
    """Bit for bit: one sequence alone and in a batch, on one thread and on several."""
    inputs = attention_inputs([1, 70, 1, 9], [5000, 2100, 40, 1500], head_dim=64, dtype=dtype)
    expected = inputs.call(torch.ops.paged.attention)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(inputs.call(torch.ops.paged.attention), expected)
    finally:
        torch.set_num_threads(threads)
    bounds = inputs.cu_seqlens_q.tolist()
    for seq, (start, end) in enumerate(itertools.pairwise(bounds)):
        row = slice(seq, seq + 1)
        alone = torch.ops.paged.attention(
            inputs.query[start:end], inputs.key_cache, inputs.value_cache, inputs.block_table[row], inputs.seq_lens[row]
        )
        assert torch.equal(alone, expected[start:end])


@pytest.mark.parametrize("window", [16, 64, 100, 513])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.usefixtures("native")
def test_what_a_call_leaves_in_scratch_memory_does_not_show(dtype, window):
    """Rows whose window has not begun take no part in the products of their neighbours."""
    batch = dict(num_heads=4, num_kv_heads=4, dtype=dtype)
    rubbish = attention_inputs([600], [600], head_dim=128, **batch)
    inputs = attention_inputs([300], [1500], head_dim=64, sliding_window=window, **batch)
    exact = reference.attention(inputs.query.double(), *inputs[1:5], sliding_window=window)
    torch.ops.paged.attention(rubbish.query * math.nan, *rubbish[1:5])
    output = torch.ops.paged.attention(*inputs[:5], sliding_window=window)
    torch.testing.assert_close(output.double(), exact, rtol=0.02, atol=0.02)
