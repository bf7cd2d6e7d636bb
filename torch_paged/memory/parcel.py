"""What sequences that are swapped out leave with."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch_paged.memory.arrays import Ints


@dataclasses.dataclass(eq=False)
class Part:
    """One group's blocks that leave together, each once, however many of the sequences share it.

    Attributes:
        blocks: int64 [n], where they were.
        rows: of each sequence outside, by its handle: which of the n blocks hold its tokens, in order.
        content: what the caller kept of the n blocks.
    """

    blocks: Ints
    rows: dict[int, Ints]
    content: Any = None


@dataclasses.dataclass(eq=False)
class Parcel:
    """What sequences that leave together leave with.

    Attributes:
        parts: of each group.
        tokens: int64 [n, block_size], of the first group's n blocks, see `Records.tokens`.
    """

    parts: list[Part]
    tokens: Ints

    @property
    def handles(self) -> list[int]:
        """Of the sequences that are still outside."""
        return list(self.parts[0].rows)

    def forget(self, handle: int) -> None:
        """One of them is back, or gone for good."""
        for part in self.parts:
            del part.rows[handle]
