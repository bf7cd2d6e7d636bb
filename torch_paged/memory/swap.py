"""Sequences moved out of the cache and back in: which blocks go, and where they come back."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from torch_paged.memory.arrays import Ints, expand
from torch_paged.memory.history import enter

if TYPE_CHECKING:
    from torch_paged.memory.manager import MemoryManager


_NONE = np.empty(0, dtype=np.int64)


@dataclasses.dataclass(eq=False)
class Parcel:
    """Blocks that leave together, each once, however many of the sequences share it.

    Attributes:
        blocks: int64 [n], where they were.
        tokens: int64 [n, block_size], see `PrefixTrie.tokens`.
        rows: of each sequence outside, by its handle: which of the n blocks hold its tokens, in order.
        content: what the caller kept of the n blocks.
    """

    blocks: Ints
    tokens: Ints
    rows: dict[int, Ints]
    content: Any = None


class Arrival(NamedTuple):
    """Sequences about to come back. Blocks are taken, but nobody's yet.

    Attributes:
        tables: the blocks of each sequence, by its handle.
        moves: parcel, its rows, and the blocks that these go to.
        found: int64 [f], blocks that the prefix cache still held.
    """

    tables: dict[int, Ints]
    moves: list[tuple[Parcel, Ints, Ints]]
    found: Ints

    @property
    def fresh(self) -> Ints:
        """The blocks that are filled from parcels."""
        return np.concatenate([_NONE, *(blocks for _, _, blocks in self.moves)])


def pack(manager: MemoryManager, seqs: Any) -> Parcel:
    """What must be kept of these sequences for them to leave. Changes nothing."""
    s = manager.sequences
    handles, rows = s.find_some(seqs)
    s.require_inside(rows)
    for row in rows.tolist():
        s.require_settled(row, "swap out")
    filled = -(-s.length[rows] // manager.block_size)
    owners, columns = expand(np.zeros_like(filled), filled)
    blocks, places = np.unique(s.table[rows[owners], columns].astype(np.int64), return_inverse=True)
    parts = np.split(places, filled.cumsum()[:-1])
    return Parcel(blocks, manager.trie.tokens[blocks], dict(zip(handles.tolist(), parts, strict=False)))


def swap_out(manager: MemoryManager, parcel: Parcel) -> None:
    """Release the blocks of a parcel's sequences. Those in the prefix cache stay there until their space is needed."""
    s = manager.sequences
    _, rows = s.find(list(parcel.rows))
    owners, columns = expand(np.zeros_like(rows), s.num_blocks[rows])
    manager.pool.release(s.table[rows[owners], columns].astype(np.int64))
    s.table[rows] = -1
    s.num_blocks[rows] = 0
    s.outside[rows] = True
    s.known[rows] = np.where(s.known[rows] == s.length[rows], s.known[rows], -1)
    s.renew_stamps(rows)
    manager.parcels.update(dict.fromkeys(parcel.rows, parcel))


def unpack(manager: MemoryManager, seqs: Any) -> Arrival:
    """Take blocks for sequences that are outside; the prefix cache may still hold some.

    Raises:
        ValueError: a sequence is not live, not outside, or occurs twice.
        OutOfBlocks: the pool cannot serve them. Nothing was changed.
    """
    s, pool = manager.sequences, manager.pool
    handles, rows = s.find_some(seqs)
    if not s.outside[rows].all():
        raise ValueError(f"sequence {handles[~s.outside[rows]][0]} was not swapped out")
    place = {
        parcel: np.full(len(parcel.blocks), -1, dtype=np.int64)
        for parcel in dict.fromkeys(manager.parcels[handle] for handle in handles.tolist())
    }
    for handle, row in zip(handles.tolist(), rows.tolist(), strict=True):
        parcel = manager.parcels[handle]
        full = parcel.rows[handle][: max(int(s.known[row]), 0) // manager.block_size]
        hits = manager.trie.find(s.namespace[row], parcel.tokens[full])
        place[parcel][full[: len(hits)]] = hits
    missing = {parcel: _missing(parcel, place[parcel], handles) for parcel in place}
    found = np.unique(np.concatenate([_NONE, *place.values()]))
    found = found[found >= 0]
    count = sum(map(len, missing.values()))
    pool.require(count + pool.count_evictable(found))

    pool.retain(found)
    blocks = pool.allocate(count)
    ends = np.cumsum([len(rows) for rows in missing.values()], dtype=np.int64)
    moves = []
    for (parcel, part), fresh in zip(missing.items(), np.split(blocks, ends[:-1]), strict=False):
        if len(part):
            place[parcel][part] = fresh
            manager.trie.tokens[fresh] = parcel.tokens[part]
            moves.append((parcel, part, fresh))
    out = {handle: manager.parcels[handle] for handle in handles.tolist()}
    tables = {handle: place[parcel][parcel.rows[handle]] for handle, parcel in out.items()}
    return Arrival(tables, moves, found)


def _missing(parcel: Parcel, place: Ints, handles: Ints) -> Ints:
    """Which rows of a parcel these of its sequences need that have no block yet."""
    needed = [parcel.rows[handle] for handle in handles.tolist() if handle in parcel.rows]
    rows = np.unique(np.concatenate(needed))
    missing: Ints = rows[place[rows] < 0]
    return missing


def cancel(manager: MemoryManager, arrival: Arrival) -> None:
    """Give back what `unpack` took. What it evicted from the prefix cache does not come back."""
    manager.pool.undo_allocate(arrival.fresh)
    manager.pool.release(arrival.found)


def swap_in(manager: MemoryManager, arrival: Arrival) -> None:
    """Give the sequences of an arrival their blocks, which hold their tokens again."""
    s, pool = manager.sequences, manager.pool
    for handle, blocks in arrival.tables.items():
        row = s.find_one(handle)
        pool.retain(blocks)
        s.table[row, : len(blocks)] = blocks
        s.num_blocks[row] = len(blocks)
        s.outside[row] = False
        del manager.parcels.pop(handle).rows[handle]
    pool.release(np.concatenate([arrival.found, arrival.fresh]))
    _enter_again(manager, list(arrival.tables))


def _enter_again(manager: MemoryManager, handles: list[int]) -> None:
    """Enter full blocks that the prefix cache has evicted meanwhile."""
    s = manager.sequences
    _, rows = s.find(handles)
    full = np.maximum(s.known[rows], 0) // manager.block_size
    owners, columns = expand(np.zeros_like(full), full)
    rows = rows[owners]
    left_out = ~manager.trie.has(s.table[rows, columns].astype(np.int64))
    enter(manager, rows[left_out], columns[left_out])
