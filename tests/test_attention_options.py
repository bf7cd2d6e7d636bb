"""Every option of `paged::attention` with every other, dtype, storage and kind of batch, against the reference."""

from itertools import combinations
from typing import NamedTuple

import pytest
import torch
from covering import covering_rows

from torch_paged import reference
from torch_paged.testing import Storage, assert_within_budget, attention_inputs, low_precision_attention, quantised

op = torch.ops.paged.attention_with_lse
E4M3, E5M2, INT8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8

BATCHES = {
    "decode": dict(query_lens=[1] * 5, seq_lens=[1, 16, 45, 0, 70], uniform=True),
    "several": dict(query_lens=[3] * 3, seq_lens=[3, 20, 2], uniform=True),
    "prefill": dict(query_lens=[21, 17], seq_lens=[21, 17]),
    "chunked": dict(query_lens=[9, 18, 2], seq_lens=[50, 20, 0]),
    "mixed": dict(query_lens=[1, 9, 0, 7], seq_lens=[50, 9, 12, 40], spare_tokens=3),
}
SHAPES = {
    "grouped": dict(num_heads=4, num_kv_heads=2, head_dim=32, block_size=16),
    "multi-head": dict(num_heads=3, num_kv_heads=3, head_dim=41, value_head_dim=23, block_size=7),
    "multi-query": dict(num_heads=6, num_kv_heads=1, head_dim=80, block_size=32, head_major=True),
    "block-1": dict(num_heads=4, num_kv_heads=2, head_dim=16, block_size=1),
}
STORED = {
    "plain": (None, None),
    "e4m3": (Storage(E4M3), Storage(E4M3)),
    "e4m3-scalar": (Storage(E4M3, "scalar"), Storage(E4M3, "scalar")),
    "e5m2-head": (Storage(E5M2, "head"), Storage(E5M2, "head")),
    "e5m2-token": (Storage(E5M2, "token"), Storage(E5M2, "token")),
    "int8-scalar": (Storage(INT8, "scalar"), Storage(INT8, "scalar")),
    "int8-token": (Storage(INT8, "token"), Storage(INT8, "token")),
    "e4m3-token-and-int8-head": (Storage(E4M3, "token"), Storage(INT8, "head")),
    "int8-head-and-e5m2-scalar": (Storage(INT8, "head"), Storage(E5M2, "scalar")),
    "plain-and-e4m3-token": (None, Storage(E4M3, "token")),
    "int8-token-and-plain": (Storage(INT8, "token"), None),
}
FACTORS = {
    "batch": list(BATCHES),
    "stored": list(STORED),
    "sliding_window": [None, 1, 5, 16, 37, 1000],
    "shape": list(SHAPES),
    "dtype": ["float32", "float16", "bfloat16"],
    "scale": [None, -0.4, 0.0],
    "softcap": [None, 1.5],
    "alibi": [False, True],
    "sinks": [False, True],
    "causal": [True, False],
    "value_is_view": [False, True],
}


class Case(NamedTuple):
    """One row of the grid: names into the tables above, and options as they are."""

    batch: str
    stored: str
    shape: str
    dtype: str
    sliding_window: int | None
    scale: float | None
    softcap: float | None
    alibi: bool
    sinks: bool
    causal: bool
    value_is_view: bool

    def __str__(self):
        """Batch, storage, shape and dtype, then the options that are on."""
        options = {name: value for name, value in self._asdict().items() if name not in self._fields[:4]}
        if options.pop("causal") is False:
            options["not-causal"] = True
        on = [
            name if value is True else f"{name}={value}"
            for name, value in options.items()
            if not (value is None or value is False)
        ]
        return "-".join([*self[:4], *on])


def allowed(row):
    if row.get("sliding_window") is not None and not row.get("causal", True):
        return False  # an error, below
    key, value = STORED[row.get("stored", "plain")]
    return not row.get("value_is_view") or key == value  # a view has the key's dtype


def slopes_of(num_heads, device):
    return 2.0 ** -torch.arange(1, num_heads + 1, device=device)


def sinks_of(num_heads, device):
    return torch.linspace(-1, 3, num_heads, device=device)


def arguments(case, device):
    """The batch, and the keywords of the call."""
    shape = SHAPES[case.shape]
    dtype = getattr(torch, case.dtype)
    inputs = attention_inputs(
        **BATCHES[case.batch], **shape, dtype=dtype, sliding_window=case.sliding_window, device=device
    )
    inputs, scales = quantised(inputs, *STORED[case.stored])
    if case.value_is_view:
        inputs = inputs._replace(value_cache=inputs.key_cache[..., : inputs.value_cache.shape[3]])
    if case.value_is_view and "value_scale_cache" in scales:
        scales["value_scale_cache"] = scales["key_scale_cache"]
    options = dict(
        scale=case.scale, causal=case.causal, sliding_window=case.sliding_window, softcap=case.softcap or 0.0
    )
    if case.alibi:
        options["alibi_slopes"] = slopes_of(shape["num_heads"], device)
    if case.sinks:
        options["sinks"] = sinks_of(shape["num_heads"], device)
    return inputs, options | scales


def exact_and_low(inputs, options):
    """The reference in float64 and the same computation in query's dtype, on the inputs' device."""
    exact = inputs._replace(query=inputs.query.double()).call(reference.attention_with_lse, **options)
    return exact, low_precision_attention(inputs, **options)


def check(inputs, **options):
    exact, low = exact_and_low(inputs, options)
    output, lse = inputs.call(op, **options)
    assert output.dtype == inputs.query.dtype
    assert output.is_contiguous()
    assert_within_budget(output, exact[0], low[0])
    assert_within_budget(lse, exact[1], low[1], "lse")


@pytest.mark.parametrize("case", [Case(**row) for row in covering_rows(FACTORS, allowed)], ids=str)
def test_pairwise_grid(case, device):
    inputs, options = arguments(case, device)
    check(inputs, **options)


@pytest.mark.parametrize("stored", [name for name in STORED if name != "plain"])
def test_quantised_caches_without_any_option(stored, device):
    """Queries whose own keys begin anywhere in a block."""
    inputs, scales = quantised(attention_inputs(**BATCHES["several"], device=device), *STORED[stored])
    check(inputs, **scales)


SETTINGS = {
    "window": "sliding_window",
    "softcap": "softcap",
    "alibi": "alibi_slopes",
    "sinks": "sinks",
    "not-causal": "causal",
    "scale": "scale",
    "key_scale": "key_scale",
    "value_scale": "value_scale",
    "key_scale_cache": "key_scale_cache",
    "value_scale_cache": "value_scale_cache",
}
REFUSED = {
    frozenset({"window", "not-causal"}): "sliding_window needs causal=True",
    frozenset(
        {"key_scale", "key_scale_cache"}
    ): "key_scale .static. and key_scale_cache .per token. exclude each other",
    frozenset({"value_scale", "value_scale_cache"}): "value_scale .static. and value_scale_cache .* exclude each other",
}


def settings(names, device):
    """A small mixed batch and what `names` asks for; caches are quantised where a scale is."""
    window = 6 if "window" in names else None
    inputs = attention_inputs([1, 9, 0, 3], [20, 9, 4, 18], sliding_window=window, spare_tokens=1, device=device)
    storage = {
        side: Storage(E4M3, "head") if f"{side}_scale" in names else
        Storage(INT8, "token") if f"{side}_scale_cache" in names else None
        for side in ("key", "value")
    }  # fmt: skip
    inputs, scales = quantised(inputs, **storage)
    options = dict(
        sliding_window=6, softcap=1.5, causal=False, scale=-0.4,
        alibi_slopes=slopes_of(4, device), sinks=sinks_of(4, device),
        **{f"{side}_scale_cache": torch.ones(inputs.key_cache.shape[:3], device=device) for side in ("key", "value")},
    )  # fmt: skip
    options |= scales
    return inputs, {SETTINGS[name]: options[SETTINGS[name]] for name in names}


def agrees(results, exact, low):
    try:
        for result, true, rough in zip(results, exact, low, strict=True):
            assert_within_budget(result.float(), true, rough)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("names", [*combinations(SETTINGS, 1), *combinations(SETTINGS, 2)], ids="+".join)
def test_no_option_is_ignored(names, device):
    """Each pair gives the right numbers, which without either option would be found wrong, or says what is amiss."""
    inputs, options = settings(names, device)
    if message := REFUSED.get(frozenset(names)):
        with pytest.raises(ValueError, match=message):
            inputs.call(op, **options)
        return
    exact, low = exact_and_low(inputs, options)
    for name in options:
        # Without a window all keys are seen, poisoned ones too: look at their whole rows.
        whole = inputs if name != "sliding_window" else settings([n for n in names if n != "window"], device)[0]
        fewer = {other: value for other, value in options.items() if other != name}
        assert not agrees(exact_and_low(whole, fewer)[0], exact, low), f"{name} changes nothing"
    assert agrees(inputs.call(op, **options), exact, low)


@pytest.mark.parametrize("stored", ["plain", "int8-token"])
@pytest.mark.parametrize("options", [{}, dict(sliding_window=3), dict(causal=False), dict(softcap=2.0)], ids=str)
def test_rows_that_see_no_key_have_the_sink_as_lse(stored, options, device):
    """Two sequences of fewer keys than queries; rows past the last sequence belong to nobody, not to the sink."""
    inputs = attention_inputs([3, 4], [0, 2], spare_tokens=2, device=device)
    inputs, scales = quantised(inputs, *STORED[stored])
    sinks = sinks_of(4, device)
    output, lse = inputs.call(op, sinks=sinks, **options, **scales)
    unseeing = slice(0, 5 if options.get("causal", True) else 3)
    assert output[unseeing].eq(0).all()
    assert torch.equal(lse[unseeing], sinks.expand_as(lse[unseeing]))
    assert output[7:].eq(0).all()
    assert lse[7:].eq(-torch.inf).all()
    check(inputs, sinks=sinks, **options, **scales)


@pytest.mark.parametrize(
    ("window", "stored"),
    [(1, "plain"), (15, "int8-token"), (16, "plain"), (17, "e4m3-token-and-int8-head"), (130, "plain")],
)
def test_window_over_many_blocks(window, stored, device):
    """Longer than any tile; blocks before every query's window have neither a table entry nor keys."""
    inputs = attention_inputs([1, 20, 3], [300, 150, 16], sliding_window=window, device=device)
    inputs, scales = quantised(inputs, *STORED[stored])
    check(inputs, sliding_window=window, **scales)


@pytest.mark.parametrize("stored", ["plain", "int8-token"])
@pytest.mark.parametrize(
    "options",
    [dict(sliding_window=200), dict(sliding_window=1000), dict(softcap=1.5), dict(softcap=1.5, causal=False), {}],
    ids=str,
)
def test_more_queries_and_keys_than_the_cpu_takes_at_once(options, stored):
    """In a window of 1000, a chunk of keys is hidden from some of the queries that go with others that see it."""
    inputs = attention_inputs([300, 1], [1500, 2500], block_size=64, sliding_window=options.get("sliding_window"))
    inputs, scales = quantised(inputs, *STORED[stored])
    check(inputs, **options, **scales)
    check(inputs, **options, **scales, alibi_slopes=slopes_of(4, "cpu"), sinks=sinks_of(4, "cpu"))


@pytest.mark.parametrize("window", [1 << 40, (1 << 63) - 1])
def test_window_of_more_than_32_bits(window, device):
    check(attention_inputs(**BATCHES["mixed"], device=device), sliding_window=window)


@pytest.mark.parametrize("sink", [-torch.inf, -200.0, 200.0, torch.inf])
def test_extreme_sinks(sink, device):
    inputs = attention_inputs(**BATCHES["mixed"], device=device)
    check(inputs, sinks=torch.tensor([sink, 0.0, sink, 1.0], device=device))


@pytest.mark.parametrize("stored", ["e4m3-head", "e4m3", "e5m2-head", "int8-scalar", "int8-token"])
def test_huge_queries_stay_finite(stored, device):
    """bfloat16 reaches far beyond what float16 or a quantised type would hold."""
    inputs = attention_inputs(**BATCHES["decode"], dtype=torch.bfloat16, device=device)
    inputs = inputs._replace(query=inputs.query * 1e6 / inputs.query.abs().max())
    storage = STORED.get(stored, (Storage(E4M3, "head"),) * 2)
    inputs, scales = quantised(inputs, *storage)
    check(inputs, **scales)


@pytest.mark.parametrize("dtype", [E4M3, INT8], ids=str)
def test_the_stride_of_a_single_block_does_not_matter(dtype, device):
    inputs = attention_inputs([1], [9], dtype=torch.bfloat16, uniform=True, device=device)
    inputs, scales = quantised(inputs, Storage(dtype, "head"), Storage(dtype, "head"))
    one = inputs._replace(
        key_cache=inputs.key_cache[:1], value_cache=inputs.value_cache[:1], block_table=inputs.block_table * 0
    )
    odd = one.value_cache.as_strided(one.value_cache.shape, (2049, *one.value_cache.stride()[1:]))
    expected = one.call(torch.ops.paged.attention, **scales)
    assert torch.equal(one._replace(value_cache=odd).call(torch.ops.paged.attention, **scales), expected)


@pytest.mark.parametrize("like", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [E4M3, E5M2, INT8], ids=str)
def test_every_code_is_read(dtype, like, device):
    """All finite codes as values, each alone in its sequence: weights of 1 show what is stored, exactly."""
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    codes = codes[codes.isfinite()]
    shape = dict(head_dim=32, block_size=1, uniform=True, num_kv_heads=1, num_heads=2)
    inputs = attention_inputs([1] * 8, [1] * 8, **shape, dtype=like)
    stored = torch.zeros(inputs.value_cache.shape)
    for seq, row in enumerate(inputs.block_table[:, 0].tolist()):
        stored[row, 0, 0] = torch.nn.functional.pad(codes, (0, 256 - len(codes)))[32 * seq : 32 * seq + 32]
    one = torch.ones((), device=device)
    inputs = inputs._replace(key_cache=inputs.key_cache.nan_to_num().to(dtype), value_cache=stored.to(dtype))
    inputs = type(inputs)(*(tensor if tensor is None else tensor.to(device) for tensor in inputs))
    output = inputs.call(torch.ops.paged.attention, key_scale=one, value_scale=one * 0.5)
    assert torch.equal(output[:, 1].flatten()[: len(codes)].cpu().float(), codes * 0.5)


def test_a_huge_scale_under_a_cap(device):
    """Their quotient is beyond float32. Rows of zeros see all keys alike, others are at the cap."""
    keys, values = torch.randn(2, 1, 16, 1, 16, device=device)
    call = keys, values, torch.zeros(1, 1, dtype=torch.int32, device=device), torch.tensor([16], device=device).int()
    for query in (torch.zeros(1, 1, 16, device=device), torch.randn(1, 1, 16, device=device)):
        expected = reference.attention(
            query.double(), *(part.double() for part in call[:2]), *call[2:], scale=1e38, softcap=0.1
        )
        output = torch.ops.paged.attention(query, *call, scale=1e38, softcap=0.1)
        torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
