"""The order in which unreferenced blocks of the prefix cache make room."""

from __future__ import annotations

import numpy as np

from torch_paged.memory.arrays import Ints

_WINDOW = 64


class EvictionQueue:
    """Distinct blocks in the order in which they came, any of which can leave from the middle.

    Every operation takes time in proportion to the blocks it is given, on average over many. Blocks are written one
    after another into an array, and each remembers its place there. One that leaves forgets its place; what it leaves
    behind in the array is passed over later. Example:

        append([4, 7, 2]), remove([7]), append([7])      array 4 7 2 7, places 4: 0, 2: 2, 7: 3
        pop(2) -> [4, 2]                                 the 7 between them no longer counts
    """

    def __init__(self, num_blocks: int) -> None:
        self._array = np.empty(2 * num_blocks, dtype=np.int64)
        self._place = np.full(num_blocks, -1, dtype=np.int64)
        self._first = self._end = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def blocks(self) -> Ints:
        """All of them, the first to go first."""
        written = self._array[self._first : self._end]
        blocks: Ints = written[self._place[written] == np.arange(self._first, self._end)]
        return blocks

    def append(self, blocks: Ints) -> None:
        """Put distinct blocks that are not in the queue at its end, in their order."""
        if self._end + len(blocks) > len(self._array):
            self._compact()
        end = self._end + len(blocks)
        self._array[self._end : end] = blocks
        self._place[blocks] = np.arange(self._end, end)
        self._end = end
        self._count += len(blocks)

    def remove(self, blocks: Ints) -> None:
        """Take distinct blocks out, wherever they are."""
        self._place[blocks] = -1
        self._count -= len(blocks)

    def pop(self, count: int) -> Ints:
        """Take the first `count` blocks out; at least so many must be there."""
        assert count <= self._count
        taken: list[Ints] = []
        while count:
            end = min(self._first + max(count, _WINDOW), self._end)
            window = self._array[self._first : end]
            found = np.flatnonzero(self._place[window] == np.arange(self._first, end))[:count]
            taken.append(window[found])
            count -= len(found)
            self._first = end if count else self._first + int(found[-1]) + 1
        blocks = np.concatenate([np.empty(0, dtype=np.int64), *taken])
        self.remove(blocks)
        return blocks

    def _compact(self) -> None:
        blocks = self.blocks
        self._first, self._end = 0, len(blocks)
        self._array[: self._end] = blocks
        self._place[blocks] = np.arange(self._end)
