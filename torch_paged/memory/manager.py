"""The memory manager: which sequence keeps which token in which block."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from torch_paged.memory import inspection, stepping
from torch_paged.memory.arrays import Ints, as_integer, as_integers
from torch_paged.memory.group import BlockGroup, usable
from torch_paged.memory.prefix import PrefixTrie
from torch_paged.memory.sequences import Sequences
from torch_paged.memory.step import Step
from torch_paged.memory.swap import Parcel


class MemoryManager:
    """Blocks for up to `max_seqs` sequences of up to `max_seq_len` tokens.

    A step is `prepare`, then the model, then `commit` or `rollback`. Several steps may be open: those of one
    sequence are committed in order and rolled back in reverse order. Every method that raises has changed
    nothing. Before a step writes to a block that others reference as well, its caller makes the copies that
    `Step.taken` lists.

    Layers that see equally far back form a group, with blocks and tables of its own. What is said of one group's blocks
    holds for all: a sequence has as many in each, but for those that a window has left behind.

    Attributes:
        groups: the widest window first, no window being the widest. Who holds a block of another group holds that of
            the first as well.
        pool: the blocks of the first group.
        trie: the prefix cache.
        tokens: int64 [num_blocks, block_size], the tokens whose keys and values a block of the first group holds, as
            far as known. They are written, and copied from block to block, where keys and values are.
        sequences: the sequences.
        steps: the open steps by their number, the oldest first.
        parcels: of each sequence that is swapped out, what it left with.
    """

    def __init__(
        self,
        num_blocks: int | Sequence[int],
        block_size: int,
        max_seqs: int,
        max_seq_len: int,
        windows: Sequence[int | None] = (None,),
    ) -> None:
        sizes = [num_blocks] if isinstance(num_blocks, int) else num_blocks
        sizes = [as_integer("num_blocks", size, at_least=1) for size in sizes]
        self.block_size = as_integer("block_size", block_size, at_least=1)
        self.trie = PrefixTrie(self.block_size)
        self.sequences = Sequences(
            as_integer("max_seqs", max_seqs, at_least=1),
            as_integer("max_seq_len", max_seq_len, at_least=1),
            self.block_size,
        )
        self.groups = [
            BlockGroup(number, window, size, self.block_size, self.trie, self.sequences)
            for number, (window, size) in enumerate(zip(windows, sizes, strict=True))
        ]
        self.pool = self.groups[0].pool
        self.tokens = np.zeros((sizes[0], self.block_size), dtype=np.int64)
        self.flat_tokens = self.tokens.reshape(-1)
        self.steps: dict[int, Step] = {}
        self.parcels: dict[int, Parcel] = {}
        self.tokens_looked_up = self.tokens_found = 0

    def add(self, tokens: Any = (), namespace: Hashable = None) -> int:
        """A new sequence's handle. It begins with what the prefix cache holds of `tokens`, the last one excepted.

        Raises:
            TypeError: `tokens` are not integers; `namespace` is not hashable.
            ValueError: `max_seqs` are live; there are more tokens than `max_seq_len`.
        """
        s, size = self.sequences, self.block_size
        if not _is_hashable(namespace):
            raise TypeError(f"namespace must be hashable, got {namespace!r}")
        s.require_rows(1)
        tokens = as_integers("tokens", tokens)
        if len(tokens) > s.max_seq_len:
            raise ValueError(f"max_seq_len = {s.max_seq_len}: the prompt has {len(tokens)} tokens")
        full = max(len(tokens) - 1, 0) // size * size
        nodes = usable(self.groups, self.trie.path(namespace, tokens[:full]))
        found = len(nodes) * size
        rows = s.open_rows(1)
        s.fill(rows, len(nodes), found, found, namespace)
        for group in self.groups:
            first = group.first_found(len(nodes))
            group.fill(rows, group.cached.blocks_of(nodes[first:]), first)
        self.tokens_looked_up += len(tokens)
        self.tokens_found += found
        return int(s.handle[rows[0]])

    def fork(self, seq: int, n: int) -> list[int]:
        """Handles of `n` new sequences that share all tokens of `seq`; reserved blocks are not shared.

        Raises:
            ValueError: `seq` is not live, is swapped out or has an open step; `n < 1`; more than `max_seqs` would be
                live.
        """
        s = self.sequences
        row = s.find_one(seq)
        n = as_integer("n", n, at_least=1)
        s.require_inside(np.array([row]))
        s.require_settled(row, "fork")
        s.require_rows(n)
        rows = s.open_rows(n)
        filled = int(-(-s.length[row] // self.block_size))
        s.fill(rows, filled, int(s.length[row]), int(s.known[row]), s.namespace[row])
        for group in self.groups:
            first = int(group.first[row])
            group.fill(rows, group.table[row, first:filled].astype(np.int64), first)
        handles: list[int] = s.handle[rows].tolist()
        return handles

    def truncate(self, seq: int, length: int) -> None:
        """Forget the tokens of `seq` from position `length` on, and give back what lies beyond, reserved too.

        Raises:
            ValueError: `seq` is not live, is swapped out or has an open step; `length` is negative or more than it has,
                or a window has released what a sequence of that length sees.
        """
        s = self.sequences
        row = s.find_one(seq)
        length = as_integer("length", length, at_least=0)
        s.require_inside(np.array([row]))
        s.require_settled(row, "truncate")
        if length > s.length[row]:
            raise ValueError(f"cannot truncate sequence {seq} of {s.length[row]} tokens to {length}")
        for group in self.groups:
            if 0 < length and group.first_seen(length) < group.first[row]:
                raise ValueError(
                    f"cannot truncate sequence {seq} of {s.length[row]} tokens to {length}: layers with sliding_window "
                    f"= {group.window} have released the keys before {group.first[row] * self.block_size}"
                )
        # Tokens on their way to the prefix cache may be forgotten ones: it cannot follow any more.
        s.known[row] = length if s.known[row] == s.length[row] else -1
        s.length[row] = s.committed[row] = length
        keep, last = -(-length // self.block_size), s.num_blocks[row]
        if keep < last:
            for group in self.groups:
                start = max(keep, group.first[row])
                group.pool.release(group.table[row, start:last].astype(np.int64))
                group.table[row, start:last] = -1
                group.first[row] = min(group.first[row], keep)
            s.num_blocks[row] = keep
            s.renew_stamps(np.array([row]))

    def free(self, seqs: Any) -> None:
        """End one sequence or several, open steps or not. Their blocks are reused once no open step reads them.

        Raises:
            ValueError: one of them is not live (freed before, for instance), or occurs twice; none is freed.
        """
        s = self.sequences
        handles, rows = s.find_some(seqs)
        for index, group in enumerate(self.groups):
            blocks = [group.held(rows, group.first[rows], s.num_blocks[rows])]
            for step in self.steps.values():  # what a step keeps for a sequence goes with the sequence
                copies = step.taken[index].copies
                ending = step.alive(self.sequences)[copies.owners] & np.isin(step.rows[copies.owners], rows)
                blocks.append(copies.sources[ending])
            group.pool.release(np.concatenate(blocks))
            group.table[rows] = -1
            group.first[rows] = 0
        for handle in handles[s.outside[rows]].tolist():
            self.parcels.pop(handle).forget(handle)
        s.close_rows(rows)

    def clear_prefixes(self, *namespaces: Hashable) -> None:
        """Empty the prefix cache of these namespaces, or of all; it does not follow their live sequences any more."""
        s = self.sequences
        nodes = self.trie.below(namespaces)
        for group in self.groups:
            group.pool.forget(nodes)
        for row in s.live_rows.tolist():
            if not namespaces or s.namespace[row] in namespaces:
                s.known[row] = -1

    @property
    def num_outside(self) -> list[int]:
        """Of each group, blocks whose contents are kept for sequences that are swapped out."""
        parcels = {*self.parcels.values()}
        return [sum(len(parcel.parts[index].blocks) for parcel in parcels) for index in range(len(self.groups))]

    def length(self, seq: int) -> int:
        """Tokens of `seq`, those of open steps included."""
        return int(self.sequences.length[self.sequences.find_one(seq)])

    def prepare(self, seqs: Any, counts: Any, ahead: int = 0) -> Step:
        """Open a step: `counts` new tokens for each of `seqs`, and room for `ahead` more.

        Args:
            seqs: n distinct live sequences, in the order of the batch.
            counts: new tokens of each, at least 1: one int for all, or n of them.
            ahead: tokens beyond for which blocks are reserved.

        Raises:
            TypeError: something is no integer.
            ValueError: an argument is out of its range, a sequence is swapped out, or would outgrow `max_seq_len`.
            OutOfBlocks: the pool cannot serve the step.
        """
        return stepping.prepare(self, seqs, counts, ahead)

    def commit(self, step: Step, advanced: int = 0) -> None:
        """End a step whose tokens stand, and with it `advanced` further tokens of each of its sequences.

        Sequences freed since are skipped. What was reserved and not used stays with its sequence. `history.remember`
        then says which tokens they were.

        Raises:
            ValueError: the step is not open; an earlier step of one of its sequences is; `advanced` exceeds
                what was reserved, or a later step of one of the sequences is open and begins before it.
        """
        stepping.commit(self, step, advanced)

    def release_unseen(self, step: Step) -> None:
        """Release what the sequences of a step need no more now that it was committed: windows have moved on."""
        s = self.sequences
        if self.groups[-1].window is not None:
            rows = step.rows[step.alive(s)]
            for group in self.groups:
                group.release_unseen(rows, s.committed[rows])

    def rollback(self, step: Step) -> None:
        """Undo a step: lengths, tables, reference counts and the order of free blocks are as before it.

        What it evicted from the prefix cache does not come back.

        Sequences freed since are skipped.

        Raises:
            ValueError: the step is not open, or a later step of one of its sequences is.
        """
        stepping.rollback(self, step)

    def stats(self, *bytes_per_token: int) -> inspection.MemoryStats:
        """See `MemoryStats`; `bytes_per_token`: of the layers of each group."""
        return inspection.stats(self, bytes_per_token)

    def slots_in_use(self) -> list[Ints]:
        """Of each group, the slots that hold a committed token of a sequence, each once."""
        return [inspection.slots_in_use(self, group) for group in self.groups]

    def check_integrity(self) -> None:
        """Raise IntegrityError, naming the broken invariant, if the records contradict each other."""
        inspection.check_integrity(self)


def _is_hashable(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True
