"""Quantising writes, bit for bit as the reference's; memory around them stays as it was."""

from typing import NamedTuple

import pytest
import torch
from covering import covering_rows
from storages import same_storage, storage_of

from torch_paged import reference

ops = torch.ops.paged
QUANTISED = [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8]
FACTORS = {
    "stored": QUANTISED,
    "scales": ["none", "scalar", "head", "token"],
    "dtype": [torch.float32, torch.float16, torch.bfloat16],
    "layout": ["token-major", "head-major", "strided"],
    "shape": [(2, 32, 32, 16), (3, 41, 17, 5), (1, 576, 512, 1), (8, 80, 128, 16)],
}


class Case(NamedTuple):
    """Of an append: types, strides, and `shape`, which is (heads, head_dim, value_head_dim, block_size)."""

    stored: torch.dtype
    scales: str
    dtype: torch.dtype
    layout: str
    shape: tuple[int, int, int, int]

    def __str__(self):
        dtypes = (str(dtype).removeprefix("torch.") for dtype in (self.stored, self.dtype))
        return "-".join([*dtypes, self.scales, self.layout, "x".join(map(str, self.shape))])


CASES = [
    Case(**row)
    for row in covering_rows(FACTORS, lambda row: (row.get("stored"), row.get("scales")) != (torch.int8, "none"))
]


def bytes_of(shape, layout, dtype, device):
    """A cache of random bytes: dense, head-major, or every second slot and head of a larger tensor."""
    blocks, size, heads, dim = shape
    if layout == "head-major":
        return random_bytes((blocks, heads, size, dim), device).view(dtype).transpose(1, 2)
    if layout == "strided":
        return random_bytes((blocks, size * 2, heads * 2, dim + 3), device).view(dtype)[:, ::2, 1::2, :dim]
    return random_bytes(shape, device).view(dtype)


def random_bytes(shape, device):
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=device)


def rows_of(count, heads, dim, dtype, device):
    """Ordinary numbers, ties of every type at scale 1/4, zeros, the smallest numbers, and some beyond any range."""
    rows = torch.randn(count, heads, dim)
    rows[1] = torch.randint(-9600, 9600, (heads, dim)) / 128
    rows[2] = 0
    rows[3] *= 1e-42
    rows[4] *= torch.tensor(10.0).pow(torch.randint(-8, 5, (heads, dim)))
    return rows.to(dtype).to(device)


def written(op, case, key, value, slots, device):
    """What a call leaves: bytes of the storages, and the scales."""
    heads, dim, value_dim, block_size = case.shape
    torch.manual_seed(1)
    caches = [bytes_of((6, block_size, heads, d), case.layout, case.stored, device) for d in (dim, value_dim)]
    caches = same_storage(caches)
    scales = {}
    for side in ("key", "value"):
        if case.scales == "token":
            scales[f"{side}_scale_cache"] = torch.randn(6, block_size * 2, heads, device=device)[:, ::2]
        elif case.scales != "none":
            static = torch.tensor(0.25) if case.scales == "scalar" else 0.25 * 2.0 ** -torch.arange(heads)
            scales[f"{side}_scale"] = static.to(device)
    op(key, value, *caches, slots, **scales)
    left = [storage_of(cache).contiguous().view(torch.uint8) for cache in caches]
    return left + [storage_of(scale) for scale in scales.values()]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_append_quantises(case, device):
    heads, dim, value_dim, block_size = case.shape
    key, value = (rows_of(9, heads, d, case.dtype, device) for d in (dim, value_dim))
    slots = torch.randperm(6 * block_size)[:5].repeat(2)[:7].to(device)
    slots[5:] = torch.tensor([-1, -(1 << 40)])
    actual = written(ops.append, case, key, value, slots, device)
    for mine, theirs in zip(actual, written(reference.append, case, key, value, slots, device), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
def test_every_finite_bfloat16_is_rounded_as_the_reference_rounds(dtype, device):
    """Saturating, ties to even, subnormal numbers, both zeros."""
    codes = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    rows = torch.where(codes.isfinite(), codes, 0).view(128, 1, 512).to(device)
    caches = [torch.zeros(128, 1, 1, 512, dtype=torch.uint8, device=device).view(dtype) for _ in range(2)]
    slots, one = torch.arange(128, device=device), torch.ones((), device=device)
    ops.append(rows, None, caches[0], None, slots, key_scale=one)
    reference.append(rows, None, caches[1], None, slots, key_scale=one)
    assert torch.equal(caches[0].view(torch.uint8), caches[1].view(torch.uint8))


@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
def test_division_is_rounded_once(dtype, device):
    """Half-way cases of scales that are no powers of two: a product with the reciprocal would miss some."""
    scales = torch.linspace(0.01, 3, 64, device=device)
    halves = torch.arange(-256, 256, device=device) / 2
    rows = (halves * scales[:, None])[None]
    caches = [torch.zeros(1, 1, 64, 512, dtype=torch.uint8, device=device).view(dtype) for _ in range(2)]
    slots = torch.zeros(1, dtype=torch.int64, device=device)
    ops.append(rows, None, caches[0], None, slots, key_scale=scales)
    reference.append(rows, None, caches[1], None, slots, key_scale=scales)
    assert torch.equal(caches[0].view(torch.uint8), caches[1].view(torch.uint8))


@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
def test_one_side_may_be_quantised_alone(dtype, device):
    key, value = torch.randn(2, 3, 2, 32, device=device)
    slots = torch.tensor([4, -1, 7], device=device)
    caches = [torch.zeros(4, 3, 2, 32, device=device), torch.zeros(4, 3, 2, 32, device=device).to(dtype)]
    expected = [cache.clone() for cache in caches]
    scales, true = torch.zeros(2, 4, 3, 2, device=device)
    reference.append(key, value, *expected, slots, value_scale_cache=true)
    ops.append(key, value, *caches, slots, value_scale_cache=scales)
    assert torch.equal(caches[0], expected[0])
    assert torch.equal(caches[1].view(torch.uint8), expected[1].view(torch.uint8))
    assert torch.equal(scales, true)


@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
def test_what_was_appended_is_read_back(dtype, device):
    """A scale of each token's own keeps every number within the type's rounding."""
    key, value = torch.randn(2, 40, 2, 64, device=device)
    caches = [torch.zeros(3, 16, 2, 64, device=device).to(dtype) for _ in range(2)]
    key_scales, value_scales = torch.full((2, 3, 16, 2), torch.nan, device=device)
    scales = dict(key_scale_cache=key_scales, value_scale_cache=value_scales)
    ops.append(key, value, *caches, torch.arange(40, device=device), **scales)
    table = torch.arange(3, dtype=torch.int32, device=device).expand(40, 3)
    lens = torch.arange(1, 41, dtype=torch.int32, device=device)
    output = ops.attention(torch.zeros(40, 4, 64, device=device), *caches, table, lens, sliding_window=1, **scales)
    step = {torch.float8_e4m3fn: 2**-4, torch.float8_e5m2: 2**-3, torch.int8: 1 / 127}[dtype]
    assert ((output[:, ::2] - value).abs() <= step * value.abs().amax(-1, keepdim=True)).all()


@pytest.mark.parametrize("size", [1.0, 0.01])
@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
def test_a_row_of_zeros_takes_no_precision_from_others(dtype, size, device):
    """Its scale is 1, which may be ten million times theirs."""
    query, key = torch.randn(1, 2, 64).bfloat16().to(device), torch.randn(200, 1, 64).bfloat16().to(device)
    value = (torch.randn(200, 1, 64) * size).bfloat16().to(device)
    value[0] = 0
    key_cache = torch.zeros(13, 16, 1, 64, dtype=torch.bfloat16, device=device)
    value_cache = torch.zeros(13, 16, 1, 64, device=device).to(dtype)
    scales = dict(value_scale_cache=torch.ones(13, 16, 1, device=device))
    ops.append(key, value, key_cache, value_cache, torch.arange(200, device=device), **scales)
    table = torch.arange(13, dtype=torch.int32, device=device)[None]
    call = key_cache, value_cache, table, torch.tensor([200], dtype=torch.int32, device=device)
    exact = reference.attention(query.double(), *call, **scales)
    error = (ops.attention(query, *call, **scales).double() - exact).norm() / exact.norm()
    assert error < 2**-8
