"""Blocks of all layers to host memory and back, for swapping."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from torch_paged.functional import gather_blocks, scatter_blocks
from torch_paged.memory.arrays import Ints

_CHUNK_BYTES = 64 << 20  # of GPU memory, twice while blocks are moved


class Transfer:
    """Copies blocks between the caches and rows of host memory: every cache's part of a block in one row.

    On a GPU, blocks pass through a chunk of its memory, by turns one of two. The caches are read and written on the
    current stream, in its order, so that a block can be given away as soon as the call returns. A second stream moves
    the chunks from and to pinned memory, beside whatever runs. The host waits for neither.

    Attributes:
        block_bytes: of a row.
    """

    def __init__(self, caches: Sequence[Tensor], block_bytes: int, device: torch.device) -> None:
        self._caches = caches
        self.block_bytes = block_bytes
        self._device = device
        self._stream: torch.cuda.Stream | None = None

    def fetch(self, blocks: Ints) -> Tensor:
        """Copies of these blocks: uint8 [n, block_bytes] on the host. On a GPU, only `store` may read them."""
        shape = len(blocks), self.block_bytes
        if self._device.type == "cpu":
            content = torch.empty(shape, dtype=torch.uint8, device="cpu")
            gather_blocks(self._caches, torch.from_numpy(blocks), content)
            return content
        with torch.cuda.device(self._device):
            content = torch.empty(shape, dtype=torch.uint8, device="cpu", pin_memory=True)
            numbers = self._send(blocks)
            side, current = self._side_stream(), torch.cuda.current_stream()
            buffers, copied = self._buffers(len(blocks), side), [torch.cuda.Event(), torch.cuda.Event()]
            for turn, (start, end) in enumerate(self._chunks(len(blocks))):
                chunk = buffers[turn % 2][: end - start]
                copied[turn % 2].wait(current)  # no wait in the first two turns: nothing was recorded
                gather_blocks(self._caches, numbers[start:end], chunk)
                side.wait_stream(current)
                with torch.cuda.stream(side):
                    content[start:end].copy_(chunk, non_blocking=True)
                copied[turn % 2].record(side)
        return content

    def store(self, content: Tensor, rows: Ints, blocks: Ints) -> None:
        """Write `rows`, ascending, of what `fetch` returned to these blocks."""
        if self._device.type == "cpu":
            scatter_blocks(content[torch.from_numpy(rows)], torch.from_numpy(blocks), self._caches)
            return
        with torch.cuda.device(self._device):
            numbers = self._send(blocks)
            side, current = self._side_stream(), torch.cuda.current_stream()
            with torch.cuda.stream(side):  # theirs from the start: they need not wait for what runs on the other
                buffers, written = self._buffers(len(blocks), current), [torch.cuda.Event(), torch.cuda.Event()]
            for turn, (start, end) in enumerate(self._chunks(len(blocks))):
                chunk = buffers[turn % 2][: end - start]
                written[turn % 2].wait(side)
                with torch.cuda.stream(side):
                    for first, last, place in _runs(rows[start:end]):
                        chunk[place : place + last - first].copy_(content[first:last], non_blocking=True)
                current.wait_stream(side)
                scatter_blocks(chunk, numbers[start:end], self._caches)
                written[turn % 2].record(current)

    def _send(self, blocks: Ints) -> Tensor:
        return torch.from_numpy(blocks).pin_memory().to(self._device, non_blocking=True)

    def _side_stream(self) -> torch.cuda.Stream:
        self._stream = self._stream or torch.cuda.Stream()
        return self._stream

    def _buffers(self, count: int, other_stream: torch.cuda.Stream) -> list[Tensor]:
        """Two chunks of the current stream's memory that another stream uses as well."""
        shape = min(count, self._room), self.block_bytes
        buffers = [torch.empty(shape, dtype=torch.uint8, device=self._device) for _ in range(2)]
        for buffer in buffers:
            buffer.record_stream(other_stream)
        return buffers

    def _chunks(self, count: int) -> Iterator[tuple[int, int]]:
        return ((start, min(start + self._room, count)) for start in range(0, count, self._room))

    @property
    def _room(self) -> int:
        """Blocks to a chunk."""
        return max(_CHUNK_BYTES // self.block_bytes, 1)


def _runs(rows: Ints) -> Iterator[tuple[int, int, int]]:
    """Half-open ranges of consecutive rows, and where each begins: [3, 4, 8] gives (3, 5, 0), (8, 9, 2)."""
    starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
    for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(rows)], strict=True):
        yield int(rows[start]), int(rows[end - 1]) + 1, start
