"""Batches for the Hopper kernel, what serves them, and what they are compared with."""

import math
from dataclasses import replace

import pytest
import torch

from torch_paged import ops, reference
from torch_paged.kernels import attention_plan, launch_tiles
from torch_paged.kernels.attention import attention as attend_with
from torch_paged.kernels.attention import launch_attention
from torch_paged.kernels.attention_plan import problem_of
from torch_paged.kernels.device import device_of
from torch_paged.kernels.launch_config import attention_launches
from torch_paged.options import PLAIN, AttentionOptions
from torch_paged.testing import assert_within_budget, attention_inputs, low_precision_attention

NEEDS_HOPPER = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs compute capability 9.0",
    ),
]
MIXED = dict(query_lens=[1, 150, 0, 2, 33, 70], seq_lens=[200, 150, 9, 64, 20, 517], spare_tokens=3)
BATCHES = {
    "mixed": dict(MIXED, num_heads=8, head_dim=128),
    "head-major": dict(MIXED, num_heads=8, head_dim=128, head_major=True),
    "block-8": dict(MIXED, num_heads=4, head_dim=64, block_size=8),
    "block-32": dict(MIXED, num_heads=16, head_dim=128, block_size=32),
    "block-64": dict(MIXED, num_heads=6, head_dim=256, block_size=64, head_major=True),
    "block-128": dict(MIXED, num_heads=14, head_dim=128, block_size=128),
    "block-256": dict(MIXED, num_heads=8, head_dim=64, block_size=256),
    "block-24": dict(MIXED, num_heads=8, head_dim=256, block_size=24),
    "block-48": dict(MIXED, num_heads=8, head_dim=128, block_size=48),
    "block-192": dict(MIXED, num_heads=4, head_dim=128, block_size=192, head_major=True),
    "one-head": dict(MIXED, num_heads=1, num_kv_heads=1, head_dim=128),
    "no-group": dict(query_lens=[300, 65], seq_lens=[300, 400], num_heads=3, num_kv_heads=3, head_dim=128),
    "narrow-values": dict(MIXED, num_heads=8, head_dim=128, value_head_dim=64),
    "wide-values": dict(MIXED, num_heads=8, head_dim=64, value_head_dim=128),
    "dim-16": dict(MIXED, num_heads=8, head_dim=16, head_major=True),
    "dim-24": dict(MIXED, num_heads=4, head_dim=24, value_head_dim=40),
    "dim-48": dict(MIXED, num_heads=4, head_dim=48, value_head_dim=24, block_size=8),
    "dim-72": dict(MIXED, num_heads=2, head_dim=72, value_head_dim=96, block_size=32),
    "dim-96": dict(MIXED, num_heads=8, head_dim=96, value_head_dim=72),
    "dim-128": dict(MIXED, num_heads=8, head_dim=128, value_head_dim=192),
    "dim-144": dict(MIXED, num_heads=8, head_dim=144, value_head_dim=160, block_size=48),
    "dim-192": dict(MIXED, num_heads=6, head_dim=192, value_head_dim=128, block_size=64),
    "dim-200": dict(MIXED, num_heads=8, head_dim=200, value_head_dim=248, block_size=32),
    "uniform": dict(query_lens=[90] * 3, seq_lens=[700, 90, 40], num_heads=8, head_dim=128, uniform=True),
}
LATE = dict(
    query_lens=[270, 1, 90, 300, 257],
    seq_lens=[270, 900, 90, 265, 257],
    num_heads=512,
    num_kv_heads=32,
    head_dim=64,
    spare_tokens=3,
)
OPTIONS = {
    "window-1": dict(sliding_window=1),
    "window-60": dict(sliding_window=60),
    "window-128": dict(sliding_window=128),
    "window-400": dict(sliding_window=400),
    "endless-window": dict(sliding_window=2**40),
    "softcap": dict(softcap=0.7),
    "sinks": dict(sinks=True),
    "all": dict(sliding_window=130, softcap=2.0, sinks=True),
}


def forget_plans():
    """What was settled for calls of the same shapes, with other programs."""
    attention_launches.cache_clear()
    attention_plan._plans.clear()
    ops._calls.clear()


def can_be_small(head_dim, value_dim):
    """Whether the small programs compute this, if they are not chosen for it."""
    return max(head_dim, value_dim) <= 128


@pytest.fixture(autouse=True, params=[False, True], ids=["", "small-programs"])
def small(request, monkeypatch):
    """With programs of 128 rows, or of 64, of which several share a multiprocessor, wherever shapes allow these."""

    def short_units(problem):
        return request.param and can_be_small(problem.head_dim, problem.value_dim)

    if request.param is not None:
        monkeypatch.setattr(launch_tiles, "_short_units", short_units)
    forget_plans()
    yield request.param
    forget_plans()


def rows_of(inputs, small):
    """Of a unit."""
    head_dim, value_dim = inputs.key_cache.shape[3], inputs.value_cache.shape[3]
    return 64 if small and can_be_small(head_dim, value_dim) else 128


def copied(inputs, small):
    """Keys of one copy."""
    _, block_size, _, head_dim = inputs.key_cache.shape
    wide = max(head_dim, inputs.value_cache.shape[3]) > 128
    return math.gcd(block_size, 64 if wide or rows_of(inputs, small) == 64 else 128)


def attention(*arguments, **options):
    return attend_with(*arguments, AttentionOptions(**options) if options else PLAIN)


def launches_of(inputs, causal=True, **options):
    query, key_cache, value_cache, block_table, _, cu_seqlens_q = inputs
    problem = problem_of(query, key_cache, value_cache, block_table, cu_seqlens_q, causal, AttentionOptions(**options))
    return attention_launches(problem, device_of(query.device))


def launch(inputs, options=None, **changes):
    """Output and lse of the launches of `inputs`, each with `changes`."""
    query, options = inputs.query, options or {}
    output = query.new_full((*query.shape[:2], inputs.value_cache.shape[3]), torch.nan)
    lse = query.new_full(query.shape[:2], torch.nan, dtype=torch.float32)
    for item in launches_of(inputs, **options):
        scale = query.shape[2] ** -0.5
        launch_attention(replace(item, **changes), *inputs, output, lse, scale, AttentionOptions(**options))
    return output, lse


def check(inputs, output, lse, causal=True, **options):
    options["causal"] = causal
    exact = inputs._replace(query=inputs.query.double()).call(reference.attention_with_lse, **options)
    low = low_precision_attention(inputs, **options)
    assert_within_budget(output, exact[0], low[0])
    assert_within_budget(lse, exact[1], low[1], "lse")


def with_options(name, batch, **changes):
    """A batch that poisons what its window hides, and the options."""
    options = dict(OPTIONS[name])
    window = options.get("sliding_window")
    inputs = attention_inputs(**batch | changes, sliding_window=window, device="cuda")
    if "sinks" in options:
        options["sinks"] = torch.linspace(-1, 3, inputs.query.shape[1], device="cuda")
    return inputs, options
