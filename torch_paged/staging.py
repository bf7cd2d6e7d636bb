"""From a host step to tensors on the device: padding, stable addresses, and one copy a step.

To a GPU a step's numbers travel in one buffer of 64-bit words, each part on a boundary of 64 bytes:

    positions | last_token | slot_mapping | seq_lens | cu_seqlens_q | changed entries | their blocks | copies

The first five parts are the batch. They are spread from there to five tensors whose memory never moves. The rest is
read once: what has changed in the block table since it was last sent, and the blocks that the step copies before it
writes to them. On a CPU everything is written where it belongs. Where layers make several groups, `slot_mapping`,
`their blocks` and `copies` stand there once for each.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torch_paged.batch import PagedBatch, unbacked
from torch_paged.memory import IntegrityError, MemoryManager, Step
from torch_paged.memory.arrays import Ints, expand
from torch_paged.uploads import Uploads

_ALIGNMENT = 64  # bytes
_REMEMBERED_SHAPES = 256
_NO_ENTRIES, _NO_BLOCKS = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int32)


class _Shape(NamedTuple):
    """Sequences and tokens of a batch, padding included, whether it has `cu_seqlens_q`, and groups of layers."""

    num_seqs: int
    num_tokens: int
    ragged: bool
    num_groups: int

    @property
    def parts(self) -> list[tuple[int, torch.dtype]]:
        """Of the batch: positions, last_token, the slot_mapping of each group, seq_lens and cu_seqlens_q."""
        return [
            (self.num_tokens, torch.int64),
            (self.num_seqs, torch.int64),
            *[(self.num_tokens, torch.int64)] * self.num_groups,
            (self.num_seqs, torch.int32),
            (self.num_seqs + 1 if self.ragged else 0, torch.int32),
        ]

    def split(self, words: Any, int32: Any) -> list[Any]:
        """Views of the parts in a buffer: a NumPy array or a tensor of words, with its name for int32."""
        parts, offset = [], 0
        for length, dtype in self.parts:
            size = _words(length, dtype)
            part = words[offset : offset + size]
            parts.append((part.view(int32) if dtype == torch.int32 else part)[:length])
            offset += size
        return parts


def _words(length: int, dtype: torch.dtype) -> int:
    """Words that a part takes in the buffer."""
    return -(-length * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT // 8


class _Place(NamedTuple):
    """Where a batch of one shape lies: its tensors, in the order of `_Shape.parts` too, and on CPU as arrays."""

    batch: PagedBatch
    parts: list[Tensor]
    host_parts: list[Any]


class Staging:
    """The device's side of a MemoryManager: its block tables and the tensors of its batches.

    Row i of a block table belongs to the i-th sequence of whatever batch was sent last. What it holds is known
    here, so that a step sends only the entries that differ.

    Attributes:
        block_tables: of each group, int32 [rows, max_blocks_per_seq] on the device; -1 past the blocks of a sequence.
        num_entries_sent: table entries sent so far, to each.
    """

    def __init__(
        self,
        memory: MemoryManager,
        device: torch.device,
        buckets: Sequence[int],
        *,
        in_place: bool | None = None,
    ) -> None:
        in_place = device.type == "cpu" if in_place is None else in_place
        sequences = memory.sequences
        self._sequences = sequences
        self._groups = memory.groups
        self._buckets = list(buckets)
        rows = self._pad(sequences.max_seqs)
        room = max([rows, *buckets])  # sequences or tokens
        self._held = np.zeros(rows, dtype=np.int64)  # entries of each row that are not -1
        self._stamps = np.full(rows, -1, dtype=np.int64)  # whose they are: `Sequences.stamp`
        self.num_entries_sent = 0
        self._device = device
        self._uploads = Uploads(device)
        with torch.inference_mode(False):
            shape = rows, sequences.width
            self.block_tables = [torch.full(shape, -1, dtype=torch.int32, device=device) for _ in self._groups]
            self._flat_tables = [table.view(-1) for table in self.block_tables]
            self._block_size = torch.tensor(memory.block_size, dtype=torch.int64, device=device)
            self._parts = self._allocate(room)
            self._spare_parts = self._allocate(0)  # for what exceeds them
        self._in_place = in_place
        self._host_tables = [table.numpy() for table in self._flat_tables] if in_place else []
        self._places: OrderedDict[_Shape, _Place] = OrderedDict()
        # The first mark imports the tracer: not in somebody's first step.
        self._lay_out(_Shape(rows, rows, False, len(self._groups)))

    def send(self, step: Step) -> tuple[PagedBatch, list[Tensor | None]]:
        """The batch of a step, on the device, and of each group the block pairs that it must copy first, if any.

        These are int64 [c, 2].
        """
        shape = self._shape(step)
        place = self._places.get(shape) or self._lay_out(shape)
        self._places.move_to_end(shape)
        entries, blocks = self._changed_entries(step.rows)
        self.num_entries_sent += len(entries)
        copies = [
            np.column_stack([taken.copies.sources, taken.copies.blocks]) if len(taken.copies.blocks) else None
            for taken in step.taken
        ]
        if self._in_place:
            _fill(place.host_parts, step)
            for table, changed in zip(self._host_tables, blocks, strict=True):
                table[entries] = changed
            pairs = [None if part is None else torch.from_numpy(part) for part in copies]
        else:
            pairs = self._upload(shape, place, step, entries, blocks, copies)
        return PagedBatch(*place.batch), pairs

    def forget(self) -> None:
        """Send everything again: after a failure nobody knows what the device holds."""
        self._held[:] = self._sequences.width
        self._stamps[:] = -1

    def check_integrity(self) -> None:
        """Raise IntegrityError if the device's block tables do not hold what this object believes. Waits for it."""
        s = self._sequences
        held = np.arange(s.width) < self._held[:, None]
        for group, on_device in zip(self._groups, self.block_tables, strict=True):
            table = on_device.cpu().numpy()
            if (table[~held] != -1).any():
                raise IntegrityError("broken invariant: the device's block table is -1 past a sequence's blocks")
            for row in s.live_rows:
                for place in np.flatnonzero(self._stamps == s.stamp[row]):
                    if (table[place] != group.table[row])[group.first[row] : self._held[place]].any():
                        raise IntegrityError(f"broken invariant: row {place} of the device's table is sequence {row}'s")

    def _shape(self, step: Step) -> _Shape:
        """The shape of a step's batch, padded to the smallest buckets that hold it."""
        num_seqs, num_tokens = len(step.rows), len(step.positions)
        padded_seqs = self._pad(num_seqs)
        if not isinstance(step.counts, int):
            return _Shape(padded_seqs, self._pad(num_tokens), True, len(self._groups))
        padded_tokens = padded_seqs * step.counts
        if self._buckets and padded_tokens > self._buckets[-1]:
            return _Shape(num_seqs, num_tokens, False, len(self._groups))
        return _Shape(padded_seqs, padded_tokens, False, len(self._groups))

    def _pad(self, size: int) -> int:
        index = bisect_left(self._buckets, size)
        return self._buckets[index] if index < len(self._buckets) else size

    @torch.inference_mode(False)
    def _lay_out(self, shape: _Shape) -> _Place:
        """Tensors for one shape. Up to the largest bucket they lie in memory that never moves.

        They are no views to PyTorch (`data`): a compiled graph would look at the whole that they are a part of.
        """
        whole = self._parts
        largest = max(shape.num_seqs, shape.num_tokens)
        if largest > len(self._parts[0]):
            if largest > len(self._spare_parts[0]):
                self._spare_parts = self._allocate(1 << largest.bit_length())
            whole = self._spare_parts
        parts = [unbacked(part[:length].data) for part, (length, _) in zip(whole, shape.parts, strict=True)]
        positions, last_token, *slot_mappings, seq_lens, cu_seqlens_q = parts
        tables = [unbacked(table[: shape.num_seqs].data) for table in self.block_tables]
        batch = PagedBatch(
            block_table=tables[0],
            seq_lens=seq_lens,
            cu_seqlens_q=cu_seqlens_q if shape.ragged else None,
            slot_mapping=slot_mappings[0],
            positions=positions,
            last_token=last_token,
            block_size=self._block_size,
            further_groups=tuple(zip(tables[1:], slot_mappings[1:], strict=True)) or None,
        )
        host_parts = [part.numpy() for part in parts] if self._in_place else []
        place = self._places[shape] = _Place(batch, parts, host_parts)
        if len(self._places) > _REMEMBERED_SHAPES:
            self._places.popitem(last=False)
        return place

    def _allocate(self, size: int) -> list[Tensor]:
        """Memory for batches of up to `size` sequences and tokens.

        A tensor for each part: views into one would differ in their offsets, and a compiled graph tells them apart.
        """
        return [
            torch.zeros(length, dtype=dtype, device=self._device)
            for length, dtype in _Shape(size, size, True, len(self._groups)).parts
        ]

    def _changed_entries(self, rows: Ints) -> tuple[Ints, list[NDArray[np.int32]]]:
        """Where the device's block tables differ from what this batch needs, and what belongs there in each."""
        s = self._sequences
        held, stamps = self._held[: len(rows)], self._stamps[: len(rows)]
        num_blocks, stamp = s.num_blocks[rows], s.stamp[rows]
        first = held * (stamps == stamp)  # the same table can only have grown since
        if self._groups[0].window is not None:  # what no group's queries see any more may be anything
            first = np.maximum(first, self._groups[0].first[rows])
        last = np.maximum(held, num_blocks)
        held[:], stamps[:] = num_blocks, stamp
        changed = (first != last).nonzero()[0]
        if not len(changed):
            return _NO_ENTRIES, [_NO_BLOCKS] * len(self._groups)
        owners, columns = expand(first[changed], last[changed])
        owners = changed[owners]
        entries = rows[owners] * s.width + columns
        return owners * s.width + columns, [group.flat_table[entries] for group in self._groups]

    def _upload(
        self,
        shape: _Shape,
        place: _Place,
        step: Step,
        entries: Ints,
        blocks: list[NDArray[np.int32]],
        copies: list[Ints | None],
    ) -> list[Tensor | None]:
        """Send a step in one copy, then spread it on the device."""
        body = sum(_words(*part) for part in shape.parts)
        words = [(len(entries) + 1) // 2] * len(blocks)
        pairs = [0 if part is None else 2 * len(part) for part in copies]
        ends = np.cumsum([body, len(entries), *words, *pairs]).tolist()
        host = self._uploads.begin(ends[-1])
        _fill(shape.split(host, np.int32), step)
        host[ends[0] : ends[1]] = entries
        places = list(itertools.pairwise(ends[1:]))
        for (start, end), changed in zip(places, blocks, strict=False):
            host[start:end].view(np.int32)[: len(changed)] = changed
        for (start, end), part in zip(places[len(blocks) :], copies, strict=True):
            if part is not None:
                host[start:end] = part.reshape(-1)
        sent = self._uploads.send()
        sent_parts = shape.split(sent, torch.int32)
        torch._foreach_copy_(place.parts[:-2], sent_parts[:-2])
        torch._foreach_copy_(place.parts[-2:], sent_parts[-2:])
        if len(entries):
            where = (sent[ends[0] : ends[1]],)
            for (start, end), table in zip(places, self._flat_tables, strict=False):
                table.index_put_(where, sent[start:end].view(torch.int32)[: len(entries)])
        return [sent[start:end].view(-1, 2) if end > start else None for start, end in places[len(blocks) :]]


def _fill(parts: list[Any], step: Step) -> None:
    """Write a step into the host parts of its batch, the padding included."""
    positions, last_token, *slot_mappings, seq_lens, cu_seqlens_q = parts
    num_seqs, num_tokens = len(step.rows), len(step.positions)
    for slot_mapping, taken in zip(slot_mappings, step.taken, strict=True):
        slot_mapping[:num_tokens], slot_mapping[num_tokens:] = taken.slots, -1
    positions[:num_tokens], positions[num_tokens:] = step.positions, 0
    seq_lens[:num_seqs], seq_lens[num_seqs:] = step.end, 0
    last_token[num_seqs:] = 0
    if isinstance(step.counts, int):
        last_token[:num_seqs] = np.arange(step.counts - 1, num_tokens, step.counts)
        return
    ends = step.counts.cumsum()
    last_token[:num_seqs] = ends - 1
    cu_seqlens_q[0] = 0
    cu_seqlens_q[1 : num_seqs + 1], cu_seqlens_q[num_seqs + 1 :] = ends, num_tokens
