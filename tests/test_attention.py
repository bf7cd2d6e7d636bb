"""`paged::attention` and `paged::attention_with_lse` against the reference, wherever they run."""

import math

import pytest
import torch

from torch_paged import bounds, reference
from torch_paged.testing import assert_within_budget, attention_inputs, low_precision_attention

op = torch.ops.paged.attention_with_lse
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

DECODE = dict(query_lens=[1, 1, 1, 1], seq_lens=[1, 16, 45, 0], uniform=True)
SEVERAL = dict(query_lens=[3, 3, 3], seq_lens=[3, 20, 2], uniform=True)
MIXED = dict(query_lens=[1, 19, 0, 1, 7], seq_lens=[50, 19, 12, 1, 40], spare_tokens=3)

SHAPES = {
    "decode": DECODE,
    "several": SEVERAL,
    "mixed": MIXED,
    "head-major": dict(MIXED, head_major=True),
    "multi-head": dict(MIXED, num_heads=3, num_kv_heads=3),
    "multi-query": dict(SEVERAL, num_heads=7, num_kv_heads=1),
    "group-20": dict(DECODE, num_heads=20, num_kv_heads=1),
    "head-dim-16": dict(DECODE, head_dim=16),
    "head-dim-odd": dict(MIXED, head_dim=41, value_head_dim=23),
    "head-dim-80": dict(MIXED, head_dim=80),
    "head-dim-96": dict(DECODE, head_dim=96, value_head_dim=160),
    "head-dim-256": dict(DECODE, head_dim=256),
    "head-dim-500": dict(SEVERAL, head_dim=500, value_head_dim=512),
    "head-dim-576": dict(DECODE, head_dim=576, value_head_dim=512, num_heads=4, num_kv_heads=1),
    "block-1": dict(MIXED, block_size=1),
    "block-7": dict(MIXED, block_size=7),
    "block-32": dict(MIXED, block_size=32),
    "block-100": dict(DECODE, block_size=100),
    "no-sequence": dict(query_lens=[], seq_lens=[]),
    "only-padding": dict(query_lens=[], seq_lens=[], spare_tokens=4),
    "no-query": dict(query_lens=[0, 0], seq_lens=[9, 5]),
    "no-key": dict(query_lens=[2, 2], seq_lens=[0, 0], uniform=True),
}


def check(inputs, **options):
    # The budget of the exact result in the inputs' own precision: the reference reads the rounded inputs.
    wide = inputs._replace(query=inputs.query.double())
    exact = wide.call(reference.attention_with_lse, **options)
    low = low_precision_attention(inputs, **options)
    output, lse = inputs.call(op, **options)
    assert output.dtype == inputs.query.dtype
    assert output.is_contiguous()
    assert lse.dtype == torch.float32
    assert_within_budget(output, exact[0].to(output.device), low[0])
    assert_within_budget(lse, exact[1].to(lse.device), low[1], "lse")
    assert torch.equal(inputs.call(torch.ops.paged.attention, **options), output)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", SHAPES)
def test_matches_reference(name, dtype, device):
    check(attention_inputs(**SHAPES[name], dtype=dtype, device=device))


@pytest.mark.parametrize(
    "options", [dict(causal=False), dict(scale=-0.4), dict(scale=0.0), dict(scale=-1e-60)], ids=str
)
@pytest.mark.parametrize("name", ["decode", "several", "mixed"])
def test_options_match_reference(name, options, device):
    check(attention_inputs(**SHAPES[name], device=device), **options)


def test_longer_than_any_tile(device):
    check(attention_inputs([1, 40, 1], [300, 290, 129], num_heads=4, head_dim=64, device=device, dtype=torch.bfloat16))


def test_strided_query_and_interleaved_caches(device):
    """Slices of packed projections and of one buffer that holds keys and values are read where they lie."""
    inputs = attention_inputs(**MIXED, device=device)
    packed = torch.randn(inputs.query.shape[0], 8, 64, device=device)
    packed[:, 2:6, 16:48] = inputs.query
    both = torch.stack([inputs.key_cache, inputs.value_cache], 3).flatten(2, 3)
    strided = inputs._replace(query=packed[:, 2:6, 16:48], key_cache=both[:, :, 0::2], value_cache=both[:, :, 1::2])
    expected = inputs.call(torch.ops.paged.attention)
    assert torch.equal(strided.call(torch.ops.paged.attention), expected)
    expanded = inputs._replace(query=inputs.query[:, :1].expand(-1, 4, -1))
    check(expanded)


def test_value_as_view_of_key_cache(device):
    inputs = attention_inputs(**DECODE, head_dim=48, value_head_dim=32, num_heads=4, num_kv_heads=1, device=device)
    check(inputs._replace(value_cache=inputs.key_cache[..., :32]))


def test_value_as_wider_view_of_the_same_memory(device):
    """The key is the narrower of two views: its tile must not stand in for the value's."""
    inputs = attention_inputs(**DECODE, head_dim=64, value_head_dim=64, num_kv_heads=1, device=device)
    check(inputs._replace(query=inputs.query[..., :60], key_cache=inputs.value_cache[..., :60]))


def test_permuted_blocks_give_the_same_result(device):
    inputs = attention_inputs(**MIXED, device=device)
    order = torch.randperm(inputs.key_cache.shape[0]).to(device)
    table = inputs.block_table.clone()
    used = table < len(order)
    table[used] = order.argsort()[table[used].long()].int()
    moved = inputs._replace(key_cache=inputs.key_cache[order], value_cache=inputs.value_cache[order], block_table=table)
    assert torch.equal(moved.call(torch.ops.paged.attention), inputs.call(torch.ops.paged.attention))


def test_results_depend_on_the_tensors_alone(device):
    """The same call twice, with lengths changed in place between, as a replayed graph would see it."""
    inputs = attention_inputs([1, 1], [33, 17], uniform=True, device=device)
    inputs.call(torch.ops.paged.attention)
    inputs.seq_lens.copy_(torch.tensor([5, 16]))
    check(inputs)


def test_merge_matches_attention_over_all_keys(device):
    """A sequence's keys split between two tables, the parts merged."""
    inputs = attention_inputs([2, 2], [64, 48], head_dim=64, device=device, uniform=True)
    exact = inputs._replace(query=inputs.query.double()).call(reference.attention_with_lse, causal=False)
    low = low_precision_attention(inputs, causal=False)
    halves = []
    for columns in (slice(0, 2), slice(2, None)):
        lens = (inputs.seq_lens - 32).clamp(min=0) if columns.start else inputs.seq_lens.clamp(max=32)
        part = inputs._replace(block_table=inputs.block_table[:, columns], seq_lens=lens)
        halves += part.call(op, causal=False)
    output, lse = torch.ops.paged.merge_attention(*halves)
    assert_within_budget(output, exact[0].to(output.device), low[0])
    assert_within_budget(lse, exact[1].to(lse.device), low[1], "lse")


def plain_merge(output_a, lse_a, output_b, lse_b):
    """The error budget: the formula in float32, rounded to the first output's dtype."""
    lse = torch.logaddexp(lse_a, lse_b)
    weights = [(part - lse).nan_to_num(-torch.inf, neginf=-torch.inf).exp()[..., None] for part in (lse_a, lse_b)]
    parts = (part.float().nan_to_num() for part in (output_a, output_b))
    return sum(weight * part for weight, part in zip(weights, parts, strict=True)).to(output_a.dtype), lse


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("dim", [24, 1, 1300])  # merging knows no longest row
def test_merge_attention(dim, dtype, device):
    outputs = torch.randn(2, 5, 3, dim, device=device).to(dtype)
    lses = torch.randn(2, 5, 3, device=device) * 4
    lses[0, 0] = lses[1, :2] = -torch.inf
    outputs[0, 0] = outputs[1, :2] = torch.nan  # rows that saw nothing, as other libraries leave them
    arguments = (outputs[0], lses[0], outputs[1], lses[1])
    output, lse = torch.ops.paged.merge_attention(*arguments)
    assert output.dtype == dtype
    exact, exact_lse = reference.merge_attention(*(t.double() for t in arguments))
    low, low_lse = plain_merge(*arguments)
    assert_within_budget(output, exact, low)
    assert_within_budget(lse, exact_lse, low_lse, "lse")
    assert output[0].eq(0).all()
    assert lse[0].eq(-torch.inf).all()


def test_merge_of_rows_without_elements(device):
    """Their lse is merged all the same, to a contiguous one."""
    output, lse = torch.randn(3, 5, 0, device=device), torch.randn(5, 3, device=device).T
    merged, merged_lse = torch.ops.paged.merge_attention(output, lse, output, lse)
    assert merged.shape == output.shape
    assert merged_lse.is_contiguous()
    torch.testing.assert_close(merged_lse, lse + math.log(2))


def test_merge_keeps_the_first_dtype_and_reads_strides(device):
    a = torch.randn(3, 4, 32, device=device).to(torch.bfloat16)
    b = torch.randn(4, 3, 64, device=device).transpose(0, 1)[..., ::2]
    lse_a, lse_b = torch.randn(2, 4, 3, device=device).transpose(1, 2)
    output, lse = torch.ops.paged.merge_attention(a, lse_a, b, lse_b)
    exact, exact_lse = reference.merge_attention(a.double(), lse_a.double(), b.double(), lse_b.double())
    assert output.dtype == torch.bfloat16
    assert output.is_contiguous()
    low, low_lse = plain_merge(a, lse_a, b, lse_b)
    assert_within_budget(output, exact, low)
    assert_within_budget(lse, exact_lse, low_lse, "lse")


def test_block_ids_up_to_the_largest():
    """A cache of more blocks than int32 counts, all of them one."""
    cache = torch.randn(1, 1, 1, 16).expand(2**31 + 7, 1, 1, 16)
    call = torch.randn(1, 1, 16), cache, cache, torch.tensor([[2**31 - 1]]).int(), torch.ones(1, dtype=torch.int32)
    bounds.attention(*call)
    output, _ = op(*call)
    torch.testing.assert_close(output[0], cache[0, 0])
