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
    launches = attention_launches(replace(DECODE, num_tokens=4096, num_seqs=1, ragged=True), gpu)
    assert [launch.variant.copy_rows for launch in launches] == [16 if gpu.hopper else 0, 0]


def test_shipped_variants_are_named_and_complete(gpu):
    shipped = shipped_variants(gpu)
    assert len({variant.name for variant in shipped}) == len(shipped)
    for kind, dtype, dim, block in itertools.product(
        ("decode", "prefill", "mixed"), ("fp16", "bf16", "fp32"), (64, 80, 128, 256), (1, 16, 64)
    ):
        assert any(variant.name.startswith(f"{kind}-{dtype}-dim{dim}-block{block}-") for variant in shipped)
