"""The Hopper kernel for many rows: values, with every option."""

import itertools

import pytest
import torch

from torch_paged.testing import attention_inputs

pytest.importorskip("triton")
import hopper_batches
from hopper_batches import (
    BATCHES,
    MIXED,
    NEEDS_HOPPER,
    OPTIONS,
    attention,
    check,
    copied,
    launch,
    launches_of,
    rows_of,
    with_options,
)

from torch_paged.kernels import launch_tiles

pytestmark = NEEDS_HOPPER
small = hopper_batches.small  # a fixture
HIDDEN_IN_LARGE_BLOCKS = {
    "one-block": dict(query_lens=[40], seq_lens=[200], num_heads=8, head_dim=128, block_size=256),
    "narrow": dict(query_lens=[40, 70], seq_lens=[200, 900], num_heads=8, head_dim=64, block_size=256),
    "wide": dict(query_lens=[40], seq_lens=[120], num_heads=8, head_dim=256, block_size=128),
    "three-parts": dict(query_lens=[40, 70], seq_lens=[180, 150], num_heads=8, head_dim=128, block_size=192),
    "odd": dict(query_lens=[5, 6], seq_lens=[81, 161], num_heads=32, head_dim=128, block_size=48),
}


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", BATCHES)
def test_values(name, dtype, causal, small):
    inputs = attention_inputs(**BATCHES[name], dtype=dtype, device="cuda")
    variant = launches_of(inputs, causal)[0].variant
    assert (variant.block_m, variant.copy_rows) == (rows_of(inputs, small), copied(inputs, small))
    check(inputs, *attention(*inputs, inputs.query.shape[2] ** -0.5, causal), causal)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", BATCHES)
def test_options(name, option, small):
    inputs, options = with_options(option, BATCHES[name], dtype=torch.bfloat16)
    variant = launches_of(inputs, **options)[0].variant
    assert (variant.block_m, variant.copy_rows) == (rows_of(inputs, small), copied(inputs, small))
    check(inputs, *attention(*inputs, inputs.query.shape[2] ** -0.5, True, **options), **options)


@pytest.mark.parametrize("option", ["softcap", "sinks"])
@pytest.mark.parametrize("name", ["mixed", "block-256"])
def test_options_where_all_keys_are_seen(name, option):
    inputs, options = with_options(option, BATCHES[name], dtype=torch.float16)
    check(inputs, *attention(*inputs, inputs.query.shape[2] ** -0.5, False, **options), False, **options)


@pytest.mark.parametrize("window", [3, 20, 61])
@pytest.mark.parametrize("name", HIDDEN_IN_LARGE_BLOCKS)
def test_what_a_window_hides_in_a_large_block_does_not_show(name, window, small):
    inputs = attention_inputs(
        **HIDDEN_IN_LARGE_BLOCKS[name], sliding_window=window, dtype=torch.bfloat16, device="cuda"
    )
    assert launches_of(inputs, sliding_window=window)[0].variant.copy_rows == copied(inputs, small)
    scale = inputs.query.shape[2] ** -0.5
    check(inputs, *attention(*inputs, scale, True, sliding_window=window), sliding_window=window)


def test_softcaps_of_any_size():
    """On the same tensors, so that one is not served as another was."""
    inputs = attention_inputs(**BATCHES["mixed"], dtype=torch.float16, device="cuda")
    for softcap in (30.0, 1e30, 1e-30, 1e-3, 4000.0, 1e4):
        assert launches_of(inputs, softcap=softcap)[0].variant.copy_rows == 16
        check(inputs, *attention(*inputs, -0.4, True, softcap=softcap), softcap=softcap, scale=-0.4)
    zeros = inputs._replace(query=torch.zeros_like(inputs.query))  # times infinity they would be NaN
    check(zeros, *attention(*zeros, 1e38, True, softcap=0.1), softcap=0.1, scale=1e38)


@pytest.mark.parametrize("small", [None], ids=["as-launched"], indirect=True)
def test_short_windows_have_small_programs():
    inputs = attention_inputs([2050], [3000], num_heads=4, head_dim=128, dtype=torch.bfloat16, device="cuda")
    for window, rows in ((1, 64), (1500, 128), (1024, 64)):
        assert launches_of(inputs, sliding_window=window)[0].variant.block_m == rows
        check(inputs, *attention(*inputs, 0.1, True, sliding_window=window), sliding_window=window, scale=0.1)


@pytest.mark.parametrize("small", [None], ids=["small-programs"], indirect=True)
@pytest.mark.parametrize("block_size", [8, 32, 48, 64, 256])
@pytest.mark.parametrize("heads", [8, 2], ids=["group-4", "no-group"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_small_programs(dtype, heads, block_size, monkeypatch):
    """Several on a multiprocessor: prompts of narrow heads, and short windows with every option."""
    monkeypatch.setattr(launch_tiles, "SHARED", 0)
    sizes = dict(num_heads=heads, num_kv_heads=2, block_size=block_size, dtype=dtype)
    inputs = attention_inputs([90] * 3, [700, 90, 40], head_dim=64, uniform=True, device="cuda", **sizes)
    for options in ({}, dict(softcap=0.7), dict(sinks=torch.linspace(-1, 3, heads, device="cuda"))):
        (found,) = launches_of(inputs, **options)
        assert (found.variant.resident, found.variant.block_m) == (3, 64)
        check(inputs, *attention(*inputs, 64**-0.5, True, **options), **options)
    for head_dim, option in itertools.product((64, 128), ("window-1", "window-60", "window-400", "all")):
        batch = MIXED | sizes | dict(head_dim=head_dim, head_major=head_dim == 64)
        inputs, options = with_options(option, batch)
        found = launches_of(inputs, **options)[0]
        assert (found.variant.resident, found.variant.block_m) == ({64: 3, 128: 2}[head_dim], 64)
        check(inputs, *attention(*inputs, head_dim**-0.5, True, **options), **options)
        for programs, rounds in ((1, 1), (3, 5), (7, 2), (132, 1)):
            check(inputs, *launch(inputs, options, programs=programs, rounds=rounds), **options)
