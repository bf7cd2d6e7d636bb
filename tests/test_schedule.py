"""`paged::schedule`: the same results for less work, whatever batch it was made for."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from torch_paged.options import PLAIN, SCHEDULE_SHAPE
from torch_paged.testing import Storage, attention_inputs, quantised

ops = torch.ops.paged

BATCHES = {
    "decode": dict(query_lens=[1] * 4, seq_lens=[300, 0, 17, 129], uniform=True),
    "one-sequence": dict(query_lens=[1], seq_lens=[700], uniform=True, num_heads=8, num_kv_heads=1),
    "alike": dict(query_lens=[1] * 6, seq_lens=[70] * 6, uniform=True),
    "several-queries": dict(query_lens=[5] * 3, seq_lens=[300, 5, 90], uniform=True, num_heads=12, head_dim=80),
    "prefill": dict(query_lens=[70] * 2, seq_lens=[70, 130], uniform=True, block_size=7),
    "mixed": dict(query_lens=[1, 40, 0, 2, 33], seq_lens=[200, 90, 9, 64, 20], num_heads=6, spare_tokens=3),
    "nobody": dict(query_lens=[0, 0], seq_lens=[0, 40]),
    "no-sequence": dict(query_lens=[], seq_lens=[]),
}
OPTIONS = {
    "plain": {},
    "window-sinks": dict(sliding_window=40, sinks=torch.arange(12.0)),
}


def both(inputs, schedule, **options):
    """Outputs and lse with and without `schedule`."""
    return (inputs.call(ops.attention_with_lse, schedule=it, **options) for it in (None, schedule))


def same(first, second):
    return all(torch.equal(a, b) and not a.isnan().any() for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", BATCHES)
def test_results_are_the_same_to_the_bit(name, options, device):
    inputs = attention_inputs(**BATCHES[name], device=device, sliding_window=OPTIONS[options].get("sliding_window"))
    given = {
        key: it[: inputs.query.shape[1]].to(device) if key == "sinks" else it for key, it in OPTIONS[options].items()
    }
    schedule = inputs.call(ops.schedule, **given)
    assert (schedule.dtype, schedule.shape) == (torch.int32, SCHEDULE_SHAPE)
    assert same(*both(inputs, schedule, **given))


@pytest.mark.parametrize("scales", ["head", "token"])
def test_of_a_quantised_cache(scales, device):
    storage = Storage(torch.int8, scales)
    inputs, options = quantised(attention_inputs([1] * 3, [90, 200, 1], uniform=True, device=device), storage, storage)
    assert same(*both(inputs, inputs.call(ops.schedule, **options), **options))


def test_only_the_metadata_of_a_query_matter(device):
    inputs = attention_inputs(**BATCHES["decode"], device=device)
    unset = inputs._replace(query=torch.full_like(inputs.query, torch.nan))
    assert torch.equal(unset.call(ops.schedule), inputs.call(ops.schedule))


@pytest.mark.parametrize("other", ["more-heads", "window", "more-sequences", "zeros", "anything"])
def test_what_is_made_for_another_call_is_not_used(other, device):
    inputs = attention_inputs(**BATCHES["decode"], device=device)
    heads, longer = (attention_inputs(**(BATCHES["decode"] | it), device=device) for it in ({"num_heads": 8}, {}))
    longer = longer._replace(seq_lens=torch.full_like(longer.seq_lens, 9))
    schedule = {
        "more-heads": lambda: heads.call(ops.schedule),
        "window": lambda: longer.call(ops.schedule, sliding_window=3),
        "more-sequences": lambda: attention_inputs([1] * 9, [9] * 9, uniform=True, device=device).call(ops.schedule),
        "zeros": lambda: torch.zeros(SCHEDULE_SHAPE, dtype=torch.int32, device=device),
        "anything": lambda: torch.randint(-(2**31), 2**31 - 1, SCHEDULE_SHAPE, dtype=torch.int32, device=device),
    }[other]()
    assert same(*both(inputs, schedule))


@pytest.fixture
def only_its_own_memory(monkeypatch):
    """Interpreted kernels that look at an address outside of the tensors that they are given fail."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    inside = []

    def checked(access):
        def look(self, pointers, *rest):
            mask = rest[0] if access.__name__ == "create_masked_load" else rest[1]
            wrong = pointers.data[mask.data.astype(bool)].astype("uint64")
            for first, end in inside:
                wrong = wrong[(wrong < first) | (wrong >= end)]
            assert not len(wrong), f"{access.__name__} of {len(wrong)} numbers outside"
            return access(self, pointers, *rest)

        return look

    def remembered(self, arguments, keywords):
        result = prepare(self, arguments, keywords)
        storages = [it.untyped_storage() for it in tree_leaves(result[0]) if isinstance(it, torch.Tensor)]
        inside[:] = [(it.data_ptr(), it.data_ptr() + it.nbytes()) for it in storages]
        return result

    prepare = GridExecutor._init_args_hst
    monkeypatch.setattr(GridExecutor, "_init_args_hst", remembered)
    for name in ("create_masked_load", "create_masked_store"):
        monkeypatch.setattr(InterpreterBuilder, name, checked(getattr(InterpreterBuilder, name)))


STALE = {
    "none": (BATCHES["decode"], dict(seq_lens=[0] * 4)),
    "other-lengths": (BATCHES["decode"], dict(seq_lens=[1, 300, 2, 3])),
    "impossible-lengths": (BATCHES["decode"], dict(seq_lens=[-5, 10**6, 2**31 - 1, 7])),
    "other-queries": (BATCHES["mixed"], dict(cu_seqlens_q=[0, 41, 42, 70, 71, 76])),
    "backwards": (BATCHES["mixed"], dict(cu_seqlens_q=[9, 3, 40, 2, 90, 1], seq_lens=[1, 2, 300, 64, 7])),
}


@pytest.mark.interpreter
def test_where_lengths_are_copied_for_a_call_it_is_not_used():
    """It is read before the kernel in front has ended, which is the one that copies."""
    from torch_paged.kernels import attention, schedule

    inputs = attention_inputs(**BATCHES["decode"])
    others = torch.zeros(SCHEDULE_SHAPE, dtype=torch.int32)
    schedule(*inputs._replace(seq_lens=inputs.seq_lens // 2), True, PLAIN, others)
    expected = attention(*inputs, 0.1, True, PLAIN)
    assert not same(expected, attention(*inputs, 0.1, True, PLAIN, schedule=others))
    strided = torch.stack([inputs.seq_lens] * 2, 1)[:, 0]
    assert same(expected, attention(*inputs._replace(seq_lens=strided), 0.1, True, PLAIN, schedule=others))


@pytest.mark.interpreter
@pytest.mark.parametrize("name", STALE)
def test_other_lengths_are_wrong_but_harmless(name, only_its_own_memory):  # noqa: ARG001
    from torch_paged.kernels import attention, schedule

    batch, changes = STALE[name]
    inputs = attention_inputs(**batch)
    made = torch.zeros(SCHEDULE_SHAPE, dtype=torch.int32)
    others = {key: torch.tensor(it, dtype=torch.int32) for key, it in changes.items()}
    schedule(*inputs._replace(**others), True, PLAIN, made)
    assert made[0, 0] > 0
    attention(*inputs, 0.1, True, PLAIN, made)


@pytest.mark.parametrize(
    ("schedule", "error", "message"),
    [
        (torch.zeros(SCHEDULE_SHAPE), TypeError, r"schedule must be int32 \[launches, numbers\], got float32"),
        (
            torch.zeros(2, dtype=torch.int32),
            ValueError,
            r"schedule must be int32 \[launches, numbers\], got int32 \[2\]",
        ),
        (
            torch.zeros(2, 9, dtype=torch.int32),
            ValueError,
            r"schedule must be int32 \[2, 32768\], as paged::schedule makes it, got int32 \[2, 9\]",
        ),
        (
            torch.zeros(2, 2 * SCHEDULE_SHAPE[1], dtype=torch.int32)[:, ::2],
            ValueError,
            r"schedule must be contiguous, as paged::schedule makes it, got strides \[65536, 2\]",
        ),
        (torch.zeros(SCHEDULE_SHAPE, dtype=torch.int32, device="meta"), ValueError, "schedule must be on cpu like"),
    ],
)
def test_refused(schedule, error, message):
    with pytest.raises(error, match=message):
        attention_inputs(**BATCHES["decode"]).call(ops.attention, schedule=schedule)


def test_the_call_itself_is_checked():
    inputs = attention_inputs(**BATCHES["decode"])
    with pytest.raises(TypeError, match="block_table must be int32"):
        inputs._replace(block_table=inputs.block_table.long()).call(ops.schedule)


@pytest.mark.parametrize("name", ["decode", "mixed"])
def test_opcheck(name):
    inputs = attention_inputs(**BATCHES[name])
    inputs = inputs._replace(key_cache=inputs.key_cache.nan_to_num(), value_cache=inputs.value_cache.nan_to_num())
    bounds = dict(cu_seqlens_q=inputs.cu_seqlens_q)
    torch.library.opcheck(ops.schedule.default, inputs[:5], bounds)
    torch.library.opcheck(ops.attention.default, inputs[:5], bounds | dict(schedule=inputs.call(ops.schedule)))


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [False, True], ids=["eager", "graph"])
def test_steps_that_follow_each_other_closely(captured):
    """Kernels that begin while others end: lengths and blocks change from step to step, keys right before a call."""
    inputs = attention_inputs([1] * 6, [700] * 6, uniform=True, device="cuda", dtype=torch.float16)
    keys, values, table, lens = inputs.key_cache, inputs.value_cache, inputs.block_table, inputs.seq_lens
    first, blocks, rows = torch.tensor([300, 1, 700, 64, 65, 128]), table.clone(), torch.arange(6, device="cuda")
    new = torch.randn(6, 2, 32, device="cuda", dtype=torch.float16)

    def step(shared):
        lens.sub_(1).clamp_(min=1)
        table.copy_(table.roll(1, 0))
        schedule = inputs.call(ops.schedule) if shared else None
        outputs = []
        for layer in range(3):
            last = lens.long() - 1
            ops.append(new * (layer + 1), new - layer, keys, values, table[rows, last // 16] * 16 + last % 16)
            outputs.append(inputs.call(ops.attention, schedule=schedule))
        return torch.stack(outputs)

    def steps(shared, run=None):
        run = run or (lambda: step(shared))
        lens.copy_(first), table.copy_(blocks)
        keys.copy_(kept[0]), values.copy_(kept[1])
        return torch.stack([run().clone() for _ in range(40)])

    kept = keys.clone(), values.clone()
    expected = steps(False)
    run = None
    if captured:
        step(True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = step(True)
        run = lambda: graph.replay() or output  # noqa: E731
    assert torch.equal(steps(True, run), expected)
