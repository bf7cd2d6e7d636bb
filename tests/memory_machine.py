"""Random operations on a memory manager, beside a model that keeps every sequence's tokens in a list."""

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from memory_by_hand import snapshot
from memory_model import MAX_SEQ_LEN, MAX_SEQS, Model

from torch_paged.memory import OutOfBlocks, swap

WINDOWS = [(None,), (None,), (None, 5), (6,), (1,), (9, 2), (None, 7, 3)]  # of the groups of layers
HOW = ["given", "late", "kept back"]  # tokens are committed
picks = st.integers(0, 11)


class Late:
    """An event of a GPU, as far as the feed looks at it."""

    arrived = False

    def query(self):
        return self.arrived


class Machine(Model, RuleBasedStateMachine):
    """Random operations, and what must hold after each.

    There are but two tokens and two namespaces, so that sequences often share prefixes. Rules pick the i-th live
    sequence or open step, so that none is wasted on what is gone.
    """

    @initialize(
        num_blocks=st.integers(4, 24),
        block_size=st.sampled_from([1, 3, 4]),
        lengths=st.lists(picks, max_size=3),
        seed=st.integers(0, 99),
        windows=st.sampled_from(WINDOWS),
    )
    def begin(self, num_blocks, block_size, lengths, seed, windows):
        super().begin(num_blocks, block_size, seed, windows)
        for length in lengths:
            self.add("a", 0)
            self.prepare(~0, [length + 1], 0)
        for _ in self.open.copy():
            self.commit(0, 0, "given")

    @rule(namespace=st.sampled_from("aab"), length=st.integers(0, MAX_SEQ_LEN))
    def add(self, namespace, length):
        prompt = self.some_tokens(length)
        if len(self.tokens) == MAX_SEQS:
            self.refused(self.manager.add, prompt, namespace, match="max_seqs")
            return
        expected = self.known_to_others(namespace, prompt)
        seq = self.manager.add(prompt, namespace)
        assert seq not in self.tokens
        assert seq not in self.freed
        found = self.manager.length(seq)
        assert found % self.manager.block_size == 0
        assert expected <= found <= max(length - 1, 0)
        self.tokens[seq] = prompt[:found]
        self.namespace[seq] = namespace
        self.peak[seq] = found and MAX_SEQ_LEN  # what comes before the window was not looked for
        self.found += found

    @rule(namespaces=st.sampled_from([["c"], ["c"], ["c"], ["a"], ["a", "b"], []]))
    def clear_prefixes(self, namespaces):
        available = self.available()
        self.manager.clear_prefixes(*namespaces)
        assert self.available() == available
        left = {parent[0] for (parent, _), _ in self.manager.trie.items() if isinstance(parent, tuple)}
        assert not left & set(namespaces or "ab")

    @rule(index=picks, n=st.integers(1, 3))
    def fork(self, index, n):
        seq = self.pick(index)
        if seq in self.outside:
            self.refused(self.manager.fork, seq, n, match="swapped out")
        elif self.has_open_step(seq):
            self.refused(self.manager.fork, seq, n, match="open")
        elif len(self.tokens) + n > MAX_SEQS:
            self.refused(self.manager.fork, seq, n, match="max_seqs")
        else:
            free = self.available()
            children = self.manager.fork(seq, n)
            assert self.available() == free, "a fork takes no block"
            assert not {*self.tokens, *self.freed} & set(children)
            self.tokens.update({child: list(self.tokens[seq]) for child in children})
            self.namespace.update(dict.fromkeys(children, self.namespace[seq]))
            self.peak.update(dict.fromkeys(children, self.peak[seq]))

    @rule(index=picks, forgotten=st.integers(0, 8))
    def truncate(self, index, forgotten):
        seq = self.pick(index)
        if seq in self.outside:
            self.refused(self.manager.truncate, seq, 0, match="swapped out")
        elif self.has_open_step(seq):
            self.refused(self.manager.truncate, seq, 0, match="open")
        else:
            length = max(0, len(self.tokens[seq]) - forgotten)
            row = self.manager.sequences.find_one(seq)
            seen = [0 if window is None else max(length - window + 1, 0) for window in self.windows]
            held = [group.first[row] * self.manager.block_size for group in self.manager.groups]
            if length and any(position < start for position, start in zip(seen, held, strict=True)):
                assert length < self.peak[seq] - self.manager.block_size, "a block's length can be forgotten"
                self.refused(self.manager.truncate, seq, length, match="have released the keys before")
                return
            self.manager.truncate(seq, length)
            del self.tokens[seq][length:]

    @rule(index=picks)
    def free(self, index):
        seq = self.pick(index)
        self.manager.free(seq)
        del self.tokens[seq]
        self.outside.discard(seq)
        self.freed.append(seq)

    @rule(members=st.integers(0, 2**MAX_SEQS - 1))
    def swap_out(self, members):
        seqs = self.members(members)
        if self.outside & {*seqs}:
            self.refused(swap.pack, self.manager, seqs, match="is swapped out")
        elif any(map(self.has_open_step, seqs)):
            self.refused(swap.pack, self.manager, seqs, match="open")
        else:
            before = snapshot(self.manager)
            parcel = swap.pack(self.manager, seqs)
            assert snapshot(self.manager) == before, "whoever fails to fetch the blocks has nothing to undo"
            for group, part in enumerate(parcel.parts):
                assert {*part.blocks.tolist()} == {b for seq in seqs for b in self.blocks_with_tokens(seq, group)}
                part.content = self.slots[group][part.blocks]
            swap.swap_out(self.manager, parcel)
            self.outside |= {*seqs}

    @rule(members=st.integers(0, 2**MAX_SEQS - 1), fault=st.booleans())
    def swap_in(self, members, fault):
        seqs = self.members(members)
        if not self.outside.issuperset(seqs):
            self.refused(swap.unpack, self.manager, seqs, match="was not swapped out")
            return
        before = snapshot(self.manager)
        try:
            landings = swap.unpack(self.manager, seqs)
        except OutOfBlocks as error:
            assert snapshot(self.manager) == before
            assert error.needed > error.free == self.available()[error.group]
            return
        for group, landing in enumerate(landings):
            for parcel, rows, blocks in landing.moves:
                assert not {*blocks.tolist()} & self.in_flight(group)
                self.slots[group][blocks] = -1 if fault else parcel.parts[group].content[rows]
        if fault:
            swap.cancel(self.manager, landings)
            return
        swap.swap_in(self.manager, landings)
        self.outside -= {*seqs}

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
        seqs = self.members(members)
        if self.outside & {*seqs}:
            self.refused(self.manager.prepare, seqs, 1, match="is swapped out: swap it in first")
            return
        counts = counts[: len(seqs)] if len(counts) > 1 else counts * len(seqs)
        if any(len(self.tokens[seq]) + n + ahead > MAX_SEQ_LEN for seq, n in zip(seqs, counts, strict=True)):
            self.refused(self.manager.prepare, seqs, counts, ahead, match="max_seq_len")
            return
        before = snapshot(self.manager)
        try:
            step = self.manager.prepare(seqs, counts, ahead)
        except OutOfBlocks as error:
            assert snapshot(self.manager) == before
            assert error.needed > error.free == self.available()[error.group]
            return
        for group, taken in enumerate(step.taken):
            fresh = {*taken.copies.blocks.tolist(), *taken.growth.blocks.tolist()}
            assert not fresh & self.in_flight(group), "a block is reused while a step that reads it is open"
        self.run(step, seqs, counts)

    @rule(
        index=picks,
        advanced=st.sampled_from([0, 0, 1, 2]),
        how=st.sampled_from(["given", "given", *HOW]),
    )
    def commit(self, index, advanced, how):
        step, before, _, tokens = self.pick_step(index)
        if advanced > step.ahead:
            self.refused(self.manager.commit, step, advanced, match="ahead")
        elif self.has_neighbour(step, later=False):
            self.refused(self.manager.commit, step, advanced, match="an earlier step")
        elif advanced and self.has_neighbour(step, later=True):
            self.refused(self.manager.commit, step, advanced, match="a later step")
        else:
            self.manager.commit(step, advanced)
            del self.open[step.number]
            for _ in range(advanced):
                tokens += [self.advance(seq) if seq in self.tokens else 0 for seq in before]
            self.refused(self.manager.commit, step, match="not open")
            if how != "kept back":
                self.late += [Late()] if how == "late" else []
                event = self.late[-1] if how == "late" else None
                self.feed.put(step, advanced, np.array(tokens, dtype=np.int64), event)
            self.manager.release_unseen(step)
            for seq in before.keys() & self.tokens.keys():
                self.note_release(seq)

    @rule(count=picks)
    def deliver(self, count):
        """The first late tokens arrive."""
        for late in self.late[:count]:
            late.arrived = True
        del self.late[:count]
        self.feed.deliver()

    @rule(index=picks)
    def rollback(self, index):
        step, before, *_ = self.pick_step(index)
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
        seqs = [seq for seq in self.tokens if seq not in self.outside]
        assume(all(len(self.tokens[seq]) + count <= MAX_SEQ_LEN for seq in seqs))
        before, entries = snapshot(self.manager), [len(group.cached) for group in self.manager.groups]
        try:
            step = self.manager.prepare(seqs, count)
        except OutOfBlocks:
            return
        evicted = [len(group.cached) for group in self.manager.groups] != entries
        self.copy(step)
        for slots, taken in zip(self.slots, step.taken, strict=True):
            slots.reshape(-1)[taken.slots] = -1
        self.manager.rollback(step)
        after = snapshot(self.manager)
        if not evicted:
            assert after == before

    @invariant()
    def everyone_reads_their_own_keys(self):
        self.manager.check_integrity()
        assert len(self.manager.sequences.live_rows) == len(self.tokens)
        for seq, tokens in self.tokens.items():
            assert self.manager.length(seq) == len(tokens)
            if seq not in self.outside:
                for group, slots in enumerate(self.slots):
                    start = self.seen_from(seq, group)
                    keys = slots[self.blocks_of(seq, group)].reshape(-1)
                    assert keys[start : len(tokens)].tolist() == self.keys_of(seq)[start:]

    def teardown(self):
        if hasattr(self, "manager"):
            for step, *_ in self.open.values():
                self.manager.commit(step)
            self.manager.free(list(self.tokens))
            self.deliver(len(self.late))
            self.manager.check_integrity()
            assert self.available() == list(map(len, self.slots))
            assert self.manager.num_outside == [0] * len(self.slots)
            self.manager.clear_prefixes()
            self.manager.check_integrity()
            assert [group.pool.num_free for group in self.manager.groups] == list(map(len, self.slots))
            assert len(self.manager.trie) == 0
