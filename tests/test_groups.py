"""Layers with sliding windows, alone and beside full ones, plain and quantised: against attention over all keys."""

import math
from itertools import chain

import pytest
import torch
from test_cache import either_way  # noqa: F401 - a fixture

from torch_paged import OutOfBlocks, PagedKVCache

HEADS, KV_HEADS, DIM, VALUE_DIM, SIZE = 4, 2, 16, 24, 4
WINDOWS = {"window": [6, 6, 6], "mixed": [None, 6, None], "three": [9, None, 1], "plain": [None] * 3}
STORED = {
    "float32": dict(),
    "e4m3": dict(cache_dtype=torch.float8_e4m3fn),
    "e4m3-token": dict(cache_dtype=torch.float8_e4m3fn, scales="token"),
    "e5m2-static": dict(cache_dtype=torch.float8_e5m2, scales="static"),
    "int8": dict(cache_dtype=torch.int8),
    "int8-static": dict(cache_dtype=torch.int8, scales="static"),
}


def make_cache(windows, device="cpu", **options):
    defaults = dict(block_size=SIZE, num_blocks=64, max_seqs=8, max_seq_len=80, dtype=torch.float32, device=device)
    cache = PagedKVCache(
        len(windows), KV_HEADS, DIM, value_head_dim=VALUE_DIM, sliding_window=windows, **(defaults | options)
    )
    poison(cache)
    for layer in cache.layers:
        if layer.key_scale is not None:
            layer.key_scale.copy_(torch.tensor([0.03, 0.05]))
            layer.value_scale.copy_(torch.tensor([0.04, 0.025]))
    return cache


def poison(cache):
    for tensor in chain(*(layer.blocks() for layer in cache.layers)):
        tensor.view(torch.uint8 if tensor.element_size() == 1 else tensor.dtype).fill_(
            0x7F if tensor.element_size() == 1 else math.nan
        )


class Twin:
    """A cache beside one of full attention that keeps everything: both get the same rows and must give the same.

    Rows follow from their token, position and layer, so that prefixes that are found hold what would be computed.
    """

    def __init__(self, windows, device="cpu", **options):
        self.windows, self.device = windows, device
        self.cache = make_cache(windows, device, **options)
        quantised = {name: options[name] for name in ("cache_dtype", "scales") if name in options}
        self.plain = make_cache([None] * len(windows), device, num_blocks=256, max_seqs=64, **quantised)
        self.seqs, self.tokens = {}, {}
        for group in self.cache._manager.groups[1:]:  # so that groups do not hand out the same numbers
            group.pool.free_blocks[:] = group.pool.free_blocks[::-1].copy()

    def rows(self, heads, dim, tokens, positions, salt):
        """[n, heads, dim], a function of each token and its position."""
        phase = torch.tensor(tokens)[:, None] * 1.7 + torch.tensor(positions)[:, None] * 0.61 + salt
        wave = torch.arange(heads * dim) * (0.37 + 0.11 * salt)
        return (torch.sin(phase + wave) * 2).view(-1, heads, dim).to(self.device)

    def add(self, prompt=()):
        """A sequence, its prompt not read but as far as it is found."""
        seq = self.cache.add(list(prompt))
        found = self.cache.length(seq)
        self.tokens[seq], self.seqs[seq] = [], self.plain.add()
        if found:
            self.read(self.plain, [self.seqs[seq]], [list(prompt[:found])], [0])
            self.tokens[seq] = list(prompt[:found])
        return seq

    def read(self, cache, seqs, new, starts, commit=True):
        """The outputs of all layers for a step."""
        batch = cache.prepare(seqs, [len(tokens) for tokens in new])
        tokens = [token for part in new for token in part]
        positions = [start + i for start, part in zip(starts, new, strict=True) for i in range(len(part))]
        padding = [0] * (len(batch.positions) - len(tokens))
        outputs = []
        for layer, window in enumerate(self.windows):
            parts = [
                self.rows(*shape, tokens + padding, positions + padding, layer + salt)
                for salt, shape in enumerate([(HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, VALUE_DIM)])
            ]
            own = {} if cache is self.cache else dict(sliding_window=window)
            outputs.append(cache.layers[layer](*parts, batch, **own)[: len(tokens)])
        if commit:
            cache.commit(batch, tokens)
        else:
            cache.rollback(batch)
        cache.check_integrity()
        return outputs

    def step(self, new, commit=True):
        """`new`: {sequence: tokens}."""
        starts = [len(self.tokens[seq]) for seq in new]
        assert starts == [self.cache.length(seq) for seq in new]
        twins = [self.seqs[seq] for seq in new]
        expected = self.read(self.plain, twins, list(new.values()), starts, commit)
        actual = self.read(self.cache, list(new), list(new.values()), starts, commit)
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        if commit:
            for seq, tokens in new.items():
                self.tokens[seq] += tokens

    def fork(self, seq):
        (child,), (twin,) = self.cache.fork(seq, 1), self.plain.fork(self.seqs[seq], 1)
        self.seqs[child], self.tokens[child] = twin, list(self.tokens[seq])
        return child

    def truncate(self, seq, forgotten):
        length = len(self.tokens[seq]) - forgotten
        self.cache.truncate(seq, length)
        self.plain.truncate(self.seqs[seq], length)
        del self.tokens[seq][length:]


def some(count, salt=0):
    return [(7 * i + 3 * salt) % 11 for i in range(count)]


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


def test_a_long_generation_holds_a_bounded_number_of_blocks():
    """10 000 tokens through a window of 64 in blocks of 16: six blocks hold it, the sixth as the window moves."""
    sizes = dict(block_size=16, num_blocks=6, max_seqs=2, max_seq_len=10016, dtype=torch.float32, device="cpu")
    cache = PagedKVCache(1, 1, 16, sliding_window=64, **sizes)
    seq, most = cache.add(), 0
    cache.commit(cache.prepare([seq], 90))
    while cache.length(seq) < 10000:
        batch = cache.prepare([seq], 1)
        most = max(most, cache.stats().blocks_used)
        cache.commit(batch, [cache.length(seq) % 13] if cache.length(seq) < 5000 else None)
        most = max(most, cache.stats().blocks_used)
    cache.check_integrity()
    assert most == math.ceil(64 / 16) + 2


def test_a_mixed_model_keeps_all_of_what_full_layers_see():
    cache = make_cache([None, 6], num_blocks=32)
    seq = cache.add()
    cache.commit(cache.prepare([seq], 40))
    assert [group.num_blocks - group.num_free_blocks for group in cache.groups] == [10, 3]
    stats = cache.stats()
    assert (stats.blocks_used, stats.tokens) == (13, 40)
    per_block = PagedKVCache.kv_bytes(1, SIZE, KV_HEADS, DIM, VALUE_DIM, dtype=torch.float32)
    assert stats.bytes_used == 13 * per_block
    cache.swap_out(seq)
    assert cache.stats().bytes_swapped == 13 * per_block


def test_a_step_in_flight_keeps_what_it_reads():
    """The second step is committed after a third was prepared: what that left behind waits for it."""
    cache = make_cache([6], num_blocks=8)
    seq = cache.add()
    cache.commit(cache.prepare([seq], 14))
    one = cache.prepare([seq], 4)
    two = cache.prepare([seq], 1)
    held = cache.num_free_blocks
    cache.commit(one)
    assert (cache.num_free_blocks, cache._manager.pool.num_waiting) == (held, 1)
    cache.rollback(two)
    assert cache.num_free_blocks == held + 1
    cache.check_integrity()


def test_a_group_without_room_leaves_all_as_it_was():
    cache = make_cache([None, 6], num_blocks=64, max_seqs=1)
    assert [group.num_blocks for group in cache.groups] == [64, 25]
    cache._manager.groups[1].pool.allocate(23)  # somebody else's
    seq, before = cache.add(), cache._manager.groups[0].pool.free_blocks.tolist()
    with pytest.raises(OutOfBlocks, match=r"the step needs 3 blocks of groups\[1\], 2 are free") as caught:
        cache.prepare([seq], 9)
    assert caught.value.group == 1
    assert cache._manager.groups[0].pool.free_blocks.tolist() == before
    assert cache.length(seq) == 0
    cache.rollback(cache.prepare([seq], 8))


def test_truncation_past_what_a_window_has_released():
    cache = make_cache([6, None], num_blocks=32)
    seq = cache.add()
    cache.commit(cache.prepare([seq], 31))
    before = cache.stats()
    cache.truncate(seq, 27)
    with pytest.raises(
        ValueError, match="of 27 tokens to 23: layers with sliding_window = 6 have released the keys be"
    ):
        cache.truncate(seq, 23)
    assert cache.length(seq) == 27
    assert before.blocks_used - cache.stats().blocks_used == 2
    cache.truncate(seq, 0)
    assert cache.stats().blocks_used == 0
    cache.check_integrity()


@pytest.mark.parametrize(("windows", "free_first"), [([6], False), ([6], True), ([None, 6], True)], ids=str)
def test_prefixes_are_found_where_every_window_is_still_there(windows, free_first):
    """Of 40 tokens the window's group keeps two blocks once others needed the rest, or three for a live sequence."""
    cache = make_cache(windows, num_blocks=20, max_seq_len=76)
    tokens = some(40)
    seq = cache.add(tokens)
    for start in range(0, 40, 8):
        cache.commit(cache.prepare([seq], 8), tokens[start : start + 8])
    if free_first:
        cache.free(seq)

    def found(count):
        other = cache.add([*tokens[:count], 99])
        length = cache.length(other)
        cache.free(other)
        return length

    assert [found(count) for count in (40, 39, 17, 3)] == [40, 36, 16, 0], "nothing was evicted yet"
    cache.free(cache.add([*tokens, 99]))  # the end was used last
    window = cache._manager.groups[-1]
    blocks = window.pool.allocate(window.pool.num_available - 2 if free_first else window.pool.num_available)
    assert [found(count) for count in (40, 39, 17)] == [40, 0 if free_first else 36, 0]
    window.pool.undo_allocate(blocks)


def test_sizes_of_groups():
    """A window's group gets what it can use: (6 - 2) // 4 + 4 blocks for each of 2 sequences, and 20 for a prompt."""
    cache = make_cache([6, None, None, 3], num_blocks=64, max_seqs=2)
    assert [group[:3] for group in cache.groups] == [(None, (1, 2), 64), (6, (0,), 30), (3, (3,), 28)]
    assert cache.groups[2].num_free_blocks == 28
    assert [len(layer.key_cache) for layer in cache.layers] == [30, 64, 64, 28]
    assert [group[:3] for group in make_cache([80, 99, None]).groups] == [(None, (0, 1, 2), 64)]
    block = PagedKVCache.kv_bytes(1, SIZE, KV_HEADS, DIM, VALUE_DIM, dtype=torch.float32)
    for memory, sizes in [(4 * block, [1, 1, 1]), (100 * block, [25, 25, 25]), (158 * block + 1, [50, 30, 28])]:
        sized = make_cache([6, None, None, 3], num_blocks=None, memory=memory, max_seqs=2)
        assert [group.num_blocks for group in sized.groups] == sizes
    with pytest.raises(ValueError, match=f"less than one block of {4 * block} bytes"):
        make_cache([6, None, None, 3], num_blocks=None, memory=4 * block - 1)


@pytest.mark.parametrize("scales", ["token", "static"])
def test_memory_counts_scales(scales):
    plain = PagedKVCache.kv_bytes(3, SIZE, KV_HEADS, DIM, VALUE_DIM, dtype=torch.int8)
    block = plain + (3 * SIZE * KV_HEADS * 2 * 4 if scales == "token" else 0)
    options = dict(num_blocks=None, cache_dtype=torch.int8, scales=scales)
    cache = make_cache([None] * 3, memory=10 * block, **options)
    assert cache.num_blocks == 10
    held = sum(tensor.numel() * tensor.element_size() for layer in cache.layers for tensor in layer.blocks())
    assert held == 10 * block
    cache.commit(cache.prepare([cache.add()], 1))
    assert cache.stats().bytes_used == block


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


def test_calibrated_by_the_tokens_that_are_there():
    """Poison stands in every other slot: those of a freed sequence, of an open step, and left behind by a window."""
    twin = Twin([None, 6])
    first, second, third = (twin.add() for _ in range(3))
    twin.step({first: some(19), second: some(6, 1), third: some(9, 2)})
    twin.step({twin.fork(first): some(2, 3), second: some(9, 4)})
    twin.cache.free(third)
    twin.plain.free(twin.seqs[third])
    twin.cache.prepare([first, second], 5)
    held = [{*slots.tolist()} for slots in twin.cache._manager.slots_in_use()]
    for layer, slots in zip(twin.cache.layers, held, strict=True):
        for cache in (layer.key_cache, layer.value_cache):
            flat = [slot for slot in range(64 * SIZE) if slot not in slots and slot < len(cache) * SIZE]
            for slot in flat:
                cache[slot // SIZE, slot % SIZE] = math.nan
    (scales, window), (expected, all_keys) = twin.cache.calibrate(torch.int8), twin.plain.calibrate(torch.int8)
    assert all(map(torch.equal, scales, expected))
    assert all((0 < one).all() and (one <= other).all() for one, other in zip(window, all_keys, strict=True))
    assert [len(slots) for slots in held] == [19 + 5 + 15, 11 + 5 + 11]  # of first, what its fork has apart, second


def test_calibration_needs_tokens_in_the_cache_and_a_type_to_store_them_in():
    cache = make_cache([None])
    with pytest.raises(ValueError, match=r"calibrate needs tokens in the cache, got none"):
        cache.calibrate(torch.int8)
    for dtype in (torch.float16, "int8"):
        with pytest.raises(TypeError, match=f"dtype must be float8_e4m3fn, float8_e5m2 or int8, got {dtype}"):
            cache.calibrate(dtype)


def test_a_quantised_cache_is_not_calibrated_again():
    with pytest.raises(TypeError, match=r"calibrate needs an unquantised cache, got one of torch.int8"):
        make_cache([None], cache_dtype=torch.int8).calibrate(torch.int8)
