"""Where the bytes of a block lie in each of many caches: device tables that let one launch serve them all.

The tables depend on nothing but the caches' addresses, shapes, strides and dtypes, and are kept under these, so they
never grow stale. Worked example: two head-major caches of float16, logically `[num_blocks, 2, 3, 4]`, each a
transposed view of a `[num_blocks, 3, 2, 4]` tensor. In memory a block is one run of 48 bytes. In logical order it is
6 runs of 8 bytes, at byte offsets 0, 16, 32, 8, 24, 40. Either way both caches make one group.
"""

import itertools
import math
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_paged.kernels.vectors import VECTOR_BYTES, effective_strides


class BlockGroup(NamedTuple):
    """Caches whose blocks consist of the same runs of bytes, so that one grid fits them all."""

    table: Tensor  # int64 [num_caches, 3]: address, bytes from block to block, first byte in a packed row
    run_offsets: Tensor  # int64 [num_runs]: first byte of each run within a block
    run_bytes: int
    alignment: int  # a power of two up to 16 that divides every address, stride, offset and run


class _Runs(NamedTuple):
    length: int  # bytes
    outer: tuple[tuple[int, int], ...]  # size and stride in bytes of each dimension that strings runs together


_Key = tuple[object, ...]
_MAX_RECENT = 64  # sets of caches; the tables of one set are some hundred bytes
_recent: OrderedDict[_Key, list[BlockGroup]] = OrderedDict()
_captured: dict[_Key, list[BlockGroup]] = {}  # a CUDA graph reads these at every replay: never dropped


def block_groups(caches: Sequence[Tensor], packed: bool) -> list[BlockGroup]:
    """The groups that `caches` fall into, made at the first call and remembered.

    Args:
        caches: tensors of one device with the same first dimension, any dtypes and strides.
        packed: runs in row-major order of the block's shape, as packed rows hold it; otherwise in the order of
            memory, where runs are longest.

    Raises:
        RuntimeError: at a first call during CUDA graph capture.
    """
    if not caches:
        return []
    key = (packed, *((c.data_ptr(), c.dtype, c.shape, c.stride()) for c in caches))
    groups = _captured.get(key, _recent.get(key))
    capturing = caches[0].is_cuda and torch.cuda.is_current_stream_capturing()
    if groups is None:
        if capturing:
            raise RuntimeError(
                "the first call on a set of caches copies their addresses to the device, which CUDA graph capture "
                "forbids: call the operator on the same caches once before, if only with an empty list of blocks"
            )
        # Warming up a CUDA graph, PyTorch takes this thread's memory from a pool that the graph will overwrite.
        with ThreadPoolExecutor(1) as other_thread:
            groups = other_thread.submit(_build, caches, packed).result()
    _remember(key, groups, capturing)
    return groups


def _remember(key: _Key, groups: list[BlockGroup], capturing: bool) -> None:
    if capturing:
        _captured[key] = groups
        return
    _recent[key] = groups
    _recent.move_to_end(key)
    for group in groups:
        if group.table.is_cuda:  # dropped one day, they are not freed before this stream's launches have read them
            stream = torch.cuda.current_stream(group.table.device)
            group.table.record_stream(stream)
            group.run_offsets.record_stream(stream)
    if len(_recent) > _MAX_RECENT:
        _recent.popitem(last=False)


def _build(caches: Sequence[Tensor], packed: bool) -> list[BlockGroup]:
    members: defaultdict[_Runs, list[tuple[int, int, int]]] = defaultdict(list)
    first = 0
    for cache in caches:
        block_bytes = math.prod(cache.shape[1:]) * cache.element_size()
        if block_bytes > 0:
            stride = effective_strides(cache)[0] * cache.element_size()
            members[_runs(cache, packed)].append((cache.data_ptr(), stride, first if packed else 0))
        first += block_bytes
    return [_group(runs, rows, caches[0].device) for runs, rows in members.items()]


def _runs(cache: Tensor, packed: bool) -> _Runs:
    """Joins a block's innermost dimensions into one run for as long as they are dense."""
    length = cache.element_size()
    dims = [
        (size, stride * length) for size, stride in zip(cache.shape[1:], cache.stride()[1:], strict=True) if size > 1
    ]
    if not packed:
        dims.sort(key=lambda dim: -dim[1])
    while dims and dims[-1][1] == length:
        length *= dims.pop()[0]
    return _Runs(length, tuple(dims))


def _group(runs: _Runs, rows: list[tuple[int, int, int]], device: torch.device) -> BlockGroup:
    strides = [stride for _, stride in runs.outer]
    offsets = [
        sum(i * stride for i, stride in zip(index, strides, strict=True))
        for index in itertools.product(*(range(size) for size, _ in runs.outer))
    ]
    return BlockGroup(
        table=torch.tensor(rows, dtype=torch.int64, device=device),
        run_offsets=torch.tensor(offsets, dtype=torch.int64, device=device),
        run_bytes=runs.length,
        alignment=math.gcd(VECTOR_BYTES, runs.length, *strides, *itertools.chain(*rows)),
    )


class WordTiles(NamedTuple):
    """How the lanes of a grid share a block: each moves vectors of words, as wide as the alignment allows."""

    word: tl.dtype
    vector: int  # words to a vector
    run_vectors: int
    block_vectors: int
    vectors: int  # to a tile

    @property
    def tiles(self) -> int:
        """Tiles to a block."""
        return -(-self.block_vectors // self.vectors)


def word_tiles(group: BlockGroup, alignment: int) -> WordTiles:
    """Tiles of at most 16 KiB over the blocks of `group`; `alignment`, in bytes, divides the group's own."""
    word_bytes = min(alignment, 4)
    run_vectors = group.run_bytes // alignment
    block_vectors = run_vectors * group.run_offsets.shape[0]
    return WordTiles(
        word={4: tl.int32, 2: tl.int16, 1: tl.int8}[word_bytes],
        vector=alignment // word_bytes,
        run_vectors=run_vectors,
        block_vectors=block_vectors,
        vectors=min(triton.next_power_of_2(block_vectors), 1024),
    )


@triton.jit
def cache_base(table, cache, block, WORD: tl.constexpr, VECTOR: tl.constexpr):
    """Pointer to the first word of `block` in cache number `cache`."""
    base = tl.load(table + cache * 3).to(tl.pointer_type(WORD))
    words = block * (tl.load(table + cache * 3 + 1) // (WORD.primitive_bitwidth // 8))
    return tl.multiple_of(base, VECTOR * WORD.primitive_bitwidth // 8) + tl.multiple_of(words, VECTOR)


@triton.jit
def run_words(
    vector,
    run_offsets,
    WORD: tl.constexpr,
    VECTOR: tl.constexpr,
    RUN_VECTORS: tl.constexpr,
    BLOCK_VECTORS: tl.constexpr,
):
    """Words from a block's start to the words of its vectors number `vector`."""
    if RUN_VECTORS == BLOCK_VECTORS:
        start = vector.to(tl.int64) * VECTOR
    else:
        run = tl.load(run_offsets + vector // RUN_VECTORS, mask=vector < BLOCK_VECTORS, other=0)
        start = run // (WORD.primitive_bitwidth // 8) + vector % RUN_VECTORS * VECTOR
    # [VECTORS, VECTOR]
    words = start[:, None] + tl.arange(0, VECTOR)[None, :]
    return tl.max_contiguous(tl.multiple_of(words, (1, VECTOR)), (1, VECTOR))
