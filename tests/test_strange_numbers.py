"""NaN and infinity: in what a query sees they show, so that a model's fault is not lost on the way."""

import math

import pytest
import torch
from conftest import INTERPRETED

op = torch.ops.paged.attention_with_lse

BATCHES = {  # queries, keys, heads, head dim
    "decode": (1, 100, 4, 64),
    "several": (3, 40, 12, 41),
    "prefill": (20, 45, 4, 32),
}
DTYPES = [torch.bfloat16] if INTERPRETED else [torch.float32, torch.bfloat16]
OPTIONS = {
    "softcap": lambda: dict(softcap=5.0),
    "sinks": lambda: dict(sinks=torch.ones(2)),
    "alibi": lambda: dict(alibi_slopes=torch.full((2,), 0.1)),
    "window": lambda: dict(sliding_window=1 << 20),
}


def strange(place, value, queries, keys, heads, head_dim, dtype, device, options):
    """One sequence with `value` in a number of the first KV head's: the output and lse of its heads and the others'."""
    query = torch.randn(queries, heads, head_dim)
    key_cache, value_cache = torch.randn(2, -(-keys // 16), 16, 2, head_dim)
    number = dict(query=query[:, : heads // 2, 3], key=key_cache[1, 5, :1, 3], value=value_cache[1, 5, :1, 3])[place]
    number.fill_(value)
    output, lse = op(
        query.to(device, dtype),
        key_cache.to(device, dtype),
        value_cache.to(device, dtype),
        torch.arange(len(key_cache), dtype=torch.int32, device=device)[None],
        torch.tensor([keys], dtype=torch.int32, device=device),
        **{
            name: each.repeat_interleave(heads // 2).to(device) if torch.is_tensor(each) else each
            for name, each in options.items()
        },
    )
    return output.chunk(2, 1), lse.chunk(2, 1)


def check_nan_shows(place, batch, dtype, device, options):
    outputs, lses = strange(place, math.nan, *batch, dtype, device, options)
    assert outputs[0].isnan().any(-1).all()
    assert lses[0].isnan().all() == (place != "value")
    assert outputs[1].isfinite().all() and lses[1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", ["query", "key", "value"])
@pytest.mark.parametrize("batch", BATCHES)
def test_nan_shows_in_the_heads_that_see_it(batch, place, dtype, device):
    check_nan_shows(place, BATCHES[batch], dtype, device, {})


@pytest.mark.parametrize("options", OPTIONS)
def test_options_do_not_hide_nan(options, device):
    check_nan_shows("key", BATCHES["decode"], torch.float32, device, OPTIONS[options]())


@pytest.mark.parametrize("place", ["query", "key"])
def test_nan_shows_over_more_keys_than_the_cpu_takes_at_once(place):
    check_nan_shows(place, (1, 2100, 2, 16), torch.float32, "cpu", {})


@pytest.mark.parametrize("batch", BATCHES)
def test_infinite_values_show_and_leave_lse_alone(batch, device):
    outputs, lses = strange("value", math.inf, *BATCHES[batch], DTYPES[-1], device, {})
    assert (outputs[0][..., 3] == math.inf).all() and outputs[1].isfinite().all()
    assert torch.cat(lses).isfinite().all()


def test_sinks_that_are_no_numbers_show(device):
    outputs, lses = strange("value", 0.0, 1, 100, 2, 32, torch.float32, device, dict(sinks=torch.tensor([math.nan, 1])))
    assert outputs[0].isnan().all() and lses[0].isnan().all()
    assert outputs[1].isfinite().all() and lses[1].isfinite().all()


def test_merging_with_what_saw_no_key_does_not_hide_nan(device):
    """In either order."""
    seen = torch.full((3, 2, 16), math.nan, device=device), torch.full((3, 2), math.nan, device=device)
    unseen = torch.zeros(3, 2, 16, device=device), torch.full((3, 2), -math.inf, device=device)
    for parts in ((*seen, *unseen), (*unseen, *seen)):
        output, lse = torch.ops.paged.merge_attention(*parts)
        assert output.isnan().all() and lse.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_infinite_keys_show_where_they_are_looked_at(dtype, device):
    """Queries that point away from one give it no weight, for the others it has all, and no number comes of it."""
    query = torch.ones(2, 1, 16, dtype=dtype, device=device)
    query[0] = -1
    keys, values = torch.randn(2, 2, 16, 1, 16, device=device).to(dtype)
    keys[0, 5, 0, 3] = math.inf
    table = torch.tensor([[0, 1]] * 2, dtype=torch.int32, device=device)
    output, _ = op(query, keys, values, table, torch.tensor([20, 20], dtype=torch.int32, device=device))
    assert output[0].isfinite().all()
    assert output[1].isnan().all()
