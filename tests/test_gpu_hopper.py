"""The Hopper kernel for many rows: values, and all that makes it different from the general one."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

import torch_paged
from torch_paged import ops, reference
from torch_paged.options import PLAIN, AttentionOptions
from torch_paged.testing import assert_within_budget, attention_inputs, low_precision_attention

pytest.importorskip("triton")
from torch_paged.kernels import attention_plan, launch_tiles
from torch_paged.kernels.attention import attention as attend_with
from torch_paged.kernels.attention import launch_attention
from torch_paged.kernels.attention_plan import problem_of
from torch_paged.kernels.device import device_of
from torch_paged.kernels.launch_config import attention_launches

pytestmark = [
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
IN_THREE_PARTS = ["mixed", "head-major", "block-32", "block-64", "block-128", "block-256"]
IN_THREE_PARTS += ["one-head", "no-group", "uniform", "dim-16", "dim-24"]
LATE = dict(
    query_lens=[270, 1, 90, 300, 257],
    seq_lens=[270, 900, 90, 265, 257],
    num_heads=512,
    num_kv_heads=32,
    head_dim=64,
    spare_tokens=3,
)


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


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", BATCHES)
def test_values(name, dtype, causal, small):
    inputs = attention_inputs(**BATCHES[name], dtype=dtype, device="cuda")
    variant = launches_of(inputs, causal)[0].variant
    assert (variant.block_m, variant.copy_rows) == (rows_of(inputs, small), copied(inputs, small))
    check(inputs, *attention(*inputs, inputs.query.shape[2] ** -0.5, causal), causal)


HIDDEN_IN_LARGE_BLOCKS = {
    "one-block": dict(query_lens=[40], seq_lens=[200], num_heads=8, head_dim=128, block_size=256),
    "narrow": dict(query_lens=[40, 70], seq_lens=[200, 900], num_heads=8, head_dim=64, block_size=256),
    "wide": dict(query_lens=[40], seq_lens=[120], num_heads=8, head_dim=256, block_size=128),
    "three-parts": dict(query_lens=[40, 70], seq_lens=[180, 150], num_heads=8, head_dim=128, block_size=192),
    "odd": dict(query_lens=[5, 6], seq_lens=[81, 161], num_heads=32, head_dim=128, block_size=48),
}
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


def with_options(name, batch, **changes):
    """A batch that poisons what its window hides, and the options."""
    options = dict(OPTIONS[name])
    window = options.get("sliding_window")
    inputs = attention_inputs(**batch | changes, sliding_window=window, device="cuda")
    if "sinks" in options:
        options["sinks"] = torch.linspace(-1, 3, inputs.query.shape[1], device="cuda")
    return inputs, options


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


@pytest.mark.parametrize("option", ["window-60", "window-400", "all"])
@pytest.mark.parametrize(("programs", "rounds"), [(1, 1), (3, 5), (7, 2), (132, 1)])
@pytest.mark.parametrize("name", ["mixed", "no-group", "uniform", "late"])
def test_any_division_of_windows_gives_the_same(name, programs, rounds, option):
    inputs, options = with_options(option, LATE if name == "late" else BATCHES[name], dtype=torch.float16)
    check(inputs, *launch(inputs, options, programs=programs, rounds=rounds), **options)


@pytest.mark.parametrize("programs", [1, 2, 7, 31, 132])
@pytest.mark.parametrize("name", ["mixed", "no-group", "uniform"])
def test_any_number_of_programs_gives_the_same(name, programs):
    inputs = attention_inputs(**BATCHES[name], dtype=torch.float16, device="cuda")
    check(inputs, *launch(inputs, programs=programs))


@pytest.mark.parametrize("small", [None], ids=["three-parts"], indirect=True)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", IN_THREE_PARTS)
def test_three_parts(name, dtype, causal, monkeypatch):
    """As for long prompts of narrow heads, whatever their number of queries, programs and rounds."""
    monkeypatch.setattr(launch_tiles, "LONG", 0)
    batch = BATCHES[name] | dict(head_dim=min(BATCHES[name]["head_dim"], 64))
    inputs = attention_inputs(**batch, dtype=dtype, device="cuda")
    assert launches_of(inputs, causal)[0].variant.block_m == 192
    check(inputs, *attention(*inputs, inputs.query.shape[2] ** -0.5, causal), causal)
    if causal:
        for programs, rounds in ((1, 1), (3, 5), (7, 2), (132, 1)):
            check(inputs, *launch(inputs, programs=programs, rounds=rounds))
    for option in ("softcap", "sinks"):
        inputs, options = with_options(option, batch, dtype=dtype)
        assert launches_of(inputs, causal, **options)[0].variant.block_m == 192
        check(inputs, *attention(*inputs, inputs.query.shape[2] ** -0.5, causal, **options), causal, **options)


@pytest.mark.parametrize("rounds", [2, 5])
@pytest.mark.parametrize("name", ["mixed", "no-group", "uniform"])
def test_any_number_of_rounds_gives_the_same(name, rounds):
    inputs = attention_inputs(**BATCHES[name], dtype=torch.float16, device="cuda")
    check(inputs, *launch(inputs, rounds=rounds, programs=3))


@pytest.mark.parametrize("small", [None], ids=["as-launched"], indirect=True)
@pytest.mark.parametrize(
    ("queries", "keys"),
    [([1] * 12 + [2050], [900] * 12 + [3000]), ([100] * 22, [100] * 22), ([1] * 2048, [20] * 2048)],
    ids=["decodes-and-chunk", "short-prompts", "decodes"],
)
def test_batches_of_which_shapes_say_little(queries, keys):
    inputs = attention_inputs(queries, keys, num_heads=4, head_dim=128, dtype=torch.bfloat16, device="cuda")
    assert launches_of(inputs)[0].variant.block_m == 128
    check(inputs, *attention(*inputs, inputs.query.shape[2] ** -0.5, True))


@pytest.mark.parametrize("programs", [1, 7, 132])
def test_units_that_come_last(programs):
    """Those that see little of a long prompt, which whoever is first done with all others takes."""
    inputs = attention_inputs(**LATE, dtype=torch.bfloat16, device="cuda")
    check(inputs, *launch(inputs, rounds=3, programs=programs))


@pytest.mark.parametrize("small", [None], ids=["three-parts"], indirect=True)
def test_units_that_come_last_in_three_parts(monkeypatch):
    monkeypatch.setattr(launch_tiles, "LONG", 0)
    batch = dict(LATE, query_lens=[410, 385], seq_lens=[410, 385])
    inputs = attention_inputs(**batch, dtype=torch.bfloat16, device="cuda")
    assert launches_of(inputs)[0].variant.block_m == 192
    check(inputs, *attention(*inputs, 64**-0.5, True))


@pytest.mark.parametrize("options", [{}, dict(sliding_window=61)], ids=["", "window"])
@pytest.mark.parametrize("batch", [BATCHES["mixed"], LATE], ids=["mixed", "late"])
def test_repeated_calls_agree_to_the_bit(batch, options):
    inputs = attention_inputs(**batch, **options, dtype=torch.bfloat16, device="cuda")
    expected = launch(inputs, options)
    for _ in range(20):
        output, lse = launch(inputs, options)
        assert torch.equal(output, expected[0])
        assert torch.equal(lse, expected[1])


@pytest.mark.parametrize("options", [{}, dict(sliding_window=61)], ids=["", "window"])
@pytest.mark.parametrize(
    "batch",
    [BATCHES["mixed"], BATCHES["uniform"], dict(LATE, num_heads=256, num_kv_heads=16)],
    ids=["mixed", "uniform", "late"],
)
def test_a_schedule_changes_no_bit(batch, options):
    """Nor do the pieces of other lengths, which it may hold, bring down anything but results."""
    inputs = attention_inputs(**batch, **options, dtype=torch.bfloat16, device="cuda")
    query, key_cache, value_cache, block_table, seq_lens, bounds = inputs
    tensors = query, key_cache, value_cache, block_table
    expected = torch_paged.attention(*tensors, seq_lens, cu_seqlens_q=bounds, **options)
    schedule = torch_paged.schedule(*tensors, seq_lens, cu_seqlens_q=bounds, **options)
    assert schedule.any(1).sum() == len(launches_of(inputs, **options))
    for _ in range(3):
        output = torch_paged.attention(*tensors, seq_lens, cu_seqlens_q=bounds, schedule=schedule, **options)
        assert torch.equal(output, expected)
    shorter = torch_paged.attention(*tensors, seq_lens // 3, cu_seqlens_q=bounds, schedule=schedule, **options)
    assert shorter.shape == expected.shape and not torch.equal(shorter, expected)
    others = torch_paged.schedule(*tensors, seq_lens // 3, cu_seqlens_q=bounds, **options)
    torch_paged.attention(*tensors, seq_lens, cu_seqlens_q=bounds, schedule=others, **options)
    torch.cuda.synchronize()


def test_who_does_not_find_its_schedule_is_served_all_the_same():
    batch = attention_inputs(**BATCHES["mixed"], dtype=torch.bfloat16, device="cuda")
    other = attention_inputs(**BATCHES["block-128"], dtype=torch.float16, device="cuda")
    schedule = torch_paged.schedule(*other[:5], cu_seqlens_q=other[5])
    output = torch_paged.attention(*batch[:5], cu_seqlens_q=batch[5], schedule=schedule)
    check(batch, output, attention(*batch, 128**-0.5, True)[1])


def test_many_keys_are_divided_among_all_programs():
    inputs = attention_inputs([40], [5000], num_heads=8, head_dim=128, dtype=torch.bfloat16, device="cuda")
    check(inputs, *launch(inputs))


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


@pytest.mark.parametrize(
    ("heads", "batches"),
    [
        (8, [([100, 50, 40, 10], [300, 50, 320, 11]), ([1] * 4, [320, 1, 9, 0]), ([0, 200, 0, 0], [0, 310, 0, 5])]),
        (
            512,
            [([260, 0, 1, 9], [260, 0, 320, 9]), ([2, 299, 0, 0], [2, 299, 5, 0]), ([260, 0, 0, 40], [260, 0, 0, 40])],
        ),
    ],
    ids=["few-heads", "late-units"],
)
@pytest.mark.parametrize("options", [{}, dict(sliding_window=100)], ids=["", "window"])
def test_a_captured_graph_serves_other_lengths(heads, batches, options):
    query = torch.randn(300, heads, 128, device="cuda", dtype=torch.bfloat16)
    caches = [torch.randn(80, 16, max(heads // 16, 2), 128, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    table = torch.randperm(80, device="cuda").int().view(4, 20)
    lens, bounds = (torch.zeros(n, dtype=torch.int32, device="cuda") for n in (4, 5))

    def attend():
        return attention(query, *caches, table, lens, bounds, 0.1, True, **options)

    attend()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, lse = attend()
    for queries, keys in batches:
        bounds.copy_(torch.tensor([0, *queries]).cumsum(0))
        lens.copy_(torch.tensor(keys))
        output.fill_(torch.nan)
        graph.replay()
        eager = attend()
        assert torch.equal(output, eager[0])
        assert torch.equal(lse, eager[1])
