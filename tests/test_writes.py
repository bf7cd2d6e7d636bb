"""append, copy_blocks, gather_blocks, scatter_blocks against the reference; memory around a write stays as it was."""

import pytest
import torch
from storages import same_storage, storage_of

from torch_paged import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ops = torch.ops.paged


def cache_of(shape, dtype, device, layout="token-major"):
    """A cache of random numbers: dense, head-major, or every second slot and head of a larger tensor."""
    blocks, size, heads, dim = shape
    if layout == "head-major":
        return torch.randn(blocks, heads, size, dim, device=device).to(dtype).transpose(1, 2)
    if layout == "strided":
        return torch.randn(blocks, size * 2, heads * 2, dim + 3, device=device).to(dtype)[:, ::2, 1::2, :dim]
    return torch.randn(shape, device=device).to(dtype)


def assert_same_storage(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(storage_of(a), storage_of(b))


@pytest.mark.parametrize("layout", ["token-major", "head-major", "strided"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(
    ("heads", "dim", "value_dim", "block_size"),
    [(2, 32, 32, 16), (3, 41, 17, 5), (1, 576, 512, 1), (8, 80, 128, 16)],
)
def test_append(heads, dim, value_dim, block_size, dtype, layout, device):
    caches = [cache_of((6, block_size, heads, d), dtype, device, layout) for d in (dim, value_dim)]
    expected = same_storage(caches)
    key, value = (torch.randn(9, heads, d, device=device).to(dtype) for d in (dim, value_dim))
    slots = torch.randperm(6 * block_size)[:5].repeat(2)[:7].to(device)
    slots[5:] = torch.tensor([-1, -(1 << 40)])
    reference.append(key, value, *expected, slots)
    ops.append(key, value, *caches, slots)
    assert_same_storage(caches, expected)


def test_append_reads_any_strides(device):
    """Keys sliced out of a packed projection, or with the heads transposed, or of a stride other than one."""
    packed = torch.randn(5, 2 * 24 + 2 * 48, device=device)
    key = packed[:, :48].view(5, 2, 24)
    value = torch.randn(48, 2, 5, device=device).permute(2, 1, 0)
    caches = [torch.randn(4, 3, 2, d, device=device) for d in (24, 48)]
    expected = same_storage(caches)
    slots = torch.tensor([11, 0, 5, -1, 6], device=device)
    reference.append(key, value, *expected, slots)
    ops.append(key, value, *caches, slots)
    assert_same_storage(caches, expected)


def test_append_without_value(device):
    """The value is a view of the key cache: one tensor is written."""
    cache = torch.randn(4, 3, 1, 64, device=device)
    key = torch.randn(3, 1, 64, device=device)
    expected = same_storage([cache])
    slots = torch.tensor([4, -1, 9], device=device)
    reference.append(key, None, expected[0], None, slots)
    ops.append(key, None, cache, None, slots)
    assert_same_storage([cache], expected)


@pytest.mark.parametrize("slots", [[], [-1, -1, -1]], ids=["empty", "all-skipped"])
def test_append_of_nothing_writes_nothing(slots, device):
    caches = [torch.randn(4, 3, 2, 32, device=device) for _ in range(2)]
    expected = same_storage(caches)
    rows = torch.randn(3, 2, 32, device=device)
    ops.append(rows, rows, *caches, torch.tensor(slots, dtype=torch.int64, device=device))
    assert_same_storage(caches, expected)


def mixed_caches(device):
    """Tensors of one first dimension in several dtypes, ranks and layouts."""
    return [
        cache_of((7, 4, 2, 16), torch.float32, device),
        cache_of((7, 4, 2, 24), torch.bfloat16, device, "head-major"),
        cache_of((7, 3, 2, 17), torch.float16, device, "strided"),
        torch.randint(0, 100, (7, 5), device=device, dtype=torch.int8),
        torch.randint(0, 100, (7, 6), device=device, dtype=torch.int8).view(torch.float8_e4m3fn)[:, ::2],
        torch.randint(0, 100, (14,), device=device)[::2],
    ]


@pytest.mark.parametrize(
    "pairs",
    [[], [(0, 1)], [(3, 1), (3, 6), (2, 0)], [(-1, 2), (4, -1), (5, 0), (-7, -7)]],
    ids=["empty", "one", "fan-out", "skipped"],
)
def test_copy_blocks(pairs, device):
    caches = mixed_caches(device)
    expected = same_storage(caches)
    pairs = torch.tensor(pairs, dtype=torch.int64, device=device).view(-1, 2)
    reference.copy_blocks(expected, pairs)
    ops.copy_blocks(caches, pairs)
    assert_same_storage(caches, expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint16, torch.uint32, torch.uint64, torch.complex64], ids=str)
def test_blocks_of_any_type_are_moved(dtype, device):
    cache = torch.randint(0, 256, (4, 3 * dtype.itemsize), dtype=torch.uint8)
    cache = ((cache > 100) if dtype == torch.bool else cache.view(dtype)).to(device)
    before = cache.clone()
    ops.copy_blocks([cache], torch.tensor([[0, 1]], device=device))
    out = torch.zeros(2, 3 * dtype.itemsize, dtype=torch.uint8, device=device)
    ops.gather_blocks([cache], torch.tensor([1, 3], device=device), out)
    ops.scatter_blocks(out, torch.tensor([2, 0], device=device), [cache])
    expected = before.cpu()[[3, 0, 0, 3]]
    assert torch.equal(cache.cpu().view(torch.uint8), expected.view(torch.uint8))


def test_copy_blocks_of_no_cache(device):
    ops.copy_blocks([], torch.tensor([[0, 1]], device=device))


@pytest.mark.parametrize("blocks", [[], [2], [6, 0, 3, 0], [-1, 5, -9]], ids=["empty", "one", "repeated", "skipped"])
def test_gather_blocks(blocks, device):
    caches = mixed_caches(device)
    row_bytes = sum(cache[0].numel() * cache.element_size() for cache in caches)
    blocks = torch.tensor(blocks, dtype=torch.int64, device=device)
    out = torch.randint(0, 255, (len(blocks), row_bytes), dtype=torch.uint8, device=device)
    expected = out.clone()
    before = same_storage(caches)
    reference.gather_blocks(caches, blocks, expected)
    ops.gather_blocks(caches, blocks, out)
    assert torch.equal(out, expected)
    assert_same_storage(caches, before)


@pytest.mark.parametrize("blocks", [[], [2], [6, 0, 3], [-1, 5, -9]], ids=["empty", "one", "several", "skipped"])
def test_scatter_blocks(blocks, device):
    caches = mixed_caches(device)
    expected = same_storage(caches)
    row_bytes = sum(cache[0].numel() * cache.element_size() for cache in caches)
    blocks = torch.tensor(blocks, dtype=torch.int64, device=device)
    source = torch.randint(0, 255, (len(blocks), row_bytes), dtype=torch.uint8, device=device)
    reference.scatter_blocks(source, blocks, expected)
    ops.scatter_blocks(source, blocks, caches)
    for cache, wanted in zip(caches, expected, strict=True):  # bytes: random ones may be NaN
        storage, wanted = storage_of(cache), storage_of(wanted)
        assert torch.equal(storage.contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8))


def test_blocks_without_elements(device):
    caches = [torch.zeros(4, 5, device=device), torch.zeros(4, 0, device=device), torch.zeros(4, 2, 0, device=device)]
    source, blocks = torch.ones(2, 20, dtype=torch.uint8, device=device), torch.tensor([3, 1], device=device)
    ops.scatter_blocks(source, blocks, caches)
    assert caches[0].view(torch.uint8).sum(1).tolist() == [0, 20, 0, 20]
    ops.gather_blocks(caches, blocks, out := torch.zeros_like(source))
    assert torch.equal(out, source)
    ops.copy_blocks(caches, torch.tensor([[1, 0]], device=device))
    assert torch.equal(caches[0][0], caches[0][1])


def test_gather_then_scatter_moves_blocks(device):
    """Typed staging of equal caches: row i holds block i of each cache, in order."""
    caches = [torch.randn(6, 4, 2, 16, device=device) for _ in range(3)]
    moved = [torch.zeros_like(cache) for cache in caches]
    staging = torch.empty(2, 3, 4, 2, 16, device=device)
    ops.gather_blocks(caches, torch.tensor([5, 1], device=device), staging)
    assert torch.equal(staging, torch.stack([cache[[5, 1]] for cache in caches], 1))
    ops.scatter_blocks(staging, torch.tensor([0, 3], device=device), moved)
    for cache, copy in zip(caches, moved, strict=True):
        assert torch.equal(copy[[0, 3]], cache[[5, 1]])
        assert copy[[1, 2, 4, 5]].eq(0).all()
