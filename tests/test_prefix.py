"""The prefix cache by hand: what is found, what leaves first, and what must never be found."""

import numpy as np
import pytest
import torch
from memory_by_hand import PROMPT, extend, found, run, snapshot, table

from torch_paged.memory import IntegrityError, MemoryManager, OutOfBlocks, history
from torch_paged.memory.eviction import EvictionQueue


@pytest.fixture
def manager():
    manager = MemoryManager(num_blocks=8, block_size=4, max_seqs=4, max_seq_len=32)
    yield manager
    manager.check_integrity()


@pytest.mark.parametrize("alive", [True, False])
@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (PROMPT, 8),
        ([*PROMPT, 11, 12, 13], 8),
        (PROMPT[:9], 8),
        (PROMPT[:8], 4),  # the last token is always left to compute
        (PROMPT[:5], 4),
        (PROMPT[:4], 0),
        ([], 0),
        ([1, 2, 3, 4, 5, 6, 7, 9, 9], 4),
        ([2, *PROMPT], 0),
        (PROMPT[4:], 0),  # the same block after another beginning
        (np.array(PROMPT, dtype=np.uint8), 8),
        (torch.tensor(PROMPT, dtype=torch.int32), 8),
    ],
    ids=str,
)
def test_the_longest_known_prefix_is_found(manager, alive, tokens, expected):
    seq = run(manager, PROMPT)
    blocks = table(manager, seq)
    if not alive:
        manager.free(seq)
    again = manager.add(tokens)
    assert manager.length(again) == expected
    assert table(manager, again) == blocks[: expected // 4]


def test_no_prefix_is_shared_between_namespaces(manager):
    run(manager, PROMPT, "one")
    assert [found(manager, PROMPT, namespace) for namespace in ("one", "two", None, 1, ("one",))] == [8, 0, 0, 0, 0]
    run(manager, PROMPT)
    assert found(manager, PROMPT) == 8
    assert found(manager, PROMPT, "two") == 0


class Tenant:
    """Unequal ones whose hashes collide."""

    def __hash__(self):
        return hash((None,))


def test_namespaces_are_told_apart_by_more_than_their_hash(manager):
    tenants = Tenant(), Tenant()
    run(manager, PROMPT, tenants[0])
    assert [found(manager, PROMPT, tenant) for tenant in (*tenants, None)] == [8, 0, 0]


def test_a_half_full_block_of_a_freed_sequence_returns_at_once(manager):
    seq = run(manager, PROMPT)
    half_full = table(manager, seq)[2]
    manager.free(seq)
    assert (manager.pool.num_free, manager.pool.num_evictable) == (6, 2)
    assert manager.pool.free_blocks[-1] == half_full


def test_a_block_enters_when_it_is_full_and_known_from_the_start(manager):
    seq = manager.add(PROMPT)
    extend(manager, seq, PROMPT[:7])
    assert found(manager, PROMPT) == 4
    extend(manager, seq, PROMPT[7:8])
    assert found(manager, PROMPT) == 8
    extend(manager, seq, [9, 10, 11], told=False)
    extend(manager, seq, [12, 13])
    assert found(manager, [*PROMPT, 11, 12, 13]) == 8, "some of its tokens are not known"


def test_advanced_tokens_come_step_by_step(manager):
    """Two sequences of a step with 2 + 2 tokens, then two steps with one of each."""
    seqs = [manager.add(), manager.add()]
    step = manager.prepare(seqs, 2, ahead=3)
    manager.commit(step, 2)
    history.remember(manager, step, [1, 2, 5, 6, 3, 7, 4, 8], 2)
    assert [found(manager, [*tokens, 9]) for tokens in ([1, 2, 3, 4], [5, 6, 7, 8], [1, 2, 7, 8])] == [4, 4, 0]


def test_equal_blocks_filled_at_the_same_time_become_one(manager):
    """In one step or in two; each goes on with blocks of its own."""
    first, second, third = (manager.add(PROMPT) for _ in range(3))
    together, alone = manager.prepare([first, second], 9), manager.prepare([third], 6)
    manager.commit(together)
    history.remember(manager, together, PROMPT[:9] * 2)
    manager.commit(alone)
    history.remember(manager, alone, PROMPT[:6])
    assert table(manager, first)[:2] == table(manager, second)[:2]
    assert table(manager, first)[0] == table(manager, third)[0]
    assert len({table(manager, seq)[-1] for seq in (first, second, third)}) == 3
    assert manager.pool.num_available == 8 - 5
    extend(manager, third, PROMPT[6:])
    assert table(manager, third)[1] == table(manager, first)[1]


def test_the_least_recently_used_leave_first_and_leaves_before_parents(manager):
    old, new = [1] * 13, [1] * 4 + [2] * 9
    seqs = [run(manager, tokens) for tokens in (old, new)]
    chains = [table(manager, seq)[:3] for seq in seqs]
    assert chains[0][0] == chains[1][0]
    manager.free(seqs)
    order = manager.pool.evictable_blocks.tolist()
    assert [{*order[:2]}, {*order[2:4]}, order[4:]] == [
        {chains[0][2], chains[1][2]},
        {chains[0][1], chains[1][1]},
        [chains[0][0]],
    ]
    manager.free(manager.add(old))
    assert manager.pool.evictable_blocks.tolist()[:2] == [chains[1][2], chains[1][1]], "old was used again"
    extend(manager, manager.add(), [7] * 16)
    assert (found(manager, old), found(manager, new)) == (12, 8)
    extend(manager, manager.add(), [8] * 4)
    assert (found(manager, old), found(manager, new)) == (8, 8), "looking new up made it the more recent one"


def test_evictable_blocks_count_as_free(manager):
    manager.free(run(manager, [1] * 32))
    assert (manager.pool.num_free, manager.pool.num_available) == (0, 8)
    seq = manager.add([1] * 13)
    before = snapshot(manager)
    with pytest.raises(OutOfBlocks, match="needs 6 blocks, 5 are free"):
        manager.prepare([seq, manager.add()], [13, 8])
    assert snapshot(manager)[1:] != before, "the other sequence was added"
    step = manager.prepare([seq], 20)
    assert manager.pool.num_available == 0
    manager.rollback(step)
    assert (manager.length(seq), manager.pool.num_available) == (12, 5)
    assert found(manager, [1] * 32) == 12, "what was evicted does not come back"


def test_blocks_in_flight_are_found_but_not_evicted(manager):
    seq = run(manager, PROMPT)
    step = manager.prepare([seq], 1)
    manager.free(seq)
    assert (manager.pool.num_waiting, manager.pool.num_available) == (3, 5)
    again = manager.add(PROMPT)
    assert (manager.length(again), manager.pool.num_waiting) == (8, 1)
    manager.commit(step)
    assert (manager.pool.num_waiting, manager.pool.num_available) == (0, 6)


def test_writing_into_a_cached_block_takes_it_out(manager):
    """Its own block is written in place; what stood below it is not found until these tokens are there again."""
    seq = run(manager, [1] * 12)
    blocks = table(manager, seq)
    manager.truncate(seq, 6)
    assert found(manager, [1] * 13) == 12, "nothing was overwritten yet"
    extend(manager, seq, [2])
    assert table(manager, seq) == blocks[:2]
    assert found(manager, [1] * 13) == 4
    manager.truncate(seq, 6)
    extend(manager, seq, [1, 1])
    assert found(manager, [1] * 13) == 12, "the third block stands below the same tokens again"


def test_writing_into_a_cached_block_that_others_hold_copies_it(manager):
    seq = run(manager, [1] * 8)
    other = manager.add([1] * 9)
    manager.truncate(seq, 6)
    step = manager.prepare([seq], 2)
    assert len(step.copies.blocks) == 1
    manager.commit(step)
    history.remember(manager, step, [1, 2])
    assert found(manager, [1] * 9) == found(manager, [1] * 7 + [2, 2]) == 8
    manager.free(other)


def test_a_truncated_sequence_goes_on_from_known_tokens(manager):
    seq = run(manager, PROMPT)
    (child,) = manager.fork(seq, 1)
    manager.truncate(child, 9)
    extend(manager, child, [20, 21, 22])
    extend(manager, seq, [11, 12])
    assert found(manager, [*range(1, 10), 20, 21, 22, 0]) == 12
    assert found(manager, [*range(1, 13), 0]) == 12


@pytest.mark.parametrize(("namespaces", "left"), [(["a"], [0, 8, 8]), ([None, "b"], [8, 0, 0]), ([], [0, 0, 0])])
def test_cleared_prefixes_are_not_found_nor_followed(manager, namespaces, left):
    seqs = {}
    for namespace in ("a", "b", None):
        seqs[namespace] = run(manager, [1] * 8, namespace)
    manager.free(seqs["b"])
    manager.clear_prefixes(*namespaces)
    manager.check_integrity()
    assert [found(manager, [1] * 9, namespace) for namespace in seqs] == left
    extend(manager, seqs["a"], [1] * 4)
    assert found(manager, [1] * 13, "a") == (12 if left[0] else 0)
    manager.free([seqs["a"], seqs[None]])
    manager.clear_prefixes()
    assert manager.pool.num_free == 8


def test_figures(manager):
    manager.free(run(manager, PROMPT))
    manager.add([*PROMPT[:4], 0])
    stats = manager.stats(10)
    assert (stats.blocks_cached, stats.blocks_evictable, stats.blocks_used, stats.blocks_free) == (2, 1, 1, 7)
    assert (stats.tokens_looked_up, stats.tokens_found) == (15, 4)
    assert stats.hit_rate == 4 / 15


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (([1.5],), TypeError, "tokens must be integers, got float64"),
        (([1 << 63],), ValueError, "tokens must be integers of 64 bits with a sign, got 9223372036854775808"),
        (([-1, 1 << 63],), ValueError, "tokens must be integers of 64 bits with a sign, got 9223372036854775808"),
        (([1 << 64],), ValueError, "tokens must be integers of 64 bits with a sign, got 18446744073709551616"),
        (([[1]],), ValueError, r"tokens must be flat: \[n\] integers, got shape \[1, 1\]"),
        (([1] * 33,), ValueError, "max_seq_len = 32: the prompt has 33 tokens"),
        (([1], ["a"]), TypeError, r"namespace must be hashable, got \['a'\]"),
        (([1], ("a", [])), TypeError, "namespace must be hashable"),
    ],
)
def test_bad_prompts_are_refused(manager, arguments, error, match):
    before = snapshot(manager)
    with pytest.raises(error, match=match):
        manager.add(*arguments)
    assert snapshot(manager) == before


def test_bytes_are_tokens(manager):
    manager.free(run(manager, list(b"a prompt")))
    assert manager.length(manager.add(b"a prompt")) == 4


@pytest.mark.parametrize(
    ("breakage", "invariant_named"),
    [
        (lambda m: m.tokens.__setitem__((0, 0), 99), "holds the tokens of its key"),
        (lambda m: m.groups[0].cached.node.__setitem__(7, 3), "each cached block has its own node"),
        (lambda m: m.groups[0].cached.node.__setitem__(0, 8), "a node's block knows it"),
        (lambda m: m.groups[0].cached.column.__setitem__(1, 0), "as far down as its node"),
        (lambda m: m.groups[0].cached.column.__setitem__(0, 1), "as far down as its node"),
        (lambda m: m.groups[0].cached.remove(np.array([1])), "path in the prefix cache"),
        (lambda m: m.sequences.namespace.__setitem__(0, "b"), "path in the prefix cache"),
        (lambda m: m.sequences.known.__setitem__(0, 12), "known tokens are committed"),
        (lambda m: m.pool._evictable.remove(np.array([3])), "add up to all"),
        (lambda m: m.groups[0].cached.remove(np.array([4])), "evictable blocks are in the prefix cache"),
        (lambda m: m.pool._evictable.append(m.pool._evictable.pop(1)), "leaves are evicted before their parents"),
    ],
)
def test_check_integrity_names_what_is_broken(breakage, invariant_named):
    manager = MemoryManager(num_blocks=8, block_size=4, max_seqs=4, max_seq_len=32)
    run(manager, PROMPT)
    manager.free(run(manager, [5] * 8))
    manager.check_integrity()
    breakage(manager)
    with pytest.raises(IntegrityError, match=invariant_named):
        manager.check_integrity()


def test_the_eviction_queue_against_a_list():
    random, queue, expected = np.random.default_rng(0), EvictionQueue(40), []
    for _ in range(2000):
        outside = np.setdiff1d(np.arange(40), expected)
        come = random.permutation(outside)[: random.integers(8)]
        queue.append(come)
        expected += come.tolist()
        leave = random.permutation(expected)[: random.integers(6)].astype(int)
        queue.remove(leave)
        expected = [block for block in expected if block not in leave]
        count = random.integers(min(len(expected), 4) + 1)
        assert queue.pop(count).tolist() == expected[:count]
        del expected[:count]
        assert queue.blocks.tolist() == expected
        assert len(queue) == len(expected)


def test_a_shared_block_stays_whose_tokens_another_has_entered_meanwhile(manager):
    """The parent cannot exchange its first block: the child would hold the second without the one before it."""
    parent = manager.add()
    late = manager.prepare([parent], 8)
    manager.commit(late)
    (child,) = manager.fork(parent, 1)
    other = run(manager, [1] * 5)
    history.remember(manager, late, [1] * 8)
    manager.check_integrity()
    assert table(manager, parent) == table(manager, child)
    manager.free([parent, other])
    manager.check_integrity()
    assert found(manager, [1] * 9) == 4
