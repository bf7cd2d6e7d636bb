"""Blocks that nobody holds any more, and that open steps still read."""

import pytest
from memory_by_hand import filled

from torch_paged.memory import MemoryManager


@pytest.fixture
def manager():
    return MemoryManager(num_blocks=12, block_size=4, max_seqs=4, max_seq_len=20)


def test_freed_blocks_wait_for_the_steps_open_at_that_time(manager):
    first, second = filled(manager, 4, 4)
    step = manager.prepare([first], 1)
    manager.free(first)
    later = manager.prepare([second], 1)
    assert (manager.pool.num_waiting, manager.pool.num_free) == (2, 8)
    manager.commit(later)
    assert manager.pool.num_waiting == 2
    another = manager.prepare([second], 1)
    manager.commit(step)
    assert (manager.pool.num_waiting, manager.pool.num_free) == (0, 10), "the step opened since does not matter"
    manager.rollback(another)


def test_blocks_wait_for_steps_that_read_them_alone(manager):
    """A step that stays open, for good perhaps, holds back what its own sequences let go of, and nothing else."""
    held, bystander = filled(manager, 4, 4)
    lost = manager.prepare([held], 1)
    manager.free(held)
    assert manager.pool.num_waiting == 2
    for _ in range(20):
        seq = manager.add()
        manager.commit(manager.prepare([seq], 7))
        manager.free(seq)
    manager.free(bystander)
    assert (manager.pool.num_waiting, manager.pool.num_free) == (2, 10)
    manager.commit(lost)
    assert (manager.pool.num_waiting, manager.pool.num_free) == (0, 12)


def test_nobody_waits_for_a_step_between_theirs(manager):
    """Steps 0 and 2 are of one sequence, and step 1, which stays open, of another."""
    one, other = filled(manager, 4, 4)
    first = manager.prepare([one], 1)
    manager.prepare([other], 1)
    second = manager.prepare([one], 1)
    manager.free(one)
    manager.commit(first)
    assert manager.pool.num_waiting == 2
    manager.commit(second)
    assert manager.pool.num_waiting == 0


def test_what_a_step_copied_goes_once(manager):
    """Its sequence is freed, and another stands in its row when the step ends."""
    (parent,) = filled(manager, 6)
    (child,) = manager.fork(parent, 1)
    step = manager.prepare([child], 1)
    manager.free(child)
    manager.free(manager.add())
    manager.check_integrity()
    manager.commit(step)
    manager.free(parent)
    manager.check_integrity()
    assert manager.pool.num_free == 12


def test_a_shared_block_waits_for_whoever_reads_it(manager):
    """The first of two forks is freed with a step open, then the other without one."""
    (first,) = filled(manager, 4)
    (second,) = manager.fork(first, 1)
    step = manager.prepare([first], 1)
    manager.free(first)
    assert manager.pool.num_waiting == 1, "its own block; the shared one is the fork's"
    later = manager.prepare([second], 1)
    manager.free(second)
    assert manager.pool.num_waiting == 3
    manager.commit(later)
    assert manager.pool.num_waiting == 2
    manager.commit(step)
    assert (manager.pool.num_waiting, manager.pool.num_free) == (0, 12)
