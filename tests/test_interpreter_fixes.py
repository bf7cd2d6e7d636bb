"""Each fault that `interpreter_fixes` mends: interpreted operations give what PyTorch gives."""

import os
from collections.abc import Callable

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

import torch
import triton
import triton.language as tl
from triton.language.semantic import TritonSemantic

from torch_paged.kernels import interpreter_fixes  # mends the interpreter

pytestmark = pytest.mark.interpreter

SIZE = 64


@triton.jit
def _combine(a, b, c, out, OPERATION: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x, y, z = tl.load(a + i), tl.load(b + i), tl.load(c + i)
    if OPERATION == "add":
        result = x + y
    elif OPERATION == "subtract":
        result = x - y
    elif OPERATION == "multiply":
        result = x * y
    elif OPERATION == "divide":
        result = x / y
    elif OPERATION == "maximum":
        result = tl.maximum(x, y)
    elif OPERATION == "negative":
        result = -x
    elif OPERATION == "absolute":
        result = tl.abs(x)
    elif OPERATION == "fma":
        result = tl.fma(x, y, z)
    elif OPERATION == "less":
        result = (x < y).to(x.dtype)
    elif OPERATION == "less_and_less":
        result = ((x < y) & (y < z)).to(x.dtype)
    elif OPERATION == "where":
        result = tl.where(x < y, x, z)
    elif OPERATION == "scalar":
        result = x * 0.5
    else:
        result = x + tl.full([SIZE], 1.5, x.dtype)
    tl.store(out + i, result)


EXPECTED = {
    "add": lambda x, y, _: x + y,
    "subtract": lambda x, y, _: x - y,
    "multiply": lambda x, y, _: x * y,
    "divide": lambda x, y, _: x / y,
    "maximum": lambda x, y, _: torch.maximum(x, y),
    "negative": lambda x, *_: -x,
    "absolute": lambda x, *_: x.abs(),
    "fma": lambda x, y, z: (x.double() * y.double() + z.double()).to(x.dtype),
    "less": lambda x, y, _: (x < y).to(x.dtype),
    "less_and_less": lambda x, y, z: ((x < y) & (y < z)).to(x.dtype),
    "where": lambda x, y, z: torch.where(x < y, x, z),
    "scalar": lambda x, *_: x * 0.5,
    "constant": lambda x, *_: x + 1.5,
}


@pytest.mark.parametrize("operation", EXPECTED)
def test_bfloat16_operations(operation: str) -> None:
    x, y, z = torch.randn(3, SIZE, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = torch.full_like(x, torch.nan)
    _combine[(1,)](x, y, z, out, operation, SIZE)
    torch.testing.assert_close(out, EXPECTED[operation](x, y, z), rtol=0, atol=0)


@triton.jit
def _dot(a, b, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    square = i[:, None] * SIZE + i[None, :]
    tl.store(out + square, tl.dot(tl.load(a + square), tl.load(b + square)))


def test_bfloat16_dot() -> None:
    a, b = torch.randn(2, SIZE, SIZE, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = torch.full((SIZE, SIZE), torch.nan)
    _dot[(1,)](a, b, out, SIZE)
    torch.testing.assert_close(out, a.float() @ b.float())


@triton.jit
def _cast(source, target, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(target + i, tl.load(source + i).to(target.dtype.element_ty))


def _cast_to(source: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    target = torch.zeros(source.shape, dtype=dtype)
    _cast[(1,)](source, target, source.shape[0])
    return target


def test_bfloat16_rounds_to_nearest_even() -> None:
    source = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 3 * 2**-9, 3e38, 3.4e38, torch.inf, 0])
    torch.testing.assert_close(_cast_to(source, torch.bfloat16), source.bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float16, torch.float64], ids=str)
def test_bfloat16_from_other_types(dtype: torch.dtype) -> None:
    source = torch.tensor([0, 1, 2, 3, 257, 259, -3, -4]).to(dtype)
    torch.testing.assert_close(_cast_to(source, torch.bfloat16), source.bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("source_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_float8_rounds_and_saturates(dtype: torch.dtype, source_dtype: torch.dtype) -> None:
    limit = torch.finfo(dtype).max
    source = torch.tensor([500.0, -500, 448, 1.0625, 1.1875, 2**-10, 60000, torch.inf]).to(source_dtype)
    expected = source.float().clamp(-limit, limit).to(dtype)
    torch.testing.assert_close(_cast_to(source, dtype).float(), expected.float(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_float8_widens_every_code(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    torch.testing.assert_close(_cast_to(codes, torch.float32), codes.float(), rtol=0, atol=0, equal_nan=True)


@triton.jit
def _count(bounds, out):
    total = 0
    for i in range(tl.load(bounds), tl.load(bounds + 1), 2):
        total += i
    for i in tl.range(0, total // 4, num_stages=3):
        total += i
    tl.store(out, total)


def test_loops_over_loaded_bounds() -> None:
    out = torch.zeros(1, dtype=torch.int32)
    _count[(1,)](torch.tensor([3, 8], dtype=torch.int32), out)
    assert out.item() == 15 + 0 + 1 + 2


@triton.jit
def _third(x):
    return x + 3


@triton.jit
def _second(x):
    return _third(x) + tl.sum(x) - tl.sum(x)


@triton.jit
def _first(out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, _second(_third(i)))


def test_language_is_replaced_once_in_a_launch_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    arange, looked = tl.arange, []
    unmended = interpreter_fixes._patch_lang_unmended
    monkeypatch.setattr(interpreter_fixes, "_patch_lang_unmended", lambda it: looked.append(it) or unmended(it))
    for _ in range(2):
        looked.clear()
        out = torch.zeros(SIZE, dtype=torch.int32)
        _first[(2,)](out, SIZE)
        assert torch.equal(out, torch.arange(6, SIZE + 6, dtype=torch.int32))
        assert tl.arange is arange
        assert len(looked) <= 2  # for the language as the kernel sees it, and as its own library does


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8], ids=str)
@pytest.mark.parametrize("operation", ["add", "subtract", "multiply"])
def test_integers_wrap_without_a_second_computation(
    operation: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton compares each result in 64 bits with its type's limits, and without debugging does nothing about it."""
    monkeypatch.delattr(TritonSemantic, "less_equal")
    info = torch.iinfo(dtype)
    x, y = torch.randint(info.min, info.max + 1, (2, SIZE), generator=torch.Generator().manual_seed(0)).to(dtype)
    out = torch.zeros_like(x)
    _combine[(1,)](x, y, y, out, operation, SIZE)
    assert torch.equal(out, EXPECTED[operation](x, y, y))


@pytest.mark.parametrize(
    "wrap", [lambda of: of, tl.pointer_type, lambda of: tl.block_type(of, [2, 4])], ids=["number", "pointer", "tile"]
)
@pytest.mark.parametrize("of", [tl.int1, tl.uint8, tl.int64, tl.float32, tl.bfloat16, tl.float8e5], ids=str)
def test_numpy_types_are_those_of_triton(of: tl.dtype, wrap: Callable[[tl.dtype], tl.dtype]) -> None:
    assert interpreter_fixes._numpy_type(wrap(of)) == interpreter_fixes._numpy_type_unmended(wrap(of))
    assert interpreter_fixes._numpy_type(tl.block_type(tl.pointer_type(of), [4])) == "uint64"
