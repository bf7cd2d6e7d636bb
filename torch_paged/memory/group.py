"""BlockGroup: the blocks of the layers that see equally far back, and who holds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from torch_paged.memory.arrays import Flags, Ints, expand
from torch_paged.memory.pool import BlockPool, Reading
from torch_paged.memory.prefix import CachedBlocks, PrefixTrie
from torch_paged.memory.sequences import Sequences
from torch_paged.memory.step import Copies, Growth, Taken


class BlockGroup:
    """A pool of blocks, and a table with a row for each sequence; row by row as in `Sequences`.

    With a sliding window, the blocks before it are released as a sequence grows. Those stay whose last key is one of
    the `window + block_size - 1` last ones: the next query sees `window - 1` of them, and a sequence can be truncated
    by a block's length. Example, `block_size` 4 and `window` 6, a sequence of 17 tokens:

        position  0..3   4..7   8..11  12..15  16..19
        table      -1     -1      6       2      9        first = 2: keys 8 and later are among the last 9

    Attributes:
        window: keys that a query sees, itself included; None: all.
        pool: the blocks.
        cached: which of them are in the prefix cache.
        table: int32 [max_seqs, width], the blocks of each row; -1 before `first`, past the blocks of the sequence, and
            in rows not in use.
        first: int64 [max_seqs], how many blocks of each sequence were released because no query can see them.
    """

    def __init__(
        self, number: int, window: int | None, num_blocks: int, block_size: int, trie: PrefixTrie, sequences: Sequences
    ) -> None:
        self.window = window
        self.cached = CachedBlocks(trie, num_blocks)
        self.pool = BlockPool(self.cached, number)
        self.table = np.full((sequences.max_seqs, sequences.width), -1, dtype=np.int32)
        self.flat_table = self.table.reshape(-1)
        self.first = np.zeros(sequences.max_seqs, dtype=np.int64)
        self._width = sequences.width
        self._block_size = block_size

    def first_seen(self, length: Any) -> Any:
        """The first column that a sequence of this length needs: its next query sees something there.

        `length`: an int, or an array of them.
        """
        return length * 0 if self.window is None else self._column(length, self.window - 1)

    def first_kept(self, length: Any) -> Any:
        """The first column that stays when a sequence has grown to this length."""
        return length * 0 if self.window is None else self._column(length, self.window + self._block_size - 1)

    def _column(self, length: Any, count: int) -> Any:
        """Where the `count` last tokens begin."""
        start = length - count
        return start * (start > 0) // self._block_size

    def first_found(self, num_blocks: int) -> int:
        """The first of so many blocks of a prefix that it takes to go on: the last one says from what."""
        seen: int = self.first_seen(num_blocks * self._block_size)
        return min(seen, max(num_blocks - 1, 0))

    def held(self, rows: Ints, last: Ints) -> tuple[Ints, Ints]:
        """The blocks before the columns `last`, one row after another, and in which of the rows each is."""
        owners, columns = expand(np.minimum(self.first[rows], last), last)
        return self.flat_table[rows[owners] * self._width + columns].astype(np.int64), owners

    def require(self, entries: Ints, start: Ints, growth: int) -> Ints:
        """Raise OutOfBlocks unless a step can have `growth` new blocks, and copies where it writes to shared ones.

        Returns:
            Which sequences must have their own copy of the block at `start`, their table's entry. No other can be
            shared: blocks past it are reserved, and those belong to one sequence.
        """
        writers = self._find_shared(entries, start)
        self.pool.require(len(writers) + growth)
        return writers

    def _find_shared(self, entries: Ints, start: Ints) -> Ints:
        refcount = self.pool.refcount
        blocks = self.flat_table[entries]  # -1 where a new block begins
        writers = ((refcount[blocks] > 1) & (blocks >= 0)).nonzero()[0]
        if not len(writers):
            return writers
        # A block all of whose references write in this step: one of them may keep it. The longest does, so
        # that the others, should the step be rolled back, find their tokens in it untouched.
        shared, group, num_writers = np.unique(blocks[writers], return_inverse=True, return_counts=True)
        order = np.lexsort((start[writers], group))
        longest = order[num_writers.cumsum() - 1]
        return np.delete(writers, longest[num_writers == refcount[shared]])

    def take(self, rows: Ints, entries: Ints, writers: Ints, owners: Ints, columns: Ints) -> tuple[Copies, Growth]:
        """Blocks for a step: copies for those `writers` that share the one at their entry, and `columns` of `owners`.

        A block that was in the prefix cache before its sequence was truncated leaves it, as it is written to.
        """
        blocks = self.pool.allocate(len(writers) + len(owners))
        copies = Copies(writers, writers, writers, writers)  # none
        if len(writers):
            shared, copied = entries[writers], blocks[: len(writers)]
            copies = Copies(writers, shared % self._width, self.flat_table[shared].astype(np.int64), copied)
            self.flat_table[shared] = copied
        if len(self.cached):
            written = self.flat_table[entries]
            again = written[(self.cached.node[written] >= 0) & (written >= 0)]
            if len(again):
                self.cached.remove(again.astype(np.int64))
        growth = Growth(owners, columns, blocks[len(writers) :])
        self.table[rows[owners], columns] = growth.blocks
        return copies, growth

    def undo(self, taken: Taken, rows: Ints, alive: Flags) -> None:
        """Give back what a step took for those of its sequences that are alive."""
        copies, growth = taken.copies, taken.growth
        copied, grown = alive[copies.owners], alive[growth.owners]
        self.table[rows[growth.owners[grown]], growth.columns[grown]] = -1
        self.table[rows[copies.owners[copied]], copies.columns[copied]] = copies.sources[copied]
        # No other step can have read these blocks, so none has to be waited for.
        self.pool.undo_allocate(np.concatenate([copies.blocks[copied], growth.blocks[grown]]))

    def fill(self, rows: Ints, blocks: Ints, first: int) -> None:
        """Let each of these rows, of new sequences, begin with `blocks`, in the columns from `first` on."""
        self.pool.retain(blocks, times=len(rows))
        self.table[rows, first : first + len(blocks)] = blocks
        self.first[rows] = first

    def release_unseen(self, rows: Ints, length: Ints, reading: Callable[[Ints, Ints], Reading]) -> None:
        """Release what sequences of these lengths do not need to keep; `reading`: that of the records."""
        if self.window is None:
            return
        first = self.first_kept(length)
        moved = np.flatnonzero(first > self.first[rows])
        if len(moved):
            rows, first = rows[moved], first[moved]
            owners, columns = expand(self.first[rows], first)
            entries = rows[owners] * self._width + columns
            blocks = self.flat_table[entries].astype(np.int64)
            self.flat_table[entries] = -1
            self.first[rows] = first
            self.pool.release(blocks, reading(blocks, rows[owners]))


def usable(groups: list[BlockGroup], nodes: Ints) -> Ints:
    """The longest beginning of a path in the prefix cache after which every group has what the next query sees."""
    while True:
        gaps = [len(nodes)]
        for group in groups:
            blocks = group.cached.blocks_of(nodes[group.first_found(len(nodes)) :])
            missing = np.flatnonzero(blocks < 0)
            if len(missing):
                gaps.append(len(nodes) - len(blocks) + int(missing[0]))
        if min(gaps) == len(nodes):
            return nodes
        nodes = nodes[: min(gaps)]
