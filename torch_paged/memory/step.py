"""A step: what one `prepare` took, enough to fill the device's tensors, to commit it or to undo it."""

from __future__ import annotations

from typing import NamedTuple

from torch_paged.memory.arrays import Flags, Ints
from torch_paged.memory.sequences import Sequences


class Copies(NamedTuple):
    """Copy-on-write of a step: blocks that are written though others reference them as well.

    Attributes:
        owners, columns: int64 [c], which of the step's sequences got a copy, and in which table column.
        sources, blocks: int64 [c], the block copied from, and the copy. The open step keeps the reference
            to the source, which the sequence gets back at a rollback.
    """

    owners: Ints
    columns: Ints
    sources: Ints
    blocks: Ints


class Growth(NamedTuple):
    """Blocks that a step added.

    Attributes:
        owners, columns: int64 [m], which of the step's sequences got a block, and in which table column.
        blocks: int64 [m].
    """

    owners: Ints
    columns: Ints
    blocks: Ints


class Taken(NamedTuple):
    """What a step took from one group of layers: `copies`, `growth`, and `slots`, int64 [num_tokens], where each token
    is stored."""

    copies: Copies
    growth: Growth
    slots: Ints


class Step(NamedTuple):
    """One open step over `n` sequences and `num_tokens` new tokens.

    Worked example, `block_size = 4`: sequence 0 holds 6 tokens in the blocks (5, 9), sequence 1 was forked
    from it and shares them; sequence 1 alone gets 3 more tokens.

        rows [1], start [6], end [9], counts 3      tokens at the positions 6, 7, 8
        copies   owners [0], columns [1], sources [9], blocks [2]    position 6 lies in the shared block 9
        growth   owners [0], columns [2], blocks [7]                 position 8 needs a third block
        table of row 1: 5, 2, 7
        slots [10, 11, 28]                          2*4+2, 2*4+3, 7*4+0

    Attributes:
        number: of this step, see `BlockPool.open_step`.
        handles, rows: int64 [n], the sequences.
        counts: new tokens of each sequence: an int where all are equal, else int64 [n].
        start, end: int64 [n], the lengths before and after.
        ahead: tokens for which blocks are reserved beyond `end`.
        blocks_before: int64 [n], how many blocks each sequence had come to.
        positions: int64 [num_tokens], where each token stands.
        taken: from each group of layers.
    """

    number: int
    handles: Ints
    rows: Ints
    counts: int | Ints
    start: Ints
    end: Ints
    ahead: int
    blocks_before: Ints
    positions: Ints
    taken: list[Taken]

    def alive(self, sequences: Sequences) -> Flags:
        """[n], which of its sequences have not been freed since."""
        alive: Flags = sequences.handle[self.rows] == self.handles
        return alive

    @property
    def copies(self) -> Copies:
        """In the first group."""
        return self.taken[0].copies

    @property
    def growth(self) -> Growth:
        """In the first group."""
        return self.taken[0].growth

    @property
    def slots(self) -> Ints:
        """In the first group."""
        return self.taken[0].slots
