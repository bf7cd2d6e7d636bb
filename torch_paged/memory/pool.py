"""Blocks: how often each is referenced, which are free, which wait for open steps, which are kept in case of need."""

from __future__ import annotations

from collections import deque

import numpy as np

from torch_paged.memory.arrays import Ints, distinct
from torch_paged.memory.errors import OutOfBlocks
from torch_paged.memory.eviction import EvictionQueue
from torch_paged.memory.prefix import CachedBlocks


class BlockPool:
    """Reference counts of a group's blocks, a stack of the free ones, a queue of those kept for the prefix cache.

    A block whose last reference goes while steps are open is not free yet: a step in flight may still read
    it. It waits until every step that was open at that moment has ended. Example, three steps 0, 1, 2:

        open_step() -> 0, open_step() -> 1
        release([7])                           7 waits for steps 0 and 1
        open_step() -> 2, close_step(0)        7 waits: step 1 is open
        close_step(1)                          7 is free, though step 2 is open

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
        # In order: (ticket, newest step open at the time, blocks); of a block only the entry with its ticket counts.
        self._waiting: deque[tuple[int, int, Ints]] = deque()
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

    def release(self, blocks: Ints) -> None:
        """Drop one reference for each entry of `blocks`, in which a block may occur several times."""
        different = distinct(blocks)
        if len(different) == len(blocks):
            self.refcount[different] -= 1
        else:
            np.subtract.at(self.refcount, blocks, 1)
        unreferenced = different[self.refcount[different] == 0]
        if not len(unreferenced):
            return
        if self._open_steps:
            self._waiting.append((self._next_ticket, next(reversed(self._open_steps)), unreferenced))
            self._ticket[unreferenced] = self._next_ticket
            self._next_ticket += 1
            self.num_waiting += len(unreferenced)
        else:
            self._give_up(unreferenced)

    def open_step(self) -> int:
        """Note that a step begins, and return its number."""
        step = self._next_step
        self._next_step += 1
        self._open_steps[step] = None
        return step

    def close_step(self, step: int) -> None:
        """Note that a step has ended; blocks that waited for it, and for no other, are given up."""
        del self._open_steps[step]
        oldest = next(iter(self._open_steps), self._next_step)
        while self._waiting and self._waiting[0][1] < oldest:
            ticket, _, blocks = self._waiting.popleft()
            blocks = blocks[self._ticket[blocks] == ticket]  # the others are referenced again, or wait anew
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
        if len(self.cached):
            cached = self.cached.has(blocks)
            kept = blocks[cached]
            self._evictable.append(kept[np.argsort(-self.cached.column[kept], kind="stable")])
            blocks = blocks[~cached]
        self._push(blocks)

    def _push(self, blocks: Ints) -> None:
        self._stack[self.num_free : self.num_free + len(blocks)] = blocks[::-1]
        self.num_free += len(blocks)
