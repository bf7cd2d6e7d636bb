"""The Hopper kernel for many rows: however its work is divided, results are the same."""

import pytest
import torch

import torch_paged
from torch_paged.testing import attention_inputs

pytest.importorskip("triton")
import hopper_batches
from hopper_batches import BATCHES, LATE, NEEDS_HOPPER, attention, check, launch, launches_of, with_options

from torch_paged.kernels import launch_tiles

pytestmark = NEEDS_HOPPER
small = hopper_batches.small  # a fixture
IN_THREE_PARTS = ["mixed", "head-major", "block-32", "block-64", "block-128", "block-256"]
IN_THREE_PARTS += ["one-head", "no-group", "uniform", "dim-16", "dim-24"]


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


def test_many_keys_are_divided_among_all_programs():
    inputs = attention_inputs([40], [5000], num_heads=8, head_dim=128, dtype=torch.bfloat16, device="cuda")
    check(inputs, *launch(inputs))


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
