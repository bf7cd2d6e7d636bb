"""What a call is served by is settled once: whatever decides it must be noticed when it changes."""

import os
from types import SimpleNamespace

import pytest
import torch

from torch_paged import ops, reference
from torch_paged.options import SCHEDULE_SHAPE
from torch_paged.testing import assert_within_budget, attention_inputs, low_precision_attention

attention = torch.ops.paged.attention


def arguments(**changes):
    """Positional and keyword arguments of a call, those named in `changes` replaced."""
    given = dict(
        query=torch.zeros(4, 8, 64),
        key_cache=torch.zeros(6, 16, 2, 64),
        value_cache=torch.zeros(6, 16, 2, 64),
        block_table=torch.zeros(4, 3, dtype=torch.int32),
        seq_lens=torch.ones(4, dtype=torch.int32),
    )
    return given | changes


def call(given):
    given = dict(given)
    names = ("query", "key_cache", "value_cache", "block_table", "seq_lens")
    return attention(*[given.pop(name) for name in names], **given)


CHANGES = {
    "tokens": dict(query=torch.zeros(8, 8, 64)),
    "dtypes": {name: torch.zeros(size, dtype=torch.float16) for name, size in
               (("query", (4, 8, 64)), ("key_cache", (6, 16, 2, 64)), ("value_cache", (6, 16, 2, 64)))},
    "query-strides": dict(query=torch.zeros(8, 4, 64).transpose(0, 1)),
    "query-alignment": dict(query=torch.zeros(4 * 8 * 64 + 1)[1:].view(4, 8, 64)),
    "head-major": dict(key_cache=torch.zeros(6, 2, 16, 64).transpose(1, 2)),
    "cache-alignment": dict(value_cache=torch.zeros(6 * 16 * 2 * 64 + 1)[1:].view(6, 16, 2, 64)),
    "value-dim": dict(value_cache=torch.zeros(6, 16, 2, 32)),
    "table-width": dict(block_table=torch.zeros(4, 2, dtype=torch.int32)),
    "table-strides": dict(block_table=torch.zeros(4, 6, dtype=torch.int32)[:, ::2]),
    "lens-strides": dict(seq_lens=torch.ones(8, dtype=torch.int32)[::2]),
    "ragged": dict(cu_seqlens_q=torch.arange(5, dtype=torch.int32)),
    "scale": dict(scale=0.5),
    "negative-scale": dict(scale=-0.5),
    "not-causal": dict(causal=False),
    "window": dict(sliding_window=2),
    "longer-window": dict(sliding_window=3),
    "softcap": dict(softcap=3.0),
    "slopes": dict(alibi_slopes=torch.zeros(8)),
    "sinks": dict(sinks=torch.zeros(8)),
    "schedule": dict(schedule=torch.zeros(SCHEDULE_SHAPE, dtype=torch.int32)),
}  # fmt: skip


@pytest.fixture
def prepared(monkeypatch):
    """The calls that were prepared, by a package that does nothing else."""
    made = []

    def prepare_attention(*args):
        made.append(args)
        return lambda query, _, value_cache, *__, **___: query.new_zeros(*query.shape[:2], value_cache.shape[3])

    package = SimpleNamespace(CHECKS_VALUES=True, prepare_attention=prepare_attention)
    monkeypatch.setattr(ops, "_cpu_package", lambda: "nothing")
    monkeypatch.setattr(ops, "_package", lambda _: Package(package))
    monkeypatch.setattr(ops, "_calls", {})
    return made


class Package(SimpleNamespace):
    """Hashable, as a module is."""

    def __init__(self, package):
        super().__init__(**vars(package))

    def __hash__(self):
        return 1

    def __eq__(self, other):
        return isinstance(other, Package)


def test_calls_that_differ_in_contents_share_what_serves_them(prepared):
    for _ in range(3):
        call(arguments(query=torch.randn(4, 8, 64)))
    assert len(prepared) == 1


@pytest.mark.parametrize("name", CHANGES)
def test_what_decides_is_noticed_when_it_changes(prepared, name):
    call(arguments())
    call(arguments(**CHANGES[name]))
    assert len(prepared) == 2
    call(arguments())
    call(arguments(**CHANGES[name]))
    assert len(prepared) == 2


def test_options_of_one_form_are_told_apart(prepared):
    call(arguments(sinks=torch.zeros(8)))
    call(arguments(alibi_slopes=torch.zeros(8)))
    assert len(prepared) == 2


def test_what_was_checked_vouches_for_nothing_else(prepared):
    call(arguments())
    with pytest.raises(TypeError, match=r"seq_lens must be int32 \[num_seqs\], got int64 \[4\]"):
        call(arguments(seq_lens=torch.ones(4, dtype=torch.int64)))
    with pytest.raises(ValueError, match="query must have a last stride of 1"):
        call(arguments(query=torch.zeros(4, 8, 128)[..., ::2]))
    with pytest.raises(ValueError, match="softcap must be 0"):
        call(arguments(softcap=-1.0))
    with pytest.raises(ValueError, match="sliding_window needs causal=True"):
        call(arguments(sliding_window=2, causal=False))
    assert len(prepared) == 1


def test_memory_is_bounded(prepared, monkeypatch):
    monkeypatch.setattr(ops, "_REMEMBERED", 3)
    for window in range(1, 9):
        call(arguments(sliding_window=window))
        assert len(ops._calls) <= 3
    assert len(prepared) == 8


@pytest.mark.interpreter
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the kernels of a GPU, interpreted")
def test_values_that_are_keys_are_told_from_values_beside_them():
    """Caches of one metadata, once two and once the same memory twice."""
    inputs = attention_inputs([1] * 3, [40, 0, 65], uniform=True, dtype=torch.float16)
    alone = inputs._replace(value_cache=torch.randn_like(inputs.key_cache))
    shared = inputs._replace(value_cache=inputs.key_cache)
    for either in (shared, alone, shared, alone):
        exact = either._replace(query=either.query.double()).call(reference.attention)
        assert_within_budget(either.call(attention), exact, low_precision_attention(either)[0])


@pytest.mark.interpreter
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the kernels of a GPU, interpreted")
def test_ids_and_sinks_may_be_strided():
    """They are as far apart as their view says, also where several programs share a sequence."""
    inputs = attention_inputs([1], [700], uniform=True)
    sinks = torch.randn(inputs.query.shape[1], 2)[:, 0]
    apart = inputs._replace(block_table=inputs.block_table.repeat_interleave(2, 1)[:, ::2])
    exact = inputs._replace(query=inputs.query.double()).call(reference.attention, sinks=sinks)
    low = low_precision_attention(inputs, sinks=sinks)[0]
    assert_within_budget(apart.call(attention, sinks=sinks), exact, low)
