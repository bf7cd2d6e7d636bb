"""Records: all that is known of blocks and sequences, for those who read and change it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from torch_paged.memory.arrays import Ints, as_integer
from torch_paged.memory.group import BlockGroup
from torch_paged.memory.parcel import Parcel
from torch_paged.memory.pool import Reading
from torch_paged.memory.prefix import PrefixTrie
from torch_paged.memory.sequences import Sequences
from torch_paged.memory.step import Step


class Records:
    """Blocks for up to `max_seqs` sequences of up to `max_seq_len` tokens, and whose they are.

    Layers that see equally far back form a group, with blocks and tables of its own. What is said of one group's blocks
    holds for all: a sequence has as many in each, but for those that a window has left behind.

    Attributes:
        groups: the widest window first, no window being the widest. Who holds a block of another group holds that of
            the first as well.
        pool: the blocks of the first group.
        trie: the prefix cache.
        tokens: int64 [num_blocks, block_size], the tokens whose keys and values a block of the first group holds, as
            far as known. They are written, and copied from block to block, where keys and values are.
        sequences: the sequences.
        steps: the open steps by their number, the oldest first.
        parcels: of each sequence that is swapped out, what it left with.
    """

    def __init__(
        self,
        num_blocks: int | Sequence[int],
        block_size: int,
        max_seqs: int,
        max_seq_len: int,
        windows: Sequence[int | None] = (None,),
    ) -> None:
        sizes = [num_blocks] if isinstance(num_blocks, int) else num_blocks
        sizes = [as_integer("num_blocks", size, at_least=1) for size in sizes]
        self.block_size = as_integer("block_size", block_size, at_least=1)
        self.trie = PrefixTrie(self.block_size)
        self.sequences = Sequences(
            as_integer("max_seqs", max_seqs, at_least=1),
            as_integer("max_seq_len", max_seq_len, at_least=1),
            self.block_size,
        )
        self.groups = [
            BlockGroup(number, window, size, self.block_size, self.trie, self.sequences)
            for number, (window, size) in enumerate(zip(windows, sizes, strict=True))
        ]
        self.pool = self.groups[0].pool
        self.tokens = np.zeros((sizes[0], self.block_size), dtype=np.int64)
        self.flat_tokens = self.tokens.reshape(-1)
        self.steps: dict[int, Step] = {}
        self.parcels: dict[int, Parcel] = {}
        self.tokens_looked_up = self.tokens_found = 0  # of all prompts, and in the prefix cache

    def reading(self, blocks: Ints, rows: Ints) -> Reading:
        """The open steps, each with those of `blocks`, which are of the sequences in `rows`, that it may read."""
        for number, step in self.steps.items():
            taking_part = np.zeros(self.sequences.max_seqs, dtype=bool)
            taking_part[step.rows[step.alive(self.sequences)]] = True
            yield number, blocks[taking_part[rows]]

    @property
    def num_outside(self) -> list[int]:
        """Of each group, blocks whose contents are kept for sequences that are swapped out."""
        parcels = {*self.parcels.values()}
        return [sum(len(parcel.parts[index].blocks) for parcel in parcels) for index in range(len(self.groups))]
