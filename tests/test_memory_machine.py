"""The memory manager under random operations, beside a model that keeps every sequence's tokens in a list."""

import numpy as np
import pytest
from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from test_memory import snapshot

from torch_paged.memory import MemoryManager, OutOfBlocks

MAX_SEQS, MAX_SEQ_LEN = 6, 24
picks = st.integers(0, 11)


class Machine(RuleBasedStateMachine):
    """The manager beside a model that keeps every sequence's tokens in a list.

    Tokens are distinct numbers, written to the slots of one array after the copies that the step asks for. As every
    sequence must read its own tokens back after every rule, a missing copy-on-write or a block in two hands shows.
    Rules pick the i-th live sequence or open step, so that none is wasted on what is gone.
    """

    @initialize(
        num_blocks=st.integers(4, 24), block_size=st.sampled_from([1, 3, 4]), lengths=st.lists(picks, max_size=3)
    )
    def begin(self, num_blocks, block_size, lengths):
        self.manager = MemoryManager(num_blocks, block_size, MAX_SEQS, MAX_SEQ_LEN)
        self.slots = np.full((num_blocks, block_size), -1)
        self.tokens = {}  # of each live sequence, those of open steps included
        self.open = {}  # step number: (step, {sequence: tokens before}, blocks that the step reads)
        self.next_token = 0
        self.freed = []
        for length in lengths:
            self.add()
            self.prepare(~0, [length + 1], 0)
        for _ in self.open.copy():
            self.commit(0, 0)

    def pick(self, index):
        """The index-th live sequence, in a circle."""
        assume(self.tokens)
        return list(self.tokens)[index % len(self.tokens)]

    def pick_step(self, index):
        assume(self.open)
        return self.open[list(self.open)[index % len(self.open)]]

    def blocks_of(self, seq):
        s = self.manager.sequences
        row = s.find_one(seq)
        return s.table[row, : s.num_blocks[row]].tolist()

    def has_open_step(self, seq):
        return any(seq in before for _, before, _ in self.open.values())

    def refused(self, action, *arguments, match):
        """`action` raises ValueError and changes nothing."""
        before = snapshot(self.manager)
        with pytest.raises(ValueError, match=match):
            action(*arguments)
        assert snapshot(self.manager) == before

    @rule()
    def add(self):
        if len(self.tokens) == MAX_SEQS:
            self.refused(self.manager.add, match="max_seqs")
            return
        seq = self.manager.add()
        assert seq not in self.tokens
        assert seq not in self.freed
        self.tokens[seq] = []

    @rule(index=picks, n=st.integers(1, 3))
    def fork(self, index, n):
        seq = self.pick(index)
        if self.has_open_step(seq):
            self.refused(self.manager.fork, seq, n, match="open")
        elif len(self.tokens) + n > MAX_SEQS:
            self.refused(self.manager.fork, seq, n, match="max_seqs")
        else:
            free = self.manager.pool.num_free
            children = self.manager.fork(seq, n)
            assert self.manager.pool.num_free == free, "a fork takes no block"
            assert not {*self.tokens, *self.freed} & set(children)
            self.tokens.update({child: list(self.tokens[seq]) for child in children})

    @rule(index=picks, forgotten=st.integers(0, 8))
    def truncate(self, index, forgotten):
        seq = self.pick(index)
        if self.has_open_step(seq):
            self.refused(self.manager.truncate, seq, 0, match="open")
        else:
            length = max(0, len(self.tokens[seq]) - forgotten)
            self.manager.truncate(seq, length)
            del self.tokens[seq][length:]

    @rule(index=picks)
    def free(self, index):
        seq = self.pick(index)
        self.manager.free(seq)
        del self.tokens[seq]
        self.freed.append(seq)

    @rule(index=picks)
    def use_after_free(self, index):
        assume(self.freed)
        seq = self.freed[index % len(self.freed)]
        self.refused(self.manager.free, seq, match="was freed")
        self.refused(self.manager.fork, seq, 1, match="was freed")
        self.refused(self.manager.truncate, seq, 0, match="was freed")
        self.refused(self.manager.prepare, [*self.tokens, seq], 1, match="was freed")

    @rule(
        members=st.integers(-1, 2**MAX_SEQS - 1),
        counts=st.lists(st.integers(1, 6), min_size=MAX_SEQS, max_size=MAX_SEQS) | st.just([1] * MAX_SEQS),
        ahead=st.sampled_from([0, 0, 1, 5]),
    )
    def prepare(self, members, counts, ahead):
        """A step of the live sequences whose bit is set in `members`."""
        seqs = [seq for i, seq in enumerate(self.tokens) if members >> i & 1]
        counts = counts[: len(seqs)] if len(counts) > 1 else counts * len(seqs)
        if any(len(self.tokens[seq]) + n + ahead > MAX_SEQ_LEN for seq, n in zip(seqs, counts, strict=True)):
            self.refused(self.manager.prepare, seqs, counts, ahead, match="max_seq_len")
            return
        before = snapshot(self.manager)
        try:
            step = self.manager.prepare(seqs, counts, ahead)
        except OutOfBlocks as error:
            assert snapshot(self.manager) == before
            assert error.needed > error.free == self.manager.pool.num_free
            return
        fresh = {*step.copies.blocks.tolist(), *step.growth.blocks.tolist()}
        for _, _, reads in self.open.values():
            assert not fresh & reads, "a block is reused while a step that reads it is open"
        self.run(step, seqs, counts)

    def run(self, step, seqs, counts):
        """Do what the model would do: the copies, then the step's tokens."""
        before = {seq: list(self.tokens[seq]) for seq in seqs}
        self.slots[step.copies.blocks] = self.slots[step.copies.sources]
        new = np.arange(self.next_token, self.next_token + sum(counts))
        self.next_token += len(new)
        self.slots.reshape(-1)[step.slots] = new
        for seq, part in zip(seqs, np.split(new, np.cumsum(counts))[:-1], strict=True):
            self.tokens[seq] += part.tolist()
        assert step.positions.tolist() == [p for s in seqs for p in range(len(before[s]), len(self.tokens[s]))]
        reads = {block for seq in seqs for block in self.blocks_of(seq)}
        self.open[step.number] = (step, before, reads)

    def has_neighbour(self, step, later):
        """Whether a later (or earlier) open step has a live sequence in common with this one."""
        mine = self.open[step.number][1].keys() & self.tokens.keys()
        others = [n for n in self.open if (n > step.number if later else n < step.number)]
        return any(mine & self.open[n][1].keys() for n in others)

    @rule(index=picks, advanced=st.sampled_from([0, 0, 1, 2]))
    def commit(self, index, advanced):
        step, before, _ = self.pick_step(index)
        if advanced > step.ahead:
            self.refused(self.manager.commit, step, advanced, match="ahead")
        elif self.has_neighbour(step, later=False):
            self.refused(self.manager.commit, step, advanced, match="an earlier step")
        elif advanced and self.has_neighbour(step, later=True):
            self.refused(self.manager.commit, step, advanced, match="a later step")
        else:
            self.manager.commit(step, advanced)
            del self.open[step.number]
            for seq in before.keys() & self.tokens.keys():
                self.advance(seq, advanced)
            self.refused(self.manager.commit, step, match="not open")

    def advance(self, seq, count):
        """What `PagedBatch.advance` would have written to the reserved blocks."""
        size = self.manager.block_size
        for _ in range(count):
            position = len(self.tokens[seq])
            self.slots[self.blocks_of(seq)[position // size], position % size] = self.next_token
            self.tokens[seq].append(self.next_token)
            self.next_token += 1

    @rule(index=picks)
    def rollback(self, index):
        step, before, _ = self.pick_step(index)
        if self.has_neighbour(step, later=True):
            self.refused(self.manager.rollback, step, match="a later step")
            return
        self.manager.rollback(step)
        del self.open[step.number]
        self.tokens.update({seq: tokens for seq, tokens in before.items() if seq in self.tokens})
        self.refused(self.manager.rollback, step, match="not open")

    @rule(count=st.integers(1, 6))
    def prepare_and_rollback(self, count):
        """Every sequence at once, so that blocks are shared among the writers, and back at once."""
        assume(all(len(tokens) + count <= MAX_SEQ_LEN for tokens in self.tokens.values()))
        before = snapshot(self.manager)
        try:
            step = self.manager.prepare(list(self.tokens), count)
        except OutOfBlocks:
            return
        self.slots[step.copies.blocks] = self.slots[step.copies.sources]
        self.slots.reshape(-1)[step.slots] = -1
        self.manager.rollback(step)
        assert snapshot(self.manager) == before

    @invariant()
    def everyone_reads_their_own_tokens(self):
        self.manager.check_integrity()
        assert len(self.manager.sequences.live_rows) == len(self.tokens)
        for seq, tokens in self.tokens.items():
            assert self.manager.length(seq) == len(tokens)
            assert self.slots[self.blocks_of(seq)].reshape(-1)[: len(tokens)].tolist() == tokens

    def teardown(self):
        if hasattr(self, "manager"):
            for step, _, _ in self.open.values():
                self.manager.commit(step)
            self.manager.free(list(self.tokens))
            self.manager.check_integrity()
            assert self.manager.pool.num_free == self.manager.pool.num_blocks


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None, derandomize=True)
