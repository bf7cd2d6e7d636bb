"""Steps: what `prepare` takes, what `commit` keeps, what `rollback` gives back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from torch_paged.memory.arrays import Flags, Ints, as_counts, as_integer, expand
from torch_paged.memory.sequences import Sequences
from torch_paged.memory.step import Step, Taken

if TYPE_CHECKING:
    from torch_paged.memory.manager import MemoryManager


def prepare(manager: MemoryManager, seqs: Any, counts: Any, ahead: int) -> Step:
    """See `MemoryManager.prepare`. Nothing is changed before everything is known to be there."""
    s, size = manager.sequences, manager.block_size
    handles, rows = s.find(seqs)
    if manager.parcels:
        s.require_inside(rows)
    counts = as_counts(counts, len(rows))
    ahead = as_integer("ahead", ahead, at_least=0)
    most = max(ahead, counts if isinstance(counts, int) else int(counts.max()))
    if most > s.max_seq_len:  # before a sum could overflow
        raise ValueError(f"max_seq_len = {s.max_seq_len}: no sequence can get {most} tokens")
    start = s.length[rows]
    end = start + counts
    s.require_length(handles, end + ahead)

    before = s.num_blocks[rows]
    after = np.maximum(before, (end + (ahead + size - 1)) // size)
    columns = start // size
    entries = rows * s.width + columns  # of a flat table: where each sequence writes first
    growing = (after != before).nonzero()[0]
    owners, new_columns = expand(before[growing], after[growing])
    owners = growing[owners]
    writers = [group.require(entries, start, len(owners)) for group in manager.groups]

    places, positions = entries, start
    if not (isinstance(counts, int) and counts == 1):
        token_owners, positions = expand(start, end)
        columns = positions // size
        places = rows[token_owners] * s.width + columns
    offsets = positions - columns * size
    taken = []
    for group, sharing in zip(manager.groups, writers, strict=True):
        copies, growth = group.take(rows, entries, sharing, owners, new_columns)
        taken.append(Taken(copies, growth, group.flat_table[places].astype(np.int64) * size + offsets))
        if len(sharing):
            s.renew_stamps(rows[sharing])
    copies = taken[0].copies
    if len(copies.owners):
        manager.tokens[copies.blocks] = manager.tokens[copies.sources]
    s.num_blocks[rows] = after
    s.length[rows] = end
    (number,) = {group.pool.open_step() for group in manager.groups}
    manager.steps[number] = step = Step(number, handles, rows, counts, start, end, ahead, before, positions, taken)
    return step


def commit(manager: MemoryManager, step: Step, advanced: int) -> None:
    """See `MemoryManager.commit`."""
    s = manager.sequences
    _require_open(manager, step)
    advanced = as_integer("advanced", advanced, at_least=0)
    if advanced > step.ahead:
        raise ValueError(f"advanced = {advanced}, but the step was prepared with ahead = {step.ahead}")
    rows, start, end = step.rows, step.start, step.end
    alive = step.alive(s)
    if not alive.all():
        rows, start, end = rows[alive], start[alive], end[alive]
    _require_all(s, s.committed[rows] == start, rows, "an earlier", "commit")
    if advanced:
        _require_all(s, s.length[rows] == end, rows, "a later", "commit advanced tokens of")
        end = end + advanced
        s.length[rows] = end
    s.committed[rows] = end
    _close(manager, step)
    for group, (copies, _, _) in zip(manager.groups, step.taken, strict=True):
        if len(copies.owners):
            group.pool.release(copies.sources[alive[copies.owners]])


def rollback(manager: MemoryManager, step: Step) -> None:
    """See `MemoryManager.rollback`."""
    s = manager.sequences
    _require_open(manager, step)
    alive = step.alive(s)
    rows = step.rows[alive]
    _require_all(s, s.length[rows] == step.end[alive], rows, "a later", "roll back")
    s.length[rows] = step.start[alive]
    s.num_blocks[rows] = step.blocks_before[alive]
    for group, taken in zip(manager.groups, step.taken, strict=True):
        group.undo(taken, step.rows, alive)
    owners = np.concatenate([step.growth.owners, *(taken.copies.owners for taken in step.taken)])
    s.renew_stamps(np.unique(step.rows[owners[alive[owners]]]))
    _close(manager, step)


def _require_open(manager: MemoryManager, step: Step) -> None:
    if manager.steps.get(step.number) is not step:
        raise ValueError(f"step {step.number} is not open: it was committed or rolled back before")


def _require_all(s: Sequences, fine: Flags, rows: Ints, which: str, action: str) -> None:
    if not fine.all():
        seq = s.handle[rows[~fine][0]]
        raise ValueError(f"cannot {action} this step: {which} step of sequence {seq} is open")


def _close(manager: MemoryManager, step: Step) -> None:
    del manager.steps[step.number]
    for group in manager.groups:
        group.pool.close_step(step.number)
