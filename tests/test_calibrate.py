"""Scales from the tokens that a cache holds."""

import math

import pytest
import torch
from cache_twins import SIZE, Twin, make_cache, some

from torch_paged import calibrate_scales


def test_calibrated_by_the_tokens_that_are_there():
    """Poison stands in every other slot: those of a freed sequence, of an open step, and left behind by a window."""
    twin = Twin([None, 6])
    first, second, third = (twin.add() for _ in range(3))
    twin.step({first: some(19), second: some(6, 1), third: some(9, 2)})
    twin.step({twin.fork(first): some(2, 3), second: some(9, 4)})
    twin.cache.free(third)
    twin.plain.free(twin.seqs[third])
    twin.cache.prepare([first, second], 5)
    held = [{*slots.tolist()} for slots in twin.cache._manager.slots_in_use()]
    for layer, slots in zip(twin.cache.layers, held, strict=True):
        for cache in (layer.key_cache, layer.value_cache):
            flat = [slot for slot in range(64 * SIZE) if slot not in slots and slot < len(cache) * SIZE]
            for slot in flat:
                cache[slot // SIZE, slot % SIZE] = math.nan
    (scales, window), (expected, all_keys) = twin.cache.calibrate(torch.int8), twin.plain.calibrate(torch.int8)
    assert all(map(torch.equal, scales, expected))
    assert all((0 < one).all() and (one <= other).all() for one, other in zip(window, all_keys, strict=True))
    assert [len(slots) for slots in held] == [19 + 5 + 15, 11 + 5 + 11]  # of first, what its fork has apart, second


def test_calibration_needs_tokens_in_the_cache_and_a_type_to_store_them_in():
    cache = make_cache([None])
    with pytest.raises(ValueError, match=r"calibrate needs tokens in the cache, got none"):
        cache.calibrate(torch.int8)
    for dtype in (torch.float16, "int8"):
        with pytest.raises(TypeError, match=f"dtype must be float8_e4m3fn, float8_e5m2 or int8, got {dtype!r}"):
            cache.calibrate(dtype)


def test_a_quantised_cache_is_not_calibrated_again():
    with pytest.raises(TypeError, match=r"calibrate needs an unquantised cache, got one of torch.int8"):
        make_cache([None], cache_dtype=torch.int8).calibrate(torch.int8)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_named(value):
    cache = torch.randn(2, 4, 3, 16)
    cache[1, 2, 1, 5] = value
    with pytest.raises(ValueError, match=r"got NaN or infinity in heads \[1\]"):
        calibrate_scales(cache, torch.arange(8), torch.int8)
    assert calibrate_scales(cache, torch.tensor([0, 1, 2, 3, -1]), torch.int8).isfinite().all()
