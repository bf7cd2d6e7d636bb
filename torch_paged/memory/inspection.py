"""Looking at the records from outside: figures, and whether they agree with each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from torch_paged.memory.arrays import Ints, expand
from torch_paged.memory.errors import IntegrityError
from torch_paged.memory.group import BlockGroup
from torch_paged.memory.records import Records


class MemoryStats(NamedTuple):
    """How full the cache is, over all groups of layers. A shared block or slot counts once.

    Attributes:
        blocks_total: blocks there are: `blocks_used + blocks_free`.
        blocks_used: blocks that cannot be handed out: referenced, or waiting for open steps.
        blocks_free: blocks that can, those included that the prefix cache keeps in case of need.
        blocks_shared: blocks that stand in the tables of several sequences.
        tokens: tokens stored, the sum of all lengths; a shared token counts for each of its sequences.
        slots_filled: share of the used blocks' slots that hold a token of a live sequence, 0 to 1.
        bytes_used: bytes of the used blocks, over all layers, keys and values.
        bytes_contiguous: bytes if every live sequence had its own room for the longest one's length.
        blocks_cached: blocks in the prefix cache, those of live sequences included.
        blocks_evictable: blocks in the prefix cache that leave it when their space is needed; part of `blocks_free`.
        tokens_looked_up: tokens of all prompts given to `add` so far.
        tokens_found: how many of those the prefix cache held.
        seqs_swapped: sequences that are swapped out; what they hold counts nowhere above.
        bytes_swapped: bytes of host memory that keep their blocks.
    """

    blocks_total: int
    blocks_used: int
    blocks_free: int
    blocks_shared: int
    tokens: int
    slots_filled: float
    bytes_used: int
    bytes_contiguous: int
    blocks_cached: int
    blocks_evictable: int
    tokens_looked_up: int
    tokens_found: int
    seqs_swapped: int
    bytes_swapped: int

    @property
    def hit_rate(self) -> float:
        """Share of the looked-up tokens that the prefix cache held, 0 to 1."""
        return self.tokens_found / max(self.tokens_looked_up, 1)


def stats(records: Records, bytes_per_token: Sequence[int]) -> MemoryStats:
    """Count. Costs time in proportion to the blocks; not for every step."""
    s, size, pools = records.sequences, records.block_size, [group.pool for group in records.groups]
    lengths = s.length[s.live_rows[~s.outside[s.live_rows]]]
    used = [pool.num_blocks - pool.num_available for pool in pools]
    filled = shared = 0
    for group in records.groups:
        rows, columns, blocks = _table_entries(records, group)
        tokens = np.zeros(group.pool.num_blocks, dtype=np.int64)
        np.maximum.at(tokens, blocks, np.clip(s.length[rows] - columns * size, 0, size))
        filled += int(tokens.sum())
        shared += int((np.bincount(blocks) > 1).sum())

    def in_bytes(blocks: Iterable[int]) -> int:
        return sum(count * size * each for count, each in zip(blocks, bytes_per_token, strict=True))

    return MemoryStats(
        blocks_total=sum(pool.num_blocks for pool in pools),
        blocks_used=sum(used),
        blocks_free=sum(pool.num_available for pool in pools),
        blocks_shared=shared,
        tokens=int(lengths.sum()),
        slots_filled=filled / (sum(used) * size) if any(used) else 0.0,
        bytes_used=in_bytes(used),
        bytes_contiguous=len(lengths) * int(lengths.max(initial=0)) * sum(bytes_per_token),
        blocks_cached=sum(len(group.cached) for group in records.groups),
        blocks_evictable=sum(pool.num_evictable for pool in pools),
        tokens_looked_up=records.tokens_looked_up,
        tokens_found=records.tokens_found,
        seqs_swapped=len(records.parcels),
        bytes_swapped=in_bytes(records.num_outside),
    )


def slots_in_use(records: Records, group: BlockGroup) -> Ints:
    """The slots of a group's blocks that hold a committed token of a sequence, each once."""
    s, size = records.sequences, records.block_size
    rows, columns, blocks = _table_entries(records, group)
    tokens = np.clip(s.committed[rows] - columns * size, 0, size)
    owners, offsets = expand(np.zeros_like(tokens), tokens)
    slots: Ints = np.unique(blocks[owners] * size + offsets)
    return slots


def check_integrity(records: Records) -> None:
    """Raise IntegrityError if one of the invariants below does not hold."""
    _check_sequences(records)
    for index, group in enumerate(records.groups):
        _check_table(records, group)
        _check_blocks(records, index)
        _check_cached(records, group)
    _check_steps(records)
    _check_trie(records)
    _check_histories(records)
    _check_parcels(records)


def _check_sequences(records: Records) -> None:
    s, size = records.sequences, records.block_size
    rows = s.live_rows
    _require(len(rows) + s.num_free_rows == s.max_seqs, "live and free rows add up to max_seqs")
    _require(len(np.unique(s.stamp[rows])) == len(rows), "the stamps of live sequences differ")
    _require((s.length[rows] <= s.max_seq_len).all(), "lengths lie within max_seq_len")
    _require((s.committed[rows] <= s.length[rows]).all(), "committed tokens are part of the length")
    _require((s.known[rows] <= s.committed[rows]).all(), "known tokens are committed")
    outside = rows[s.outside[rows]]
    _require({*s.handle[outside].tolist()} == {*records.parcels}, "who is swapped out left something behind")
    _require((s.num_blocks[outside] == 0).all(), "who is swapped out holds no blocks")
    _require((s.committed[outside] == s.length[outside]).all(), "who is swapped out has no open step")
    enough = s.num_blocks[rows] * size >= s.length[rows]
    _require((enough | s.outside[rows]).all(), "a sequence holds blocks for its length")


def _check_table(records: Records, group: BlockGroup) -> None:
    s = records.sequences
    rows = s.live_rows
    held = np.zeros(s.max_seqs, dtype=np.int64)
    held[rows] = s.num_blocks[rows]
    columns = np.arange(s.width)
    before, past = columns < group.first[:, None], columns >= held[:, None]
    _require((group.table[past] == -1).all(), "table entries past a sequence's blocks are -1")
    _require((group.table[before] == -1).all(), "table entries that a window has left behind are -1")
    entries = group.table[~(before | past)]
    _require(((entries >= 0) & (entries < group.pool.num_blocks)).all(), "table entries are blocks")
    _require((group.first[rows] <= group.first_seen(s.committed[rows])).all(), "what a query sees is held")
    idle = np.setdiff1d(np.arange(s.max_seqs), rows)
    _require((group.first[idle] == 0).all(), "rows not in use have released nothing")


def _check_blocks(records: Records, index: int) -> None:
    group, size = records.groups[index], records.block_size
    pool = group.pool
    rows, columns, in_tables = _table_entries(records, group)
    kept = []
    for step in records.steps.values():
        copies = step.taken[index].copies
        kept.append(copies.sources[step.alive(records.sequences)[copies.owners]])
    references = np.bincount(np.concatenate([in_tables, *kept]), minlength=pool.num_blocks)
    _require((references == pool.refcount).all(), "reference counts equal the references from tables and steps")
    idle = np.concatenate([pool.free_blocks, pool.waiting_blocks, pool.evictable_blocks])
    _require(len(np.unique(idle)) == len(idle), "no block is free, waiting or evictable twice")
    _require((pool.refcount[idle] == 0).all(), "free, waiting and evictable blocks have no reference")
    used = int((pool.refcount > 0).sum())
    _require(used + len(idle) == pool.num_blocks, "used, waiting, free and evictable blocks add up to all")
    _require(not pool.num_waiting or bool(records.steps), "blocks wait only while steps are open")
    reserved = in_tables[columns * size >= records.sequences.length[rows]]
    _require((pool.refcount[reserved] == 1).all(), "reserved blocks belong to one sequence")


def _check_steps(records: Records) -> None:
    s = records.sequences
    expected = s.committed.copy()
    for step in records.steps.values():
        alive = step.alive(s)
        rows = step.rows[alive]
        _require((expected[rows] == step.start[alive]).all(), "open steps follow each other without a gap")
        expected[rows] = step.end[alive]
    rows = s.live_rows
    _require((expected[rows] == s.length[rows]).all(), "committed tokens and open steps add up to the length")


def _check_trie(records: Records) -> None:
    holders = dict.fromkeys(dict(records.trie.items()).values(), 0)
    for (parent, _), node in records.trie.items():
        if isinstance(parent, int):
            _require(parent in holders, "a node's parent is in the prefix cache")
            holders[parent] += 1
        for group in records.groups:
            holders[node] += group.cached.block_of(node) >= 0
    _require(all(holders.values()), "a node has a block or leads to one that has")
    parents = {node: parent for (parent, _), node in records.trie.items()}
    likely = ((node, records.trie.likely_child(node)) for node in parents)
    _require(all(child is None or parents.get(child) == node for node, child in likely), "a likely child is a child")


def _check_cached(records: Records, group: BlockGroup) -> None:
    cached, pool = group.cached, group.pool
    order = {block: place for place, block in enumerate(pool.evictable_blocks.tolist())}
    _require((cached.node >= 0).sum() == len(cached), "each cached block has its own node")
    _require(len(order) == pool.num_evictable, "evictable blocks are counted")
    _require(cached.has(np.array(list(order), dtype=np.int64)).all(), "evictable blocks are in the prefix cache")
    _require(not cached.has(pool.free_blocks).any(), "free blocks are not in the prefix cache")
    column: dict[object, int] = {}
    for (parent, tokens), node in records.trie.items():
        block, above = cached.block_of(node), -1 if isinstance(parent, tuple) else cached.block_of(parent)
        column[node] = column.get(parent, -1) + 1
        if block < 0:
            continue
        _require(cached.node[block] == node, "a node's block knows it")
        _require(cached.column[block] == column[node], "a cached block is as far down as its node")
        if group is records.groups[0]:
            holds = records.tokens[block].tobytes() == tokens
            _require(holds, "a block in the prefix cache holds the tokens of its key")
        if group.window is None and isinstance(parent, int):
            references = pool.refcount[above] if above >= 0 else 0
            _require(references >= pool.refcount[block], "who references a child references its parent")
            place = order.get(block, pool.num_blocks)
            _require(above not in order or place < order[above], "leaves are evicted before their parents")


def _check_histories(records: Records) -> None:
    s, group = records.sequences, records.groups[0]
    above = {node: parent for (parent, _), node in records.trie.items()}
    for row in s.live_rows[~s.outside[s.live_rows]]:
        first, full = group.first[row], max(int(s.known[row]), 0) // records.block_size
        nodes = group.cached.node[group.table[row, first:full]].tolist()
        parents = [(s.namespace[row],) if first == 0 else above.get(nodes[0]) if nodes else None, *nodes]
        _require(
            all(node in above and above[node] == parent for node, parent in zip(nodes, parents, strict=False)),
            "the full blocks of a known history are a path in the prefix cache",
        )


def _check_parcels(records: Records) -> None:
    s, size = records.sequences, records.block_size
    for parcel in {*records.parcels.values()}:
        members = {handle for handle, other in records.parcels.items() if other is parcel}
        for group, part in zip(records.groups, parcel.parts, strict=True):
            _require(members == {*part.rows}, "a parcel and its sequences know each other")
            for handle, rows in part.rows.items():
                row = s.find_one(handle)
                filled = max(-(-s.length[row] // size) - group.first[row], 0)
                _require(len(rows) == filled, "a parcel holds its sequences' tokens")
                _require(((rows >= 0) & (rows < len(part.blocks))).all(), "a parcel's rows are its own")


def _table_entries(records: Records, group: BlockGroup) -> tuple[Ints, Ints, Ints]:
    """Row, column and block of every table entry in use."""
    s = records.sequences
    live = s.live_rows[~s.outside[s.live_rows]]
    owners, columns = expand(np.minimum(group.first[live], s.num_blocks[live]), s.num_blocks[live])
    rows = live[owners]
    return rows, columns, group.table[rows, columns].astype(np.int64)


def _require(holds: object, invariant: str) -> None:
    if not holds:
        raise IntegrityError(f"broken invariant: {invariant}")
