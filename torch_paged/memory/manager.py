"""The memory manager: which sequence keeps which token in which block."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np

from torch_paged.memory import inspection
from torch_paged.memory.arrays import Flags, Ints, as_counts, as_integer, as_integers, expand
from torch_paged.memory.group import usable
from torch_paged.memory.records import Records
from torch_paged.memory.step import Copies, Growth, Step, Taken


class MemoryManager(Records):
    """The records, and what can be done to them.

    A step is `prepare`, then the model, then `commit` or `rollback`. Several steps may be open: those of one
    sequence are committed in order and rolled back in reverse order. Every method that raises has changed
    nothing. Before a step writes to a block that others reference as well, its caller makes the copies that
    `Step.taken` lists.
    """

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
        place = s.places(rows)
        for index, group in enumerate(self.groups):
            held = [group.held(rows, s.num_blocks[rows])]
            for step in self.steps.values():  # what a step keeps for a sequence goes with the sequence
                copies = step.taken[index].copies
                owners = np.where(step.alive(s)[copies.owners], place[step.rows[copies.owners]], -1)
                held.append((copies.sources[owners >= 0], owners[owners >= 0]))
            blocks, owners = map(np.concatenate, zip(*held, strict=True))
            group.pool.release(blocks, self.reading(blocks, rows[owners]))
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

    def length(self, seq: int) -> int:
        """Tokens of `seq`, those of open steps included."""
        return int(self.sequences.length[self.sequences.find_one(seq)])

    def prepare(self, seqs: Any, counts: Any, ahead: int = 0, ragged: bool = False) -> Step:
        """Open a step: `counts` new tokens for each of `seqs`, and room for `ahead` more.

        Args:
            seqs: n distinct live sequences, in the order of the batch.
            counts: new tokens of each, at least 1: one int for all, or n of them.
            ahead: tokens beyond for which blocks are reserved.
            ragged: whether equal counts are kept one by one.

        Raises:
            TypeError: something is no integer.
            ValueError: an argument is out of its range, a sequence is swapped out, or would outgrow `max_seq_len`.
            OutOfBlocks: the pool cannot serve the step.
        """
        s, size = self.sequences, self.block_size
        handles, rows = s.find(seqs)
        if self.parcels:
            s.require_inside(rows)
        counts, ahead = as_counts(counts, len(rows)), as_integer("ahead", ahead, at_least=0)
        if ragged and isinstance(counts, int):
            counts = np.full(len(rows), counts)
        start = s.length[rows]
        end, reserved = s.grown(handles, start, counts, ahead)
        before = s.num_blocks[rows]
        after = np.maximum(before, (reserved + (size - 1)) // size)
        growing = (after != before).nonzero()[0]
        owners, new_columns = expand(before[growing], after[growing])
        owners = growing[owners]
        columns = start // size
        entries = rows * s.width + columns  # of a flat table: where each sequence writes first
        writers = [group.require(entries, start, len(owners)) for group in self.groups]
        # Nothing was changed before this line, nothing is refused behind it.
        taken = self._take(rows, entries, writers, owners, new_columns)
        places, positions = entries, start
        if not (isinstance(counts, int) and counts == 1):
            token_owners, positions = expand(start, end)
            columns = positions // size
            places = rows[token_owners] * s.width + columns
        offsets = positions - columns * size
        slots = [group.flat_table[places].astype(np.int64) * size + offsets for group in self.groups]
        s.num_blocks[rows], s.length[rows] = after, end
        (number,) = {group.pool.open_step() for group in self.groups}
        parts = [Taken(*each, where) for each, where in zip(taken, slots, strict=True)]
        self.steps[number] = step = Step(number, handles, rows, counts, start, end, ahead, before, positions, parts)
        return step

    def _take(
        self, rows: Ints, entries: Ints, writers: list[Ints], owners: Ints, columns: Ints
    ) -> list[tuple[Copies, Growth]]:
        """`BlockGroup.take` from every group."""
        taken = []
        for group, sharing in zip(self.groups, writers, strict=True):
            taken.append(group.take(rows, entries, sharing, owners, columns))
            if len(sharing):
                self.sequences.renew_stamps(rows[sharing])
        copies, _ = taken[0]
        if len(copies.owners):
            self.tokens[copies.blocks] = self.tokens[copies.sources]
        return taken

    def commit(self, step: Step, advanced: int = 0) -> None:
        """End a step whose tokens stand, and with it `advanced` further tokens of each of its sequences.

        Sequences freed since are skipped. What was reserved and not used stays with its sequence. `history.remember`
        then says which tokens they were.

        Raises:
            ValueError: the step is not open; an earlier step of one of its sequences is; `advanced` exceeds
                what was reserved, or a later step of one of the sequences is open and begins before it.
        """
        s = self.sequences
        self._require_open(step)
        advanced = as_integer("advanced", advanced, at_least=0)
        if advanced > step.ahead:
            raise ValueError(f"advanced = {advanced}, but the step was prepared with ahead = {step.ahead}")
        rows, start, end = step.rows, step.start, step.end
        alive = step.alive(s)
        if np.count_nonzero(alive) < len(alive):
            rows, start, end = rows[alive], start[alive], end[alive]
        self._require_all(s.committed[rows] == start, rows, "an earlier", "commit")
        if advanced:
            self._require_all(s.length[rows] == end, rows, "a later", "commit advanced tokens of")
            end = end + advanced
            s.length[rows] = end
        s.committed[rows] = end
        self._close(step)
        for group, (copies, _, _) in zip(self.groups, step.taken, strict=True):
            if len(copies.owners):
                group.pool.release(copies.sources[alive[copies.owners]])

    def release_unseen(self, step: Step) -> None:
        """Release what the sequences of a step need no more now that it was committed: windows have moved on."""
        s = self.sequences
        if self.groups[-1].window is not None:
            rows = step.rows[step.alive(s)]
            for group in self.groups:
                group.release_unseen(rows, s.committed[rows], self.reading)

    def rollback(self, step: Step) -> None:
        """Undo a step: lengths, tables, reference counts and the order of free blocks are as before it.

        What left the prefix cache for its sake, as a block was needed or is written to, does not come back.

        Sequences freed since are skipped.

        Raises:
            ValueError: the step is not open, or a later step of one of its sequences is.
        """
        s = self.sequences
        self._require_open(step)
        alive = step.alive(s)
        rows = step.rows[alive]
        self._require_all(s.length[rows] == step.end[alive], rows, "a later", "roll back")
        s.length[rows] = step.start[alive]
        s.num_blocks[rows] = step.blocks_before[alive]
        for group, taken in zip(self.groups, step.taken, strict=True):
            group.undo(taken, step.rows, alive)
        owners = np.concatenate([step.growth.owners, *(taken.copies.owners for taken in step.taken)])
        s.renew_stamps(np.unique(step.rows[owners[alive[owners]]]))
        self._close(step)

    def _require_open(self, step: Step) -> None:
        if self.steps.get(step.number) is not step:
            raise ValueError(f"step {step.number} is not open: it was committed or rolled back before")

    def _require_all(self, fine: Flags, rows: Ints, which: str, action: str) -> None:
        if np.count_nonzero(fine) < len(fine):
            seq = self.sequences.handle[rows[~fine][0]]
            raise ValueError(f"cannot {action} this step: {which} step of sequence {seq} is open")

    def _close(self, step: Step) -> None:
        del self.steps[step.number]
        for group in self.groups:
            group.pool.close_step(step.number)

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
