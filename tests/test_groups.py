"""Layers with sliding windows, alone and beside full ones, plain and quantised: against attention over all keys."""

from itertools import chain

import pytest
import torch
from cache_twins import DIM, HEADS, KV_HEADS, SIZE, STORED, VALUE_DIM, WINDOWS, Twin, make_cache, some

from torch_paged import PagedKVCache


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize(("stored", "buckets"), [("float32", None), ("float32", [4, 32]), ("int8", [4, 32])], ids=str)
@pytest.mark.parametrize("windows", WINDOWS)
def test_steps_equal_attention_over_all_keys(windows, stored, buckets):
    """Prefill, decode, forks, rollback, truncation, prefixes found, swap: step by step."""
    run_through(windows, stored, buckets)


@pytest.mark.parametrize("stored", sorted(STORED.keys() - {"float32", "int8"}))
def test_quantised_steps_equal_attention_over_all_keys(stored):
    run_through("mixed", stored, None)


@pytest.mark.gpu
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("windows", WINDOWS)
def test_steps_on_a_gpu(windows, stored):
    run_through(windows, stored, [4, 32], "cuda")


def run_through(windows, stored, buckets, device="cpu"):
    twin = Twin(WINDOWS[windows], device, buckets=buckets, **STORED[stored])
    first, second = twin.add(), twin.add()
    twin.step({first: some(21), second: some(5, 1)})
    for i in range(9):
        twin.step({second: [i], first: [i + 1]})
    child = twin.fork(first)
    twin.step({first: [3], child: [4], second: [5]})
    twin.step({child: some(6, 2), first: [1]}, commit=False)
    twin.step({child: some(6, 2), first: [1]})
    twin.truncate(child, SIZE)
    twin.step({child: [9, 8], second: [7]})
    found = twin.add(twin.tokens[first])
    assert len(twin.tokens[found]) == (len(twin.tokens[first]) - 1) // SIZE * SIZE
    twin.step({found: [1, 2, 3], first: [2]})
    held = sum(group.num_blocks - group.num_free_blocks for group in twin.cache.groups)
    twin.cache.swap_out([first, child])
    twin.cache.check_integrity()
    assert sum(group.num_blocks - group.num_free_blocks for group in twin.cache.groups) < held
    twin.step({found: [4], second: some(9)})
    intruder = twin.cache.add()  # what the prefix cache holds is evicted
    free = min(group.num_free_blocks for group in twin.cache.groups)
    twin.cache.rollback(twin.cache.prepare([intruder], min(free * SIZE, 80)))
    twin.cache.free(intruder)
    twin.cache.swap_in([first, child])
    twin.cache.check_integrity()
    for i in range(12):
        twin.step({first: [i], child: [i], found: [2 * i], second: [0]})
    twin.cache.free(list(twin.seqs))
    twin.cache.clear_prefixes()
    twin.cache.check_integrity()
    assert twin.cache.stats().blocks_used == 0


def test_tensors_of_layers():
    shape = (64, SIZE, KV_HEADS)
    for stored, kinds in dict(float32=0, e4m3=0, int8=3, **{"int8-static": 1}).items():
        cache = make_cache([None], **STORED[stored])
        (tensors,) = cache.tensors()
        assert [tuple(part.shape) for part in tensors[:2]] == [(*shape, DIM), (*shape, VALUE_DIM)]
        assert [part.dim() for part in tensors[2:]] == [kinds] * (2 if kinds else 0)
        assert all(part.dtype == torch.float32 for part in tensors[2:])
        assert cache.state_dict() == {}
    cache.to(torch.float32)
    with pytest.raises(
        RuntimeError, match=r"a paged cache stays torch.float32 on cpu, it cannot become torch.bfloat16"
    ):
        cache.bfloat16()


def test_the_functional_layer_is_the_layer():
    for stored in STORED.values():
        caches = [make_cache([6, None], **stored) for _ in range(2)]
        inputs = [torch.randn(13, heads, dim) for heads, dim in [(HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, VALUE_DIM)]]
        for layer in range(2):
            one, other = (cache.prepare([cache.add()], 13) for cache in caches)
            expected = caches[0].layers[layer](*inputs, one)
            assert torch.equal(caches[1].functional()(caches[1].tensors(), layer, *inputs, other), expected)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        (dict(windows=[6, 0]), ValueError, "sliding_window must be at least 1, got 0"),
        (dict(windows=[6, 2.5]), TypeError, "sliding_window must be an integer, got 2.5"),
        (
            dict(cache_dtype=torch.int8, scales="head"),
            ValueError,
            "scales must be 'token', 'static' or None, got 'head'",
        ),
        (
            dict(scales="token"),
            ValueError,
            "scales must be None with an unquantised cache of torch.float32, got 'token'",
        ),
        (dict(cache_dtype=torch.bfloat16), TypeError, "cache_dtype must be float8_e4m3fn, float8_e5m2, int8, or dtype"),
    ],
)
def test_bad_arguments_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        make_cache(**(dict(windows=[None]) | options))


def test_a_window_for_each_layer():
    sizes = dict(block_size=4, num_blocks=8, max_seqs=3, max_seq_len=20, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="sliding_window must be one int or one for each of 2 layers, got 3"):
        PagedKVCache(2, 1, 16, sliding_window=[None, 3, 3], **sizes)
    assert [layer.sliding_window for layer in PagedKVCache(2, 1, 16, sliding_window=3, **sizes).layers] == [3, 3]


def test_a_layer_has_its_own_window():
    cache = make_cache([6, None])
    inputs = [torch.randn(9, heads, dim) for heads, dim in [(HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, VALUE_DIM)]]
    batch = cache.prepare([cache.add()], 9)
    for window in (None, 5, 7):
        with pytest.raises(ValueError, match=f"the layer's sliding_window is 6, got sliding_window={window}"):
            cache.layers[0](*inputs, batch, sliding_window=window)
    windowed = cache.layers[0](*inputs, batch, sliding_window=6)
    torch.testing.assert_close(cache.layers[1](*inputs, batch, sliding_window=6), windowed)
    other = make_cache([None]).prepare([], 1)
    with pytest.raises(
        ValueError, match=r"the batch is of a cache with one group of layers, got a layer of groups\[1\]"
    ):
        cache.layers[0](*inputs, other)


@pytest.mark.usefixtures("either_way")
def test_a_batch_by_hand():
    """Two groups: the second's blocks differ once a window has moved on, and its table is arbitrary before it."""
    cache = make_cache([None, 6], buckets=[2, 4])
    seq = cache.add()
    for count in (18, 3):
        cache.commit(cache.prepare([seq], count))
    batch = cache.prepare([seq], 1)
    ((table, slots),) = batch.further_groups
    assert batch.block_table[0, :6].tolist() == [0, 1, 2, 3, 4, 5]
    assert table[0, 3:6].tolist() == [3, 4, 0], "the window has left the blocks 0 and 1 behind"
    assert (batch.slot_mapping.tolist(), slots.tolist()) == ([21, -1], [1, -1])
    assert batch.tables(1)[0] is table
    cache.check_integrity()


@pytest.mark.usefixtures("either_way")
def test_advance_equals_prepare():
    """In every group, three decode steps without the host are what prepare would have made."""

    def values(batch):
        return [*(part.tolist() for part in batch[3:6]), batch.seq_lens.tolist(), batch.further_groups[0][1].tolist()]

    caches = [make_cache([None, 6], buckets=[4, 64]) for _ in range(2)]
    seqs = [[cache.add() for _ in range(3)] for cache in caches]
    batches = [cache.prepare(own, [6, 33, 8], ahead=3) for cache, own in zip(caches, seqs, strict=True)]
    batch = batches[0]
    advanced = [batch := batch.advance() for _ in range(3)]
    caches[1].commit(batches[1])
    for batch in advanced:
        expected = caches[1].prepare(seqs[1], 1)
        assert values(batch) == values(expected)
        caches[1].commit(expected)
    caches[0].commit(batches[0], advanced=3)
    for cache in caches:
        cache.check_integrity()
    assert caches[0].stats() == caches[1].stats()


@pytest.mark.usefixtures("either_way")
def test_addresses_are_stable():
    cache = make_cache([None, 6], buckets=[2, 4])
    seqs = [cache.add() for _ in range(4)]

    def pointers(count):
        batch = cache.prepare(seqs[:count], 1)
        cache.commit(batch)
        return [part.data_ptr() for part in chain(batch[:2], batch[3:7], *batch.further_groups)]

    before = [pointers(count) for count in (1, 3)]
    pointers(4)
    assert [pointers(2), pointers(4)] == before
