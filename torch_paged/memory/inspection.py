"""Looking at the memory manager from outside: figures, and whether its records agree with each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from torch_paged.memory.arrays import Ints, expand
from torch_paged.memory.errors import IntegrityError

if TYPE_CHECKING:
    from torch_paged.memory.manager import MemoryManager


class MemoryStats(NamedTuple):
    """How full the cache is. A shared block or slot counts once.

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


def stats(manager: MemoryManager, bytes_per_token: int) -> MemoryStats:
    """Count. Costs time in proportion to the blocks; not for every step."""
    s, pool, size = manager.sequences, manager.pool, manager.block_size
    rows, columns, blocks = _table_entries(manager)
    filled = np.zeros(pool.num_blocks, dtype=np.int64)
    np.maximum.at(filled, blocks, np.clip(s.length[rows] - columns * size, 0, size))
    lengths = s.length[s.live_rows[~s.outside[s.live_rows]]]
    used = pool.num_blocks - pool.num_available
    return MemoryStats(
        blocks_total=pool.num_blocks,
        blocks_used=used,
        blocks_free=pool.num_available,
        blocks_shared=int((np.bincount(blocks, minlength=pool.num_blocks) > 1).sum()),
        tokens=int(lengths.sum()),
        slots_filled=float(filled.sum() / (used * size)) if used else 0.0,
        bytes_used=used * size * bytes_per_token,
        bytes_contiguous=len(lengths) * int(lengths.max(initial=0)) * bytes_per_token,
        blocks_cached=len(manager.trie),
        blocks_evictable=pool.num_evictable,
        tokens_looked_up=manager.tokens_looked_up,
        tokens_found=manager.tokens_found,
        seqs_swapped=len(manager.parcels),
        bytes_swapped=manager.num_outside * size * bytes_per_token,
    )


def check_integrity(manager: MemoryManager) -> None:
    """Raise IntegrityError if one of the invariants below does not hold."""
    _check_sequences(manager)
    _check_blocks(manager)
    _check_steps(manager)
    _check_trie(manager)
    _check_eviction(manager)
    _check_histories(manager)
    _check_parcels(manager)


def _check_sequences(manager: MemoryManager) -> None:
    s, size = manager.sequences, manager.block_size
    rows = s.live_rows
    _require(len(rows) + s.num_free_rows == s.max_seqs, "live and free rows add up to max_seqs")
    _require(len(np.unique(s.stamp[rows])) == len(rows), "the stamps of live sequences differ")
    _require((s.length[rows] <= s.max_seq_len).all(), "lengths lie within max_seq_len")
    _require((s.committed[rows] <= s.length[rows]).all(), "committed tokens are part of the length")
    _require((s.known[rows] <= s.committed[rows]).all(), "known tokens are committed")
    outside = rows[s.outside[rows]]
    _require({*s.handle[outside].tolist()} == {*manager.parcels}, "who is swapped out left something behind")
    _require((s.num_blocks[outside] == 0).all(), "who is swapped out holds no blocks")
    _require((s.committed[outside] == s.length[outside]).all(), "who is swapped out has no open step")
    enough = s.num_blocks[rows] * size >= s.length[rows]
    _require((enough | s.outside[rows]).all(), "a sequence holds blocks for its length")
    held = np.zeros(s.max_seqs, dtype=np.int64)
    held[rows] = s.num_blocks[rows]
    in_use = np.arange(s.width) < held[:, None]
    _require((s.table[~in_use] == -1).all(), "table entries past a sequence's blocks are -1")
    entries = s.table[in_use]
    _require(((entries >= 0) & (entries < manager.pool.num_blocks)).all(), "table entries are blocks")


def _check_blocks(manager: MemoryManager) -> None:
    pool, size = manager.pool, manager.block_size
    rows, columns, in_tables = _table_entries(manager)
    kept = [
        step.copies.sources[(manager.sequences.handle[step.rows] == step.handles)[step.copies.owners]]
        for step in manager.steps.values()
    ]
    references = np.bincount(np.concatenate([in_tables, *kept]), minlength=pool.num_blocks)
    _require((references == pool.refcount).all(), "reference counts equal the references from tables and steps")
    idle = np.concatenate([pool.free_blocks, pool.waiting_blocks, pool.evictable_blocks])
    _require(len(np.unique(idle)) == len(idle), "no block is free, waiting or evictable twice")
    _require((pool.refcount[idle] == 0).all(), "free, waiting and evictable blocks have no reference")
    used = int((pool.refcount > 0).sum())
    _require(used + len(idle) == pool.num_blocks, "used, waiting, free and evictable blocks add up to all")
    _require(pool.num_waiting == len(pool.waiting_blocks), "waiting blocks are counted")
    _require(not pool.num_waiting or bool(manager.steps), "blocks wait only while steps are open")
    reserved = in_tables[columns * size >= manager.sequences.length[rows]]
    _require((pool.refcount[reserved] == 1).all(), "reserved blocks belong to one sequence")


def _check_steps(manager: MemoryManager) -> None:
    s = manager.sequences
    expected = s.committed.copy()
    for step in manager.steps.values():
        alive = s.handle[step.rows] == step.handles
        rows = step.rows[alive]
        _require((expected[rows] == step.start[alive]).all(), "open steps follow each other without a gap")
        expected[rows] = step.end[alive]
    rows = s.live_rows
    _require((expected[rows] == s.length[rows]).all(), "committed tokens and open steps add up to the length")


def _check_trie(manager: MemoryManager) -> None:
    trie, refcount = manager.trie, manager.pool.refcount
    _require((trie.node >= 0).sum() == len(trie), "each node has its own block")
    for (parent, tokens), node in trie.items():
        block = trie.block_of(node)
        _require(trie.node[block] == node, "a node's block knows it")
        _require(trie.tokens[block].tobytes() == tokens, "a block in the prefix cache holds the tokens of its key")
        if isinstance(parent, tuple):
            _require(trie.column[block] == 0, "the root's children are first blocks")
        elif trie.node[trie.block_of(parent)] == parent:
            above = trie.block_of(parent)
            _require(trie.column[block] == trie.column[above] + 1, "a child is one column after its parent")
            _require(refcount[above] >= refcount[block], "who references a child references its parent")
        else:
            _require(refcount[block] == 0, "blocks that cannot be found any more are unreferenced")


def _check_eviction(manager: MemoryManager) -> None:
    trie, pool = manager.trie, manager.pool
    order = {block: place for place, block in enumerate(pool.evictable_blocks.tolist())}
    _require(len(order) == pool.num_evictable, "evictable blocks are counted")
    _require(trie.has(np.array(list(order), dtype=np.int64)).all(), "evictable blocks are in the prefix cache")
    _require(not trie.has(pool.free_blocks).any(), "free blocks are not in the prefix cache")
    for (parent, _), node in trie.items():
        above = -1 if isinstance(parent, tuple) else trie.block_of(parent)
        if above in order and trie.node[above] == parent:
            place = order.get(trie.block_of(node), pool.num_blocks)
            _require(place < order[above], "leaves are evicted before their parents")


def _check_histories(manager: MemoryManager) -> None:
    s, trie = manager.sequences, manager.trie
    above = {node: parent for (parent, _), node in trie.items()}
    for row in s.live_rows[~s.outside[s.live_rows]]:
        full = max(int(s.known[row]), 0) // manager.block_size
        nodes = trie.node[s.table[row, :full]].tolist()
        parents = [(s.namespace[row],), *nodes]
        _require(
            all(above.get(node) == parent for node, parent in zip(nodes, parents, strict=False)),
            "the full blocks of a known history are a path in the prefix cache",
        )


def _check_parcels(manager: MemoryManager) -> None:
    s, size = manager.sequences, manager.block_size
    for parcel in {*manager.parcels.values()}:
        members = {handle for handle, other in manager.parcels.items() if other is parcel}
        _require(members == {*parcel.rows}, "a parcel and its sequences know each other")
        for handle, rows in parcel.rows.items():
            _require(len(rows) == -(-s.length[s.find_one(handle)] // size), "a parcel holds its sequences' tokens")
            _require(((rows >= 0) & (rows < len(parcel.blocks))).all(), "a parcel's rows are its own")


def _table_entries(manager: MemoryManager) -> tuple[Ints, Ints, Ints]:
    """Row, column and block of every table entry in use."""
    s = manager.sequences
    live = s.live_rows
    owners, columns = expand(np.zeros_like(live), s.num_blocks[live])
    rows = live[owners]
    return rows, columns, s.table[rows, columns].astype(np.int64)


def _require(holds: object, invariant: str) -> None:
    if not holds:
        raise IntegrityError(f"broken invariant: {invariant}")
