"""Which tokens are a sequence's, whatever stands in `cu_seqlens_q`: never others than there are."""

import os

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl
from dealt_pieces import DEVICE, variant_of

from torch_paged.kernels.units import query_range

pytestmark = [pytest.mark.interpreter if os.environ.get("TRITON_INTERPRET") == "1" else pytest.mark.gpu]


@triton.jit
def ranges(cu_seqlens_q, starts, counts, num_tokens, num_seqs, V: tl.constexpr):
    sequence = tl.arange(0, 8)
    start, queries = query_range(sequence, cu_seqlens_q, num_tokens, num_seqs, V)
    tl.store(starts + sequence, start)
    tl.store(counts + sequence, queries)


def ranges_of(bounds, num_tokens):
    """Start and count of each sequence, of the rows behind them, and of what does not exist."""
    starts, counts = torch.empty(2, 8, dtype=torch.int32, device=DEVICE)
    v = variant_of([num_tokens], [num_tokens], 0, 2, 3)
    bounds = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    ranges[(1,)](bounds, starts, counts, num_tokens, len(bounds) - 1, V=v)
    return list(zip(starts.tolist(), counts.tolist(), strict=True))


def test_sequences_and_the_rows_behind_them():
    assert ranges_of([0, 100, 100, 250], 300)[:4] == [(0, 100), (100, 0), (100, 150), (250, 50)]


@pytest.mark.parametrize(
    "bounds",
    [[0, 200, -(2**31), 300], [2**31 - 1, -(2**31), 100], [-(2**31), 2**31 - 1, 7], [250, 100, 400]],
    ids=["far-below", "turned-around", "everything", "falling"],
)
def test_whatever_the_bounds_say_tokens_exist(bounds):
    for start, count in ranges_of(bounds, 300):
        assert 0 <= start <= start + count <= 300
