"""Host side of the paged cache: who owns which block. NumPy alone, no torch.

errors.py      what can go wrong: OutOfBlocks, OutOfSwapSpace, IntegrityError
arrays.py      checks of a caller's integers, ragged ranges
prefix.py      PrefixTrie, CachedBlocks: full blocks, found by the tokens that filled them
eviction.py    EvictionQueue: the order in which unreferenced blocks of the prefix cache make room
pool.py        BlockPool: reference counts, free blocks, blocks that wait for open steps
sequences.py   Sequences: handles and lengths, one row a sequence
group.py       BlockGroup: the blocks and tables of the layers with one window, what they share and release
step.py        Step: what one prepare took, enough to commit it or to undo it
parcel.py      Parcel: what sequences that are swapped out leave with
records.py     Records: all of the above under one roof
history.py     the tokens of committed steps on their way into the prefix cache
swap.py        sequences moved out of the cache and back
inspection.py  MemoryStats, which slots hold tokens, and the integrity check
manager.py     MemoryManager: add, fork, truncate, free; prepare, commit, rollback
"""

from torch_paged.memory.errors import IntegrityError, OutOfBlocks, OutOfSwapSpace
from torch_paged.memory.inspection import MemoryStats
from torch_paged.memory.manager import MemoryManager
from torch_paged.memory.step import Step

__all__ = ["IntegrityError", "MemoryManager", "MemoryStats", "OutOfBlocks", "OutOfSwapSpace", "Step"]
