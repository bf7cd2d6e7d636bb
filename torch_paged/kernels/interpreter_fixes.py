"""Mends Triton 3.6's interpreter, under TRITON_INTERPRET=1 alone and before the first launch.

The faults, none of which a GPU has:

- bfloat16 tiles are kept as raw 16-bit patterns, and arithmetic, comparisons and `tl.dot` compute on the patterns.
- float32 to bfloat16 truncates, other types to bfloat16 wrap as integers do, and conversions to float8 neither round
  to nearest even nor saturate.
- With NumPy 2.4, a loop whose bound was loaded or computed in the kernel raises TypeError.
- `tl.full` of a bfloat16 other than 0 raises AttributeError.
- Every function that a kernel calls looks through all of `triton.language` for what to replace, a third of the time.
- Sums and products of integers are computed once more to find overflows that nobody is told of, half of what remains.
- NumPy's type of a tile is looked up in a table that is built for the occasion.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_TORCH = {
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.bfloat16: torch.bfloat16,
    tl.float16: torch.float16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
}
_FLOAT8 = (tl.float8e4nv, tl.float8e5)
_BITS = {8: torch.uint8, 16: torch.uint16, 32: torch.uint32, 64: torch.uint64}

_Array = np.ndarray[Any, Any]
_Handle = interpreter.TensorHandle
_Builder = interpreter.InterpreterBuilder
_convert_unmended = interpreter._convert_float
_patch_unmended = interpreter._patch_lang_tensor
_patch_lang_unmended = interpreter._patch_lang
_numpy_type_unmended = interpreter._get_np_dtype
_numpy_type_of_numbers = functools.cache(_numpy_type_unmended)
_patched: set[ModuleType] = set()  # in the launch that runs


def _mend() -> None:
    """Replaces the faulty parts of the interpreter, for this process."""
    interpreter._convert_float = _convert
    interpreter._get_np_dtype = _numpy_type
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=builder.options.debug)
    for name in ("binary_op", "unary_op", "ternary_op", "create_fma", "create_rsqrt", "create_erf"):
        setattr(_Builder, name, _in_float32(getattr(_Builder, name)))
    _Builder.create_dot = _dot_in_float32(_Builder.create_dot)
    _Builder.cast_impl = _cast_through_float32(_Builder.cast_impl)
    _Builder.get_bf16 = _bfloat16_constant
    interpreter._patch_lang_tensor = _patch_with_index
    interpreter._patch_lang = _patch_once_in_a_launch


def _convert(data: _Array, source: tl.dtype, target: tl.dtype, rounding: Any) -> _Array:
    """Bit patterns of `data` in `target`, rounded to nearest even; float8 saturates, as `cvt.satfinite` does."""
    toward_zero = rounding == interpreter._ir.ROUNDING_MODE.RTZ
    if toward_zero or source not in _TORCH or target not in _TORCH:
        converted: _Array = _convert_unmended(data, source, target, rounding)
        return converted
    bits = torch.from_numpy(np.array(data, order="C").view(f"uint{source.primitive_bitwidth}"))
    values = bits.view(_TORCH[source])
    if target in _FLOAT8:
        limit = torch.finfo(_TORCH[target]).max
        values = values.float().clamp(-limit, limit)
    return values.to(_TORCH[target]).view(_BITS[target.primitive_bitwidth]).numpy()


def _numpy_type(of: tl.dtype) -> Any:
    """NumPy's type of a number, a pointer, or a tile of either."""
    return _numpy_type_unmended(of) if of.scalar.is_ptr() else _numpy_type_of_numbers(of.scalar)


def _is_bfloat16(handle: Any) -> bool:
    return isinstance(handle, _Handle) and handle.dtype.scalar == tl.bfloat16


def _widened(handle: Any) -> Any:
    if not _is_bfloat16(handle):
        return handle
    return _Handle(_convert(handle.data, tl.bfloat16, tl.float32, None).view(np.float32), tl.float32)


def _in_float32(unmended: Callable[..., Any]) -> Callable[..., Any]:
    """The operation on bfloat16 operands as GPUs do it: in float32, rounded once."""

    def operation(self: Any, *operands: Any) -> Any:
        if not any(map(_is_bfloat16, operands)):
            return unmended(self, *operands)
        result = unmended(self, *map(_widened, operands))
        if result.data.dtype == np.bool_:
            return _Handle(result.data, tl.int1)
        return _to_bfloat16(result.data)

    return operation


def _dot_in_float32(unmended: Callable[..., Any]) -> Callable[..., Any]:
    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return unmended(self, _widened(a), _widened(b), *rest)

    return create_dot


def _cast_through_float32(unmended: Callable[..., Any]) -> Callable[..., Any]:
    def cast_impl(self: Any, source: Any, target: tl.dtype) -> Any:
        if target.scalar != tl.bfloat16:
            return unmended(self, source, target)
        return _to_bfloat16(source.data.astype(np.float32))

    return cast_impl


def _bfloat16_constant(_self: Any, value: float) -> Any:
    return _to_bfloat16(np.array([value], np.float32))


def _to_bfloat16(data: _Array) -> Any:
    return _Handle(_convert(data, tl.float32, tl.bfloat16, None), tl.bfloat16)


def _patch_with_index(tensor: Any, scope: Any) -> None:
    _patch_unmended(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


class _LaunchScope(interpreter._LangPatchScope):  # type: ignore[misc]
    """What a launch has replaced, of which the functions that it calls replace nothing again."""

    def restore(self) -> None:
        super().restore()
        _patched.clear()


def _patch_once_in_a_launch(function: Any) -> Any:
    missing = _languages(function) - _patched
    if not missing:
        return interpreter._LangPatchScope()
    scope = _LaunchScope()
    scope._changes = _patch_lang_unmended(function)._changes
    _patched.update(missing)
    return scope


@functools.cache
def _languages(function: Any) -> frozenset[ModuleType]:
    return frozenset(it for it in function.__globals__.values() if it is tl or it is tl.core)


_mend()
