"""The prefix cache: full blocks, found again by the exact tokens that filled them and all that came before."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np

from torch_paged.memory.arrays import Flags, Ints

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
        self._unused: list[int] = []  # numbers
        self._block_key = np.dtype((np.void, block_size * np.dtype(np.int64).itemsize))

    def __len__(self) -> int:
        return len(self._nodes)

    def items(self) -> Iterable[tuple[Key, int]]:
        """Every key with its node; a parent comes before its children."""
        return self._nodes.items()

    def keys_of(self, tokens: Ints) -> list[bytes]:
        """The keys of so many full blocks: `tokens` is contiguous, of any shape."""
        keys: list[Any] = tokens.reshape(-1).view(self._block_key).tolist()
        return keys

    def path(self, namespace: Hashable, tokens: Ints) -> list[int]:
        """The nodes of the longest known prefix of these tokens, a whole number of blocks."""
        nodes = self._nodes
        node: Parent = (namespace,)
        path = []
        for key in self.keys_of(tokens):
            child = nodes.get((node, key))
            if child is None:
                break
            path.append(child)
            node = child
        return path

    def enter(self, parent: Parent, key: bytes) -> int:
        """The node below `parent` with these tokens. A new one must be held, or it stays for ever."""
        pair = parent, key
        node = self._nodes.get(pair)
        if node is not None:
            return node
        if self._unused:
            node = self._unused.pop()
            self._keys[node] = pair
        else:
            node = len(self._keys)
            self._keys.append(pair)
            self._holders.append(0)
        self._nodes[pair] = node
        if not isinstance(parent, tuple):
            self._holders[parent] += 1
        return node

    def hold(self, node: int) -> None:
        """Keep a node until `drop`."""
        self._holders[node] += 1

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
            if isinstance(pair[0], tuple):
                return
            node = pair[0]

    def below(self, namespaces: tuple[Hashable, ...]) -> list[int]:
        """All nodes of these namespaces, all nodes if none is named."""
        chosen: set[Parent] = {(namespace,) for namespace in namespaces}
        for (parent, _), node in self._nodes.items():
            if parent in chosen or not namespaces:
                chosen.add(node)
        return [node for node in chosen if isinstance(node, int)]


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
        self._block: dict[int, int] = {}  # of a node

    def __len__(self) -> int:
        return len(self._block)

    def has(self, blocks: Ints) -> Flags:
        """Which of these blocks are in the cache."""
        inside: Flags = self.node[blocks] >= 0
        return inside

    def block_of(self, node: int) -> int:
        """The block of a node, -1 where it has none here."""
        return self._block.get(node, -1)

    def blocks_of(self, nodes: list[int]) -> Ints:
        """`block_of` each of these nodes."""
        block = self._block
        return np.array([block.get(node, -1) for node in nodes], dtype=np.int64)

    def put(self, node: int, block: int, column: int) -> None:
        """Enter `block`, which is not in the cache, as that of a node without one."""
        self._block[node] = block
        self.node[block] = node
        self.column[block] = column
        self._trie.hold(node)

    def remove(self, blocks: Ints) -> None:
        """Take distinct blocks out of the cache."""
        for node in self.node[blocks].tolist():
            del self._block[node]
            self._trie.drop(node)
        self.node[blocks] = -1
