"""Sequences to host memory and back: the blocks' contents and the records of them together."""

from __future__ import annotations

from collections.abc import Sequence

from torch_paged.memory import MemoryManager, OutOfSwapSpace, swap
from torch_paged.transfer import Transfer


class Swapping:
    """`out` and `back` are `swap_out` and `swap_in` of PagedKVCache.

    Args:
        transfers: of each group of layers.
        space: bytes of host memory, or None.
    """

    def __init__(self, memory: MemoryManager, transfers: Sequence[Transfer], space: int | None) -> None:
        self._memory = memory
        self.transfers = transfers
        self._space = space

    def out(self, seqs: int | Sequence[int]) -> None:
        parcel = swap.pack(self._memory, seqs)
        needed, used = map(self._in_bytes, ([len(part.blocks) for part in parcel.parts], self._memory.num_outside))
        if self._space is not None and used + needed > self._space:
            raise OutOfSwapSpace(needed, self._space - used)
        for transfer, part in zip(self.transfers, parcel.parts, strict=True):
            part.content = transfer.fetch(part.blocks)
        swap.swap_out(self._memory, parcel)

    def back(self, seqs: int | Sequence[int]) -> None:
        landings = swap.unpack(self._memory, seqs)
        try:
            for group, landing in enumerate(landings):
                for parcel, rows, blocks in landing.moves:
                    self.transfers[group].store(parcel.parts[group].content, rows, blocks)
        except BaseException:
            swap.cancel(self._memory, landings)
            raise
        swap.swap_in(self._memory, landings)

    def _in_bytes(self, blocks: Sequence[int]) -> int:
        """Bytes of so many blocks of each group."""
        return sum(count * transfer.block_bytes for count, transfer in zip(blocks, self.transfers, strict=True))
