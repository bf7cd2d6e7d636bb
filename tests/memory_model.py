"""What a memory manager must do, in lists: every sequence's tokens, and the keys that it must find in its blocks."""

from itertools import chain

import numpy as np
import pytest
from hypothesis import assume
from memory_by_hand import snapshot

from torch_paged.memory import MemoryManager
from torch_paged.token_feed import TokenFeed

MAX_SEQS, MAX_SEQ_LEN = 6, 24


class Keys(dict):
    """Numbers that stand for a namespace and all tokens up to one, as keys of a model depend on what came before."""

    def of(self, namespace, tokens):
        """The key of each token."""
        keys, key = [], namespace
        for token in tokens:
            key = self.setdefault((key, token), len(self))
            keys.append(key)
        return keys


class Model:
    """A manager, and beside it a list of tokens for each of its sequences.

    Keys are written to the slots of one array a group after the copies that the step asks for. As every sequence must
    read those of its own keys back after every operation that its next query sees in the group's window, a missing
    copy-on-write, a block in two hands, one given back too early or a prefix found by the wrong tokens shows.
    """

    def begin(self, num_blocks, block_size, seed, windows):
        """A manager of as many groups as there are windows."""
        sizes = [max(num_blocks - 2 * number, 4) for number in range(len(windows))]
        self.manager = MemoryManager(sizes, block_size, MAX_SEQS, MAX_SEQ_LEN, windows)
        self.windows = windows
        self.slots = [np.full((size, block_size), -1) for size in sizes]
        self.peak = {}  # of each sequence, the greatest length that it was committed with
        self.found = 0
        self.keys = Keys()
        self.tokens = {}  # of each live sequence, those of open steps included
        self.namespace = {}  # of each sequence
        self.open = {}  # step number: (step, {sequence: tokens before}, blocks that the step reads, its tokens)
        self.random = np.random.default_rng(seed)
        self.freed = []
        self.outside = set()  # sequences that are swapped out
        self.feed = TokenFeed(self.manager)
        self.late = []  # one for each commit whose tokens were late: whether they have arrived

    def pick(self, index):
        """The index-th live sequence, in a circle."""
        if not self.tokens:
            assume(False)
        return list(self.tokens)[index % len(self.tokens)]

    def pick_step(self, index):
        if not self.open:
            assume(False)
        return self.open[list(self.open)[index % len(self.open)]]

    def members(self, bits):
        """The live sequences whose bit is set."""
        return [seq for i, seq in enumerate(self.tokens) if bits >> i & 1]

    def available(self):
        return [group.pool.num_available for group in self.manager.groups]

    def blocks_of(self, seq, group=0):
        """Of all columns: -1 where a window has left them behind."""
        s = self.manager.sequences
        row = s.find_one(seq)
        return self.manager.groups[group].table[row, : s.num_blocks[row]].tolist()

    def blocks_with_tokens(self, seq, group):
        blocks = self.blocks_of(seq, group)[: -(-len(self.tokens[seq]) // self.manager.block_size)]
        return [block for block in blocks if block >= 0]

    def seen_from(self, seq, group):
        """The first position that the next query of a sequence sees, should its open steps be rolled back."""
        s, window = self.manager.sequences, self.windows[group]
        return 0 if window is None else max(int(s.committed[s.find_one(seq)]) - window + 1, 0)

    def seen_blocks(self, seq, position, group):
        """Blocks that queries from this position on see."""
        window = self.windows[group]
        first = 0 if window is None else max(position - window + 1, 0) // self.manager.block_size
        blocks = self.blocks_of(seq, group)[first:]
        assert min(blocks, default=0) >= 0, "what a query sees is there"
        return blocks

    def keys_of(self, seq):
        return self.keys.of(self.namespace[seq], self.tokens[seq])

    def some_tokens(self, count):
        return (self.random.random(count) < 0.2).astype(int).tolist()

    def has_open_step(self, seq):
        return any(seq in before for _, before, *_ in self.open.values())

    def has_neighbour(self, step, later):
        """Whether a later (or earlier) open step has a live sequence in common with this one."""
        mine = self.open[step.number][1].keys() & self.tokens.keys()
        others = [n for n in self.open if (n > step.number if later else n < step.number)]
        return any(mine & self.open[n][1].keys() for n in others)

    def in_flight(self, group):
        """Blocks of a group that open steps read."""
        return {block for _, _, reads, _ in self.open.values() for block in reads[group]}

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

    def refused(self, action, *arguments, match):
        """`action` raises ValueError and changes nothing."""
        before = snapshot(self.manager)
        with pytest.raises(ValueError, match=match):
            action(*arguments)
        assert snapshot(self.manager) == before

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

    def advance(self, seq):
        """What `PagedBatch.advance` would have written to the reserved blocks."""
        size, position = self.manager.block_size, len(self.tokens[seq])
        self.tokens[seq] += self.some_tokens(1)
        for group, slots in enumerate(self.slots):
            slots[self.blocks_of(seq, group)[position // size], position % size] = self.keys_of(seq)[-1]
        return self.tokens[seq][-1]

    def note_release(self, seq):
        """No block is held longer than promised."""
        s, size = self.manager.sequences, self.manager.block_size
        row = s.find_one(seq)
        self.peak[seq] = max(self.peak[seq], int(s.committed[row]))
        for window, group in zip(self.windows, self.manager.groups, strict=True):
            if window is not None:
                assert group.first[row] >= max(s.committed[row] - window - size + 1, 0) // size
