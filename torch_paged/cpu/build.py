"""The native library: found beside its sources in a wheel, or built with the machine's compiler on first use and kept.

A built library stands in `$XDG_CACHE_HOME/torch_paged` under a name that hashes all it was made of. Its maker holds a
lock, compiles in a folder of its own and renames the result into place: processes that start together build it once,
and none of them ever sees half a file.
"""

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "native"

# Instruction sets, best first: what the processor must have, and the compiler's flags. "portable" is any processor.
LEVELS = {
    "avx512bf16": ("avx512f avx512bw avx512vl avx512dq avx512cd avx512vbmi avx512_bf16 bmi2 fma f16c",
                   "-march=x86-64-v4 -mavx512bf16 -mavx512vbmi"),
    "avx512": ("avx512f avx512bw avx512vl avx512dq avx512cd bmi2 fma f16c", "-march=x86-64-v4"),
    "avx2": ("avx2 bmi2 fma f16c movbe", "-march=x86-64-v3"),
    "portable": ("", ""),
}  # fmt: skip
_FLAGS = (
    "-O2 -std=c++17 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wno-psabi "
    "-DTORCH_TARGET_VERSION=0x020b000000000000"  # the oldest PyTorch that it shall load with: 2.11
)


class BuildError(RuntimeError):
    """There is no compiler, or it failed."""


def library(level: str | None = None) -> Path:
    """The native library for this processor, built if need be.

    Args:
        level: a name of `LEVELS`; None: `TORCH_PAGED_CPU_LEVEL`, or the best that the processor has.

    Raises:
        BuildError: there is no compiler, or it failed; the message is one line.
    """
    level = level or os.environ.get("TORCH_PAGED_CPU_LEVEL") or best_level()
    if level not in LEVELS:
        raise ValueError(f"TORCH_PAGED_CPU_LEVEL must be one of {', '.join(LEVELS)}, got {level!r}")
    shipped = SOURCES / f"{level}.so"
    if shipped.exists():
        return shipped
    compiler = find_compiler()
    built = cache_folder() / f"{level}-{fingerprint(compiler, level)}.so"
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        with built.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not built.exists():
                _announce_and_build(compiler, level, built)
    return built


def machine_levels() -> list[str]:
    """The instruction sets that compilers for this kind of machine know."""
    return [*LEVELS] if platform.machine() in ("x86_64", "AMD64") else ["portable"]


def best_level() -> str:
    """The best instruction set of this processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    has = set(next((line for line in lines if line.startswith("flags")), "").split())
    return next(name for name in machine_levels() if has.issuperset(LEVELS[name][0].split()))


def cache_folder() -> Path:
    """Where built libraries are kept for this user."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "torch_paged"


def find_compiler() -> str:
    """The C++ compiler: `$CXX`, or what stands in the path."""
    for name in [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]:
        if path := shutil.which(name):
            return path
    raise BuildError(f"no C++ compiler: {os.environ.get('CXX') or 'c++, g++, clang++'} not found")


def build(compiler: str, level: str, target: Path, flags: Sequence[str] = ()) -> None:
    """Compile every source at once, and link them to `target`; `flags` come on top of the usual ones."""
    torch_home = Path(torch.__file__).parent
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        options = [*_FLAGS.split(), *LEVELS[level][1].split(), "-isystem", str(torch_home / "include"), *flags]
        objects = [Path(folder) / f"{source.stem}.o" for source in _sources(".cpp")]
        jobs = [
            _start([compiler, *options, "-c", str(source), "-o", str(out)])
            for source, out in zip(_sources(".cpp"), objects, strict=True)
        ]
        for failed in [error for error in map(_finish, jobs) if error]:
            raise BuildError(failed)
        linked = Path(folder) / target.name
        libraries = ["-L", str(torch_home / "lib"), "-ltorch_cpu"]
        if failed := _finish(_start([compiler, "-shared", *flags, *map(str, objects), "-o", str(linked), *libraries])):
            raise BuildError(failed)
        linked.replace(target)


def _announce_and_build(compiler: str, level: str, target: Path) -> None:
    print(f"torch_paged: building the native CPU kernels ({level}), once for this machine ...", file=sys.stderr)
    start = time.perf_counter()
    build(compiler, level, target)
    print(f"torch_paged: built {target} in {time.perf_counter() - start:.1f} s", file=sys.stderr)


def _sources(suffix: str) -> list[Path]:
    return sorted(path for path in SOURCES.iterdir() if path.suffix == suffix)


def fingerprint(compiler: str, level: str) -> str:
    """A hash of all that a library is made of: sources, flags, compiler, PyTorch."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    made_of = [torch.__version__, platform.machine(), compiler, version, _FLAGS, *LEVELS[level]]
    made_of += [path.read_text() for suffix in (".cpp", ".h") for path in _sources(suffix)]
    return hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]


def _start(command: list[str]) -> "subprocess.Popen[str]":
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error}") from error


def _finish(job: "subprocess.Popen[str]") -> str:
    """Wait for a compiler; what it says is wrong, in one line."""
    output, _ = job.communicate()
    if job.returncode == 0:
        return ""
    errors = [line for line in output.splitlines() if "error" in line] or output.splitlines()[-1:]
    return f"the C++ compiler failed: {errors[0] if errors else f'status {job.returncode}'}"
