"""Blocks: how often each is referenced, which are free, and which still wait for open steps."""

from __future__ import annotations

from collections import deque

import numpy as np

from torch_paged.memory.arrays import Ints
from torch_paged.memory.errors import OutOfBlocks


class BlockPool:
    """Reference counts of `num_blocks` blocks and a stack of the free ones.

    A block whose last reference goes while steps are open is not free yet: a step in flight may still read
    it. It waits until every step that was open at that moment has ended. Example, three steps 0, 1, 2:

        open_step() -> 0, open_step() -> 1
        release([7])                           7 waits for steps 0 and 1
        open_step() -> 2, close_step(0)        7 waits: step 1 is open
        close_step(1)                          7 is free, though step 2 is open

    Where unreferenced blocks keep useful contents (a prefix cache), two places change: `release` hands them
    to that cache instead of the stack, and `require` takes its least useful ones back.

    Attributes:
        refcount: int32 [num_blocks].
        num_free: blocks that `allocate` can hand out now.
        num_waiting: unreferenced blocks that wait for open steps.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.refcount = np.zeros(num_blocks, dtype=np.int32)
        self.num_free = num_blocks
        self.num_waiting = 0
        # [:num_free] are free; the last of them goes out first, so a block just freed is used while cached.
        self._stack = np.arange(num_blocks, dtype=np.int64)[::-1].copy()
        self._waiting: deque[tuple[int, Ints]] = deque()  # (newest step open at the time, blocks), in order
        self._open_steps: dict[int, None] = {}  # an ordered set: the oldest first
        self._next_step = 0

    @property
    def free_blocks(self) -> Ints:
        """The free blocks, the next one to go out last."""
        return self._stack[: self.num_free]

    @property
    def waiting_blocks(self) -> Ints:
        """The unreferenced blocks that wait for open steps."""
        return np.concatenate([np.empty(0, dtype=np.int64), *(blocks for _, blocks in self._waiting)])

    def require(self, count: int) -> None:
        """Raise OutOfBlocks unless `count` blocks can be allocated now."""
        if count > self.num_free:
            raise OutOfBlocks(count, self.num_free, self.num_waiting)

    def allocate(self, count: int) -> Ints:
        """Take `count` free blocks, each with one reference. `require` them first."""
        self.num_free -= count
        blocks = self._stack[self.num_free : self.num_free + count][::-1].copy()
        self.refcount[blocks] = 1
        return blocks

    def undo_allocate(self, blocks: Ints) -> None:
        """Give back, at once and to their old places, blocks that nothing but their taker has seen."""
        self.refcount[blocks] = 0
        self._push(blocks)

    def retain(self, blocks: Ints, times: int = 1) -> None:
        """Add `times` references to each of these distinct blocks."""
        self.refcount[blocks] += times

    def release(self, blocks: Ints) -> None:
        """Drop one reference for each entry of `blocks`, in which a block may occur several times."""
        np.subtract.at(self.refcount, blocks, 1)
        unreferenced = np.unique(blocks[self.refcount[blocks] == 0])
        if not len(unreferenced):
            return
        if self._open_steps:
            self._waiting.append((next(reversed(self._open_steps)), unreferenced))
            self.num_waiting += len(unreferenced)
        else:
            self._push(unreferenced)

    def open_step(self) -> int:
        """Note that a step begins, and return its number."""
        step = self._next_step
        self._next_step += 1
        self._open_steps[step] = None
        return step

    def close_step(self, step: int) -> None:
        """Note that a step has ended; blocks that waited for it, and for no other, become free."""
        del self._open_steps[step]
        oldest = next(iter(self._open_steps), self._next_step)
        while self._waiting and self._waiting[0][0] < oldest:
            _, blocks = self._waiting.popleft()
            self.num_waiting -= len(blocks)
            self._push(blocks)

    def _push(self, blocks: Ints) -> None:
        self._stack[self.num_free : self.num_free + len(blocks)] = blocks[::-1]
        self.num_free += len(blocks)
