"""Compiles kernels for GPUs that are not there, and reads from the machine code what decides their speed.

`compile_call` runs a launch function with a driver that knows its target but has no device: what would be launched is
compiled, exactly as specialised for that call, and nothing runs. Of kernels that were compiled before, from the same
intermediate code by the same compiler, the figures are taken, and the compilation ends there; of calls whose kernels
are known, nothing is compiled at all: see `aot_report`.

Importing this module changes nothing; a process that has called `compile_call` cannot use a GPU any more, so call it
through `Workers`.
"""

import functools
import hashlib
import inspect
import os
import re
import subprocess
import tempfile
from collections import ChainMap
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_SASS = {
    "load128": r"\bLDG\.E[.\w]*\.128",
    "load_narrow": r"\bLDG\.E(?![.\w]*\.128)",
    "store128": r"\bSTG\.E[.\w]*\.128",
    "store_narrow": r"\bSTG\.E(?![.\w]*\.128)",
    "async128": r"\bLDGSTS[.\w]*\.128",
    "async_narrow": r"\bLDGSTS\b(?![.\w]*\.128)",
    "copy_engine": r"\bUTMALDG\b",
    "tensor_core": r"\b(?:HMMA|IMMA|DMMA)\b",
    "wgmma": r"\b[HQI]GMMA\b",
    "tcgen05": r"\bUT[CHQ]\w*MMA\b",
    "spill": r"\b(?:STL|LDL)\b",
    "all": r"^\s+/\*[0-9a-f]{4,5}\*/",
}
_AMDGCN = {
    "load128": r"\b(?:global|buffer|flat)_load_dwordx4\b",
    "load_narrow": r"\b(?:global|buffer|flat)_load_dword(?:x2)?\b",
    "load_element": r"\b(?:global|buffer|flat)_load_(?:[us]?byte|[us]?short)",
    "store128": r"\b(?:global|buffer|flat)_store_dwordx4\b",
    "store_narrow": r"\b(?:global|buffer|flat)_store_(?:byte|short|dword|dwordx2)\b",
    "tensor_core": r"\bv_mfma_",
    "spill": r"\bscratch_(?:load|store)",
    "all": r"^\t[a-z]\w+",
}
_ACCESS = re.compile(r"\b(?:tt\.(?:load|store|atomic_\w+)|ttg\.async_copy\w*|ttng\.async_tma\w*)\b")


class Kernel(NamedTuple):
    """What was compiled for one launch."""

    name: str
    identity: str  # equal for launches that share one compilation
    ir: str  # what it was compiled from and by: kernels of equal code share it though Triton compiles each
    registers: int  # of one thread; on AMD vector registers
    shared_memory: int  # bytes of one thread block
    buffers: int  # copies of a pipelined tile in shared memory, of the tile that has fewest; 0 without a pipeline
    pending: int  # asynchronous copies that may still be under way while a tile is computed
    instructions: dict[str, int]  # how many of each kind that `_SASS` or `_AMDGCN` names
    pipelined_loops: int  # loops of Hopper's machine code that wait for one product while the next is under way
    overlapped: int  # exponentials and tanh that do not wait for the last product in such a loop
    waits_first: int  # 1: touches no memory before the kernel in front of it has ended (programmatic dependent launch)


class _AbsentDevice(DriverBase):
    """A Triton driver for a target without a device: enough to compile, nothing can be launched."""

    def __init__(self, target: str) -> None:
        self.target = target

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target]

    def get_current_device(self) -> int:
        return list(TARGETS).index(self.target)  # each target has compiled kernels of its own

    def get_current_stream(self, device: int | None = None) -> int:  # noqa: ARG002
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:  # noqa: ARG002
        return "void*"

    def get_benchmarker(self) -> Callable[..., float]:
        raise NotImplementedError


_compiled: dict[str, Kernel] = {}  # in this process, by `ir`


class _Known(Exception):
    """Ends a compilation whose outcome is known."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel.name)
        self.kernel = kernel


def _digest(backend: Any, options: Any, module: Any) -> str:
    """Names all that decides the figures: compiler, target, options, the code after its first stage, and their reader.

    By then the parameters of the launch are folded in, and names of files and functions are gone.
    """
    parts = triton.__version__, backend.hash(), _settings(options), module.str_nodebug(), _reader()
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _settings(options: Any) -> str:
    return str(sorted((name, value) for name, value in vars(options).items() if name != "extern_libs"))


def compiler(target: str) -> str:
    """Names the compiler of `target`, and its options as they are where a launch has none."""
    backend = make_backend(TARGETS[target])
    return "\n".join((triton.__version__, backend.hash(), _settings(backend.parse_options({}))))


@functools.cache
def _reader() -> str:
    """The source of what reads figures from machine code."""
    functions = map(inspect.getsource, (_read, _waits_first, _pipelined_loops, _overlapped, _nvidia, _amd))
    return "\n".join((*functions, _ACCESS.pattern, str(_SASS), str(_AMDGCN)))


def _ends_where(known: Mapping[str, Kernel]) -> Callable[..., None]:
    """A hook into Triton's compilers that raises `_Known`."""

    def hook(backend: Any, stages: dict[str, Any], options: Any, *_: Any) -> None:
        first, lower = next(iter(stages.items()))

        def lower_or_end(source: Any, metadata: dict[str, Any]) -> Any:
            module = lower(source, metadata)
            metadata["ir"] = _digest(backend, options, module)
            if (kernel := known.get(metadata["ir"])) is not None:
                raise _Known(kernel._replace(identity=metadata["hash"]))
            return module

        stages[first] = lower_or_end

    return hook


@contextmanager
def _launches_recorded() -> Iterator[list[Kernel]]:
    """Makes every launch a compilation alone, whose result goes into the list."""
    compiled: list[Kernel] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:  # noqa: ARG001
        try:
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        except _Known as end:
            compiled.append(end.kernel)
            return None
        compiled.append(_compiled.get(kernel.metadata.ir) or _read(kernel))
        _compiled.setdefault(kernel.metadata.ir, compiled[-1])
        return kernel

    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = run


def compile_call(
    target: str, call: Callable[..., Any], *args: Any, known: Mapping[str, Kernel] | None = None
) -> list[Kernel]:
    """The kernels that `call(*args)` would launch on `target`, in order, where its tensors are on the CPU.

    `known` are kernels by what they were compiled from. Triton's cache on disk is not asked.
    """
    triton.runtime.driver.set_active(_AbsentDevice(target))
    triton.knobs.compilation.always_compile = True
    triton.knobs.runtime.add_stages_inspection_hook = _ends_where(ChainMap(_compiled, known or {}))
    with _launches_recorded() as compiled:
        call(*args)
    return compiled


def _read(compiled: Any) -> Kernel:
    ttgir = compiled.asm["ttgir"]
    copies = [int(n) for n in re.findall(r"ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x", ttgir)]
    pending = [int(n) for n in re.findall(r"ttg\.async_wait .*?num = (\d+)", ttgir)]
    registers, code, patterns = _amd(compiled) if "amdgcn" in compiled.asm else _nvidia(compiled)
    return Kernel(
        name=compiled.metadata.name,
        identity=compiled.hash,
        ir=compiled.metadata.ir,
        registers=registers,
        shared_memory=compiled.metadata.shared,
        buffers=min(copies, default=0),
        pending=max(pending, default=0),
        instructions={name: len(re.findall(pattern, code, re.MULTILINE)) for name, pattern in patterns.items()},
        pipelined_loops=len(_pipelined_loops(code)),
        overlapped=_overlapped(code),
        waits_first=_waits_first(ttgir),
    )


def _waits_first(ttgir: str) -> int:
    before, wait, _ = ttgir.partition("griddepcontrol.wait")
    return int(wait != "" and _ACCESS.search(before) is None)


def _pipelined_loops(code: str) -> list[str]:
    """The loops around every wait that leaves products of the matrix unit under way."""
    lines = code.splitlines(keepends=True)
    labels = {found[1]: number for number, line in enumerate(lines) if (found := re.match(r"\s*(\.L_x_\d+):", line))}
    spans = []
    for number, line in enumerate(lines):
        target = re.search(r"\bBRA\b.*\((\.L_x_\d+)\)", line)
        if target and labels.get(target[1], number) < number:
            spans.append(range(labels[target[1]], number))
    waits = [number for number, line in enumerate(lines) if re.search(r"DEPBAR.LE gsb0, 0x[1-9]", line)]
    around = [[span for span in spans if wait in span] for wait in waits]
    return ["".join(lines[min(loops, key=len).start : min(loops, key=len).stop]) for loops in around if loops]


def _overlapped(code: str) -> int:
    """Exponentials and tanh between the last product of a pipelined loop and the wait for it.

    In the loop without masks that has fewest. The assembler puts the wait where it likes: with none before it, all of
    them wait for the product.
    """
    without_masks = [loop for loop in _pipelined_loops(code) if loop.count("FSEL") <= 16]
    under_way = [loop.rpartition("HGMMA")[2].rpartition("DEPBAR.LE gsb0")[0] for loop in without_masks]
    return min((len(re.findall(r"MUFU\.(?:EX2|TANH)", part)) for part in under_way), default=0)


def _nvidia(compiled: Any) -> tuple[int, str, dict[str, str]]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "-c", "-ndf", file.name)
    found = re.search(r"\bREG:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump named no registers: {usage}")
    return int(found[1]), code, _SASS


def _amd(compiled: Any) -> tuple[int, str, dict[str, str]]:
    code = compiled.asm["amdgcn"]
    found = re.search(r"\.vgpr_count:\s+(\d+)", code)
    if found is None:
        raise RuntimeError("the assembly names no registers")
    return int(found[1]), code, _AMDGCN


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([_NVIDIA_TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def _compile(known: Callable[[str], Mapping[str, Kernel]], target: str, call: Callable[..., Any], *args: Any) -> Any:
    return compile_call(target, call, *args, known=known(target))


class Workers:
    """Processes that compile what is not `known` for its target; results are remembered by their arguments.

    They give way to what runs beside them. `launched` are for each target calls, with their arguments, whose kernels
    need no process.
    """

    def __init__(
        self,
        known: Callable[[str], Mapping[str, Kernel]],
        launched: Callable[[str], Mapping[Hashable, list[Kernel]]],
        processes: int = 2,
    ) -> None:
        self._known = known
        self._launched = launched
        self._pool = ProcessPoolExecutor(
            processes, mp_context=get_context("spawn"), initializer=os.nice, initargs=(10,)
        )
        self._results: dict[Any, Future[list[Kernel]]] = {}

    def submit(self, target: str, call: Callable[..., Any], *args: Any) -> Future[list[Kernel]]:
        """The future of `compile_call(target, call, *args)`: picklable and hashable arguments."""
        key = (target, call, *args)
        if key not in self._results:
            if (kernels := self._launched(target).get((call, *args))) is None:
                self._results[key] = self._pool.submit(_compile, self._known, *key)
            else:
                self._results[key] = Future()
                self._results[key].set_result(kernels)
        return self._results[key]

    def shutdown(self) -> None:
        self._pool.shutdown(cancel_futures=True)
