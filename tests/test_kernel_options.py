"""What the options' kernels are made of, where a whole operator would hide it: conversions, tanh, work left undone."""

import os
from dataclasses import replace

import pytest
import torch

from torch_paged import reference, warmup
from torch_paged.options import AttentionOptions
from torch_paged.testing import Storage, assert_within_budget, attention_inputs, low_precision_attention, quantised

pytest.importorskip("triton")
import triton
import triton.language as tl

from torch_paged import kernels
from torch_paged.kernels.attention import launch_attention
from torch_paged.kernels.attention_logits import tanh
from torch_paged.kernels.attention_plan import problem_of
from torch_paged.kernels.attention_stored import widen, widen_pairs
from torch_paged.kernels.deal import deal
from torch_paged.kernels.device import INTERPRETED, device_of
from torch_paged.kernels.features import Stored
from torch_paged.kernels.launch_config import attention_launches
from torch_paged.kernels.problem import Device

HERE = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [pytest.mark.interpreter if HERE else pytest.mark.gpu]
DEVICE = "cpu" if HERE else "cuda"
ops = torch.ops.paged
E4M3, E5M2, INT8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8


@triton.jit
def _widen(codes, like, out, S: tl.constexpr):
    lane = tl.arange(0, 256)
    LIKE: tl.constexpr = like.dtype.element_ty
    tl.store(out + lane, widen(tl.load(codes + lane), LIKE, S).to(tl.float32))


@triton.jit
def _widen_pairs(pairs, out, S: tl.constexpr):
    lane = tl.arange(0, 256)
    first, second = widen_pairs(tl.load(pairs + lane), S)
    tl.store(out + 2 * lane, first.to(tl.float32))
    tl.store(out + 2 * lane + 1, second.to(tl.float32))


# As the device does it, and e4m3 by integer arithmetic everywhere.
NATIVE = not HERE and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
EVERYWHERE = [Stored("e4m3 bits"), Stored("e5m2"), Stored("int8")]
STORED = EVERYWHERE + [Stored(dtype, packed=True) for dtype in ("e4m3", "e5m2", "int8") if NATIVE]
TYPES = {"e4m3 bits": E4M3, "e4m3": E4M3, "e5m2": E5M2, "int8": INT8}


@pytest.mark.parametrize("like", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stored", STORED, ids=str)
def test_every_code_widens_exactly(stored, like):
    codes = torch.arange(256, dtype=torch.uint8)
    exact = codes.view(TYPES[stored.dtype])
    held = codes if stored.bytes else exact
    out = torch.full((256,), -1.0, device=DEVICE)
    _widen[(1,)](held.to(DEVICE), torch.empty(0, dtype=like, device=DEVICE), out, S=stored)
    torch.testing.assert_close(out.cpu(), exact.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("stored", STORED, ids=str)
def test_every_code_of_a_pair_widens_exactly(stored):
    codes = torch.arange(256, dtype=torch.uint8)
    pairs = torch.stack([codes, codes.flip(0)], dim=1)
    out = torch.full((512,), -1.0, device=DEVICE)
    _widen_pairs[(1,)](pairs.view(torch.int16).flatten().to(DEVICE), out, S=stored)
    exact = pairs.view(TYPES[stored.dtype]).float().flatten()
    torch.testing.assert_close(out.cpu(), exact, rtol=0, atol=0, equal_nan=True)


def test_bytes_of_e4m3_are_decoded_only_where_no_type_is():
    query = torch.zeros(1, 2, 32, dtype=torch.bfloat16)
    cache = torch.zeros(1, 16, 2, 32).to(E4M3)
    problem = problem_of(query, cache, cache.clone(), torch.zeros(1, 1, dtype=torch.int32), None, True)

    def stored(**changes):
        return attention_launches(problem, replace(Device(132, 200 * 1024), **changes))[0].variant.has.key.dtype

    assert stored(capability=90) == stored(capability=89) == "e4m3"
    assert stored(capability=80) == stored(capability=86) == stored(capability=94, amd=True) == "e4m3 bits"
    assert INTERPRETED.capability < 89  # so that the grid shows it


@triton.jit
def _tanh(x, out, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    tl.store(out + lane, tanh(tl.load(x + lane)))


def test_tanh_is_accurate_everywhere():
    magnitudes = torch.logspace(-40, 38, 2048, dtype=torch.float64).float()
    edge = torch.linspace(0.15, 0.25, 1024)  # where one formula follows another
    x = torch.cat([magnitudes, -magnitudes[:512], edge[:511], torch.tensor([0.0])])
    out = torch.empty(len(x), device=DEVICE)
    x = torch.nn.functional.pad(x, (0, 4096 - len(x))).to(DEVICE)
    out = torch.empty(4096, device=DEVICE)
    _tanh[(1,)](x, out, SIZE=4096)
    exact = x.double().tanh()
    error = ((out.double() - exact).abs() / exact.abs().clamp(min=2.0**-126)).max()
    assert error <= 6 * 2.0**-23, error


LONG = dict(query_lens=[1, 70, 0, 2, 33], seq_lens=[200, 150, 9, 64, 20], num_heads=6, spare_tokens=3)
KINDS = {
    "window": dict(sliding_window=37),
    "sinks": dict(sinks=torch.linspace(-1, 2, 6)),
    "window-softcap-alibi-sinks": dict(
        sliding_window=90, softcap=2.0, alibi_slopes=torch.linspace(0.3, 0.01, 6), sinks=torch.linspace(-1, 2, 6)
    ),
    "token-scales": {},
}


@pytest.mark.parametrize("programs", [1, 7, 24])
@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_programs_gives_the_same(kind, programs):
    """Units cut between programs: windows, sinks and the tokens' scales survive the handoff."""
    options = {name: it.to(DEVICE) if isinstance(it, torch.Tensor) else it for name, it in KINDS[kind].items()}
    window = options.get("sliding_window")
    inputs = attention_inputs(**LONG, sliding_window=window, device=DEVICE, dtype=torch.float16)
    if kind == "token-scales":
        inputs, options = quantised(inputs, Storage(INT8, "token"), Storage(E4M3, "token"))
    exact = inputs._replace(query=inputs.query.double()).call(reference.attention_with_lse, **options)
    low = low_precision_attention(inputs, **options)
    query, key_cache, value_cache, table, _, bounds = inputs
    given = AttentionOptions(**options)
    output = query.new_full((*query.shape[:2], value_cache.shape[3]), torch.nan)
    lse = torch.full(query.shape[:2], torch.nan, device=DEVICE)
    problem = problem_of(query, key_cache, value_cache, table, bounds, True, given)
    for launch in attention_launches(problem, device_of(query.device)):
        launch = replace(launch, programs=programs)
        launch_attention(launch, *inputs, output, lse, query.shape[2] ** -0.5, given)
    assert_within_budget(output, exact[0], low[0])
    assert_within_budget(lse, exact[1], low[1], "lse")


@pytest.mark.skipif(not HERE, reason="counts interpreted products")
@pytest.mark.parametrize("queries", [1, 100])
def test_work_follows_the_window(queries, monkeypatch):
    """Products of tiles: as many as windows hold, not as many as there are keys."""
    from triton.runtime.interpreter import InterpreterBuilder

    products = [0]
    create_dot = InterpreterBuilder.create_dot

    def counted(*args):
        products[0] += 1
        return create_dot(*args)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counted)
    inputs = attention_inputs([queries], [2000], num_heads=2, num_kv_heads=1, head_dim=16, block_size=64)
    inputs.call(ops.attention, sliding_window=40)
    variant = attention_launches(problem_of(*inputs[:4], inputs.cu_seqlens_q, True), INTERPRETED)[0].variant
    units = -(-2 * queries // variant.block_m)
    tiles = -(-(40 + variant.block_m // 2) // variant.tile) + 1  # a window and the unit's own keys may begin in a tile
    assert 2 * units <= products[0] <= 2 * units * tiles
    assert products[0] < 2 * units * (2000 // variant.tile) / 4


@triton.jit
def _pieces(seq_lens, out, window, V: tl.constexpr):
    sequence, _, _, _, _ = deal(seq_lens, None, 2, 2, 1, 4096, V, window)
    tl.store(out + tl.program_id(0), sequence)


@pytest.mark.parametrize(("window", "second"), [(None, 0), (64, 1)])
def test_programs_share_what_windows_hold(window, second):
    """Of a long sequence and a short one, whose windows are the same, each gets one; without, both share the long."""
    inputs = attention_inputs([1, 1], [1500, 100], num_heads=2, num_kv_heads=1, head_dim=16, uniform=True)
    options = AttentionOptions(sliding_window=window)
    (launch,) = attention_launches(problem_of(*inputs[:4], None, True, options), INTERPRETED)
    out = torch.full((2,), -1, dtype=torch.int32, device=DEVICE)
    variant = replace(launch.variant, least_work=1)
    _pieces[(2,)](inputs.seq_lens.to(DEVICE), out, window or 0, V=variant)
    assert out.tolist() == [0, second]


@pytest.mark.parametrize("uniform", [False, True])
def test_cache_without_blocks_leaves_the_sinks(uniform):
    inputs = attention_inputs([2, 2], [0, 0], uniform=uniform, spare_tokens=0 if uniform else 3, device=DEVICE)
    empty = inputs._replace(key_cache=inputs.key_cache[:0], value_cache=inputs.value_cache[:0])
    sinks = torch.arange(4.0, device=DEVICE)
    output, lse = empty.call(ops.attention_with_lse, sinks=sinks)
    assert output.eq(0).all()
    assert torch.equal(lse[:4], sinks.expand(4, 4))
    assert lse[4:].isneginf().all()


@pytest.mark.parametrize("rounded", [E4M3, E5M2, INT8], ids=str)
def test_append_rounds_every_bfloat16_as_the_reference_does(rounded):
    """To the bit, infinities and every number between two codes included; float32 too, ties among them."""
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    codes = torch.arange(256, dtype=torch.uint8).view(rounded).float().nan_to_num(0, posinf=0, neginf=0).sort().values
    between = (codes[1:] + codes[:-1]) / 2
    near = torch.cat([between, between.nextafter(codes[1:]), between.nextafter(codes[:-1])])
    rows = torch.cat([halves, near, torch.zeros(-len(near) % 64)]).view(-1, 2, 32)
    scale = torch.ones(())
    caches = [torch.zeros(len(rows), 1, 2, 32).to(rounded) for _ in range(2)]
    slots = torch.arange(len(rows))
    reference.append(rows, None, caches[1], None, slots, key_scale=scale)
    cache = caches[0].to(DEVICE)
    ops.append(rows.to(DEVICE), None, cache, None, slots.to(DEVICE), key_scale=scale.to(DEVICE))
    actual, expected = cache.cpu().float(), caches[1].float()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(actual.signbit() & (actual == 0), expected.signbit() & (expected == 0))


def test_warmup_with_every_option():
    given = dict(dtype=torch.float16, device=DEVICE, block_size=16)
    options = dict(sliding_window=True, softcap=True, alibi_slopes=True, sinks=True, rotary_dim=16, interleaved=True)
    assert warmup(4, 2, 32, **given, **options, cache_dtype=INT8, scales="token") > 0
    with pytest.raises(ValueError, match="scales must be 'scalar', 'head', 'token' or None, got 'row'"):
        warmup(4, 2, 32, **given, cache_dtype=INT8, scales="row")


def test_positions_out_of_range_are_taken_for_the_nearest():
    """Past the operator's own check, as on a GPU: no memory beside the angles is read."""
    angles = torch.full((9, 8), torch.nan, device=DEVICE)
    cos, sin = angles[2:5].copy_(torch.randn(3, 8)), torch.randn(9, 8, device=DEVICE)[2:5]
    query, key = torch.randn(4, 2, 16, device=DEVICE), torch.randn(4, 1, 16, device=DEVICE)
    rotated = []
    for positions in ([-1, 3, 1 << 40, -(1 << 40)], [0, 2, 2, 0]):
        cache = torch.zeros(1, 4, 1, 16, device=DEVICE)
        places = torch.tensor(positions, device=DEVICE), cache, None, torch.arange(4, device=DEVICE)
        rotated += [kernels.rotary_append(query, key, None, cos, sin, *places), cache]
    assert torch.equal(rotated[0], rotated[2])
    assert torch.equal(rotated[1], rotated[3])
