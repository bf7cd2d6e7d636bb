"""The host side: what the memory manager hands out, shares, copies, defers and takes back."""

import numpy as np
import pytest
from memory_by_hand import filled, snapshot

from torch_paged.memory import IntegrityError, MemoryManager, OutOfBlocks
from torch_paged.memory.arrays import expand


@pytest.fixture
def manager():
    return MemoryManager(num_blocks=12, block_size=4, max_seqs=4, max_seq_len=20)


def test_a_step_by_hand(manager):
    """The example in Step's docstring."""
    (parent,) = filled(manager, 6)
    (child,) = manager.fork(parent, 1)
    assert manager.groups[0].table[[0, 1], :2].tolist() == [[0, 1], [0, 1]]
    step = manager.prepare([child], [3])
    assert (step.copies.sources.tolist(), step.copies.blocks.tolist()) == ([1], [2])
    assert step.growth.blocks.tolist() == [3]
    assert (step.slots.tolist(), step.positions.tolist()) == ([10, 11, 12], [6, 7, 8])
    assert manager.groups[0].table[1, :3].tolist() == [0, 2, 3]
    assert manager.pool.refcount[:4].tolist() == [2, 2, 1, 1], "the open step keeps the reference to block 1"
    manager.commit(step)
    assert manager.pool.refcount[:4].tolist() == [2, 1, 1, 1]


@pytest.mark.parametrize("writers", [1, 2, 3])
def test_copies_only_while_more_than_one_reference_is_left(manager, writers):
    """Three sequences share a half-full block: if all write at once, the last of them keeps it."""
    (parent,) = filled(manager, 6)
    seqs = [parent, *manager.fork(parent, 2)]
    step = manager.prepare(seqs[:writers], 1)
    assert len(step.copies.blocks) == min(writers, 2)
    manager.commit(step)
    assert len(manager.prepare(seqs[writers:], 1).copies.blocks) == max(0, 2 - writers)
    assert len(manager.prepare(seqs[:writers], 1).copies.blocks) == 0


def test_the_longest_writer_keeps_a_shared_block(manager):
    """So that after a rollback the shorter ones still find their tokens in it."""
    (parent,) = filled(manager, 7)
    short, middle = manager.fork(parent, 2)
    manager.truncate(short, 5)
    manager.truncate(middle, 6)
    step = manager.prepare([short, parent, middle], 1)
    assert step.copies.owners.tolist() == [0, 2]
    assert manager.groups[0].table[0, 1] == 1, "the parent's"


def test_full_shared_blocks_are_never_copied(manager):
    (parent,) = filled(manager, 8)
    children = manager.fork(parent, 3)
    step = manager.prepare([parent, *children], 4)
    assert len(step.copies.blocks) == 0
    assert len(step.growth.blocks) == 4


def test_reserved_blocks_are_used_and_not_shared(manager):
    (seq,) = filled(manager, 3)
    step = manager.prepare([seq], 1, ahead=5)
    assert len(step.growth.blocks) == 2
    manager.commit(step, advanced=3)
    assert manager.length(seq) == 7
    (child,) = manager.fork(seq, 1)
    assert manager.sequences.num_blocks[:2].tolist() == [3, 2]
    manager.free(child)
    assert len(manager.prepare([seq], 5).growth.blocks) == 0, "position 11 lies in the third block"


def test_out_of_blocks_says_what_is_missing(manager):
    first, second, third = filled(manager, 20, 20, 4)
    step = manager.prepare([third], 1)
    manager.free(third)
    seq = manager.add()
    before = snapshot(manager)
    with pytest.raises(OutOfBlocks, match="needs 3 blocks, 0 are free; 2 more become free as open steps end") as caught:
        manager.prepare([seq], 9)
    assert (caught.value.needed, caught.value.free, caught.value.waiting) == (3, 0, 2)
    assert snapshot(manager) == before
    manager.commit(step)
    manager.free([first, second])
    manager.commit(manager.prepare([seq], 9))


def test_a_copy_counts_as_a_needed_block():
    manager = MemoryManager(num_blocks=2, block_size=4, max_seqs=4, max_seq_len=8)
    (parent,) = filled(manager, 6)
    (child,) = manager.fork(parent, 1)
    with pytest.raises(OutOfBlocks, match=r"needs 1 blocks, 0 are free$"):
        manager.prepare([child], 1)
    manager.free(parent)
    assert len(manager.prepare([child], 1).copies.blocks) == 0, "one reference is left"


def test_freed_rows_get_new_handles(manager):
    seqs = [manager.add() for _ in range(4)]
    manager.free(seqs[1])
    again = manager.add()
    assert again not in seqs
    with pytest.raises(ValueError, match=f"sequence {seqs[1]} was freed"):
        manager.prepare([seqs[0], seqs[1]], 1)
    manager.prepare([again], 1)


@pytest.mark.parametrize(
    ("seqs", "counts", "ahead", "error", "match"),
    [
        ([0, 1, 0], 1, 0, ValueError, "distinct, sequence 0 occurs twice"),
        ([0, 1, 0, 1, 0], 1, 0, ValueError, "distinct"),
        ([0, 7], 1, 0, ValueError, "there is no sequence 7"),
        ([-1], 1, 0, ValueError, "there is no sequence -1"),
        ([2], 1, 0, ValueError, "there is no sequence 2"),
        ([0, 1], [1], 0, ValueError, "one for each of 2 seqs, got 1"),
        ([0, 1], [1, 0], 0, ValueError, "counts must be at least 1, got 0"),
        ([0, 1], 0, 0, ValueError, "counts must be at least 1, got 0"),
        ([0, 1], [1, 20], 0, ValueError, "max_seq_len = 20: sequence 1 would have 23 tokens"),
        ([0, 1], 1, 17, ValueError, "max_seq_len = 20: sequence 1 would have 21 tokens"),
        ([0, 1], 1, -1, ValueError, "ahead must be at least 0, got -1"),
        ([0.0, 1.0], 1, 0, TypeError, "seqs must be integers, got float64"),
        ([[0, 1]], 1, 0, ValueError, r"seqs must be flat: \[n\] integers, got shape \[1, 2\]"),
        (0, 1, 0, ValueError, "seqs must be flat"),
        ([0, 1], 1.0, 0, TypeError, "counts must be an integer, got 1.0"),
        ([0, 1], True, 0, TypeError, "counts must be an integer, got True"),
        ([0, 1], [1.0, 2.0], 0, TypeError, "counts must be integers, got float64"),
        ([0, 1], 1, 0.5, TypeError, "ahead must be an integer, got 0.5"),
    ],
)
def test_bad_steps_are_refused(manager, seqs, counts, ahead, error, match):
    filled(manager, 2, 3)
    before = snapshot(manager)
    with pytest.raises(error, match=match):
        manager.prepare(seqs, counts, ahead)
    assert snapshot(manager) == before


@pytest.mark.parametrize("seqs", [[0, 1.0], [False, True], [np.array([0, 1]), 1]], ids=["real", "bool", "array"])
def test_what_is_refused_does_not_depend_on_what_came_before(manager, seqs):
    """Even where it equals the sequences of the step before."""
    filled(manager, 2, 3)
    manager.rollback(manager.prepare([0, 1], 1))
    with pytest.raises((TypeError, ValueError), match=r"seqs must be integers|inhomogeneous"):
        manager.prepare(seqs, 1)


def test_the_sequences_of_a_step_cannot_be_written_to(manager):
    filled(manager, 2, 3)
    step = manager.prepare([0, 1], 1)
    for part in (step.handles, step.rows):
        with pytest.raises(ValueError, match="read-only"):
            part[0] = 1
    assert manager.length(0) == 3, "the question is not remembered in their place"
    assert manager.sequences.find([0, 1])[0] is step.handles


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda m: m.fork(0, 0), ValueError, "n must be at least 1, got 0"),
        (lambda m: m.fork(0, 4), ValueError, "max_seqs = 4: 4 more sequences do not fit beside 1 live ones"),
        (lambda m: m.fork(5, 1), ValueError, "there is no sequence 5"),
        (lambda m: m.truncate(0, 7), ValueError, "cannot truncate sequence 0 of 6 tokens to 7"),
        (lambda m: m.truncate(0, -1), ValueError, "length must be at least 0, got -1"),
        (lambda m: m.truncate(0, 1.5), TypeError, "length must be an integer, got 1.5"),
        (lambda m: m.free([0, 0]), ValueError, "sequence 0 occurs twice"),
        (lambda m: m.free([0, 3]), ValueError, "there is no sequence 3"),
        (lambda m: m.length(9), ValueError, "there is no sequence 9"),
        (lambda _: MemoryManager(0, 4, 4, 20), ValueError, "num_blocks must be at least 1, got 0"),
        (lambda _: MemoryManager(4, 0, 4, 20), ValueError, "block_size must be at least 1, got 0"),
        (lambda _: MemoryManager(4, 4, 0, 20), ValueError, "max_seqs must be at least 1, got 0"),
        (lambda _: MemoryManager(4, 4, 4, "20"), TypeError, "max_seq_len must be an integer, got '20'"),
    ],
)
def test_bad_calls_are_refused(manager, call, error, match):
    filled(manager, 6)
    before = snapshot(manager)
    with pytest.raises(error, match=match):
        call(manager)
    assert snapshot(manager) == before


def test_fork_and_truncate_wait_for_open_steps(manager):
    (seq,) = filled(manager, 6)
    step = manager.prepare([seq], 1)
    with pytest.raises(ValueError, match="cannot fork sequence 0 while one of its steps is open"):
        manager.fork(seq, 1)
    with pytest.raises(ValueError, match="cannot truncate sequence 0 while one of its steps is open"):
        manager.truncate(seq, 1)
    manager.commit(step)
    manager.fork(seq, 1)


def test_steps_end_in_order(manager):
    first, second = filled(manager, 2, 2)
    one = manager.prepare([first], 1, ahead=1)
    two = manager.prepare([first, second], 1)
    with pytest.raises(ValueError, match="cannot commit this step: an earlier step of sequence 0 is open"):
        manager.commit(two)
    with pytest.raises(ValueError, match="cannot roll back this step: a later step of sequence 0 is open"):
        manager.rollback(one)
    with pytest.raises(ValueError, match="cannot commit advanced tokens of this step: a later step"):
        manager.commit(one, advanced=1)
    with pytest.raises(ValueError, match="advanced = 2, but the step was prepared with ahead = 1"):
        manager.commit(one, advanced=2)
    manager.commit(one)
    manager.rollback(two)
    with pytest.raises(ValueError, match="not open"):
        manager.commit(two)
    assert manager.sequences.length[:2].tolist() == [3, 2]


def test_disjoint_steps_end_in_any_order(manager):
    first, second = filled(manager, 2, 2)
    one, two = manager.prepare([first], 1), manager.prepare([second], 1)
    manager.rollback(one)
    manager.commit(two)
    assert manager.sequences.length[:2].tolist() == [2, 3]


@pytest.mark.parametrize("max_seqs", [1, 2, 3, 4, 5])
def test_no_integer_passes_for_a_sequence_that_is_not_there(max_seqs):
    manager = MemoryManager(num_blocks=4, block_size=4, max_seqs=max_seqs, max_seq_len=20)
    freed = [manager.add() for _ in range(max_seqs)]
    manager.free(freed)
    live = manager.add()
    for seq in [*range(-20, 20), 2**63 - 1, -(2**63)]:
        if seq != live:
            with pytest.raises(ValueError, match=f"sequence {seq}"):
                manager.length(seq)
    assert manager.length(live) == 0


def test_an_empty_step(manager):
    step = manager.prepare([], [])
    assert (len(step.rows), len(step.slots)) == (0, 0)
    manager.commit(step)
    manager.rollback(manager.prepare(np.empty(0, dtype=np.int64), 3))


def test_the_callers_arrays_are_not_kept(manager):
    seqs, counts = np.array(filled(manager, 2, 3)), np.array([1, 2])
    step = manager.prepare(seqs, counts)
    seqs[:], counts[:] = -7, -7
    manager.rollback(step)
    assert manager.sequences.length[:2].tolist() == [2, 3]
    listed = [0, 1]
    step = manager.prepare(listed, 1)
    listed[0] = -7
    manager.rollback(step)
    with pytest.raises(ValueError, match="there is no sequence -7"):
        manager.prepare(listed, 1)


def test_stats_by_hand(manager):
    """6 + 6 + 1 tokens in 2 + 1 blocks: the fork shares both of its parent's."""
    parent, _ = filled(manager, 6, 1)
    manager.fork(parent, 1)
    stats = manager.stats(10)
    assert stats[:5] == (12, 3, 9, 2, 13)
    assert stats.slots_filled == pytest.approx(7 / 12)
    assert (stats.bytes_used, stats.bytes_contiguous) == (3 * 4 * 10, 3 * 6 * 10)
    empty = MemoryManager(3, 4, 4, 20).stats(10)
    assert empty == (3, 0, 3, 0, 0, 0.0, 0, 0, 0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("breakage", "invariant_named"),
    [
        (lambda m: m.pool.refcount.__setitem__(0, 5), "reference counts equal"),
        (lambda m: m.pool.free_blocks.__setitem__(0, m.pool.free_blocks[1]), "free, waiting or evictable twice"),
        (lambda m: setattr(m.pool, "num_free", m.pool.num_free - 1), "add up to all"),
        (lambda m: m.groups[0].table.__setitem__((0, 0), 99), "table entries are blocks"),
        (lambda m: m.groups[0].table.__setitem__((0, 4), 3), "past a sequence's blocks are -1"),
        (lambda m: m.sequences.length.__setitem__(0, 9), "blocks for its length"),
        (lambda m: m.sequences.length.__setitem__(0, 5), "committed tokens are part"),
        (lambda m: m.sequences.committed.__setitem__(0, 5), "add up to the length"),
        (lambda m: m.sequences.stamp.__setitem__(0, m.sequences.stamp[1]), "stamps"),
        (lambda m: m.sequences.handle.__setitem__(1, -1), "max_seqs"),
        (lambda m: m.pool._readers.__setitem__(m.pool.free_blocks[0], 1), "free, waiting or evictable twice"),
    ],
)
def test_check_integrity_names_what_is_broken(manager, breakage, invariant_named):
    filled(manager, 6, 1)
    manager.check_integrity()
    breakage(manager)
    with pytest.raises(IntegrityError, match=invariant_named):
        manager.check_integrity()


def test_expand():
    owner, value = expand(np.array([3, 9, 7]), np.array([5, 9, 8]))
    assert (owner.tolist(), value.tolist()) == ([0, 0, 2], [3, 4, 7])


@pytest.mark.parametrize(("counts", "ahead"), [(2**63 - 1, 0), ([2**63 - 1], 0), (1, 2**64)])
def test_counts_beyond_any_sequence_change_nothing(counts, ahead):
    manager = MemoryManager(num_blocks=4, block_size=4, max_seqs=2, max_seq_len=16)
    seq = manager.add()
    with pytest.raises(ValueError, match="max_seq_len = 16: no sequence can get"):
        manager.prepare([seq], counts, ahead)
    manager.check_integrity()
    assert manager.length(seq) == 0
