"""The memory manager under long random lives, in proportions that keep the cache full and prefixes shared."""

import numpy as np
import pytest
from memory_machine import HOW, Machine
from memory_model import MAX_SEQ_LEN, MAX_SEQS

WEIGHTS = dict(
    add=6, prepare=8, commit=12, free=6, swap_out=4, swap_in=6, truncate=2, fork=3, rollback=1, deliver=3,
    clear_prefixes=0.05,
)  # fmt: skip
SIZES = [((None,), 6), ((None,), 12), ((None,), 20), ((None,), 40)]
SIZES += [(windows, num_blocks) for windows in [(None, 5), (6,), (9, 2)] for num_blocks in (6, 20)]


@pytest.mark.parametrize(("windows", "num_blocks"), SIZES, ids=str)
@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_many_random_operations(num_blocks, block_size, windows):
    """Longer lives than Hypothesis gives: 30 x 1000."""
    random = np.random.default_rng(num_blocks * block_size)

    def pick():
        return int(random.integers(12))

    def some(seqs):
        """Bits for one or two of these sequences."""
        return sum({1 << list(machine.tokens).index(random.choice(seqs)) for _ in range(1 + pick() % 2)}) if seqs else 0

    def inside():
        return [seq for seq in machine.tokens if seq not in machine.outside]

    def settled():
        return [seq for seq in inside() if not machine.has_open_step(seq)]

    machine = Machine()
    machine.begin(num_blocks, block_size, [], pick(), windows)
    drawn = dict(
        add=lambda: (random.choice(["a", "a", "b"]), int(random.integers(MAX_SEQ_LEN + 1))),
        prepare=lambda: (some(inside()), random.integers(1, 5, MAX_SEQS).tolist(), pick() % 2),
        commit=lambda: (pick(), int(random.random() < 0.2), random.choice(["given"] * 12 + HOW)),
        fork=lambda: (pick(), 1),
        swap_out=lambda: (some(settled()),),
        swap_in=lambda: (some([*machine.outside]), pick() % 4 == 0),
        truncate=lambda: (pick(), pick() % 9),
        clear_prefixes=lambda: ([["a"], []][pick() % 2],),
    )
    weights = np.array(list(WEIGHTS.values()))
    for name in random.choice(list(WEIGHTS), size=1000, p=weights / weights.sum()):
        wanted = dict(commit=machine.open, rollback=machine.open, add=True, clear_prefixes=True, deliver=True)
        if wanted.get(name, machine.tokens):
            getattr(machine, name)(*drawn.get(name, lambda: (pick(),))())
            machine.everyone_reads_their_own_keys()
    assert machine.found
    machine.teardown()
