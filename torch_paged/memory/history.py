"""What sequences consist of: the tokens of committed steps, and the full blocks that enter the prefix cache."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from torch_paged.memory.arrays import Ints, as_integers, expand
from torch_paged.memory.group import BlockGroup
from torch_paged.memory.records import Records
from torch_paged.memory.step import Step


class Exchange(NamedTuple):
    """A sequence's `own` block and its `twin`, which has the same tokens and is in the prefix cache."""

    row: int
    column: int
    own: int
    twin: int


def remember(records: Records, step: Step, tokens: Ints, advanced: int = 0) -> None:
    """Note the tokens of a committed step, and enter the blocks that they fill into the prefix cache.

    The steps of a sequence come in order, but it may have been changed since the commit. A sequence is skipped that
    was freed, some of whose earlier tokens are not known, or whose window has left these tokens behind.

    Args:
        tokens: int64 [num_tokens + advanced * n], those of the step in the order of the batch, then those of each
            advanced step.
    """
    s, size, group = records.sequences, records.block_size, records.groups[0]
    follows = (s.handle[step.rows] == step.handles) & (s.known[step.rows] == step.start)
    if group.window is not None:  # what is new goes on from the block before, and begins in one that must be there
        follows &= group.first[step.rows] <= np.maximum(step.start // size - 1, 0)
    num_following = np.count_nonzero(follows)
    if not num_following:
        return
    token_rows, positions = _places(step, advanced)
    rows, start, end = step.rows, step.start, step.end + advanced
    if num_following < len(rows):
        kept = np.isin(token_rows, rows[follows])
        token_rows, positions, tokens = token_rows[kept], positions[kept], tokens[kept]
        rows, start, end = rows[follows], start[follows], end[follows]
    columns = positions // size
    blocks = group.flat_table[token_rows * s.width + columns]
    records.flat_tokens[(blocks - columns) * size + positions] = tokens
    s.known[rows] = end
    first, last = start // size, end // size
    filled = (first < last).nonzero()[0]
    if len(filled):
        owners, columns = expand(first[filled], last[filled])
        enter(records, rows[filled[owners]], columns)


def _places(step: Step, advanced: int) -> tuple[Ints, Ints]:
    """The row of the sequence that each token belongs to, and its position there."""
    rows = step.rows if len(step.positions) == len(step.rows) else np.repeat(step.rows, step.counts)
    positions = step.positions
    if advanced:
        further = step.end + np.arange(advanced)[:, None]
        rows = np.concatenate([rows, np.tile(step.rows, advanced)])
        positions = np.concatenate([positions, further.reshape(-1)])
    return rows, positions


def enter(records: Records, rows: Ints, columns: Ints) -> None:
    """Enter the full blocks at these places of the tables, row by row; what is left out before them is in the trie.

    Where another block with the same tokens is there already, the sequence gets that one for its own. If others hold
    its own as well, which may follow it with blocks in the trie, it stays as it is and is not followed any more.
    """
    s, trie, group = records.sequences, records.trie, records.groups[0]
    entries = rows * s.width + columns
    keys = trie.keys_of(records.tokens[group.flat_table[entries]])
    before = group.cached.node[group.flat_table[entries - 1]].tolist()
    last_row, last_column, node = -1, -1, -1
    left: set[int] = set()
    new: dict[int, int] = {}  # nodes, by the places that lead to them
    exchanges: list[list[Exchange]] = [[] for _ in records.groups]
    places = zip(rows.tolist(), columns.tolist(), keys, before, strict=True)
    for place, (row, column, key, above) in enumerate(places):
        if left and row in left:
            continue
        parent = node if row == last_row and column == last_column + 1 else above
        last_row, last_column = row, column
        node, is_new = trie.enter(parent if column else (s.namespace[row],), key)
        if is_new:
            new[place] = node
            continue
        _put(records, rows, columns, new)
        if not _join(records, row, column, node, exchanges):
            s.known[row] = -1
            left.add(row)
    _put(records, rows, columns, new)
    for group, pairs in zip(records.groups, exchanges, strict=True):
        if pairs:
            _exchange(records, group, pairs)


def _put(records: Records, rows: Ints, columns: Ints, new: dict[int, int]) -> None:
    """Enter the blocks of new nodes, where windows have not left them behind, and EMPTY `new`."""
    if not new:
        return
    places, nodes = as_integers("places", list(new)), as_integers("nodes", list(new.values()))
    new.clear()
    rows, columns = rows[places], columns[places]
    for group in records.groups:
        if group.window is not None:
            kept = group.first[rows] <= columns
            rows, columns, nodes = rows[kept], columns[kept], nodes[kept]
        group.cached.put(nodes, group.table[rows, columns].astype(np.int64), columns)


def _join(records: Records, row: int, column: int, node: int, exchanges: list[list[Exchange]]) -> bool:
    """Enter the blocks of a place as those of its node, or note that they are exchanged for the ones that are.

    False, and nothing is changed: the first group's is another one, and others hold this one too.
    """
    for index, group in enumerate(records.groups):
        if group.first[row] > column:
            continue
        own, twin = int(group.table[row, column]), group.cached.block_of(node)
        if twin < 0:
            group.cached.put(np.array([node]), np.array([own]), np.array([column]))
        elif twin != own and group.pool.refcount[own] == 1:
            exchanges[index].append(Exchange(row, column, own, twin))
        elif twin != own and index == 0:
            return False
    return True


def _exchange(records: Records, group: BlockGroup, exchanges: list[Exchange]) -> None:
    """Give sequences the blocks of the prefix cache for their own, which nobody else holds."""
    rows, columns, own, twins = np.array(exchanges).T
    blocks, times = np.unique(twins, return_counts=True)
    group.pool.retain(blocks, times)
    group.table[rows, columns] = twins
    group.pool.release(own, records.reading(own, rows))
    records.sequences.renew_stamps(np.unique(rows))
