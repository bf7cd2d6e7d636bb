"""Blocks: how often each is referenced, which are free, which wait for open steps, which are kept in case of need."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from torch_paged.memory.arrays import Ints, distinct
from torch_paged.memory.errors import OutOfBlocks
from torch_paged.memory.eviction import EvictionQueue
from torch_paged.memory.prefix import CachedBlocks

_NO_STEP = np.iinfo(np.int64).max


class Readers(NamedTuple):
    """int64 [n], of n blocks or sequences: the oldest and the newest open step that may read them.

    Where there is none, the oldest is newer than the newest.
    """

    oldest: Ints
    newest: Ints

    @classmethod
    def none(cls, count: int) -> Readers:
        return cls(np.full(count, _NO_STEP), np.full(count, -1, dtype=np.int64))

    def of(self, places: Ints) -> Readers:
        """Those at some places."""
        return Readers(self.oldest[places], self.newest[places])


class BlockPool:
    """Reference counts of a group's blocks, a stack of the free ones, a queue of those kept for the prefix cache.

    A block whose last reference goes while a step in flight may still read it is not free yet. Who drops a reference
    says which steps these are, by the oldest and the newest (`Readers`); of all that were said of a block, it waits for
    those between the oldest and the newest. Example, four steps 0 to 3, of which 1 and 2 read block 7 for a sequence:

        release([7], readers=(1, 2))           7 waits for steps 1 and 2
        close_step(1)                          7 waits: step 2 is open
        close_step(2)                          7 is free, though steps 0 and 3 are open

    If 7 is in the prefix cache it is then evictable instead: it keeps its contents until `allocate` finds the stack
    empty. Least recently released blocks go first, of those released at once the last column first. So leaves go before
    their parents, unless a window has left these behind: who references a block references those before it as well.

    Attributes:
        cached: which of the blocks are in the prefix cache.
        group: the number of the layers' group.
        refcount: int32 [num_blocks].
        num_free: blocks on the stack.
        num_waiting: unreferenced blocks that wait for open steps.
    """

    def __init__(self, cached: CachedBlocks, group: int) -> None:
        self.cached = cached
        self.group = group
        self.num_blocks = num_blocks = len(cached.node)
        self.refcount = np.zeros(num_blocks, dtype=np.int32)
        self.num_free = num_blocks
        self.num_waiting = 0
        # [:num_free] are free; the last of them goes out first, so a block just freed is used while cached.
        self._stack = np.arange(num_blocks, dtype=np.int64)[::-1].copy()
        self._evictable = EvictionQueue(num_blocks)
        self._oldest = np.full(num_blocks, _NO_STEP)  # steps that may still read it for who let go of it
        self._newest = np.full(num_blocks, -1, dtype=np.int64)
        # By the step that they wait for: (ticket, blocks); of a block only the entry with its ticket counts.
        self._waiting: dict[int, list[tuple[int, Ints]]] = {}
        self._ticket = np.full(num_blocks, -1, dtype=np.int64)
        self._next_ticket = 0
        self._open_steps: dict[int, None] = {}  # an ordered set: the oldest first
        self._next_step = 0

    @property
    def free_blocks(self) -> Ints:
        """The free blocks, the next one to go out last."""
        return self._stack[: self.num_free]

    @property
    def evictable_blocks(self) -> Ints:
        """The unreferenced blocks of the prefix cache that wait for no step, the next one to go out first."""
        return self._evictable.blocks

    @property
    def waiting_blocks(self) -> Ints:
        """The unreferenced blocks that wait for open steps."""
        return np.flatnonzero(self._ticket >= 0)

    @property
    def num_evictable(self) -> int:
        return len(self._evictable)

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out now: free or evictable."""
        return self.num_free + len(self._evictable)

    def require(self, count: int) -> None:
        """Raise OutOfBlocks unless `count` blocks can be allocated now."""
        if count > self.num_available:
            raise OutOfBlocks(count, self.num_available, self.num_waiting, self.group)

    def count_evictable(self, blocks: Ints) -> int:
        """How many of these distinct blocks of the prefix cache `allocate` could evict."""
        return int(((self.refcount[blocks] == 0) & (self._ticket[blocks] < 0)).sum())

    def allocate(self, count: int) -> Ints:
        """Take `count` blocks, each with one reference, evicting where none is free. `require` them first."""
        if count > self.num_free:
            evicted = self._evictable.pop(count - self.num_free)
            self.cached.remove(evicted)
            self._push(evicted)
        self.num_free -= count
        blocks = self._stack[self.num_free : self.num_free + count][::-1].copy()
        self.refcount[blocks] = 1
        return blocks

    def undo_allocate(self, blocks: Ints) -> None:
        """Give back, at once and to their old places, blocks that nothing but their taker has seen."""
        self.refcount[blocks] = 0
        self._push(blocks)

    def retain(self, blocks: Ints, times: int | Ints = 1) -> None:
        """Add `times` references, of each or for all, to distinct blocks that are referenced or in the prefix cache."""
        unreferenced = blocks[self.refcount[blocks] == 0]
        if len(unreferenced):
            waiting = self._ticket[unreferenced] >= 0
            self._ticket[unreferenced] = -1
            self.num_waiting -= int(waiting.sum())
            self._evictable.remove(unreferenced[~waiting])
        self.refcount[blocks] += times

    def release(self, blocks: Ints, readers: Readers | None = None) -> None:
        """Drop one reference for each entry of `blocks`, in which a block may occur several times."""
        if readers is not None:
            np.minimum.at(self._oldest, blocks, readers.oldest)
            np.maximum.at(self._newest, blocks, readers.newest)
        different = distinct(blocks)
        if len(different) == len(blocks):
            self.refcount[different] -= 1
        else:
            np.subtract.at(self.refcount, blocks, 1)
        unreferenced = different[self.refcount[different] == 0]
        if len(unreferenced):
            self._ticket[unreferenced] = self._next_ticket
            self.num_waiting += len(unreferenced)
            self._wait_or_give_up(unreferenced, self._next_ticket)
            self._next_ticket += 1

    def open_step(self) -> int:
        """Note that a step begins, and return its number."""
        step = self._next_step
        self._next_step += 1
        self._open_steps[step] = None
        return step

    def close_step(self, step: int) -> None:
        """Note that a step has ended; blocks that waited for it, and for no other, are given up."""
        del self._open_steps[step]
        for ticket, blocks in self._waiting.pop(step, ()):
            blocks = blocks[self._ticket[blocks] == ticket]  # the others are referenced again, or wait anew
            self._wait_or_give_up(blocks, ticket)

    def _wait_or_give_up(self, blocks: Ints, ticket: int) -> None:
        """Unreferenced blocks with this ticket wait for the newest open step that may read them, if there is one."""
        for step in reversed(self._open_steps):
            waiting = (self._oldest[blocks] <= step) & (step <= self._newest[blocks])
            if np.count_nonzero(waiting):
                self._waiting.setdefault(step, []).append((ticket, blocks[waiting]))
                blocks = blocks[~waiting]
        self._ticket[blocks] = -1
        self.num_waiting -= len(blocks)
        self._give_up(blocks)

    def forget(self, nodes: Ints) -> None:
        """Take the blocks of these nodes out of the prefix cache."""
        blocks = self.cached.blocks_of(nodes)
        blocks = blocks[blocks >= 0]
        self.cached.remove(blocks)
        idle = blocks[(self.refcount[blocks] == 0) & (self._ticket[blocks] < 0)]
        self._evictable.remove(idle)
        self._push(idle)

    def _give_up(self, blocks: Ints) -> None:
        """Unreferenced blocks that no step reads: the prefix cache keeps its own, the others are free."""
        self._oldest[blocks], self._newest[blocks] = _NO_STEP, -1
        if len(self.cached):
            cached = self.cached.has(blocks)
            kept = blocks[cached]
            self._evictable.append(kept[np.argsort(-self.cached.column[kept], kind="stable")])
            blocks = blocks[~cached]
        self._push(blocks)

    def _push(self, blocks: Ints) -> None:
        self._stack[self.num_free : self.num_free + len(blocks)] = blocks[::-1]
        self.num_free += len(blocks)
