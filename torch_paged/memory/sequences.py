"""Sequences: their handles and lengths, in arrays with one row a sequence."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np

from torch_paged.memory.arrays import Ints, as_integers


class Sequences:
    """Rows of up to `max_seqs` live sequences.

    A handle is an int that names a sequence for ever: the row in its low bits, above them how often the row
    was used before. So a freed sequence's handle is told from its row's next owner without a look-up table.
    With `max_seqs = 4`, row 2 serves the handles 2, 6, 10, ...

    Attributes:
        handle: int64 [rows], the handle that lives in each row, negative where none does.
        length: int64 [max_seqs], tokens, those of open steps included.
        committed: int64 [max_seqs], tokens of steps that were committed. Less than `length`: a step is open.
        known: int64 [max_seqs], how many tokens of the history, from the first on, the prefix cache was told; those
            in full blocks are in it. Less than `committed`, and it does not follow the sequence (for ever if -1),
            unless the missing tokens are still on their way.
        namespace: of each row, whose prefixes it shares.
        outside: bool [max_seqs], swapped out: it has its length, but no blocks.
        num_blocks: int64 [max_seqs], the blocks of each sequence, those that a window has left behind included;
            those past the length are reserved.
        stamp: int64 [max_seqs], a number never used twice. A new one is drawn whenever entries already in a table are
            replaced or taken away from its end, so an equal stamp means that a table has at most grown there.
        width: columns of a table, see BlockGroup.
    """

    def __init__(self, max_seqs: int, max_seq_len: int, block_size: int) -> None:
        self.max_seqs = max_seqs
        self.max_seq_len = max_seq_len
        self.width = -(-max_seq_len // block_size)
        num_rows = 1 << max((max_seqs - 1).bit_length(), 1)  # any integer names a row; past max_seqs none lives
        self._row_mask = num_rows - 1
        self._no_handle = ~np.arange(num_rows)  # as a handle, ~row names another row than this: it never matches
        self.handle = self._no_handle.copy()
        self.length = np.zeros(max_seqs, dtype=np.int64)
        self.committed = np.zeros(max_seqs, dtype=np.int64)
        self.known = np.zeros(max_seqs, dtype=np.int64)
        self.namespace: list[Hashable] = [None] * max_seqs
        self.outside = np.zeros(max_seqs, dtype=bool)
        self.num_blocks = np.zeros(max_seqs, dtype=np.int64)
        self.stamp = np.full(max_seqs, -1, dtype=np.int64)
        self._next_stamp = 0
        self._next_handle = np.arange(max_seqs, dtype=np.int64)
        self._free_rows = list(range(max_seqs))[::-1]
        self._order = np.arange(max_seqs)
        self._last_content = b""
        self._last_found = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        self._seen = np.zeros(num_rows, dtype=np.int64)

    @property
    def live_rows(self) -> Ints:
        """The rows in use, ascending."""
        return np.flatnonzero(self.handle >= 0)

    @property
    def num_free_rows(self) -> int:
        return len(self._free_rows)

    def find(self, seqs: Any) -> tuple[Ints, Ints]:
        """Handles and rows of distinct live sequences, which the next call may return again: not to be written to.

        Raises:
            TypeError: `seqs` are not integers.
            ValueError: one is unknown, was freed, or occurs twice.
        """
        handles = as_integers("seqs", seqs)
        content = handles.tobytes()
        known = content == self._last_content  # a decode loop passes the same ones again and again
        if known:
            handles, rows = self._last_found
        else:
            rows = handles & self._row_mask
        alive = self.handle[rows] == handles
        if np.count_nonzero(alive) < len(alive):
            raise ValueError(self._why_not_alive(int(handles[~alive][0])))
        if not known and len(handles) > 1:  # a single one may be asked about between two steps
            self._check_distinct(handles, rows)
            handles.flags.writeable = rows.flags.writeable = False
            self._last_content, self._last_found = content, (handles, rows)
        return handles, rows

    def find_some(self, seqs: Any) -> tuple[Ints, Ints]:
        """As `find`, for a single sequence's handle too."""
        return self.find(seqs if isinstance(seqs, list) or np.ndim(seqs) else [seqs])

    def find_one(self, seq: int) -> int:
        """The row of one live sequence; raises as `find` does."""
        if type(seq) is int and self.handle[seq & self._row_mask] == seq:
            return seq & self._row_mask
        return int(self.find([seq])[1][0])

    def places(self, rows: Ints) -> Ints:
        """int64 [max_seqs], where in `rows`, distinct ones, each row is; -1: it is not among them."""
        places = np.full(self.max_seqs, -1, dtype=np.int64)
        places[rows] = np.arange(len(rows))
        return places

    def _why_not_alive(self, handle: int) -> str:
        row = handle & self._row_mask
        used = 0 <= handle and row < self.max_seqs and handle < self._next_handle[row]
        return f"sequence {handle} was freed" if used else f"there is no sequence {handle}"

    def _check_distinct(self, handles: Ints, rows: Ints) -> None:
        # Each row remembers who came last: a sequence that is not its own last visitor occurs twice.
        order = self._order[: len(rows)] if len(rows) <= self.max_seqs else np.arange(len(rows))
        self._seen[rows] = order
        repeated = self._seen[rows] != order
        if repeated.any():
            raise ValueError(f"seqs must be distinct, sequence {handles[repeated][0]} occurs twice")

    def require_rows(self, count: int) -> None:
        """Raise ValueError unless `count` more sequences fit."""
        if count > len(self._free_rows):
            used = self.max_seqs - len(self._free_rows)
            raise ValueError(f"max_seqs = {self.max_seqs}: {count} more sequences do not fit beside {used} live ones")

    def require_inside(self, rows: Ints) -> None:
        """Raise ValueError if one of these sequences is swapped out."""
        if self.outside[rows].any():
            seq = self.handle[rows[self.outside[rows]][0]]
            raise ValueError(f"sequence {seq} is swapped out: swap it in first")

    def require_settled(self, row: int, action: str) -> None:
        """Raise ValueError if a step of this row's sequence is open."""
        if self.committed[row] != self.length[row]:
            raise ValueError(
                f"cannot {action} sequence {self.handle[row]} while one of its steps is open: commit or roll back first"
            )

    def grown(self, handles: Ints, length: Ints, counts: int | Ints, ahead: int) -> tuple[Ints, Ints]:
        """Lengths of sequences with so many tokens more, and with those `ahead` besides.

        Raises ValueError if one of them would grow past `max_seq_len`.
        """
        most = max(ahead, counts if isinstance(counts, int) else int(counts.max(initial=0)))
        if most > self.max_seq_len:  # before a sum could overflow
            raise ValueError(f"max_seq_len = {self.max_seq_len}: no sequence can get {most} tokens")
        end = length + counts
        reserved = end + ahead if ahead else end
        if len(reserved) and reserved.max() > self.max_seq_len:
            worst = reserved.argmax()
            raise ValueError(
                f"max_seq_len = {self.max_seq_len}: sequence {handles[worst]} would have {reserved[worst]} tokens"
            )
        return end, reserved

    def open_rows(self, count: int) -> Ints:
        """Take `count` free rows for new, empty sequences. `require_rows` first."""
        rows = np.array([self._free_rows.pop() for _ in range(count)], dtype=np.int64)
        self.handle[rows] = self._next_handle[rows]
        self._next_handle[rows] += self._row_mask + 1
        self.length[rows] = self.committed[rows] = self.known[rows] = self.num_blocks[rows] = 0
        self.renew_stamps(rows)
        return rows

    def fill(self, rows: Ints, num_blocks: int, length: int, known: int, namespace: Hashable) -> None:
        """Give new, empty sequences their first tokens, all the same."""
        self.num_blocks[rows] = num_blocks
        self.length[rows] = self.committed[rows] = length
        self.known[rows] = known
        for row in rows.tolist():
            self.namespace[row] = namespace

    def close_rows(self, rows: Ints) -> None:
        """End the sequences of these rows; their blocks are the caller's to release."""
        self.handle[rows] = self._no_handle[rows]
        self.num_blocks[rows] = 0
        self.outside[rows] = False
        for row in rows.tolist():
            self.namespace[row] = None
        self._free_rows.extend(rows[::-1].tolist())

    def renew_stamps(self, rows: Ints) -> None:
        self.stamp[rows] = np.arange(self._next_stamp, self._next_stamp + len(rows))
        self._next_stamp += len(rows)
