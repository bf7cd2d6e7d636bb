"""`paged::rotary_append` against the reference, and against rotation and append as separate steps."""

from typing import NamedTuple

import pytest
import torch
from covering import covering_rows

from torch_paged import reference
from torch_paged.testing import assert_within_budget

op = torch.ops.paged.rotary_append
E4M3, INT8 = torch.float8_e4m3fn, torch.int8


class Case(NamedTuple):
    """One row of the grid; `rotary_dim` is twice the columns of `cos`."""

    dtype: str
    rotary_dim: int
    interleaved: bool
    stored: str
    strided: bool
    value: bool
    angles: str

    def __str__(self):
        names = [name for name in ("interleaved", "strided") if getattr(self, name)]
        tail = [] if self.value else ["no-value"]
        return "-".join([self.dtype, f"rotary-{self.rotary_dim}", self.stored, f"cos-{self.angles}", *names, *tail])


FACTORS = {
    "dtype": ["float32", "float16", "bfloat16"],
    "rotary_dim": [2, 20, 32, 42],
    "interleaved": [False, True],
    "stored": ["plain", "e4m3", "e4m3-head", "int8-token"],
    "strided": [False, True],
    "value": [True, False],
    "angles": ["float32", "own"],
}
HEAD_DIM = 42


def heads_of(num_heads, strided, dtype, device, dim=HEAD_DIM):
    """[6, num_heads, dim], as it comes or out of a packed projection with every second column unused."""
    if strided:
        return torch.randn(num_heads + 2, 6, 2 * dim, device=device).to(dtype)[1:-1, :, ::2].transpose(0, 1)
    return torch.randn(6, num_heads, dim, device=device).to(dtype)


def caches_of(case, device):
    """Key and value cache full of a canary, and the scales' keywords, among them scale caches of another."""
    dtype = {"e4m3": E4M3, "int8": INT8}.get(case.stored.partition("-")[0], getattr(torch, case.dtype))
    caches = [torch.full((3, 5, 2, dim), 3.0, device=device).to(dtype) for dim in (HEAD_DIM, 24)]
    sides = ("key", "value") if case.value else ("key",)
    scales = {}
    if case.stored.endswith("head"):
        scales = {f"{side}_scale": torch.tensor([0.02, 0.5], device=device) for side in sides}
    elif case.stored.endswith("token"):
        scales = {f"{side}_scale_cache": torch.full((3, 5, 2), -1.0, device=device) for side in sides}
    return caches if case.value else [caches[0], None], scales


def assert_same_bytes(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        if a is not None:
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("case", [Case(**row) for row in covering_rows(FACTORS, lambda row: True)], ids=str)  # noqa: ARG005
def test_rotary_append(case, device):
    dtype = getattr(torch, case.dtype)
    query, key = (heads_of(count, case.strided, dtype, device) for count in (4, 2))
    value = heads_of(2, case.strided, dtype, device, 24) if case.value else None
    angles = torch.rand(9, case.rotary_dim // 2, device=device) * 7
    cos, sin = (f(angles).to(torch.float32 if case.angles == "float32" else dtype) for f in (torch.cos, torch.sin))
    positions = torch.tensor([8, 0, 3, 3, 0, 5], device=device)
    slots = torch.tensor([14, -1, 0, 7, -(1 << 40)], device=device)
    options = dict(interleaved=case.interleaved)
    before = [tensor.clone() for tensor in (query, key)]

    caches, scales = caches_of(case, device)
    rotated = op(query, key, value, cos, sin, positions, *caches, slots, **options, **scales)
    assert rotated.is_contiguous()
    assert torch.equal(query, before[0])
    assert torch.equal(key, before[1])

    exact = reference.rotate(query.double(), cos[positions], sin[positions], case.interleaved)
    low = reference.rotate(query, cos[positions].to(dtype), sin[positions].to(dtype), case.interleaved)
    assert_within_budget(rotated, exact, low)
    assert torch.equal(rotated[..., case.rotary_dim :], query[..., case.rotary_dim :])

    # The separate steps: the key turned as if it were a query, then appended.
    ignored = torch.zeros(1, 6, 2, HEAD_DIM, device=device).to(dtype)
    turned = op(key, key, None, cos, sin, positions, ignored, None, slots[:0], **options)
    separate, separate_scales = caches_of(case, device)
    reference.append(turned, value, *separate, slots, **separate_scales)
    assert_same_bytes([*caches, *scales.values()], [*separate, *separate_scales.values()])


def test_positions_beyond_the_slots_are_rotated_too(device):
    """Rows of padding: neither keys nor values, but their queries have a result."""
    query, key = torch.randn(4, 2, 16, device=device), torch.randn(4, 1, 16, device=device)
    angles = torch.rand(5, 8, device=device)
    cache, positions = torch.zeros(2, 2, 1, 16, device=device), torch.tensor([1, 2, 3, 4], device=device)
    slots = torch.tensor([2], device=device)
    rotated = op(query, key, None, angles.cos(), angles.sin(), positions, cache, None, slots)
    exact = reference.rotate(query.double(), angles.cos()[positions], angles.sin()[positions], False)
    torch.testing.assert_close(rotated, exact.float(), rtol=1e-6, atol=1e-6)
    assert cache.flatten(0, 1)[[0, 1, 3]].eq(0).all()
    assert cache[1, 0].ne(0).any()


def test_no_token(device):
    query, key = torch.randn(0, 4, 16, device=device), torch.randn(0, 2, 16, device=device)
    cache = torch.zeros(2, 4, 2, 16, device=device)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    table = torch.ones(3, 8, device=device)
    assert op(query, key, key, table, table, none, cache, cache.clone(), none).shape == (0, 4, 16)
    assert cache.eq(0).all()
