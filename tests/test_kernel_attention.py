"""How the attention kernels divide their work: results must not depend on it, nor on what memory held before."""

import os
from dataclasses import replace

import pytest
import torch

from torch_paged import reference
from torch_paged.options import PLAIN
from torch_paged.testing import assert_within_budget, attention_inputs, low_precision_attention

pytest.importorskip("triton")
from torch_paged import warmup
from torch_paged.kernels import attention_call, attention_combine
from torch_paged.kernels.attention import attention, launch_attention
from torch_paged.kernels.attention_plan import problem_of
from torch_paged.kernels.device import device_of
from torch_paged.kernels.launch import Launcher
from torch_paged.kernels.launch_config import attention_launches

pytestmark = [pytest.mark.interpreter if os.environ.get("TRITON_INTERPRET") == "1" else pytest.mark.gpu]
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"

BATCHES = {
    "decode": dict(query_lens=[1] * 4, seq_lens=[300, 0, 17, 129], uniform=True),
    "one-sequence": dict(query_lens=[1], seq_lens=[700], uniform=True),
    "many-parts": dict(query_lens=[1, 1], seq_lens=[40, 3500], num_heads=4, num_kv_heads=1, uniform=True, head_dim=80),
    "many-parts-several": dict(query_lens=[9], seq_lens=[2500], num_heads=4, num_kv_heads=1, uniform=True, head_dim=80),
    "many-short": dict(query_lens=[1] * 300, seq_lens=[3] * 300, num_heads=2, uniform=True, head_dim=16),
    "mixed": dict(query_lens=[1, 70, 0, 2, 33], seq_lens=[200, 150, 9, 64, 20], num_heads=6, spare_tokens=3),
    "many-tiles": dict(query_lens=[70], seq_lens=[200], num_heads=8, num_kv_heads=1, uniform=True),
    "split-dims": dict(query_lens=[1, 40], seq_lens=[200, 90], head_dim=96, value_head_dim=80),
}


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Outputs and workspaces are allocated full of NaN and of the largest integers."""

    def empty_strided(device_type):  # the usual one does not ask whether to fill what it allocates
        return lambda shape, stride, dtype: torch.empty_strided(shape, stride, dtype=dtype, device=device_type)

    monkeypatch.setattr(attention_call, "empty_strided", empty_strided)
    torch.use_deterministic_algorithms(True)
    assert attention_call.empty_strided(DEVICE)((2, 3), (3, 1), torch.float32).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def arguments(inputs):
    return (*inputs, inputs.query.shape[2] ** -0.5)


def launch(inputs, **changes):
    """Output and lse of the launches of `inputs`, each with `changes`."""
    query, key_cache, value_cache, block_table, _, cu_seqlens_q = inputs
    problem = problem_of(query, key_cache, value_cache, block_table, cu_seqlens_q, True)
    output = query.new_empty(*query.shape[:2], value_cache.shape[3])
    lse = query.new_empty(query.shape[:2], dtype=torch.float32)
    for item in attention_launches(problem, device_of(query.device)):
        launch_attention(replace(item, **changes), *inputs, output, lse, query.shape[2] ** -0.5)
    return output, lse


def check(inputs, output, lse):
    exact = inputs._replace(query=inputs.query.double()).call(reference.attention_with_lse)
    low = low_precision_attention(inputs)
    assert_within_budget(output, exact[0].to(output.device), low[0])
    assert_within_budget(lse, exact[1].to(lse.device), low[1], "lse")


@pytest.mark.parametrize("programs", [1, 2, 7, 24])
@pytest.mark.parametrize("name", ["decode", "one-sequence", "mixed", "split-dims"])
def test_any_number_of_programs_gives_the_same(name, programs):
    inputs = attention_inputs(**BATCHES[name], device=DEVICE, dtype=torch.float16)
    check(inputs, *launch(inputs, programs=programs))


@pytest.mark.parametrize(("programs", "parts"), [(40, 2), (40, 8), (4, 8), (5, 8), (6, 8)])
@pytest.mark.parametrize("name", ["many-parts", "many-parts-several"])
def test_more_parts_of_a_unit_than_are_read_at_a_time(name, programs, parts):
    """Where there are 40 programs for the several queries, the parts of a row are shared by warps."""
    inputs = attention_inputs(**BATCHES[name], device=DEVICE, dtype=torch.float16)
    check(inputs, *launch(inputs, programs=programs, combine_parts=parts))


@pytest.mark.parametrize("dims", [(16, 16), (64, 23), (576, 512)])
def test_rows_of_any_width_are_combined(dims):
    heads = dict(num_heads=2, num_kv_heads=1, head_dim=dims[0], value_head_dim=dims[1])
    inputs = attention_inputs([1], [900], **heads, uniform=True, device=DEVICE, dtype=torch.float16)
    check(inputs, *launch(inputs, programs=3))
    check(inputs, *launch(inputs, programs=20))


@pytest.mark.parametrize(("programs", "rows", "combining"), [(3, 1, 1), (7, 1, 4), (7, 4, 13), (24, 8, 100), (1, 4, 4)])
@pytest.mark.parametrize("name", ["many-parts-several", "many-tiles", "mixed"])
def test_any_number_of_programs_may_share_what_was_left(name, programs, rows, combining, monkeypatch):
    """As of the Hopper kernel, whose variants the interpreter cannot run."""

    def launcher(kernel, _, constants, *options):
        variant = replace(constants["V"], copy_rows=16)
        return Launcher(kernel, (combining, 1, 1), constants | dict(V=variant), *options)

    monkeypatch.setattr(attention_combine, "Launcher", launcher)
    inputs = attention_inputs(**BATCHES[name], device=DEVICE, dtype=torch.float16)
    check(inputs, *launch(inputs, programs=programs, combine_rows=rows))


@pytest.mark.parametrize("programs", [4, 5, 7, 9])
def test_a_program_may_end_one_unit_and_begin_another(programs):
    lens = dict(query_lens=[1] * 3, seq_lens=[1700, 900, 1350], uniform=True)
    inputs = attention_inputs(**lens, num_heads=4, num_kv_heads=1, device=DEVICE, dtype=torch.float16)
    check(inputs, *launch(inputs, programs=programs))


def test_more_units_than_sequences_have_heads():
    inputs = attention_inputs(**BATCHES["many-tiles"], device=DEVICE, dtype=torch.float16)
    check(inputs, *launch(inputs, programs=12))


def test_more_sequences_than_are_read_at_a_time():
    inputs = attention_inputs(**BATCHES["many-short"], device=DEVICE)
    check(inputs, *launch(inputs, programs=5))


def test_repeated_calls_agree_to_the_bit():
    inputs = attention_inputs(**BATCHES["mixed"], device=DEVICE, dtype=torch.float16)
    first, second = launch(inputs, programs=9), launch(inputs, programs=9)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_blocks_out_of_range_neither_fault_nor_spread():
    inputs = attention_inputs([1, 1, 20], [40, 33, 50], device=DEVICE)
    expected, _ = attention(*arguments(inputs), True, PLAIN)
    table = inputs.block_table.clone()
    table[1, 0], table[1, 1] = -5, 2**31 - 1
    output, _ = attention(*arguments(inputs._replace(block_table=table)), True, PLAIN)
    assert torch.equal(output[0], expected[0])
    assert torch.equal(output[2:], expected[2:])


@pytest.mark.parametrize("keys", [-7, 10**6])
def test_impossible_lengths_neither_fault_nor_spread(keys):
    inputs = attention_inputs([1, 1, 3], [40, 33, 50], device=DEVICE)
    lens = inputs.seq_lens.clone()
    lens[1] = keys
    expected, _ = attention(*arguments(inputs), True, PLAIN)
    output, _ = attention(*arguments(inputs._replace(seq_lens=lens)), True, PLAIN)
    assert_within_budget(output[2:], expected[2:].double(), expected[2:])


def test_query_bounds_that_run_backwards_or_away_do_not_fault():
    inputs = attention_inputs([1, 1, 3], [40, 33, 50], device=DEVICE)
    bounds = torch.tensor([-3, 2, 1, 10**6], dtype=torch.int32, device=DEVICE)
    attention(*arguments(inputs._replace(cu_seqlens_q=bounds)), True, PLAIN)


def test_cache_without_blocks():
    inputs = attention_inputs([2, 2], [0, 0], uniform=True, device=DEVICE)
    empty = inputs._replace(key_cache=inputs.key_cache[:0], value_cache=inputs.value_cache[:0])
    output, lse = attention(*arguments(empty), True, PLAIN)
    assert not output.any()
    assert lse.isneginf().all()


@pytest.mark.parametrize("layout", ["query", "caches", "offset"])
def test_rows_that_do_not_start_at_vectors(layout):
    inputs = attention_inputs(**BATCHES["mixed"], device=DEVICE, dtype=torch.bfloat16)

    def widened(tensor, front):
        room = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), torch.nan, dtype=tensor.dtype, device=DEVICE)
        inner = room[..., front : front + tensor.shape[-1]]
        return inner.copy_(tensor)

    if layout == "query":
        inputs = inputs._replace(query=widened(inputs.query, 0))
    else:
        front = 1 if layout == "offset" else 0
        inputs = inputs._replace(
            key_cache=widened(inputs.key_cache, front), value_cache=widened(inputs.value_cache, front)
        )
    output, lse = attention(*arguments(inputs), True, PLAIN)
    check(inputs, output, lse)
    exact = inputs._replace(query=inputs.query.double())
    error = (output.double() - exact.call(reference.attention)).abs()
    sizes = exact._replace(value_cache=inputs.value_cache.abs()).call(reference.attention)  # of what is added up
    # Weights and output are rounded, by half of eps each.
    assert (error <= torch.finfo(output.dtype).eps * sizes).all()


def test_tables_and_lengths_may_be_strided_views():
    inputs = attention_inputs(**BATCHES["mixed"], device=DEVICE, dtype=torch.bfloat16)
    expected, _ = attention(*arguments(inputs), True, PLAIN)

    def strided(numbers):
        return numbers.repeat_interleave(2, -1)[..., ::2]

    views = inputs._replace(
        block_table=strided(inputs.block_table),
        seq_lens=strided(inputs.seq_lens),
        cu_seqlens_q=strided(inputs.cu_seqlens_q),
    )
    assert torch.equal(attention(*arguments(views), True, PLAIN)[0], expected)


def test_warmup_reports_every_batch():
    seen = []
    count = warmup(
        6, 2, 32, value_head_dim=48, dtype=torch.float16, device=DEVICE, progress=lambda *done: seen.append(done)
    )
    assert seen == [(number, count) for number in range(1, count + 1)]
