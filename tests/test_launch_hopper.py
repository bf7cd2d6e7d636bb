"""Launch parameters of Hopper's kernel for many rows: pure functions, tested without Triton."""

from dataclasses import replace

import pytest

from torch_paged.kernels.features import Features, Stored
from torch_paged.kernels.launch_config import attention_launches
from torch_paged.kernels.problem import Device, Problem, columns_of

HOPPER = Device(132, 228 * 1024, 90)
AMPERE = Device(108, 164 * 1024, 80)
PREFILL = Problem(4096, 1, 32, 8, 128, 128, 16, itemsize=2, causal=True, ragged=False)


@pytest.mark.parametrize(
    ("changes", "copy_rows"),
    [
        ({}, 16),
        (dict(block_size=8), 8),
        (dict(block_size=64), 64),
        (dict(block_size=256), 128),
        (dict(block_size=256, head_dim=256, value_dim=256), 64),
        (dict(head_dim=64, value_dim=128), 16),
        (dict(num_heads=56), 16),
        (dict(features=Features(window=True, softcap=True, sinks=True)), 16),
        (dict(features=Features(alibi=True)), 0),
        (dict(features=Features(key=Stored("e4m3", "head"))), 0),
        (dict(features=Features(window=True), block_size=128), 128),
        (dict(features=Features(window=True), block_size=256), 128),
        (dict(features=Features(window=True), block_size=256, short_window=True), 64),
        (dict(block_size=48), 16),
        (dict(block_size=24, head_dim=256, value_dim=256), 8),
        (dict(block_size=528), 16),
        (dict(block_size=192), 64),
        (dict(block_size=384), 128),
        (dict(block_size=4), 0),
        (dict(block_size=20), 0),
        (dict(head_dim=80, value_dim=80), 16),
        (dict(head_dim=16, value_dim=256), 16),
        (dict(head_dim=264, value_dim=256), 0),
        (dict(head_dim=100, value_dim=96), 0),
        (dict(head_dim=96, value_dim=100), 0),
        (dict(head_dim=128, value_dim=512), 0),
        (dict(itemsize=4), 0),
        (dict(copyable=False), 0),
        (dict(aligned=False), 0),
        (dict(num_tokens=16), 0),
    ],
    ids=str,
)
def test_hopper_copies_blocks_or_parts_of_them(changes, copy_rows):
    launches = attention_launches(replace(PREFILL, **changes), HOPPER)
    assert [launch.variant.copy_rows for launch in launches] == [copy_rows]


@pytest.mark.parametrize("dim", range(16, 257, 8))
def test_products_on_hopper_are_of_the_columns_that_are_there(dim):
    """In one or two pieces of what is copied: of keys as few columns as there can be, of values up to 128 in one."""
    variant = attention_launches(replace(PREFILL, head_dim=dim, value_dim=dim), HOPPER)[0].variant
    keys, values = variant.key_widths, variant.value_widths
    powers = [16, 32, 64, 128, 256]
    assert keys[0] > keys[1] and {*keys} <= {0, *powers}
    assert sum(keys) == min(a + b for a in powers for b in [0, *powers] if a + b >= dim)
    assert dim <= sum(values) <= -(-dim // 64) * 64 <= columns_of(dim)  # what is copied, and its room
    assert min(values[0], values[1] or 32) >= 32
    assert values[1] == 0 or (dim > 128 and values[0] % 64 == 0)


@pytest.mark.parametrize(
    ("queries", "seqs", "ragged"), [(8192, 1, True), (8192, 9, True), (8184, 8, False), (100, 1, False), (100, 1, True)]
)
def test_units_of_prompts_of_any_length_have_two_parts_on_hopper(queries, seqs, ragged):
    problem = replace(PREFILL, num_tokens=queries, num_seqs=seqs, ragged=ragged)
    launches = attention_launches(problem, HOPPER)
    assert [launch.variant.copy_rows for launch in launches] == [16] + [0] * ragged
    assert (launches[0].variant.block_m, launches[0].num_warps) == (128, 8)


@pytest.mark.parametrize(
    ("changes", "rows", "programs", "rounds"),
    [
        (dict(short_window=True), 64, 2, 1),
        (dict(short_window=True, num_tokens=16384), 64, 2, 6),  # whose keys fill the L2 cache
        (dict(short_window=True, block_size=64, ragged=True), 64, 2, 1),
        (dict(short_window=True, block_size=128), 64, 2, 1),
        (dict(short_window=True, head_dim=64, value_dim=64), 64, 3, 1),
        (dict(short_window=True, head_dim=256, value_dim=256), 128, 1, 6),
        (dict(short_window=False, num_seqs=5), 128, 1, 5),
        (dict(short_window=False, num_seqs=9), 128, 1, 1),
        (dict(features=Features(), num_seqs=8), 128, 1, 5),
        (dict(features=Features(), num_seqs=16), 128, 1, 1),
        (dict(features=Features(), num_seqs=8, head_dim=64, value_dim=64), 64, 3, 3),
        (dict(features=Features(), num_seqs=8, head_dim=48, value_dim=16), 64, 3, 3),
        (dict(features=Features(), num_seqs=8, head_dim=56, value_dim=48), 128, 1, 5),  # rows of 112 bytes
        (dict(features=Features(), num_seqs=8, head_dim=48, value_dim=40), 128, 1, 5),
        (dict(short_window=True, head_dim=40, value_dim=40), 64, 3, 1),
        (dict(features=Features(), num_seqs=16, head_dim=64, value_dim=64), 128, 1, 1),
        (dict(features=Features(), num_seqs=8, head_dim=64, value_dim=64, ragged=True), 128, 1, 5),
    ],
    ids=str,
)
def test_short_units_have_small_programs_where_the_cache_serves_them(changes, rows, programs, rounds):
    problem = replace(PREFILL, num_tokens=8192, features=Features(window=True))
    launch = attention_launches(replace(problem, **changes), HOPPER)[0]
    assert (launch.variant.block_m, launch.programs, launch.rounds) == (rows, 132 * programs, rounds)
    assert launch.max_registers * 32 * (launch.num_warps + 4) * programs <= 65536


@pytest.mark.parametrize(
    ("changes", "rows", "warps"),
    [
        (dict(), 192, 12),
        (dict(ragged=True), 192, 12),
        (dict(block_size=8), 128, 8),  # ids of 16 blocks take the registers of a third part
        (dict(block_size=48), 128, 8),
        (dict(block_size=384), 192, 12),
        (dict(value_dim=128), 128, 8),
        (dict(head_dim=24, value_dim=40), 192, 12),
        (dict(value_dim=72), 128, 8),
        (dict(num_seqs=5), 64, 4),
        (dict(num_seqs=9), 128, 8),
        (dict(num_seqs=5, ragged=True), 128, 8),
    ],
)
def test_three_parts_serve_long_prompts_of_narrow_heads(changes, rows, warps):
    problem = replace(PREFILL, **dict(head_dim=64, value_dim=64, num_tokens=8192, num_seqs=2) | changes)
    launch = attention_launches(problem, HOPPER)[0]
    assert (launch.variant.block_m, launch.num_warps) == (rows, warps)
    assert launch.max_registers * 32 * (warps + 4) <= 65536  # of a multiprocessor, loaders among them


@pytest.mark.parametrize(
    ("queries", "seqs", "heads", "rounds"),
    [
        (512, 1, 32, 1),
        (2048, 1, 32, 1),
        (8192, 1, 32, 5),
        (8192, 1, 8, 1),
        (8192, 5, 32, 5),
        (32768, 1, 32, 6),
        (10**6, 3, 1, 6),
    ],
)
def test_long_prompts_are_dealt_out_in_rounds(queries, seqs, heads, rounds):
    problem = replace(PREFILL, num_tokens=queries, num_seqs=seqs, num_heads=heads, num_kv_heads=1, ragged=True)
    prefill, decode = attention_launches(problem, HOPPER)
    assert (prefill.rounds, decode.rounds) == (rounds, 0)
    assert attention_launches(problem, AMPERE)[0].rounds == 0
