"""The memory manager under random operations, beside a model that keeps every sequence's tokens in a list."""

from itertools import chain

import numpy as np
import pytest
from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from test_memory import snapshot

from torch_paged.memory import MemoryManager, OutOfBlocks, swap
from torch_paged.token_feed import TokenFeed

MAX_SEQS, MAX_SEQ_LEN = 6, 24
WINDOWS = [(None,), (None,), (None, 5), (6,), (1,), (9, 2), (None, 7, 3)]  # of the groups of layers
HOW = ["given", "late", "kept back"]  # tokens are committed
picks = st.integers(0, 11)


class Late:
    """An event of a GPU, as far as the feed looks at it."""

    arrived = False

    def query(self):
        return self.arrived


class Machine(RuleBasedStateMachine):
    """The manager beside a model that keeps every sequence's tokens in a list.

    A token's key is a number that stands for its namespace and all tokens up to it, as keys of a model depend on what
    came before. Keys are written to the slots of one array a group after the copies that the step asks for. As every
    sequence must read those of its own keys back after every rule that its next query sees in the group's window, a
    missing copy-on-write, a block in two hands, one given back too early or a prefix found by
    the wrong tokens shows. There are but two tokens and two namespaces, so that sequences often share prefixes.
    Rules pick the i-th live sequence or open step, so that none is wasted on what is gone.
    """

    @initialize(
        num_blocks=st.integers(4, 24),
        block_size=st.sampled_from([1, 3, 4]),
        lengths=st.lists(picks, max_size=3),
        seed=st.integers(0, 99),
        windows=st.sampled_from(WINDOWS),
    )
    def begin(self, num_blocks, block_size, lengths, seed, windows):
        sizes = [max(num_blocks - 2 * number, 4) for number in range(len(windows))]
        self.manager = MemoryManager(sizes, block_size, MAX_SEQS, MAX_SEQ_LEN, windows)
        self.windows = windows
        self.slots = [np.full((size, block_size), -1) for size in sizes]
        self.peak = {}  # of each sequence, the greatest length that it was committed with
        self.found = 0
        self.keys = {}  # of (the key before it or the namespace, a token)
        self.tokens = {}  # of each live sequence, those of open steps included
        self.namespace = {}  # of each sequence
        self.open = {}  # step number: (step, {sequence: tokens before}, blocks that the step reads, its tokens)
        self.random = np.random.default_rng(seed)
        self.freed = []
        self.outside = set()  # sequences that are swapped out
        self.feed = TokenFeed(self.manager)
        self.late = []  # one for each commit whose tokens were late: whether they have arrived
        for length in lengths:
            self.add("a", 0)
            self.prepare(~0, [length + 1], 0)
        for _ in self.open.copy():
            self.commit(0, 0, "given")

    def pick(self, index):
        """The index-th live sequence, in a circle."""
        if not self.tokens:
            assume(False)
        return list(self.tokens)[index % len(self.tokens)]

    def pick_step(self, index):
        if not self.open:
            assume(False)
        return self.open[list(self.open)[index % len(self.open)]]

    def blocks_of(self, seq, group=0):
        """Of all columns: -1 where a window has left them behind."""
        s = self.manager.sequences
        row = s.find_one(seq)
        return self.manager.groups[group].table[row, : s.num_blocks[row]].tolist()

    def seen_from(self, seq, group):
        """The first position that the next query of a sequence sees, should its open steps be rolled back."""
        s, window = self.manager.sequences, self.windows[group]
        return 0 if window is None else max(int(s.committed[s.find_one(seq)]) - window + 1, 0)

    def keys_of(self, seq):
        keys, key = [], self.namespace[seq]
        for token in self.tokens[seq]:
            key = self.keys.setdefault((key, token), len(self.keys))
            keys.append(key)
        return keys

    def some_tokens(self, count):
        return (self.random.random(count) < 0.2).astype(int).tolist()

    def has_open_step(self, seq):
        return any(seq in before for _, before, *_ in self.open.values())

    def refused(self, action, *arguments, match):
        """`action` raises ValueError and changes nothing."""
        before = snapshot(self.manager)
        with pytest.raises(ValueError, match=match):
            action(*arguments)
        assert snapshot(self.manager) == before

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

    def known_to_others(self, namespace, prompt):
        """How many tokens of a prompt the prefix cache must hold, because a live sequence begins with them."""
        size, most = self.manager.block_size, 0
        if any(self.windows):
            return 0
        for seq, tokens in self.tokens.items():
            if self.namespace[seq] == namespace and seq not in self.outside:
                known = self.manager.sequences.known[self.manager.sequences.find_one(seq)]
                pairs = zip(prompt[:-1], tokens[: max(known, 0)], strict=False)
                most = max(most, sum(np.cumprod([a == b for a, b in pairs])) // size * size)
        return most

    @rule(namespaces=st.sampled_from([["c"], ["c"], ["c"], ["a"], ["a", "b"], []]))
    def clear_prefixes(self, namespaces):
        available = self.available()
        self.manager.clear_prefixes(*namespaces)
        assert self.available() == available
        left = {parent[0] for (parent, _), _ in self.manager.trie.items() if isinstance(parent, tuple)}
        assert not left & set(namespaces or "ab")

    def available(self):
        return [group.pool.num_available for group in self.manager.groups]

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

    def blocks_with_tokens(self, seq, group):
        blocks = self.blocks_of(seq, group)[: -(-len(self.tokens[seq]) // self.manager.block_size)]
        return [block for block in blocks if block >= 0]

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

    def members(self, bits):
        """The live sequences whose bit is set."""
        return [seq for i, seq in enumerate(self.tokens) if bits >> i & 1]

    def in_flight(self, group):
        """Blocks of a group that open steps read."""
        return {block for _, _, reads, _ in self.open.values() for block in reads[group]}

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

    def run(self, step, seqs, counts):
        """Do what the model would do: the copies, then the step's keys."""
        before = {seq: list(self.tokens[seq]) for seq in seqs}
        self.copy(step)
        new = [self.some_tokens(count) for count in counts]
        for seq, part in zip(seqs, new, strict=True):
            self.tokens[seq] += part
        keys = [self.keys_of(seq)[len(before[seq]) :] for seq in seqs]
        for slots, taken in zip(self.slots, step.taken, strict=True):
            slots.reshape(-1)[taken.slots] = np.array([*chain(*keys)], dtype=int)
        assert step.positions.tolist() == [p for s in seqs for p in range(len(before[s]), len(self.tokens[s]))]
        reads = [
            {block for seq in seqs for block in self.seen_blocks(seq, len(before[seq]), group)}
            for group in range(len(self.windows))
        ]
        self.open[step.number] = (step, before, reads, [*chain(*new)])

    def copy(self, step):
        for slots, taken in zip(self.slots, step.taken, strict=True):
            slots[taken.copies.blocks] = slots[taken.copies.sources]

    def seen_blocks(self, seq, position, group):
        """Blocks that queries from this position on see."""
        window = self.windows[group]
        first = 0 if window is None else max(position - window + 1, 0) // self.manager.block_size
        blocks = self.blocks_of(seq, group)[first:]
        assert min(blocks, default=0) >= 0, "what a query sees is there"
        return blocks

    def has_neighbour(self, step, later):
        """Whether a later (or earlier) open step has a live sequence in common with this one."""
        mine = self.open[step.number][1].keys() & self.tokens.keys()
        others = [n for n in self.open if (n > step.number if later else n < step.number)]
        return any(mine & self.open[n][1].keys() for n in others)

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

    def note_release(self, seq):
        """No block is held longer than promised."""
        s, size = self.manager.sequences, self.manager.block_size
        row = s.find_one(seq)
        self.peak[seq] = max(self.peak[seq], int(s.committed[row]))
        for window, group in zip(self.windows, self.manager.groups, strict=True):
            if window is not None:
                assert group.first[row] >= max(s.committed[row] - window - size + 1, 0) // size

    def advance(self, seq):
        """What `PagedBatch.advance` would have written to the reserved blocks."""
        size, position = self.manager.block_size, len(self.tokens[seq])
        self.tokens[seq] += self.some_tokens(1)
        for group, slots in enumerate(self.slots):
            slots[self.blocks_of(seq, group)[position // size], position % size] = self.keys_of(seq)[-1]
        return self.tokens[seq][-1]

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


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None, derandomize=True)

OFTEN = dict(add=6, prepare=8, commit=12, free=6, swap_out=4, swap_in=6)
WEIGHTS = OFTEN | dict(truncate=2, fork=3, rollback=1, deliver=3, clear_prefixes=0.05)


SIZES = [((None,), 6), ((None,), 12), ((None,), 20), ((None,), 40)]
SIZES += [(windows, num_blocks) for windows in [(None, 5), (6,), (9, 2)] for num_blocks in (6, 20)]


@pytest.mark.parametrize(("windows", "num_blocks"), SIZES, ids=str)
@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_many_random_operations(num_blocks, block_size, windows):
    """Longer lives than Hypothesis gives: 30 x 1000, in proportions that keep the cache full and prefixes shared."""
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
