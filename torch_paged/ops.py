"""The operators of namespace `paged`: schemas, fake kernels, the Autograd guard, and who implements what.

A call runs `checks` (metadata), `bounds` (values: on CPU always, on a GPU in debug mode) and then the implementation,
a function of the operator's name in `torch_paged.cpu` or `torch_paged.kernels`, imported on first use.
"""

import importlib
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from torch_paged import bounds, checks
from torch_paged.guard import guarded, refusing_lost_offsets
from torch_paged.options import PLAIN, SCALES, SCHEDULE_SHAPE, AttentionOptions

_OPTIONS = """Tensor? cu_seqlens_q=None, float? scale=None, bool causal=True, int? sliding_window=None,
    float softcap=0.0, Tensor? alibi_slopes=None, Tensor? sinks=None, Tensor? key_scale=None,
    Tensor? value_scale=None, Tensor? key_scale_cache=None, Tensor? value_scale_cache=None"""
_BATCH = f"Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table, Tensor seq_lens, *, {_OPTIONS}"
_ATTENTION = f"({_BATCH}, Tensor? schedule=None)"
_WRITTEN_SCALES = """Tensor? key_scale=None, Tensor? value_scale=None, Tensor(c!)? key_scale_cache=None,
    Tensor(d!)? value_scale_cache=None"""

_REMEMBERED = 4096
_ALIGNMENT = 16  # bytes; kernels are compiled for addresses that are multiples of it, or for any
_Preparing = Callable[[ModuleType, tuple[Any, ...], dict[str, Any]], Callable[..., Any]]
_calls: dict[tuple[Any, ...], Callable[..., Any]] = {}  # what serves a call, by all that decides it

_library = torch.library.Library("paged", "DEF")


def _empty_output(query: Tensor, value_cache: Tensor) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[1], value_cache.shape[3])


def _empty_lse(query: Tensor) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[1], dtype=torch.float32)


def _fake_attention(query: Tensor, key_cache: Tensor, value_cache: Tensor, *args: Tensor, **options: Any) -> Tensor:
    checks.attention(query, key_cache, value_cache, *args, **options)
    return _empty_output(query, value_cache)


def _fake_attention_with_lse(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, *args: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    checks.attention(query, key_cache, value_cache, *args, **options)
    return _empty_output(query, value_cache), _empty_lse(query)


def _fake_schedule(query: Tensor, *args: Tensor, **options: Any) -> Tensor:
    checks.schedule(query, *args, **options)
    return query.new_empty(SCHEDULE_SHAPE, dtype=torch.int32)


def _fake_merge_attention(output_a: Tensor, lse_a: Tensor, output_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    checks.merge_attention(output_a, lse_a, output_b, lse_b)
    return output_a.new_empty(output_a.shape), _empty_lse(output_a)


def _prepare_attention(
    with_lse: bool,
    package: ModuleType,
    query: Tensor,
    *args: Tensor,
    cu_seqlens_q: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    schedule: Tensor | None = None,  # noqa: ARG001
    **options: Any,
) -> Callable[..., Any]:
    """What attends, its default scale resolved: the package's own for calls like this one, or its function."""
    scale = query.shape[2] ** -0.5 if scale is None else scale
    if abs(scale) < torch.finfo(torch.float32).tiny:  # what float32 would flush to 0
        scale = 0.0
    if not hasattr(package, "prepare_attention"):
        return partial(_attend, package, with_lse, scale)
    settled = cu_seqlens_q, scale, causal, AttentionOptions(**options), with_lse
    prepared: Callable[..., Any] = package.prepare_attention(query, *args, *settled)
    return prepared


def _attend(
    package: ModuleType,
    with_lse: bool,
    settled_scale: float,
    *args: Tensor,
    cu_seqlens_q: Tensor | None = None,
    scale: float | None = None,  # noqa: ARG001
    causal: bool = True,
    schedule: Tensor | None = None,  # noqa: ARG001 - it only saves time, elsewhere
    **options: Any,
) -> Any:
    """Run the attention with its options as one tuple."""
    options_tuple = AttentionOptions(**options) if options else PLAIN
    result = package.attention(*args, cu_seqlens_q, settled_scale, causal, options_tuple)
    return result if with_lse else result[0]


def _schedule(
    package: ModuleType,
    query: Tensor,
    *args: Tensor,
    cu_seqlens_q: Tensor | None = None,
    scale: float | None = None,  # noqa: ARG001 - any will do
    causal: bool = True,
    **options: Any,
) -> Tensor:
    """A schedule, of zeros where the package has nothing to share between calls."""
    schedule = query.new_zeros(SCHEDULE_SHAPE, dtype=torch.int32)
    if hasattr(package, "schedule"):
        package.schedule(
            query, *args, cu_seqlens_q, causal, AttentionOptions(**options) if options else PLAIN, schedule
        )
    return schedule


def _append(package: ModuleType, *args: Tensor, **scales: Tensor) -> None:
    package.append(*args, *map(scales.get, SCALES))


def _rotary_append(package: ModuleType, *args: Tensor, interleaved: bool = False, **scales: Tensor) -> Tensor:
    rotated: Tensor = package.rotary_append(*args, interleaved, *map(scales.get, SCALES))
    return rotated


def _fake_rotary_append(query: Tensor, *args: Tensor, **options: Any) -> Tensor:
    checks.rotary_append(query, *args, **options)
    return query.new_empty(query.shape)


def _define(
    schema: str,
    fake: Callable[..., Any] | None = None,
    run: Callable[..., Any] | None = None,
    prepare: Callable[..., Callable[..., Any]] | None = None,
) -> None:
    """Define one operator and register it for every device.

    `fake` is the fake kernel (default: the checks alone, for an operator that returns nothing). An implementation is
    `prepare(package, *arguments)`, which serves whatever agrees with these arguments in metadata and options, or else
    `run(package, *arguments)` (default: the package's function of the operator's name).
    """
    name = schema.partition("(")[0]
    meaning = name.removesuffix("_with_lse")
    check: Callable[..., None] = getattr(checks, meaning)
    run = run or (lambda package, *args, **kwargs: getattr(package, name)(*args, **kwargs))
    prepare = prepare or (lambda package, *_, **__: partial(run, package))
    prepared = _prepared(check, prepare) if "[]" in schema else _remembered(name, _prepared(check, prepare))

    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        package = _package(_cpu_package())
        call = prepared(package, args, kwargs)
        if package.CHECKS_VALUES:
            try:
                return call(*args, **kwargs)
            except (IndexError, ValueError):
                getattr(bounds, meaning)(*args, **kwargs)  # which says what is wrong, and where
                raise
        getattr(bounds, meaning)(*args, **kwargs)
        return call(*args, **kwargs)

    def on_cuda(*args: Any, **kwargs: Any) -> Any:
        if _several_devices():
            with _device_of(args):
                return on_its_device(args, kwargs)
        return on_its_device(args, kwargs)

    def on_its_device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = prepared(_package("torch_paged.kernels"), args, kwargs)
        if _debugging():
            getattr(bounds, meaning)(*args, **kwargs)
        return call(*args, **kwargs)

    _library.define(schema)
    op = getattr(torch.ops.paged, name).default
    torch.library.register_fake(f"paged::{name}", refusing_lost_offsets(op, fake or check), lib=_library)
    _library.impl(name, guarded(op), "Autograd", with_keyset=True)
    for device, kernel in (("CPU", on_cpu), ("CUDA", on_cuda)):
        _library.impl(name, kernel, device)
        _library.impl(name, guarded(op, device, kernel), f"Autograd{device}", with_keyset=True)


def _device_of(args: tuple[Any, ...]) -> AbstractContextManager[Any]:
    """Triton launches on the current device: makes it that of the tensors."""
    return torch.cuda.device_of(next(arg for arg in args if isinstance(arg, Tensor)))


@cache
def _several_devices() -> bool:
    return torch.cuda.device_count() > 1


def _prepared(check: Callable[..., None], prepare: Callable[..., Callable[..., Any]]) -> _Preparing:
    """Checks the arguments of a call and says what serves it."""

    def prepared(package: ModuleType, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
        check(*args, **kwargs)
        return prepare(package, *args, **kwargs)

    return prepared


def _remembered(name: str, prepared: _Preparing) -> _Preparing:
    """`prepared`, run once for each combination of metadata, alignment and options: a decode loop repeats one."""

    def remembered(package: ModuleType, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
        metadata = (
            name,
            package,
            *[
                (arg.dtype, arg.shape, arg.stride(), arg.get_device(), arg.data_ptr() % _ALIGNMENT)
                if isinstance(arg, Tensor)
                else arg
                for arg in (*args, *kwargs, *kwargs.values())
            ],
        )
        call = _calls.get(metadata)
        if call is None:
            call = prepared(package, args, kwargs)
            if len(_calls) >= _REMEMBERED:
                _calls.clear()
            _calls[metadata] = call
        return call

    return remembered


@cache
def _cpu_package() -> str:
    """Triton's interpreter reads its variable when kernels are first imported, native kernels may be built: once."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "torch_paged.kernels"
    chosen: str = _package("torch_paged.cpu.choice").package()
    return chosen


@cache
def _package(name: str) -> ModuleType:
    return importlib.import_module(name)


def package_on(device_type: str) -> ModuleType | None:
    """What implements the operators on such devices; None: nothing does."""
    if device_type == "cpu":
        return _package(_cpu_package())
    return _package("torch_paged.kernels") if device_type == "cuda" else None


def _debugging() -> bool:
    if os.environ.get("TORCH_PAGED_DEBUG") != "1":
        return False
    if torch.cuda.is_current_stream_capturing():
        _warn_of_capture()
        return False
    return True


@cache
def _warn_of_capture() -> None:
    warnings.warn("TORCH_PAGED_DEBUG=1: values are not checked during CUDA graph capture", stacklevel=2)


_define(f"attention{_ATTENTION} -> Tensor", _fake_attention, prepare=partial(_prepare_attention, False))
_define(
    f"attention_with_lse{_ATTENTION} -> (Tensor output, Tensor lse)",
    _fake_attention_with_lse,
    prepare=partial(_prepare_attention, True),
)
_define(f"schedule({_BATCH}) -> Tensor", _fake_schedule, _schedule)
_define(
    "merge_attention(Tensor output_a, Tensor lse_a, Tensor output_b, Tensor lse_b) -> (Tensor output, Tensor lse)",
    _fake_merge_attention,
)
_define(
    f"""append(Tensor key, Tensor? value, Tensor(a!) key_cache, Tensor(b!)? value_cache, Tensor slot_mapping, *,
    {_WRITTEN_SCALES}) -> ()""",
    run=_append,
)
_define(
    f"""rotary_append(Tensor query, Tensor key, Tensor? value, Tensor cos, Tensor sin, Tensor positions,
    Tensor(a!) key_cache, Tensor(b!)? value_cache, Tensor slot_mapping, *, bool interleaved=False,
    {_WRITTEN_SCALES}) -> Tensor""",
    _fake_rotary_append,
    _rotary_append,
)
_define("copy_blocks(Tensor(a!)[] caches, Tensor block_pairs) -> ()")
_define("gather_blocks(Tensor[] caches, Tensor blocks, Tensor(a!) out) -> ()")
_define("scatter_blocks(Tensor source, Tensor blocks, Tensor(a!)[] caches) -> ()")
