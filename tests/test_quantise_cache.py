"""A filled cache, quantised: scales and bytes by the reference's arithmetic, and attention as over true values."""

import pytest
import torch

from torch_paged import attention, calibrate_scales, quantise_cache, reference, slots_in_use
from torch_paged.testing import attention_inputs

QUANTISED = [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8]


def filled(device, **options):
    """A ragged batch, its unused slots full of NaN, and the slots that are used."""
    inputs = attention_inputs([1, 3, 1], [37, 12, 16], block_size=5, device=device, **options)
    return inputs, slots_in_use(inputs.block_table, inputs.seq_lens, 5)


def test_slots_in_use(device):
    table = torch.tensor([[4, 1, 1 << 30], [2, 0, -1], [4, 1 << 30, 7]], dtype=torch.int32, device=device)
    lens = torch.tensor([5, 0, 2], dtype=torch.int32, device=device)
    assert slots_in_use(table, lens, 4).tolist() == [4, 16, 17, 18, 19]
    assert slots_in_use(table[:0], lens[:0], 4).tolist() == []


def test_slots_that_a_window_has_left_behind_are_not_in_use(device):
    """As in a cache with windows, where another sequence may own them by now, or nobody."""
    table = torch.tensor([[-1, 3, 5], [1 << 30, 7, 2]], dtype=torch.int32, device=device)
    lens = torch.tensor([9, 8], dtype=torch.int32, device=device)
    assert slots_in_use(table, lens, 4, sliding_window=3).tolist() == [14, 15, 20, 29, 30, 31]
    assert slots_in_use(table[:, 1:], lens - 4, 4, sliding_window=100).tolist() == [12, 13, 14, 15, 20, 28, 29, 30, 31]


@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
def test_calibrated_scales_are_each_heads_own(dtype, device):
    inputs, slots = filled(device)
    cache = inputs.key_cache
    cache[:, :, 1] *= 7
    scales = calibrate_scales(cache, slots, dtype)
    peaks = cache.nan_to_num().abs().amax((0, 1, 3))
    assert torch.equal(scales, peaks / torch.full_like(peaks, reference.largest(dtype)))
    assert calibrate_scales(torch.zeros_like(cache), slots, dtype).eq(1).all()
    assert calibrate_scales(cache, slots[:0], dtype).eq(1).all()


@pytest.mark.parametrize("kind", ["scalar", "head", "token"])
@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
def test_quantised_as_by_append(dtype, kind, device):
    inputs, slots = filled(device, dtype=torch.bfloat16, head_major=True)
    cache = inputs.key_cache
    scale = None if kind == "token" else calibrate_scales(cache, slots, dtype)
    scale = scale.amax() if kind == "scalar" else scale
    quantised, used = quantise_cache(cache, slots, dtype, scale)
    assert quantised.stride() == cache.stride()
    expected = torch.zeros_like(cache, dtype=torch.uint8).view(dtype)
    scales = dict(key_scale=scale, key_scale_cache=torch.ones_like(used) if scale is None else None)
    rows = cache[slots // 5, slots % 5]
    reference.append(rows, None, expected, None, slots, **scales)
    assert torch.equal(quantised.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(used, scales["key_scale_cache"] if scale is None else scale)


@pytest.mark.parametrize("kind", ["head", "token"])
@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
def test_attention_over_a_quantised_cache_is_close(dtype, kind, device):
    inputs, slots = filled(device)
    caches, scales = [], {}
    for side, cache in (("key", inputs.key_cache), ("value", inputs.value_cache)):
        scale = calibrate_scales(cache, slots, dtype) if kind == "head" else None
        quantised, used = quantise_cache(cache, slots, dtype, scale)
        caches.append(quantised)
        scales[f"{side}_scale" if kind == "head" else f"{side}_scale_cache"] = used
    exact = inputs.call(attention)
    close = inputs._replace(key_cache=caches[0], value_cache=caches[1]).call(attention, **scales)
    error = ((close - exact).norm() / exact.norm()).item()
    assert error < {torch.float8_e4m3fn: 0.06, torch.float8_e5m2: 0.12, torch.int8: 0.03}[dtype]


CACHE, SLOTS = torch.randn(3, 4, 2, 16), torch.tensor([0, 5, -1])


@pytest.mark.parametrize(
    ("cache", "slots", "dtype", "error", "match"),
    [
        (CACHE, SLOTS, torch.float16, TypeError, "dtype must be float8_e4m3fn, float8_e5m2 or int8, got torch.float16"),
        (CACHE.to(torch.float8_e5m2), SLOTS, torch.int8, TypeError, "cache must be float32, float16 or bfloat16, got"),
        (CACHE[0], SLOTS, torch.int8, ValueError, r"cache must be \[num_blocks, .*\], got \[4, 2, 16\]"),
        (CACHE, SLOTS.int(), torch.int8, TypeError, r"slots must be int64 \[n\], got torch.int32 \[3\]"),
        (CACHE, SLOTS + 7, torch.int8, IndexError, r"slots must be below num_blocks \* block_size = 12, got 12"),
    ],
)
@pytest.mark.parametrize("function", [calibrate_scales, quantise_cache])
def test_caches_that_cannot_be_quantised(function, cache, slots, dtype, error, match):
    with pytest.raises(error, match=match):
        function(cache, slots, dtype)


def test_negative_slots_are_skipped():
    cache = CACHE.clone()
    cache[-1, -1] = 1e9  # what an index of -1 would find
    assert torch.equal(calibrate_scales(cache, SLOTS, torch.int8), calibrate_scales(cache, SLOTS[:2], torch.int8))
    far = torch.cat([SLOTS.new_tensor([-100]), SLOTS])
    for with_it, without in zip(*(quantise_cache(cache, each, torch.int8) for each in (far, SLOTS[:2])), strict=True):
        assert torch.equal(with_it, without)


def test_lengths_that_no_table_holds():
    table = torch.zeros(2, 3, dtype=torch.int32)
    for lens, got in ([4, 13], 13), ([-1, 4], -1):
        with pytest.raises(IndexError, match=rf"seq_lens must be 0 to .* = 12, got {got}"):
            slots_in_use(table, torch.tensor(lens, dtype=torch.int32), 4)
    for options, name in (dict(block_size=0), "block_size"), (dict(block_size=4, sliding_window=0), "sliding_window"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            slots_in_use(table, torch.zeros(2, dtype=torch.int32), **options)
