"""Swap by hand, on the host alone: what leaves, what comes back where, and what the prefix cache makes of it."""

import pytest
from memory_by_hand import PROMPT, extend, found, run, snapshot, table

from torch_paged.memory import MemoryManager, OutOfBlocks, swap


@pytest.fixture
def manager():
    manager = MemoryManager(num_blocks=8, block_size=4, max_seqs=4, max_seq_len=32)
    yield manager
    manager.check_integrity()


def swap_out(manager, seqs):
    parcel = swap.pack(manager, seqs)
    swap.swap_out(manager, parcel)
    return parcel


def swap_in(manager, seqs):
    landings = swap.unpack(manager, seqs)
    swap.swap_in(manager, landings)
    return landings[0]


def test_sequences_that_left_together_share_again(manager):
    """6 tokens of a parent, its fork and a fork of that with 2 more: two blocks that are shared, one that is not."""
    parent = manager.add()
    extend(manager, parent, [1] * 6, told=False)
    child, grandchild = manager.fork(parent, 2)
    extend(manager, grandchild, [1] * 2, told=False)
    before = [table(manager, seq) for seq in (parent, child, grandchild)]
    parcel = swap_out(manager, [grandchild, parent, child])
    assert parcel.parts[0].blocks.tolist() == sorted({*before[0], *before[2]})
    assert (manager.pool.num_free, sum(manager.num_outside)) == (8, 3)
    arrival = swap_in(manager, [child, parent])
    assert sum(len(blocks) for _, _, blocks in arrival.moves) == 2
    assert table(manager, parent) == table(manager, child)
    assert (manager.pool.num_free, sum(manager.num_outside)) == (6, 3)
    swap_in(manager, grandchild)
    assert (manager.pool.num_free, sum(manager.num_outside)) == (8 - 4, 0)


def test_what_the_prefix_cache_still_holds_is_not_moved(manager):
    seq = run(manager, PROMPT)
    blocks = table(manager, seq)
    swap_out(manager, seq)
    assert (found(manager, PROMPT), manager.pool.num_evictable) == (8, 2)
    arrival = swap_in(manager, seq)
    assert [rows.tolist() for _, rows, _ in arrival.moves] == [[2]]
    assert table(manager, seq)[:2] == blocks[:2]


def test_a_returned_sequence_enters_the_prefix_cache_again(manager):
    seq = run(manager, PROMPT)
    swap_out(manager, seq)
    other = run(manager, [7] * 32)
    manager.free(other)
    assert found(manager, PROMPT) == 0
    swap_in(manager, seq)
    assert found(manager, PROMPT) == 8
    extend(manager, seq, [11, 12])
    assert found(manager, [*PROMPT, 11, 12, 13]) == 12


def test_a_return_for_which_there_is_no_room_changes_nothing(manager):
    seq = run(manager, PROMPT)
    swap_out(manager, seq)
    other = manager.add()
    step = manager.prepare([other], 24)
    before = snapshot(manager)
    with pytest.raises(OutOfBlocks, match="needs 3 blocks, 2 are free"):
        swap.unpack(manager, seq)
    assert snapshot(manager) == before
    manager.rollback(step)
    swap_in(manager, seq)


def test_swapped_sequences_wait_or_are_freed(manager):
    seq, other = run(manager, PROMPT), run(manager, [1])
    step = manager.prepare([other], 1)
    with pytest.raises(ValueError, match="cannot swap out sequence 1 while one of its steps is open"):
        swap.pack(manager, [seq, other])
    swap_out(manager, seq)
    with pytest.raises(ValueError, match="sequence 0 is swapped out: swap it in first"):
        manager.prepare([other, seq], 1)
    for action, arguments in [(manager.fork, (1,)), (manager.truncate, (1,))]:
        with pytest.raises(ValueError, match="sequence 0 is swapped out: swap it in first"):
            action(seq, *arguments)
    with pytest.raises(ValueError, match="sequence 0 is swapped out: swap it in first"):
        swap.pack(manager, [seq])
    with pytest.raises(ValueError, match="sequence 1 was not swapped out"):
        swap.unpack(manager, [other])
    assert manager.length(seq) == 10
    assert manager.stats(10)[-2:] == (1, 3 * 4 * 10)
    manager.rollback(step)
    manager.free([seq, other])
    assert (manager.pool.num_available, sum(manager.num_outside), manager.parcels) == (8, 0, {})
