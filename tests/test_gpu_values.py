"""What only a GPU can show of the operators' values: huge offsets, the debug mode, memory that nobody may touch.

Their grids of shapes run on the GPU as well, through the `device` fixture; graphs and streams are in test_gpu_graphs,
the cache's tests in test_cache_gpu.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu_inputs import BF16, BLOCK, ids, randn, small_call

pytestmark = pytest.mark.gpu
ops = torch.ops.paged
ROOT = Path(__file__).parents[1]
PAST_INT32 = 2**31
BLOCK_NUMEL = 16 * 8 * 128


def need_memory(gigabytes):
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * 2**30:
        pytest.skip(f"needs {gigabytes} GiB of free GPU memory, there are {free / 2**30:.0f}")


@pytest.fixture
def high_blocks():
    """Two caches of more than 2^31 elements, two small ones, and which blocks of the huge ones hold the same."""
    need_memory(16)
    num_blocks = PAST_INT32 // BLOCK_NUMEL + 8
    small = [randn(6, *BLOCK) for _ in range(2)]
    huge = [torch.empty(num_blocks, *BLOCK, dtype=BF16, device="cuda") for _ in range(2)]
    high = ids([num_blocks - 1, num_blocks - 4, num_blocks - 2, 3, num_blocks - 7, num_blocks - 5])
    for few, many in zip(small, huge, strict=True):
        many[high] = few
    yield small, huge, high
    del huge
    torch.cuda.empty_cache()


def assert_same_blocks(small, huge, high):
    for few, many in zip(small, huge, strict=True):
        assert torch.equal(many[high], few)


def test_attention_past_int32(high_blocks):
    small, huge, high = high_blocks
    query, table, lens = randn(2, 32, 128), ids([[4, 0, 2], [1, 3, 5]], torch.int32), ids([41, 48], torch.int32)
    expected = ops.attention_with_lse(query, *small, table, lens)
    actual = ops.attention_with_lse(query, *huge, high.int()[table.long()], lens)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


def test_writes_past_int32(high_blocks):
    small, huge, high = high_blocks
    rows = randn(3, 8, 128)
    slots = ids([5, 4 * 16 + 3, -1])
    ops.append(rows, rows, *small, slots)
    ops.append(rows, rows, *huge, torch.where(slots < 0, -1, high[slots // 16] * 16 + slots % 16))
    assert_same_blocks(small, huge, high)
    pairs = ids([[0, 3], [4, 1]])
    ops.copy_blocks(small, pairs)
    ops.copy_blocks(huge, high[pairs])
    assert_same_blocks(small, huge, high)
    staging = [torch.zeros(2, 2, *BLOCK, dtype=BF16, device="cuda") for _ in range(2)]
    ops.gather_blocks(small, ids([2, 5]), staging[0])
    ops.gather_blocks(huge, high[ids([2, 5])], staging[1])
    assert torch.equal(*staging)
    ops.scatter_blocks(staging[0], ids([0, 1]), small)
    ops.scatter_blocks(staging[0], high[:2], huge)
    assert_same_blocks(small, huge, high)


def test_rows_past_int32():
    """Many rows to append, to attend with, to merge and to gather: the last of them come out as they do alone."""
    need_memory(24)
    num_rows = PAST_INT32 // (8 * 128) + 4
    keys, few = torch.empty(num_rows, 8, 128, dtype=BF16, device="cuda"), randn(3, 8, 128)
    keys[-3:] = few
    caches = [torch.zeros(4, *BLOCK, dtype=BF16, device="cuda") for _ in range(2)]
    slots = torch.full((num_rows,), -1, device="cuda")
    slots[-3:] = ids([1, 17, 63])
    ops.append(keys, keys, *caches, slots)
    assert torch.equal(caches[1].flatten(0, 1)[[1, 17, 63]], few)

    queries = keys.view(-1, 16, 128)
    queries[-1] = randn(16, 128)
    count = len(queries)
    table, lens = torch.zeros(count, 1, dtype=torch.int32, device="cuda"), ids([16], torch.int32).expand(count)
    caches = [randn(1, *BLOCK) for _ in range(2)]
    outputs, lse = ops.attention_with_lse(queries, *caches, table, lens.contiguous())
    alone = ops.attention_with_lse(queries[-1:], *caches, table[-1:], ids([16], torch.int32))
    torch.testing.assert_close((outputs[-1:], lse[-1:]), alone)

    merged, merged_lse = ops.merge_attention(outputs, lse, queries, lse)
    alone = ops.merge_attention(outputs[-1:], lse[-1:], queries[-1:], lse[-1:])
    assert torch.equal(merged[-1:], alone[0])
    assert torch.equal(merged_lse[-1:], alone[1])

    del outputs, merged
    staging = keys.flatten()[: num_rows * 8 * 128 // BLOCK_NUMEL * BLOCK_NUMEL].view(-1, 1, *BLOCK)
    ops.gather_blocks(caches[:1], torch.zeros(len(staging), dtype=torch.int64, device="cuda"), staging)
    assert torch.equal(staging[-1], caches[0])


WRONG = {
    "block": (dict(block_table=[[0, 1], [2, 5]]), r"block_table must be 0 to num_blocks - 1 = 4, got 5 at \[1, 1\]"),
    "length": (dict(seq_lens=[3, 9]), r"seq_lens must be 0 to max_blocks_per_seq .* = 8, got 9 at \[1\]"),
    "bounds": (dict(cu_seqlens_q=[0, 2, 1]), "cu_seqlens_q must be non-decreasing"),
}


@pytest.mark.parametrize("name", WRONG)
def test_debug_mode_checks_values(name, monkeypatch):
    changes, message = WRONG[name]
    arguments = small_call() | {key: ids(value, torch.int32) for key, value in changes.items()}
    monkeypatch.setenv("TORCH_PAGED_DEBUG", "1")
    with pytest.raises(IndexError, match=message):
        ops.attention(**arguments)


def test_debug_mode_checks_writes(monkeypatch):
    caches = [randn(5, 4, 2, 32) for _ in range(2)]
    before = [cache.clone() for cache in caches]
    rows, staging = randn(1, 2, 32), torch.zeros(1, 2, 4, 2, 32, dtype=BF16, device="cuda")
    monkeypatch.setenv("TORCH_PAGED_DEBUG", "1")
    with pytest.raises(IndexError, match=r"slot_mapping must be below num_blocks .* = 20, got 20 at \[0\]"):
        ops.append(rows, rows, *caches, ids([20]))
    with pytest.raises(IndexError, match="block_pairs must be below num_blocks = 5, got 5"):
        ops.copy_blocks(caches, ids([[0, 5]]))
    with pytest.raises(ValueError, match="block_pairs must not copy from a destination, got 1 as both"):
        ops.copy_blocks(caches, ids([[0, 1], [1, 2]]))
    with pytest.raises(IndexError, match="blocks must be below num_blocks = 5, got 7"):
        ops.gather_blocks(caches, ids([7]), staging)
    with pytest.raises(IndexError, match="blocks must be below num_blocks = 5, got 7"):
        ops.scatter_blocks(staging, ids([7]), caches)
    assert all(map(torch.equal, caches, before))


def test_without_debug_mode_nothing_outside_the_caches_is_touched():
    """Slots and blocks out of range are skipped by writes and clamped by reads; canary blocks stay as they were."""
    whole = [torch.full((7, 4, 2, 32), torch.nan, dtype=BF16, device="cuda") for _ in range(2)]
    caches = [tensor[1:6].zero_() for tensor in whole]
    rows, staging = randn(4, 2, 32), torch.ones(3, 2, 4, 2, 32, dtype=BF16, device="cuda")
    ops.append(rows, rows, *caches, ids([20, 1 << 40, -5, -(1 << 40)]))
    ops.copy_blocks(caches, ids([[0, 5], [5, 0], [1 << 40, 1], [-1, 2]]))
    ops.scatter_blocks(staging, ids([5, 1 << 40, -1]), caches)
    ops.gather_blocks(caches, ids([5, 1 << 40, -1]), staging)
    lens = ids([8, 8], torch.int32)
    output = ops.attention(randn(2, 4, 32), *caches, ids([[1 << 30, -1], [5, -7]], torch.int32), lens)
    assert output.eq(0).all()
    assert staging.eq(1).all()
    for tensor in whole:
        assert tensor[1:6].eq(0).all()
        assert tensor[[0, 6]].isnan().all()


def test_gather_into_pinned_memory():
    """Below the operator, whose arguments share one device: the GPU writes pinned host memory across the bus."""
    from torch_paged import kernels

    caches = [randn(6, 4, 2, 64) for _ in range(3)]
    staging = torch.zeros(2, 3, 4, 2, 64, dtype=BF16, pin_memory=True)
    kernels.gather_blocks(caches, ids([4, 1]), staging)
    torch.cuda.synchronize()
    assert torch.equal(staging, torch.stack([cache[[4, 1]] for cache in caches], 1).cpu())
    kernels.scatter_blocks(staging, ids([0, 2]), caches)
    assert all(torch.equal(cache[[0, 2]], cache[[4, 1]]) for cache in caches)


def run(*command, **environment):
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_demo():
    done = run(sys.executable, "examples/generate.py", "--device", "cuda", "--check")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.slow
def test_memory_checker():
    """compute-sanitizer over the small grids, with an allocation of its own for every tensor."""
    checker = shutil.which("compute-sanitizer")
    if checker is None:
        pytest.skip("needs compute-sanitizer")
    tests = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests/test_writes.py")
    done = run(checker, "--error-exitcode", "7", *tests, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer does not support this machine")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
