"""Sequences moved out of the cache and back in: which blocks go, and where they come back."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from torch_paged.memory.arrays import Ints, expand
from torch_paged.memory.history import enter
from torch_paged.memory.parcel import Parcel, Part
from torch_paged.memory.records import Records

_NONE = np.empty(0, dtype=np.int64)


class Landing(NamedTuple):
    """Where sequences about to come back have their blocks in one group. These are taken, but nobody's yet.

    Attributes:
        tables: the blocks of each sequence, by its handle.
        moves: parcel, rows of its part, and the blocks that these go to.
        found: int64 [f], blocks that the prefix cache still held.
    """

    tables: dict[int, Ints]
    moves: list[tuple[Parcel, Ints, Ints]]
    found: Ints

    @property
    def fresh(self) -> Ints:
        """The blocks that are filled from parcels."""
        return np.concatenate([_NONE, *(blocks for _, _, blocks in self.moves)])


def pack(records: Records, seqs: Any) -> Parcel:
    """What must be kept of these sequences for them to leave. Changes nothing."""
    s = records.sequences
    handles, rows = s.find_some(seqs)
    s.require_inside(rows)
    for row in rows.tolist():
        s.require_settled(row, "swap out")
    filled = -(-s.length[rows] // records.block_size)
    parts = []
    for group in records.groups:
        first = group.first[rows]
        blocks, places = np.unique(group.held(rows, filled)[0], return_inverse=True)
        own = np.split(places, np.maximum(filled - first, 0).cumsum()[:-1])
        parts.append(Part(blocks, dict(zip(handles.tolist(), own, strict=False))))
    return Parcel(parts, records.tokens[parts[0].blocks])


def swap_out(records: Records, parcel: Parcel) -> None:
    """Release the blocks of a parcel's sequences. Those in the prefix cache stay there until their space is needed."""
    s = records.sequences
    handles = parcel.handles
    _, rows = s.find(handles)
    for group in records.groups:
        group.pool.release(group.held(rows, s.num_blocks[rows])[0])
        group.table[rows] = -1
    s.num_blocks[rows] = 0
    s.outside[rows] = True
    followed = (s.known[rows] == s.length[rows]) & (records.groups[0].first[rows] == 0)  # back to the first token
    s.known[rows] = np.where(followed, s.known[rows], -1)
    s.renew_stamps(rows)
    records.parcels.update(dict.fromkeys(handles, parcel))


def unpack(records: Records, seqs: Any) -> list[Landing]:
    """Take blocks of every group for sequences that are outside; the prefix cache may still hold some.

    Raises:
        ValueError: a sequence is not live, not outside, or occurs twice.
        OutOfBlocks: a pool cannot serve them. Nothing was changed.
    """
    s = records.sequences
    handles, rows = s.find_some(seqs)
    if not s.outside[rows].all():
        raise ValueError(f"sequence {handles[~s.outside[rows]][0]} was not swapped out")
    outside = dict(zip(handles.tolist(), rows.tolist(), strict=True))
    paths = {handle: _path(records, handle, row) for handle, row in outside.items()}
    searches = [_Search(records, index, outside, paths) for index in range(len(records.groups))]
    for search in searches:
        search.require()
    landings = [search.take() for search in searches]
    for parcel, rows, blocks in landings[0].moves:
        records.tokens[blocks] = parcel.tokens[rows]
    return landings


def _path(records: Records, handle: int, row: int) -> Ints:
    """The nodes of a sequence's full blocks, as far as the prefix cache knows them."""
    s, parcel = records.sequences, records.parcels[handle]
    full = parcel.parts[0].rows[handle][: max(int(s.known[row]), 0) // records.block_size]
    return records.trie.path(s.namespace[row], parcel.tokens[full])


class _Search:
    """Which blocks of one group are still there for sequences about to come back, and which they lack."""

    def __init__(self, records: Records, index: int, outside: dict[int, int], paths: dict[int, Ints]) -> None:
        self._group = group = records.groups[index]
        self._parcels = {handle: records.parcels[handle] for handle in outside}
        self._rows = {handle: parcel.parts[index].rows[handle] for handle, parcel in self._parcels.items()}
        self._place = {
            parcel: np.full(len(parcel.parts[index].blocks), -1, dtype=np.int64) for parcel in self._parcels.values()
        }
        for handle, row in outside.items():
            hits = group.cached.blocks_of(paths[handle][int(group.first[row]) :])
            self._place[self._parcels[handle]][self._rows[handle][: len(hits)]] = hits
        self._found = np.unique(np.concatenate([_NONE, *self._place.values()]))
        self._found = self._found[self._found >= 0]
        self._missing = {parcel: self._lacking(parcel, place) for parcel, place in self._place.items()}
        self._count = sum(map(len, self._missing.values()))

    def _lacking(self, parcel: Parcel, place: Ints) -> Ints:
        """Which rows of a parcel its sequences need that have no block yet."""
        needed = [rows for handle, rows in self._rows.items() if self._parcels[handle] is parcel]
        rows = np.unique(np.concatenate(needed))
        lacking: Ints = rows[place[rows] < 0]
        return lacking

    def require(self) -> None:
        """Raise OutOfBlocks unless the group can serve them."""
        pool = self._group.pool
        pool.require(self._count + pool.count_evictable(self._found))

    def take(self) -> Landing:
        """Take the blocks. `require` them first."""
        pool = self._group.pool
        pool.retain(self._found)
        blocks = pool.allocate(self._count)
        ends = np.cumsum([len(rows) for rows in self._missing.values()], dtype=np.int64)
        moves = []
        for (parcel, rows), fresh in zip(self._missing.items(), np.split(blocks, ends[:-1]), strict=False):
            if len(rows):
                self._place[parcel][rows] = fresh
                moves.append((parcel, rows, fresh))
        tables = {handle: self._place[parcel][self._rows[handle]] for handle, parcel in self._parcels.items()}
        return Landing(tables, moves, self._found)


def cancel(records: Records, landings: list[Landing]) -> None:
    """Give back what `unpack` took. What it evicted from the prefix cache does not come back."""
    for group, landing in zip(records.groups, landings, strict=True):
        group.pool.undo_allocate(landing.fresh)
        group.pool.release(landing.found)


def swap_in(records: Records, landings: list[Landing]) -> None:
    """Give the sequences their blocks, which hold their tokens again."""
    s = records.sequences
    for group, landing in zip(records.groups, landings, strict=True):
        for handle, blocks in landing.tables.items():
            row = s.find_one(handle)
            group.pool.retain(blocks)
            first = group.first[row]
            group.table[row, first : first + len(blocks)] = blocks
            s.num_blocks[row] = first + len(blocks)
        group.pool.release(np.concatenate([landing.found, landing.fresh]))
    handles = list(landings[0].tables)
    for handle in handles:
        records.parcels.pop(handle).forget(handle)
    _, rows = s.find(handles)
    s.outside[rows] = False
    _enter_again(records, rows)


def _enter_again(records: Records, rows: Ints) -> None:
    """Enter full blocks that the prefix cache has evicted meanwhile."""
    s = records.sequences
    full = np.maximum(s.known[rows], 0) // records.block_size
    owners, columns = expand(np.zeros_like(full), full)
    rows = rows[owners]
    left_out = np.zeros(len(rows), dtype=bool)
    for group in records.groups:
        left_out |= (columns >= group.first[rows]) & ~group.cached.has(group.table[rows, columns].astype(np.int64))
    enter(records, rows[left_out], columns[left_out])
