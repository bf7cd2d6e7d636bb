"""What sequences consist of: the tokens of committed steps, and the full blocks that enter the prefix cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from torch_paged.memory.arrays import Ints, expand
from torch_paged.memory.step import Step

if TYPE_CHECKING:
    from torch_paged.memory.group import BlockGroup
    from torch_paged.memory.manager import MemoryManager


def remember(manager: MemoryManager, step: Step, tokens: Ints, advanced: int = 0) -> None:
    """Note the tokens of a committed step, and enter the blocks that they fill into the prefix cache.

    The steps of a sequence come in order, but it may have been changed since the commit. A sequence is skipped that
    was freed, some of whose earlier tokens are not known, or whose window has left these tokens behind.

    Args:
        tokens: int64 [num_tokens + advanced * n], those of the step in the order of the batch, then those of each
            advanced step.
    """
    s, size, group = manager.sequences, manager.block_size, manager.groups[0]
    follows = (s.handle[step.rows] == step.handles) & (s.known[step.rows] == step.start)
    if group.window is not None:  # what is new goes on from the block before, and begins in one that must be there
        follows &= group.first[step.rows] <= np.maximum(step.start // size - 1, 0)
    if not follows.any():
        return
    token_rows, positions = _places(step, advanced)
    rows, start, end = step.rows, step.start, step.end + advanced
    if not follows.all():
        kept = np.isin(token_rows, rows[follows])
        token_rows, positions, tokens = token_rows[kept], positions[kept], tokens[kept]
        rows, start, end = rows[follows], start[follows], end[follows]
    columns = positions // size
    blocks = group.flat_table[token_rows * s.width + columns]
    manager.flat_tokens[(blocks - columns) * size + positions] = tokens
    s.known[rows] = end
    first, last = start // size, end // size
    filled = (first < last).nonzero()[0]
    if len(filled):
        owners, columns = expand(first[filled], last[filled])
        enter(manager, rows[filled[owners]], columns)


def _places(step: Step, advanced: int) -> tuple[Ints, Ints]:
    """The row of the sequence that each token belongs to, and its position there."""
    rows = step.rows if len(step.positions) == len(step.rows) else np.repeat(step.rows, step.counts)
    positions = step.positions
    if advanced:
        further = step.end + np.arange(advanced)[:, None]
        rows = np.concatenate([rows, np.tile(step.rows, advanced)])
        positions = np.concatenate([positions, further.reshape(-1)])
    return rows, positions


def enter(manager: MemoryManager, rows: Ints, columns: Ints) -> None:
    """Enter the full blocks at these places of the tables, row by row; what is left out before them is in the trie.

    Where another block with the same tokens is there already, the sequence gets that one for its own. If others hold
    its own as well, which may follow it with blocks in the trie, it stays as it is and is not followed any more.
    """
    s, trie, group = manager.sequences, manager.trie, manager.groups[0]
    entries = rows * s.width + columns
    blocks = group.flat_table[entries].astype(np.int64)
    keys = trie.keys_of(manager.tokens[blocks])
    before = group.cached.node[group.flat_table[entries - 1]].tolist()
    last, node = (-1, -1), -1
    left: set[int] = set()
    places = zip(rows.tolist(), columns.tolist(), blocks.tolist(), keys, before, strict=True)
    for row, column, block, key, parent in places:
        if row in left:
            continue
        above = (s.namespace[row],) if column == 0 else node if (row, column - 1) == last else parent
        last, node = (row, column), trie.enter(above, key)
        if not _put(manager, group, row, column, block, node):
            s.known[row] = -1
            left.add(row)
            continue
        for other in manager.groups[1:]:
            if other.first[row] <= column:
                _put(manager, other, row, column, int(other.table[row, column]), node)


def _put(manager: MemoryManager, group: BlockGroup, row: int, column: int, own: int, node: int) -> bool:
    """Enter a group's block as that of its node, or exchange it for the one that is. False: others hold it too."""
    twin = group.cached.block_of(node)
    if twin < 0:
        group.cached.put(node, own, column)
    elif twin != own:
        if group.pool.refcount[own] > 1:
            return False
        group.pool.retain(np.array([twin]))
        group.table[row, column] = twin
        group.pool.release(np.array([own]))
        manager.sequences.renew_stamps(np.array([row]))
    return True
