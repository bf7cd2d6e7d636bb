"""Launch parameters of attention: pure functions, tested without Triton."""

import itertools
from dataclasses import replace

import pytest

from torch_paged.kernels.features import Features, Stored
from torch_paged.kernels.launch_config import WORKSPACE_LIMIT, attention_launches
from torch_paged.kernels.problem import Device, Problem, split_dim
from torch_paged.kernels.shipped import shipped_variants

DEVICES = {
    "sm_80": Device(108, 164 * 1024, 80),
    "sm_86": Device(84, 100 * 1024, 86),
    "sm_90": Device(132, 228 * 1024, 90),
    "sm_100": Device(148, 228 * 1024, 100),
    "gfx942": Device(304, 64 * 1024, 94, amd=True),
    "gfx90a": Device(104, 64 * 1024, 90, amd=True),
}
DECODE = Problem(
    num_tokens=64,
    num_seqs=64,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    value_dim=128,
    block_size=16,
    itemsize=2,
    causal=True,
    ragged=False,
)


@pytest.fixture(params=DEVICES.values(), ids=DEVICES.keys())
def gpu(request):
    return request.param


@pytest.mark.parametrize("dim", [*range(16, 513), 576])
def test_pieces_of_a_row_cover_it_without_doubling_it(dim):
    pieces = split_dim(dim)
    assert all(piece & (piece - 1) == 0 for piece in pieces)
    assert dim <= sum(pieces) < 2 * dim
    assert pieces[1] == 0 or pieces[1] >= 32


def test_pieces_of_common_head_dims():
    dims = (64, 80, 96, 112, 128, 192, 256, 576)
    assert [split_dim(dim) for dim in dims] == [
        (64, 0),
        (64, 32),
        (64, 32),
        (128, 0),
        (128, 0),
        (128, 64),
        (256, 0),
        (512, 64),
    ]


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("dim", [16, 80, 128, 256, 512, 576])
def test_workspace_is_bounded_at_any_shape(gpu, dim, itemsize):
    for heads, tokens, seqs, ragged in itertools.product((1, 8, 128), (1, 4096, 2**20), (1, 1024), (False, True)):
        problem = replace(
            DECODE,
            num_tokens=tokens * seqs,
            num_seqs=seqs,
            num_heads=heads,
            num_kv_heads=1,
            head_dim=dim,
            value_dim=min(dim, 512),
            itemsize=itemsize,
            ragged=ragged,
        )
        launches = attention_launches(problem, gpu)
        assert all(4 * (x.partial_floats + x.handoff_ints) <= WORKSPACE_LIMIT for x in launches)
        assert all(x.programs >= 1 for x in launches)


@pytest.mark.parametrize("ragged", [False, True])
def test_batch_and_number_of_kv_heads_compile_nothing_new(gpu, ragged):
    problem = replace(DECODE, ragged=ragged)
    few = attention_launches(problem, gpu)
    for seqs, scale in ((65, 1), (1000, 1), (64, 2)):
        other = replace(problem, num_seqs=seqs, num_tokens=seqs, num_heads=32 * scale, num_kv_heads=8 * scale)
        assert attention_launches(other, gpu) == few


@pytest.mark.parametrize("heads", [1, 4, 7, 16, 20, 128])
@pytest.mark.parametrize("tokens", [1, 3, 40, 5000])
@pytest.mark.parametrize("ragged", [False, True])
def test_every_sequence_is_served_by_one_launch(heads, tokens, ragged, gpu):
    problem = replace(DECODE, num_tokens=tokens, num_seqs=1, num_heads=heads, num_kv_heads=1, ragged=ragged)
    variants = [launch.variant for launch in attention_launches(problem, gpu)]
    for queries in range(1, tokens + 1):
        rows = queries * heads
        assert sum(v.rows_above < rows <= v.rows_upto for v in variants) == 1


def test_few_rows_get_small_tiles_and_many_get_large_ones():
    launches = attention_launches(replace(DECODE, num_tokens=4096, ragged=True), DEVICES["sm_90"])
    assert [launch.variant.block_m for launch in launches] == [128, 16]
    assert [launch.variant.unmasked_first for launch in launches] == [True, False]


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("queries", [1, 4, 8, 16])
@pytest.mark.parametrize(("head_dim", "programs"), [(64, 2), (80, 2), (128, 2), (256, 1)])
def test_loads_are_pipelined_where_memory_decides(target, queries, head_dim, programs):
    problem = replace(DECODE, num_tokens=queries * DECODE.num_seqs, head_dim=head_dim, value_dim=head_dim)
    (launch,) = attention_launches(problem, DEVICES[target])
    assert launch.variant.num_stages >= 3
    assert launch.programs >= programs * DEVICES[target].multiprocessors


@pytest.mark.parametrize(
    ("changes", "keys"), [({}, 64), ({"features": Features(alibi=True)}, 32), ({"aligned": False}, 32)]
)
def test_tiles_of_wide_heads_are_smaller_where_registers_would_be_spilled(changes, keys):
    problem = replace(DECODE, num_tokens=16 * DECODE.num_seqs, head_dim=256, value_dim=256, **changes)
    (launch,) = attention_launches(problem, DEVICES["sm_90"])
    assert launch.variant.tile == keys


@pytest.mark.parametrize(
    ("changes", "target", "unmasked_first"),
    [
        ({}, "sm_90", True),
        ({"features": Features(softcap=True, sinks=True)}, "sm_90", True),
        ({"features": Features(key=Stored("e4m3", "head"), value=Stored("e4m3", "head"))}, "sm_90", True),
        ({"features": Features(value=Stored("int8", "token"))}, "sm_90", False),
        ({"features": Features(window=True)}, "sm_90", False),
        ({"features": Features(alibi=True)}, "sm_90", False),
        ({}, "sm_80", False),
        ({}, "sm_100", False),
        ({}, "gfx90a", False),
    ],
)
def test_few_rows_have_a_loop_without_masks_where_registers_allow(changes, target, unmasked_first):
    (launch,) = attention_launches(replace(DECODE, num_tokens=16 * DECODE.num_seqs, **changes), DEVICES[target])
    assert launch.variant.block_m == 64
    assert launch.variant.unmasked_first == unmasked_first
    assert not attention_launches(DECODE, DEVICES[target])[0].variant.unmasked_first


@pytest.mark.parametrize(
    ("block_size", "paging"), [(1, "any"), (7, "any"), (16, "several"), (64, "one"), (256, "one"), (48, "any")]
)
def test_paging_follows_block_size(block_size, paging):
    (launch,) = attention_launches(replace(DECODE, block_size=block_size), DEVICES["sm_90"])
    assert launch.variant.paging == paging


def test_values_share_the_tiles_of_keys_only_where_their_pieces_agree():
    latent = replace(DECODE, head_dim=576, value_dim=512, shared_values=True)
    assert attention_launches(latent, DEVICES["sm_90"])[0].variant.shared_values
    narrower = replace(DECODE, head_dim=128, value_dim=80, shared_values=True)
    assert not attention_launches(narrower, DEVICES["sm_90"])[0].variant.shared_values


def test_options_have_launches_of_their_own(gpu):
    assert DECODE.plain_caches
    windowed = replace(DECODE, features=Features(window=True))
    assert windowed.plain_caches
    assert not replace(DECODE, features=Features(value=Stored("int8", "head"))).plain_caches
    assert attention_launches(windowed, gpu) != attention_launches(DECODE, gpu)


@pytest.mark.parametrize(
    ("changes", "pairs"),
    [
        ({}, True),
        (dict(head_dim=80), True),
        (dict(value_dim=32), True),
        (dict(value_dim=16), False),
        (dict(value_dim=96), False),
        (dict(aligned=False), False),
        (dict(itemsize=4), False),
        (dict(shared_values=True), False),
        (dict(num_tokens=512), False),
        (dict(features=Features(key=Stored("e4m3"))), False),
    ],
    ids=str,
)
def test_narrow_values_come_in_pairs(changes, pairs, gpu):
    stored = replace(DECODE, features=Features(value=Stored("e4m3")))
    variant = attention_launches(replace(stored, **changes), gpu)[0].variant
    assert variant.value_pairs == pairs
    if pairs:
        assert sum(variant.value_widths) == variant.value_dim


PREFILL = replace(DECODE, num_tokens=4096, num_seqs=1)


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
        (dict(features=Features(softcap=True), far_cap=True), 0),
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
    launches = attention_launches(replace(PREFILL, **changes), DEVICES["sm_90"])
    assert [launch.variant.copy_rows for launch in launches] == [copy_rows]


@pytest.mark.parametrize("dim", range(16, 257, 8))
def test_products_on_hopper_are_of_the_columns_that_are_there(dim):
    """In one or two pieces of what is copied, of which the second begins a copy; of values in one up to 128."""
    variant = attention_launches(replace(PREFILL, head_dim=dim, value_dim=dim), DEVICES["sm_90"])[0].variant
    for first, rest in (variant.key_widths, variant.value_widths):
        assert dim <= first + rest <= -(-dim // 64) * 64  # what is copied
        assert rest == 0 or first % 64 == 0
    assert min(variant.value_widths[0], variant.value_widths[1] or 32) >= 32
    assert variant.value_widths[1] == 0 or dim > 128


@pytest.mark.parametrize(
    ("queries", "seqs", "ragged"), [(8192, 1, True), (8192, 9, True), (8184, 8, False), (100, 1, False), (100, 1, True)]
)
def test_units_of_prompts_of_any_length_have_two_parts_on_hopper(queries, seqs, ragged):
    problem = replace(PREFILL, num_tokens=queries, num_seqs=seqs, ragged=ragged)
    launches = attention_launches(problem, DEVICES["sm_90"])
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
        (dict(features=Features(), num_seqs=16, head_dim=64, value_dim=64), 128, 1, 1),
        (dict(features=Features(), num_seqs=8, head_dim=64, value_dim=64, ragged=True), 128, 1, 5),
    ],
    ids=str,
)
def test_short_units_have_small_programs_where_the_cache_serves_them(changes, rows, programs, rounds):
    problem = replace(PREFILL, num_tokens=8192, features=Features(window=True))
    launch = attention_launches(replace(problem, **changes), DEVICES["sm_90"])[0]
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
    launch = attention_launches(problem, DEVICES["sm_90"])[0]
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
    prefill, decode = attention_launches(problem, DEVICES["sm_90"])
    assert (prefill.rounds, decode.rounds) == (rounds, 0)
    assert attention_launches(problem, DEVICES["sm_80"])[0].rounds == 0


@pytest.mark.parametrize(("seqs", "programs", "warps"), [(15, 2, 4), (16, 4, 2), (64, 4, 2)])
def test_many_sequences_of_8_bit_caches_have_more_and_smaller_programs(seqs, programs, warps):
    e4m3 = Stored("e4m3", "head")
    problem = replace(DECODE, num_tokens=seqs, num_seqs=seqs, features=Features(key=e4m3, value=e4m3, normalised=True))
    (launch,) = attention_launches(problem, DEVICES["sm_90"])
    assert (launch.programs, launch.num_warps) == (132 * programs, warps)
    (plain,) = attention_launches(replace(problem, features=Features()), DEVICES["sm_90"])
    assert (plain.programs, plain.num_warps) == (132 * 2, 4)


@pytest.mark.parametrize(("seqs", "queries", "rows"), [(1, 1, 4), (64, 1, 4), (2, 16, 1), (3, 16, 8), (8, 512, 16)])
def test_warps_share_the_parts_of_a_row_where_few_units_have_many(seqs, queries, rows):
    problem = replace(DECODE, num_seqs=seqs, num_tokens=seqs * queries)
    (launch,) = attention_launches(problem, DEVICES["sm_90"])
    units = 8 * seqs if launch.variant.single_tile else launch.programs
    assert launch.rows_combined(units) == rows


def test_only_hopper_has_the_hopper_kernel(gpu):
    launches = attention_launches(replace(PREFILL, ragged=True), gpu)
    assert [launch.variant.copy_rows for launch in launches] == [16 if gpu.hopper else 0, 0]


def test_shipped_variants_are_named_and_complete(gpu):
    shipped = shipped_variants(gpu)
    assert len({variant.name for variant in shipped}) == len(shipped)
    for kind, dtype, dim, block in itertools.product(
        ("decode", "prefill", "mixed"), ("fp16", "bf16", "fp32"), (64, 80, 128, 256), (1, 16, 64)
    ):
        assert any(variant.name.startswith(f"{kind}-{dtype}-dim{dim}-block{block}-") for variant in shipped)
