"""What the options' kernels are made of, where a whole operator would hide it: conversions, tanh, work left undone."""

import os
from dataclasses import replace

import pytest
import torch

from torch_paged import reference
from torch_paged.options import AttentionOptions
from torch_paged.testing import Storage, assert_within_budget, attention_inputs, low_precision_attention, quantised

pytest.importorskip("triton")
import triton
import triton.language as tl

from torch_paged.kernels.attention import launch_attention
from torch_paged.kernels.attention_logits import tanh
from torch_paged.kernels.attention_plan import problem_of
from torch_paged.kernels.attention_stored import widen
from torch_paged.kernels.device import INTERPRETED, device_of
from torch_paged.kernels.features import Stored
from torch_paged.kernels.launch_config import Device, attention_launches

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


@pytest.mark.parametrize("like", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stored", ["e4m3 bits", "e4m3", "e5m2", "int8"])
def test_every_code_widens_exactly(stored, like):
    """As the device does it, and e4m3 by integer arithmetic everywhere."""
    native = not HERE and torch.cuda.get_device_capability() >= (8, 9)
    if stored == "e4m3" and not native:
        pytest.skip("e4m3 is no type of this device")
    codes = torch.arange(256, dtype=torch.uint8)
    exact = codes.view({"e5m2": E5M2, "int8": INT8}.get(stored, E4M3)).float()
    held = codes if stored == "e4m3 bits" else codes.view({"e4m3": E4M3, "e5m2": E5M2, "int8": INT8}[stored])
    out = torch.full((256,), -1.0, device=DEVICE)
    _widen[(1,)](held.to(DEVICE), torch.empty(0, dtype=like, device=DEVICE), out, S=Stored(stored))
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


@pytest.mark.parametrize("cut", [1, 2, 5])
def test_programs_share_windows_alike(cut):
    """Every program gets about as many keys of a long sequence as of a short one, whose windows are the same."""
    inputs = attention_inputs([1, 1], [1500, 100], num_heads=2, num_kv_heads=1, head_dim=16, sliding_window=64)
    inputs = type(inputs)(*(it if it is None else it.to(DEVICE) for it in inputs))
    problem = problem_of(*inputs[:4], inputs.cu_seqlens_q, True, AttentionOptions(sliding_window=64))
    (launch,) = attention_launches(problem, device_of(inputs.query.device))
    output = inputs.query.new_full(inputs.query.shape, torch.nan)
    lse = torch.full(inputs.query.shape[:2], torch.nan, device=DEVICE)
    launch = replace(launch, programs=cut, variant=replace(launch.variant, least_work=1))
    launch_attention(launch, *inputs, output, lse, 0.25, AttentionOptions(sliding_window=64))
    exact = inputs._replace(query=inputs.query.double()).call(reference.attention, scale=0.25, sliding_window=64)
    assert (output - exact).abs().max() < 1e-5


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
