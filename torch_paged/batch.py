"""PagedBatch: one step's metadata on the device, and the marks that let one compiled graph serve every size."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def unbacked(tensor: Tensor) -> Tensor:
    """Mark dimension 0 of `tensor` as of unknown size for `torch.compile`, and return the same tensor.

    A compiled model then makes one graph for all sizes, 0 and 1 included. The tensors of a PagedBatch are marked;
    mark what goes in beside it too: `model(unbacked(tokens), batch)`. Without effect in eager mode, and while
    tracing.
    """
    if not torch.compiler.is_compiling():
        from torch._dynamo.decorators import mark_unbacked  # over a second: only where it is needed

        mark_unbacked(tensor, 0)
    return tensor


class PagedBatch(NamedTuple):
    """What the layers need to know of a step: a plain tuple of device tensors, made by `PagedKVCache.prepare`.

    Example, `block_size` 4: a sequence of 6 tokens in the blocks (5, 2) decodes its seventh, and a new one brings a
    prompt of 3 tokens into block 9. With the buckets 4, 8, ... both sequences and tokens are padded:

        block_table    [[5, 2, ...], [9, ...], [...], [...]]   rows of padding are never read
        seq_lens       [7, 3, 0, 0]        the new tokens included
        cu_seqlens_q   [0, 1, 4, 4, 4]     where each sequence's new tokens begin, and where the last ones end
        slot_mapping   [10, 36, 37, 38]    2*4+2, 9*4+0, 9*4+1, 9*4+2
        positions      [6, 0, 1, 2]
        last_token     [0, 3, 0, 0]        rows of the model's output whose logits say what comes next

    Had there been a fifth token, the last four entries of `slot_mapping` up to the bucket of 8 would be padding: -1,
    and 0 in `positions`. A step with one number of new tokens for all is uniform: `cu_seqlens_q` is None.

    Attributes:
        block_table: int32 [S, max_blocks_per_seq], the blocks of each sequence in order.
        seq_lens: int32 [S], keys per sequence, the new tokens included; 0 in padding.
        cu_seqlens_q: int32 [S + 1], or None where every sequence has T / S new tokens.
        slot_mapping: int64 [T], the slot of each new token: block * block_size + offset; -1 in padding.
        positions: int64 [T], the position of each new token in its sequence; 0 in padding.
        last_token: int64 [S], the last new token of each sequence; 0 in padding.
        block_size: int64 [], slots of a block.
        further_groups: where layers see back unequally far, `(block_table, slot_mapping)` of the second group of layers
            and those after it (see `PagedKVCache.groups`), of the same shapes; None where there is but one. Entries of
            a table that a sliding window has left behind are arbitrary, and never read.
        schedules: of each group of layers, from `torch_paged.schedule`, or None; None where there are none.
    """

    block_table: Tensor
    seq_lens: Tensor
    cu_seqlens_q: Tensor | None
    slot_mapping: Tensor
    positions: Tensor
    last_token: Tensor
    block_size: Tensor
    further_groups: tuple[tuple[Tensor, Tensor], ...] | None = None
    schedules: tuple[Tensor | None, ...] | None = None

    def tables(self, group: int) -> tuple[Tensor, Tensor]:
        """`block_table` and `slot_mapping` of a group of layers."""
        if group == 0:
            return self.block_table, self.slot_mapping
        further = self.further_groups or ()
        if not 0 < group <= len(further):
            groups = f"{1 + len(further)} groups" if further else "one group"
            raise ValueError(f"the batch is of a cache with {groups} of layers, got a layer of groups[{group}]")
        return further[group - 1]

    def with_schedule(self, schedule: Tensor, group: int = 0) -> PagedBatch:
        """The batch with a schedule for the layers of a group: see `PagedKVLayer.scheduled`."""
        self.tables(group)  # which says so where there is no such group
        schedules = list(self.schedules or [None] * (1 + len(self.further_groups or ())))
        schedules[group] = schedule
        return self._replace(schedules=tuple(schedules))

    def advance(self) -> PagedBatch:
        """The decode step after this one: one token more for every sequence, in tensor operations alone.

        It needs no host, so several steps fit into one compiled function or CUDA graph. Its tokens go to blocks
        that were reserved by `prepare(..., ahead=n)` for `n` such steps. A sequence without a reserved block left
        gets the slot -1 and does not grow: the token is not stored, so its results are of no use.
        """
        width = self.block_table.shape[1]
        positions = self.seq_lens.to(torch.int64)  # 0 in padding, as it should be
        rows = torch.arange(self.seq_lens.shape[0], device=self.seq_lens.device)
        columns = positions // self.block_size
        entries = rows * width + columns.clamp(max=width - 1)
        further = self.further_groups or ()
        tables = [self.block_table, *(table for table, _ in further)]
        blocks = [table.reshape(-1)[entries].to(torch.int64) for table in tables]
        stored = (self.seq_lens > 0) & (columns < width) & (blocks[0] >= 0)  # what one group lacks, all lack
        offsets = positions % self.block_size
        slots = [torch.where(stored, block * self.block_size + offsets, -1) for block in blocks]
        following = PagedBatch(
            block_table=self.block_table,
            seq_lens=self.seq_lens + stored.to(torch.int32),
            cu_seqlens_q=None,
            slot_mapping=slots[0],
            positions=positions,
            last_token=torch.where(self.seq_lens > 0, rows, 0),
            block_size=self.block_size,
            further_groups=tuple(zip(tables[1:], slots[1:], strict=True)) if further else None,
        )
        for tensor in (following.seq_lens, following.positions, following.last_token, *slots):
            unbacked(tensor)
        return following


# So that torch.export can save programs that take a batch, and load them: named tuples are not saved otherwise.
torch.utils._pytree._register_namedtuple(PagedBatch, serialized_type_name="torch_paged.PagedBatch")
torch.serialization.add_safe_globals([PagedBatch])
