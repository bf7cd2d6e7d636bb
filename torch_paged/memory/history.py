"""What sequences consist of: the tokens of committed steps, and the full blocks that enter the prefix cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from torch_paged.memory.arrays import Ints, expand
from torch_paged.memory.step import Step

if TYPE_CHECKING:
    from torch_paged.memory.manager import MemoryManager


def remember(manager: MemoryManager, step: Step, tokens: Ints, advanced: int = 0) -> None:
    """Note the tokens of a committed step, and enter the blocks that they fill into the prefix cache.

    The steps of a sequence come in order, but it may have been changed since the commit. A sequence is skipped that
    was freed, or some of whose earlier tokens are not known.

    Args:
        tokens: int64 [num_tokens + advanced * n], those of the step in the order of the batch, then those of each
            advanced step.
    """
    s, size = manager.sequences, manager.block_size
    follows = (s.handle[step.rows] == step.handles) & (s.known[step.rows] == step.start)
    if not follows.any():
        return
    token_rows, positions = _places(step, advanced)
    rows, start, end = step.rows, step.start, step.end + advanced
    if not follows.all():
        kept = np.isin(token_rows, rows[follows])
        token_rows, positions, tokens = token_rows[kept], positions[kept], tokens[kept]
        rows, start, end = rows[follows], start[follows], end[follows]
    columns = positions // size
    blocks = s.flat_table[token_rows * s.width + columns]
    manager.trie.flat_tokens[(blocks - columns) * size + positions] = tokens
    s.known[rows] = end
    first, last = start // size, end // size
    filled = np.flatnonzero(first < last)
    if len(filled):
        owners, columns = expand(first[filled], last[filled])
        enter(manager, rows[filled[owners]], columns)


def _places(step: Step, advanced: int) -> tuple[Ints, Ints]:
    """The row of the sequence that each token belongs to, and its position there."""
    rows, positions = np.repeat(step.rows, step.counts), step.positions
    if advanced:
        further = step.end + np.arange(advanced)[:, None]
        rows = np.concatenate([rows, np.tile(step.rows, advanced)])
        positions = np.concatenate([positions, further.reshape(-1)])
    return rows, positions


def enter(manager: MemoryManager, rows: Ints, columns: Ints) -> None:
    """Enter the full blocks at these places of the tables; of each row all that follow those in the trie already.

    Where another block with the same tokens is there already, the sequence gets that one for its own. If others hold
    its own as well, which may follow it with blocks in the trie, it stays as it is and is not followed any more.
    """
    s, trie = manager.sequences, manager.trie
    entries = rows * s.width + columns
    blocks = s.flat_table[entries].astype(np.int64)
    keys = trie.keys_of(trie.tokens[blocks])
    before = trie.node[s.flat_table[entries - 1]].tolist()
    last_row, node = -1, -1
    left: set[int] = set()
    for row, column, block, key, parent in zip(
        rows.tolist(), columns.tolist(), blocks.tolist(), keys, before, strict=True
    ):
        if row in left:
            continue
        above = (s.namespace[row],) if column == 0 else node if row == last_row else parent
        node = trie.enter(above, key, block, column)
        last_row, twin = row, trie.block_of(node)
        if twin == block:
            continue
        if manager.pool.refcount[block] == 1:
            _share(manager, row, column, twin)
        else:
            s.known[row] = -1
            left.add(row)


def _share(manager: MemoryManager, row: int, column: int, block: int) -> None:
    """Let a sequence have the block that is in the trie, not its own with the same tokens."""
    s = manager.sequences
    own = s.table[row, column]
    manager.pool.retain(np.array([block]))
    s.table[row, column] = block
    manager.pool.release(np.array([own], dtype=np.int64))
    s.renew_stamps(np.array([row]))
