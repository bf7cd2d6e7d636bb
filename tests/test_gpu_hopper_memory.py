"""The Hopper kernel for many rows: which memory it reads, and what it does with tables and lengths that are wrong."""

import pytest
import torch

from torch_paged.testing import assert_within_budget, attention_inputs

pytest.importorskip("triton")
import hopper_batches
from hopper_batches import BATCHES, MIXED, NEEDS_HOPPER, attention, check, launches_of

pytestmark = NEEDS_HOPPER
small = hopper_batches.small  # a fixture


def test_caches_at_other_addresses_are_found():
    """A launch is remembered by shapes and strides, a descriptor by the address too."""
    batches = [
        attention_inputs(**BATCHES["mixed"], dtype=torch.bfloat16, device="cuda", seed=seed) for seed in range(3)
    ]
    for inputs in batches * 2:
        check(inputs, *attention(*inputs, inputs.query.shape[2] ** -0.5, True))


@pytest.mark.parametrize(
    "layout", ["odd-block", "tiny-block", "unaligned-rows", "unaligned-queries", "expanded-heads"], ids=str
)
def test_what_the_copy_engine_cannot_address_goes_to_the_general_kernel(layout):
    block_size = {"odd-block": 20, "tiny-block": 4}.get(layout, 16)
    batch = dict(MIXED, num_heads=8, head_dim=128, block_size=block_size)
    inputs = attention_inputs(**batch, dtype=torch.bfloat16, device="cuda")
    caches = inputs.key_cache, inputs.value_cache
    if layout == "unaligned-rows":
        caches = tuple(torch.nn.functional.pad(cache, (0, 1))[..., :-1] for cache in caches)
    elif layout == "unaligned-queries":
        inputs = inputs._replace(query=torch.nn.functional.pad(inputs.query, (0, 1))[..., :-1])
    elif layout == "expanded-heads":
        caches = tuple(cache[:, :, :1].expand_as(cache) for cache in caches)
    inputs = inputs._replace(key_cache=caches[0], value_cache=caches[1])
    assert launches_of(inputs)[0].variant.copy_rows == 0
    check(inputs, *attention(*inputs, inputs.query.shape[2] ** -0.5, True))


def test_blocks_out_of_range_neither_fault_nor_spread():
    inputs = attention_inputs([80, 90, 70], [300, 333, 200], num_heads=4, head_dim=128, device="cuda", dtype=torch.half)
    expected, _ = attention(*inputs, 0.1, True)
    table = inputs.block_table.clone()
    table[1, 0], table[1, 1] = -5, 2**31 - 1
    output, _ = attention(*inputs._replace(block_table=table), 0.1, True)
    assert torch.equal(output[:80], expected[:80])
    assert torch.equal(output[170:], expected[170:])


@pytest.mark.parametrize("keys", [-7, 10**6])
def test_impossible_lengths_neither_fault_nor_spread(keys):
    inputs = attention_inputs([80, 90, 70], [300, 333, 200], num_heads=4, head_dim=128, device="cuda", dtype=torch.half)
    lens = inputs.seq_lens.clone()
    lens[1] = keys
    expected, _ = attention(*inputs, 0.1, True)
    output, _ = attention(*inputs._replace(seq_lens=lens), 0.1, True)
    assert_within_budget(output[170:], expected[170:].double(), expected[170:])


def test_query_bounds_that_run_backwards_or_away_do_not_fault():
    inputs = attention_inputs([80, 90, 70], [300, 333, 200], num_heads=4, head_dim=128, device="cuda", dtype=torch.half)
    bounds = torch.tensor([-3, 200, 100, 10**6], dtype=torch.int32, device="cuda")
    attention(*inputs._replace(cu_seqlens_q=bounds), 0.1, True)
    torch.cuda.synchronize()
