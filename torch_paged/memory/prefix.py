"""The prefix cache: full blocks, found again by the exact tokens that filled them and all that came before."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np

from torch_paged.memory.arrays import Flags, Ints

Parent = int | tuple[Hashable]  # a node, or a namespace's root
Key = tuple[Parent, bytes]


class PrefixTrie:
    """A trie whose nodes are blocks: a path from a namespace's root spells a prefix, a block's tokens at a time.

    One dictionary holds the whole trie: (parent, the tokens of a block as bytes) leads to a node. It compares keys in
    full, so that equal hashes do no harm. A node is a number that names a block for ever: the block, plus `num_blocks`
    times a number never used twice. So what once stood below a node is not found below another that fills the same
    block later. The parent of a first block is the tuple of its namespace alone. Example, `num_blocks = 10`, 2 tokens
    a block, and the prompts [1, 2, 3, 4] in the blocks 6, 8 and [1, 2, 5, 6] in 6, 7, of the namespace "a":

        (("a",), b"1 2") -> 6        (6, b"3 4") -> 18        (6, b"5 6") -> 27

    Whether blocks are referenced, and which is evicted next, is for the BlockPool to know.

    Attributes:
        tokens: int64 [num_blocks, block_size], the tokens whose keys and values a block holds, as far as known. They
            are written, and copied from block to block, where keys and values are.
        node: int64 [num_blocks], the node of each block that is in the trie, else -1.
        column: int64 [num_blocks], of those: how many blocks come before it in a sequence.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.tokens = np.zeros((num_blocks, block_size), dtype=np.int64)
        self.flat_tokens = self.tokens.reshape(-1)
        self.node = np.full(num_blocks, -1, dtype=np.int64)
        self.column = np.zeros(num_blocks, dtype=np.int64)
        self._nodes: dict[Key, int] = {}
        self._keys: list[Key | None] = [None] * num_blocks
        self._block_key = np.dtype((np.void, block_size * self.tokens.itemsize))
        self._next_generation = 0

    def __len__(self) -> int:
        return len(self._nodes)

    def items(self) -> Iterable[tuple[Key, int]]:
        """Every key with its node; a parent comes before its children."""
        return self._nodes.items()

    def block_of(self, node: int) -> int:
        return node % len(self.node)

    def has(self, blocks: Ints) -> Flags:
        """Which of these blocks are in the trie."""
        inside: Flags = self.node[blocks] >= 0
        return inside

    def keys_of(self, tokens: Ints) -> list[bytes]:
        """The keys of so many full blocks: `tokens` is contiguous, of any shape."""
        keys: list[Any] = tokens.reshape(-1).view(self._block_key).tolist()
        return keys

    def find(self, namespace: Hashable, tokens: Ints) -> Ints:
        """The blocks that hold the longest known prefix of these tokens, a whole number of blocks."""
        nodes = self._nodes
        node: Parent = (namespace,)
        found = []
        for key in self.keys_of(tokens):
            child = nodes.get((node, key))
            if child is None:
                break
            found.append(child)
            node = child
        return np.array(found, dtype=np.int64) % len(self.node)

    def enter(self, parent: Parent, key: bytes, block: int, column: int) -> int:
        """Enter `block` under its parent, unless another block with these tokens is there; the node that is there."""
        pair = parent, key
        known = self._nodes.get(pair)
        if known is not None:
            return known
        node = self._next_generation * len(self.node) + block
        self._next_generation += 1
        self._nodes[pair] = node
        self._keys[block] = pair
        self.node[block] = node
        self.column[block] = column
        return node

    def remove(self, blocks: Ints) -> None:
        """Take distinct blocks out of the trie. What stands below them is not found any more."""
        for block in blocks.tolist():
            key = self._keys[block]
            assert key is not None
            del self._nodes[key]
            self._keys[block] = None
        self.node[blocks] = -1

    def clear(self, namespaces: tuple[Hashable, ...]) -> Ints:
        """Take out all blocks of these namespaces, all blocks if none is named, and return them."""
        doomed: set[Parent] = {(namespace,) for namespace in namespaces}
        for (parent, _), node in self._nodes.items():
            if parent in doomed or not namespaces:
                doomed.add(node)
        nodes = [node for node in doomed if isinstance(node, int)]
        blocks = np.array(nodes, dtype=np.int64) % len(self.node)
        self.remove(blocks)
        return blocks
