"""Blocks: how often each is referenced, which are free, which wait for open steps, which are kept in case of need."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from torch_paged.memory.arrays import Flags, Ints, distinct
from torch_paged.memory.errors import OutOfBlocks
from torch_paged.memory.eviction import EvictionQueue
from torch_paged.memory.prefix import CachedBlocks

Reading = Iterable[tuple[int, Ints]]  # open steps, each with blocks that it may read


class BlockPool:
    """Reference counts of a group's blocks, a stack of the free ones, a queue of those kept for the prefix cache.

    A block whose last reference goes while a step in flight may still read it is not free yet. Who drops a reference
    says which steps these are. Example, four open steps 0 to 3, of which 1 and 2 read block 7 for a sequence:

        release([7], [(1, [7]), (2, [7])])     7 waits for steps 1 and 2
        close_step(2)                          7 waits: step 1 is open
        close_step(1)                          7 is free, though steps 0 and 3 are open

    If 7 is in the prefix cache it is then evictable instead: it keeps its contents until `allocate` finds the stack
    empty. Least recently released blocks go first, of those released at once the last column first. So leaves go before
    their parents, unless a window has left these behind: who references a block references those before it as well.

    Attributes:
        cached: which of the blocks are in the prefix cache.
        group: the number of the layers' group.
        refcount: int32 [num_blocks].
        num_free: blocks on the stack.
    """

    def __init__(self, cached: CachedBlocks, group: int) -> None:
        self.cached = cached
        self.group = group
        self.num_blocks = num_blocks = len(cached.node)
        self.refcount = np.zeros(num_blocks, dtype=np.int32)
        self.num_free = num_blocks
        # [:num_free] are free; the last of them goes out first, so a block just freed is used while cached.
        self._stack = np.arange(num_blocks, dtype=np.int64)[::-1].copy()
        self._evictable = EvictionQueue(num_blocks)
        self._reading: dict[int, list[Ints]] = {}  # of each open step, blocks that it reads for who let go of them
        self._readers = np.zeros(num_blocks, dtype=np.int32)  # how often each block stands there
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
        return np.flatnonzero((self.refcount == 0) & (self._readers > 0))

    @property
    def num_waiting(self) -> int:
        return len(self.waiting_blocks)

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
        return int(self._idle(blocks).sum())

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
            self._evictable.remove(unreferenced[self._readers[unreferenced] == 0])
        self.refcount[blocks] += times

    def release(self, blocks: Ints, reading: Reading = ()) -> None:
        """Drop one reference for each entry of `blocks`, in which a block may occur several times.

        `reading`: the open steps, with those of these blocks that they read for who lets go of them.
        """
        for step, read in reading:
            if len(read):
                self._reading[step].append(read)
                np.add.at(self._readers, read, 1)
        np.subtract.at(self.refcount, blocks, 1)
        self._give_up(blocks)

    def open_step(self) -> int:
        """Note that a step begins, and return its number."""
        step = self._next_step
        self._next_step += 1
        self._reading[step] = []
        return step

    def close_step(self, step: int) -> None:
        """Note that a step has ended; blocks that waited for it, and for no other, are given up."""
        for read in self._reading.pop(step):
            np.subtract.at(self._readers, read, 1)
            self._give_up(read)

    def _idle(self, blocks: Ints) -> Flags:
        """Which of these blocks nobody references and no step reads."""
        idle: Flags = (self.refcount[blocks] == 0) & (self._readers[blocks] == 0)
        return idle

    def forget(self, nodes: Ints) -> None:
        """Take the blocks of these nodes out of the prefix cache."""
        blocks = self.cached.blocks_of(nodes)
        blocks = blocks[blocks >= 0]
        self.cached.remove(blocks)
        idle = blocks[self._idle(blocks)]
        self._evictable.remove(idle)
        self._push(idle)

    def _give_up(self, blocks: Ints) -> None:
        """Of these blocks those that are idle now: the prefix cache keeps its own, the others are free."""
        blocks = distinct(blocks)
        blocks = blocks[self._idle(blocks)]
        if len(self.cached):
            cached = self.cached.has(blocks)
            kept = blocks[cached]
            self._evictable.append(kept[np.argsort(-self.cached.column[kept], kind="stable")])
            blocks = blocks[~cached]
        self._push(blocks)

    def _push(self, blocks: Ints) -> None:
        self._stack[self.num_free : self.num_free + len(blocks)] = blocks[::-1]
        self.num_free += len(blocks)
