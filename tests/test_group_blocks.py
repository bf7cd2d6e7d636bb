"""Blocks of groups of layers: how many each has, what a window gives back, and when."""

import math

import pytest
import torch
from cache_twins import DIM, KV_HEADS, SIZE, VALUE_DIM, make_cache, some

from torch_paged import OutOfBlocks, PagedKVCache


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
