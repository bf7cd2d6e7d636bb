"""The prefix cache: full blocks, found again by the exact tokens that filled them and all that came before."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np

from torch_paged.memory.arrays import Flags, Ints

_MORE_NODES = 1024

Parent = int | tuple[Hashable]  # a node, or a namespace's root
Key = tuple[Parent, bytes]


class PrefixTrie:
    """A trie whose nodes stand for prefixes: a path from a namespace's root spells one, a block's tokens at a time.

    One dictionary holds the whole trie: (parent, the tokens of a block as bytes) leads to a node, a number. It compares
    keys in full, so that equal hashes do no harm. The parent of a first node is the tuple of its namespace alone.
    Example, 2 tokens a block, and the prompts [1, 2, 3, 4] and [1, 2, 5, 6] of the namespace "a":

        (("a",), b"1 2") -> 0        (0, b"3 4") -> 1        (0, b"5 6") -> 2

    Which blocks hold the keys and values of a node, each group's CachedBlocks know. A node lives while one of them
    holds it or a child stands below it: it may have lost its blocks, as the first ones of a sequence with a sliding
    window do, and still lead to those that have theirs. Then its number names another.
    """

    def __init__(self, block_size: int) -> None:
        self._nodes: dict[Key, int] = {}
        self._keys: list[Key | None] = []  # of each node
        self._holders: list[int] = []  # of each node: its children, and the groups in which it has a block
        self._likely: list[int] = []  # of each node, its newest child, which is tried first; -1: none is known
        self._unused: list[int] = []  # numbers
        self._block_key = np.dtype((np.void, block_size * np.dtype(np.int64).itemsize))

    def __len__(self) -> int:
        return len(self._nodes)

    @property
    def num_numbers(self) -> int:
        """All nodes, past ones too, have numbers below this."""
        return len(self._keys)

    def items(self) -> Iterable[tuple[Key, int]]:
        """Every key with its node; a parent comes before its children."""
        return self._nodes.items()

    def keys_of(self, tokens: Ints) -> list[bytes]:
        """The keys of so many full blocks: `tokens` is contiguous, of any shape."""
        keys: list[Any] = tokens.reshape(-1).view(self._block_key).tolist()
        return keys

    def path(self, namespace: Hashable, tokens: Ints) -> Ints:
        """The nodes of the longest known prefix of these tokens, a whole number of blocks."""
        nodes, pairs, likely = self._nodes, self._keys, self._likely
        node: Parent = (namespace,)
        path, child = array("q"), -1
        for key in self.keys_of(tokens):
            if child < 0 or pairs[child][1] != key:  # type: ignore[index]
                child = nodes.get((node, key), -1)
                if child < 0:
                    break
            path.append(child)
            node, child = child, likely[child]
        return np.array(path)

    def enter(self, parent: Parent, key: bytes) -> tuple[int, bool]:
        """The node below `parent` with these tokens, and whether it is new: it must be held then, or it stays."""
        pair, unused = (parent, key), self._unused
        spare = unused[-1] if unused else len(self._keys)
        node = self._nodes.setdefault(pair, spare)
        if node != spare:
            return node, False
        if unused:
            unused.pop()
            self._keys[node] = pair
        else:
            self._keys.append(pair)
            self._holders.append(0)
            self._likely.append(-1)
        if not isinstance(parent, tuple):
            self._holders[parent] += 1
            self._likely[parent] = node
        return node, True

    def hold(self, nodes: Iterable[int]) -> None:
        """Keep each of these nodes until `drop`."""
        holders = self._holders
        for node in nodes:
            holders[node] += 1

    def drop(self, node: int) -> None:
        """End a `hold`; the node goes if nothing else keeps it, and with it those above that only led there."""
        while True:
            self._holders[node] -= 1
            if self._holders[node]:
                return
            pair = self._keys[node]
            assert pair is not None
            del self._nodes[pair]
            self._keys[node] = None
            self._unused.append(node)
            parent = pair[0]
            if isinstance(parent, tuple):
                return
            if self._likely[parent] == node:
                self._likely[parent] = -1
            node = parent

    def likely_child(self, node: int) -> int | None:
        """The child that `path` tries first, if there is one."""
        return self._likely[node] if self._likely[node] >= 0 else None

    def below(self, namespaces: tuple[Hashable, ...]) -> Ints:
        """All nodes of these namespaces, all nodes if none is named."""
        chosen: set[Parent] = {(namespace,) for namespace in namespaces}
        for (parent, _), node in self._nodes.items():
            if parent in chosen or not namespaces:
                chosen.add(node)
        return np.array([node for node in chosen if isinstance(node, int)], dtype=np.int64)


class CachedBlocks:
    """The blocks of one group of layers that are in the prefix cache: at most one of each node.

    Whether blocks are referenced, and which is evicted next, is for the BlockPool to know.

    Attributes:
        node: int64 [num_blocks], the node of each block that is in the cache, else -1.
        column: int64 [num_blocks], of those: how many blocks come before it in a sequence.
    """

    def __init__(self, trie: PrefixTrie, num_blocks: int) -> None:
        self.node = np.full(num_blocks, -1, dtype=np.int64)
        self.column = np.zeros(num_blocks, dtype=np.int64)
        self._trie = trie
        self._block = array("q")  # of each node, as far as it reaches; -1 where it has none
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def has(self, blocks: Ints) -> Flags:
        """Which of these blocks are in the cache."""
        inside: Flags = self.node[blocks] >= 0
        return inside

    def block_of(self, node: int) -> int:
        """The block of a node, -1 where it has none here."""
        return self._block[node] if node < len(self._block) else -1

    def blocks_of(self, nodes: Ints) -> Ints:
        """`block_of` each of these nodes."""
        if not len(nodes):
            return nodes
        self._reach_all()
        blocks: Ints = np.frombuffer(self._block, dtype=np.int64)[nodes]
        return blocks

    def put(self, nodes: Ints, blocks: Ints, columns: Ints) -> None:
        """Enter distinct blocks, which are not in the cache, as those of nodes without one."""
        self._reach_all()
        np.frombuffer(self._block, dtype=np.int64)[nodes] = blocks
        self._count += len(blocks)
        self.node[blocks] = nodes
        self.column[blocks] = columns
        self._trie.hold(nodes.tolist())

    def remove(self, blocks: Ints) -> None:
        """Take distinct blocks out of the cache."""
        for node in self.node[blocks].tolist():
            self._block[node] = -1
            self._trie.drop(node)
        self._count -= len(blocks)
        self.node[blocks] = -1

    def _reach_all(self) -> None:
        missing = self._trie.num_numbers - len(self._block)
        if missing > 0:
            self._block.extend([-1] * (missing + _MORE_NODES))
