"""The Triton kernels, interpreted: that they are what runs, and what calls checked on the CPU cannot reach.

The operators' own tests run here too, through their `device` fixture.
"""

import collections
import importlib
import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

import torch
from triton.runtime.interpreter import GridExecutor

from torch_paged import kernels, reference
from torch_paged.kernels.vectors import common_vector
from torch_paged.testing import attention_inputs

pytestmark = pytest.mark.interpreter
ops = torch.ops.paged
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def launches(monkeypatch):
    """Counts interpreted launches by the kernel's name."""
    counts = collections.Counter()
    run = GridExecutor.__call__

    def counted(self, *args, **kwargs):
        counts[self.fn.__name__] += 1
        return run(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    return counts


def caches_of(count, shape=(5, 4, 2, 16), dtype=torch.float32):
    return [torch.randn(shape).to(dtype) for _ in range(count)]


def test_every_operator_launches_its_kernel(launches):
    inputs = attention_inputs([1, 2], [3, 5])
    output, lse = inputs.call(ops.attention_with_lse)
    assert launches["_attention"] >= 1
    launches.clear()
    ops.merge_attention(output, lse, output, lse)
    assert launches == {"_merge_attention": 1}
    launches.clear()
    key_cache, value_cache = caches_of(2)
    ops.append(torch.zeros(3, 2, 16), torch.zeros(3, 2, 16), key_cache, value_cache, torch.tensor([0, 9, -1]))
    assert launches == {"_append": 1}
    launches.clear()
    stored = [cache.to(torch.float8_e5m2) for cache in (key_cache, value_cache)]
    ops.append(torch.zeros(3, 2, 16), torch.zeros(3, 2, 16), *stored, torch.tensor([0, 9, -1]))
    assert launches == {"_append_quantised": 1}
    launches.clear()
    rows, angles, slots = torch.zeros(3, 2, 16), torch.zeros(4, 8), torch.tensor([0, 9, -1])
    ops.rotary_append(rows, rows, rows, angles, angles, torch.arange(3), key_cache, value_cache, slots)
    assert launches == {"_rotary_append": 1}
    launches.clear()
    ops.copy_blocks([key_cache, value_cache], torch.tensor([[2, 1]]))
    assert launches == {"copy_blocks_kernel": 1}
    launches.clear()
    staging = torch.zeros(1, 2, 4, 2, 16)
    ops.gather_blocks([key_cache, value_cache], torch.tensor([2]), staging)
    ops.scatter_blocks(staging, torch.tensor([2]), [key_cache, value_cache])
    assert launches == {"_move_blocks": 2}


@pytest.mark.parametrize("count", [1, 64])
def test_one_launch_copies_the_blocks_of_all_layers(count, launches):
    caches = caches_of(count)
    expected = [cache.clone() for cache in caches]
    pairs = torch.tensor([[4, 0], [1, 3]])
    ops.copy_blocks(caches, pairs)
    reference.copy_blocks(expected, pairs)
    assert launches == {"copy_blocks_kernel": 1}
    assert all(map(torch.equal, caches, expected))


def test_unequal_blocks_take_a_launch_each(launches):
    keys, values = caches_of(3, (5, 4, 2, 16)), caches_of(3, (5, 4, 2, 24))
    ops.copy_blocks([*keys, *values], torch.tensor([[0, 1]]))
    assert launches == {"copy_blocks_kernel": 2}


@pytest.mark.parametrize("slots", [[20, 0], [1 << 40, 19], [-(1 << 62), 3]], ids=str)
def test_append_skips_slots_outside_the_cache(slots):
    """Past the operator's own check, as on a GPU; canary blocks around the caches stay as they are."""
    whole = [torch.full((7, 4, 2, dim), torch.nan) for dim in (16, 24)]
    caches = [cache[1:6].zero_() for cache in whole]
    key, value = torch.ones(2, 2, 16), torch.ones(2, 2, 24)
    kernels.append(key, value, *caches, torch.tensor(slots))
    for canaries, cache in zip(whole, caches, strict=True):
        assert canaries[[0, 6]].isnan().all()
        assert cache.sum() == cache[0, 0].numel()
        assert cache.view(20, -1)[slots[1]].eq(1).all()


def test_copies_and_moves_skip_blocks_outside_the_caches():
    whole = torch.full((7, 4, 2, 16), torch.nan)
    cache = whole[1:6].copy_(torch.arange(5.0)[:, None, None, None].expand(5, 4, 2, 16))
    kernels.copy_blocks([cache], torch.tensor([[5, 0], [0, 5], [-1, 1], [1, -2], [1 << 40, 2], [4, 3]]))
    assert cache[:, 0, 0, 0].tolist() == [0, 1, 2, 4, 4]
    staging = torch.full((4, 1, 4, 2, 16), -3.0)
    kernels.gather_blocks([cache], torch.tensor([5, -1, 1 << 40, 2]), staging)
    assert staging[:, 0, 0, 0, 0].tolist() == [-3, -3, -3, 2]
    kernels.scatter_blocks(staging, torch.tensor([5, -1, -(1 << 40), 0]), [cache])
    assert cache[:, 3, 1, 15].tolist() == [2, 1, 2, 4, 4]
    assert whole[[0, 6]].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "dims"), [(1, (16, 16)), (3, (24, 17)), (1, (41, 96)), (8, (80, 80)), (1, (576, 512))], ids=str
)
def test_append_of_odd_sizes(heads, dims, dtype):
    """Keys of a packed projection; more rows than a tile holds, and fewer."""
    for rows, block_size in ((1, 1), (37, 5)):
        packed = torch.randn(rows + 1, heads * sum(dims) + 3).to(dtype)
        key, value, _ = packed.split([heads * dims[0], heads * dims[1], 3], dim=1)
        caches = [torch.full((11, block_size, heads, dim), torch.nan).to(dtype) for dim in dims]
        expected = [cache.clone() for cache in caches]
        slots = torch.randperm(11 * block_size)[:rows]
        slots[rows // 2 :: 3] = -1
        arguments = (key.view(rows + 1, heads, -1), value.view(rows + 1, heads, -1))
        kernels.append(*arguments, *caches, slots)
        reference.append(*arguments, *expected, slots)
        torch.testing.assert_close(caches, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("other", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "heads", "dim"), [(1, 1, 1), (5, 3, 17), (3, 7, 80), (2, 2, 512)])
def test_merge_of_odd_sizes(tokens, heads, dim, dtype, other):
    """Any pair of dtypes; a part that saw no key has no say, NaN or not."""
    output_a, output_b = torch.randn(tokens, heads, dim).to(dtype), torch.randn(heads, tokens, dim).to(other)
    output_b, lse_a = output_b.transpose(0, 1), torch.randn(tokens, heads) * 10
    lse_b = lse_a.flip(0) + 1
    exact = reference.merge_attention(output_a.double(), lse_a.double(), output_b.double(), lse_b.double())
    output, lse = kernels.merge_attention(output_a, lse_a, output_b, lse_b)
    assert output.dtype == dtype and output.is_contiguous()
    torch.testing.assert_close(output, exact[0].to(dtype))
    torch.testing.assert_close(lse, exact[1].float())
    nothing = torch.full_like(lse_a, -torch.inf)
    blank = torch.full_like(output_a, torch.nan)
    output, lse = kernels.merge_attention(blank, nothing, output_b, lse_b)
    torch.testing.assert_close((output, lse), (output_b.to(dtype).contiguous(), lse_b), rtol=1e-6, atol=0)
    output, lse = kernels.merge_attention(blank, nothing, blank, nothing)
    assert output.eq(0).all() and torch.equal(lse, nothing)


def test_tables_of_addresses_are_made_once_and_never_stale():
    groups = importlib.import_module("torch_paged.kernels.block_groups")
    caches = caches_of(2)
    first = groups.block_groups(caches, packed=False)
    assert groups.block_groups([cache.view_as(cache) for cache in caches], packed=False) is first
    # The same addresses under another shape are another set.
    wider = [cache.view(5, 8, 16) for cache in caches]
    assert groups.block_groups(wider, packed=False) is not first
    for _ in range(2 * groups._MAX_RECENT):
        groups.block_groups(caches_of(1, (2, 3)), packed=False)
    assert len(groups._recent) == groups._MAX_RECENT


def test_groups_of_head_major_caches_as_the_docstring_says():
    groups = importlib.import_module("torch_paged.kernels.block_groups")
    caches = [torch.zeros(9, 3, 2, 4, dtype=torch.float16).transpose(1, 2) for _ in range(2)]
    (group,) = groups.block_groups(caches, packed=False)
    assert (group.run_bytes, group.run_offsets.tolist(), group.alignment) == (48, [0], 16)
    (group,) = groups.block_groups(caches, packed=True)
    assert (group.run_bytes, group.run_offsets.tolist(), group.alignment) == (8, [0, 16, 32, 8, 24, 40], 8)
    assert group.table.tolist() == [[caches[0].data_ptr(), 48, 0], [caches[1].data_ptr(), 48, 48]]


def test_first_call_under_capture_raises(monkeypatch):
    groups = importlib.import_module("torch_paged.kernels.block_groups")
    groups._recent.clear()
    caches, told = caches_of(2), []
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda table, stream: told.append((len(table), stream)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: "stream")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="call the operator on the same caches once before"):
        kernels.copy_blocks(caches, torch.tensor([[0, 1]]))
    assert not groups._captured
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    kernels.copy_blocks(caches, torch.empty(0, 2, dtype=torch.int64))
    assert told == [(2, "stream"), (1, "stream")]  # table and offsets: their memory waits for this stream
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    kernels.copy_blocks(caches, torch.tensor([[0, 1]]))
    assert torch.equal(caches[0][0], caches[0][1])
    assert len(groups._captured) == 1
    assert len(told) == 2
    groups._captured.clear()


@pytest.mark.parametrize(
    ("rows", "width"),
    [
        (torch.zeros(5, 4, 80), 4),
        (torch.zeros(5, 4, 80).half(), 8),
        (torch.zeros(5, 4, 88, dtype=torch.float16)[..., :83], 1),
        (torch.zeros(5, 4, 84, dtype=torch.float16)[..., :80], 4),
        (torch.zeros(5, 80, 4, dtype=torch.float16).transpose(1, 2), 1),
        (torch.zeros(1, 320 + 3, dtype=torch.float16)[:, :320].view(1, 4, 80), 8),
    ],
    ids=["float32", "half", "odd-dim", "odd-rows", "strided-elements", "one-row"],
)
def test_vectors_are_as_wide_as_strides_allow(rows, width):
    """The interpreter takes any width; on a GPU, too wide a vector would be a misaligned access."""
    cache = torch.zeros(3, 2, *rows.shape[1:], dtype=rows.dtype)
    assert common_vector((rows, rows, cache, cache)) == width
