"""The memory manager: which sequence keeps which token in which block."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np

from torch_paged.memory import inspection
from torch_paged.memory.arrays import Flags, Ints, as_counts, as_integer, as_integers, expand
from torch_paged.memory.pool import BlockPool
from torch_paged.memory.prefix import PrefixTrie
from torch_paged.memory.sequences import Sequences
from torch_paged.memory.step import Copies, Growth, Step
from torch_paged.memory.swap import Parcel

_NONE = np.empty(0, dtype=np.int64)


class MemoryManager:
    """Blocks for up to `max_seqs` sequences of up to `max_seq_len` tokens.

    A step is `prepare`, then the model, then `commit` or `rollback`. Several steps may be open: those of one
    sequence are committed in order and rolled back in reverse order. Every method that raises has changed
    nothing. Before a step writes to a block that others reference as well, its caller makes the copies that
    `Step.copies` lists.

    Attributes:
        pool: the blocks.
        trie: the prefix cache.
        sequences: the sequences.
        steps: the open steps by their number, the oldest first.
        parcels: of each sequence that is swapped out, what it left with.
    """

    def __init__(self, num_blocks: int, block_size: int, max_seqs: int, max_seq_len: int) -> None:
        self.block_size = as_integer("block_size", block_size, at_least=1)
        self.trie = PrefixTrie(as_integer("num_blocks", num_blocks, at_least=1), self.block_size)
        self.pool = BlockPool(self.trie)
        self.sequences = Sequences(
            as_integer("max_seqs", max_seqs, at_least=1),
            as_integer("max_seq_len", max_seq_len, at_least=1),
            self.block_size,
        )
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
        blocks = self.trie.find(namespace, tokens[:full])
        self.pool.retain(blocks)
        found = len(blocks) * size
        rows = s.open_rows(1)
        s.fill(rows, blocks, found, found, namespace)
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
        filled = -(-s.length[row] // self.block_size)
        blocks = s.table[row, :filled].astype(np.int64)
        self.pool.retain(blocks, times=n)
        s.fill(rows, blocks, int(s.length[row]), int(s.known[row]), s.namespace[row])
        handles: list[int] = s.handle[rows].tolist()
        return handles

    def truncate(self, seq: int, length: int) -> None:
        """Forget the tokens of `seq` from position `length` on, and give back what lies beyond, reserved too.

        Raises:
            ValueError: `seq` is not live, is swapped out or has an open step; `length` is negative or more than it has.
        """
        s = self.sequences
        row = s.find_one(seq)
        length = as_integer("length", length, at_least=0)
        s.require_inside(np.array([row]))
        s.require_settled(row, "truncate")
        if length > s.length[row]:
            raise ValueError(f"cannot truncate sequence {seq} of {s.length[row]} tokens to {length}")
        # Tokens on their way to the prefix cache may be forgotten ones: it cannot follow any more.
        s.known[row] = length if s.known[row] == s.length[row] else -1
        s.length[row] = s.committed[row] = length
        keep, held = -(-length // self.block_size), s.num_blocks[row]
        if keep < held:
            self.pool.release(s.table[row, keep:held].astype(np.int64))
            s.table[row, keep:held] = -1
            s.num_blocks[row] = keep
            s.renew_stamps(np.array([row]))

    def free(self, seqs: Any) -> None:
        """End one sequence or several, open steps or not. Their blocks are reused once no open step reads them.

        Raises:
            ValueError: one of them is not live (freed before, for instance), or occurs twice; none is freed.
        """
        s = self.sequences
        handles, rows = s.find_some(seqs)
        owners, columns = expand(np.zeros_like(rows), s.num_blocks[rows])
        blocks = [s.table[rows[owners], columns].astype(np.int64)]
        for step in self.steps.values():  # what a step keeps for a sequence goes with the sequence
            owners = step.copies.owners
            ending = self._alive(step)[owners] & np.isin(step.rows[owners], rows)
            blocks.append(step.copies.sources[ending])
        self.pool.release(np.concatenate(blocks))
        for handle in handles[s.outside[rows]].tolist():
            del self.parcels.pop(handle).rows[handle]
        s.close_rows(rows)

    def clear_prefixes(self, *namespaces: Hashable) -> None:
        """Empty the prefix cache of these namespaces, or of all; it does not follow their live sequences any more."""
        s = self.sequences
        self.pool.clear_prefixes(*namespaces)
        for row in s.live_rows.tolist():
            if not namespaces or s.namespace[row] in namespaces:
                s.known[row] = -1

    @property
    def num_outside(self) -> int:
        """Blocks whose contents are kept for sequences that are swapped out."""
        return sum(len(parcel.blocks) for parcel in {*self.parcels.values()})

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
        s, size = self.sequences, self.block_size
        handles, rows = s.find(seqs)
        if self.parcels:
            s.require_inside(rows)
        counts = as_counts(counts, len(rows))
        ahead = as_integer("ahead", ahead, at_least=0)
        most = max(ahead, counts if isinstance(counts, int) else int(counts.max()))
        if most > s.max_seq_len:  # before a sum could overflow
            raise ValueError(f"max_seq_len = {s.max_seq_len}: no sequence can get {most} tokens")
        start = s.length[rows]
        end = start + counts
        s.require_length(handles, end + ahead)

        before = s.num_blocks[rows]
        after = np.maximum(before, (end + (ahead + size - 1)) // size)
        columns = start // size
        entries = rows * s.width + columns  # of the flat table: where each sequence writes first
        to_copy = self._find_shared(entries, start)
        growing = np.flatnonzero(after != before)
        owners, new_columns = expand(before[growing], after[growing])
        num_new = len(to_copy) + len(owners)
        self.pool.require(num_new)

        blocks = self.pool.allocate(num_new)
        copies = self._copy(rows, to_copy, columns[to_copy], blocks[: len(to_copy)])
        self._forget_overwritten(entries)
        growth = self._grow(rows, growing[owners], new_columns, blocks[len(to_copy) :])
        s.num_blocks[rows] = after
        s.length[rows] = end
        positions = start
        if not (isinstance(counts, int) and counts == 1):
            owners, positions = expand(start, end)
            columns = positions // size
            entries = rows[owners] * s.width + columns
        slots = (s.flat_table[entries] - columns) * size + positions
        number = self.pool.open_step()
        self.steps[number] = step = Step(
            number, handles, rows, counts, start, end, ahead, before, copies, growth, slots, positions
        )
        return step

    def _find_shared(self, entries: Ints, start: Ints) -> Ints:
        """Which sequences must have their own copy of the block at `start`, their table's entry, before they write.

        Only the block at `start` can be shared: blocks past it are reserved, and those belong to one sequence.
        """
        refcount = self.pool.refcount
        blocks = self.sequences.flat_table[entries]  # -1 where a new block begins
        writers = np.flatnonzero((refcount[blocks] > 1) & (blocks >= 0))
        if not len(writers):
            return writers
        # A block all of whose references write in this step: one of them may keep it. The longest does, so
        # that the others, should the step be rolled back, find their tokens in it untouched.
        shared, group, num_writers = np.unique(blocks[writers], return_inverse=True, return_counts=True)
        order = np.lexsort((start[writers], group))
        longest = order[num_writers.cumsum() - 1]
        return np.delete(writers, longest[num_writers == refcount[shared]])

    def _copy(self, rows: Ints, owners: Ints, columns: Ints, blocks: Ints) -> Copies:
        """Put `blocks` in the place of shared ones."""
        s, rows = self.sequences, rows[owners]
        sources = s.table[rows, columns].astype(np.int64)
        s.table[rows, columns] = blocks
        self.trie.tokens[blocks] = self.trie.tokens[sources]
        s.renew_stamps(rows)
        return Copies(owners, columns, sources, blocks)

    def _forget_overwritten(self, entries: Ints) -> None:
        """A block that was in the prefix cache before its sequence was truncated leaves it when written to."""
        if len(self.trie):
            blocks = self.sequences.flat_table[entries].astype(np.int64)
            blocks = blocks[blocks >= 0]
            self.trie.remove(blocks[self.trie.has(blocks)])

    def _grow(self, rows: Ints, owners: Ints, columns: Ints, blocks: Ints) -> Growth:
        """Put `blocks` at the ends of tables."""
        self.sequences.table[rows[owners], columns] = blocks
        return Growth(owners, columns, blocks)

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
        alive = self._alive(step)
        if not alive.all():
            rows, start, end = rows[alive], start[alive], end[alive]
        self._require_all(s.committed[rows] == start, rows, "an earlier", "commit")
        if advanced:
            self._require_all(s.length[rows] == end, rows, "a later", "commit advanced tokens of")
            end = end + advanced
            s.length[rows] = end
        s.committed[rows] = end
        self._close(step, step.copies.sources[alive[step.copies.owners]])

    def rollback(self, step: Step) -> None:
        """Undo a step: lengths, tables, reference counts and the order of free blocks are as before it.

        What it evicted from the prefix cache does not come back.

        Sequences freed since are skipped.

        Raises:
            ValueError: the step is not open, or a later step of one of its sequences is.
        """
        s, copies, growth = self.sequences, step.copies, step.growth
        self._require_open(step)
        alive = self._alive(step)
        rows = step.rows[alive]
        self._require_all(s.length[rows] == step.end[alive], rows, "a later", "roll back")
        copied, grown = alive[copies.owners], alive[growth.owners]
        copy_rows = step.rows[copies.owners[copied]]
        grown_rows = step.rows[growth.owners[grown]]
        s.length[rows] = step.start[alive]
        s.num_blocks[rows] = step.blocks_before[alive]
        s.table[grown_rows, growth.columns[grown]] = -1
        s.table[copy_rows, copies.columns[copied]] = copies.sources[copied]
        s.renew_stamps(np.unique(np.concatenate([copy_rows, grown_rows])))
        # No other step can have read these blocks, so none has to be waited for.
        self.pool.undo_allocate(np.concatenate([copies.blocks[copied], growth.blocks[grown]]))
        self._close(step, _NONE)

    def _require_open(self, step: Step) -> None:
        if self.steps.get(step.number) is not step:
            raise ValueError(f"step {step.number} is not open: it was committed or rolled back before")

    def _alive(self, step: Step) -> Flags:
        """[n], which of the step's sequences have not been freed since."""
        alive: Flags = self.sequences.handle[step.rows] == step.handles
        return alive

    def _require_all(self, fine: Flags, rows: Ints, which: str, action: str) -> None:
        if not fine.all():
            seq = self.sequences.handle[rows[~fine][0]]
            raise ValueError(f"cannot {action} this step: {which} step of sequence {seq} is open")

    def _close(self, step: Step, unneeded: Ints) -> None:
        del self.steps[step.number]
        self.pool.close_step(step.number)
        if len(unneeded):
            self.pool.release(unneeded)

    def stats(self, bytes_per_token: int) -> inspection.MemoryStats:
        """See `MemoryStats`."""
        return inspection.stats(self, bytes_per_token)

    def check_integrity(self) -> None:
        """Raise IntegrityError, naming the broken invariant, if the records contradict each other."""
        inspection.check_integrity(self)


def _is_hashable(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True
