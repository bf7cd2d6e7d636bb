"""A model whose steps are captured as CUDA graphs, so that a step costs the host one launch."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from torch_paged import PagedBatch, PagedKVCache

BUCKETS = (8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # sequences and tokens of a step


class Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    tokens: Tensor
    logits: Tensor


class Graphed:
    """`model(tokens, batch)`, captured anew for each shape that a batch is padded to, and replayed from then on.

    The cache must have `buckets`: then the tensors of a batch never move, and what they hold is all that differs
    between two steps of one shape. The logits are overwritten by the next call. What no bucket holds runs as it is.
    """

    def __init__(self, model: Callable[[Tensor, PagedBatch], Tensor], buckets: tuple[int, ...] = BUCKETS) -> None:
        self._model = model
        self._buckets = frozenset(buckets)
        self._captured: dict[tuple[int, int, bool], Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, tokens: Tensor, batch: PagedBatch) -> Tensor:
        shape = len(batch.seq_lens), len(tokens), batch.cu_seqlens_q is None
        if not self._buckets.issuperset(shape[:2]):
            return self._model(tokens, batch)
        captured = self._captured.get(shape)
        if captured is None:
            return self._capture(shape, tokens, batch)
        captured.tokens.copy_(tokens)
        captured.graph.replay()
        return captured.logits

    def _capture(self, shape: tuple[int, int, bool], tokens: Tensor, batch: PagedBatch) -> Tensor:
        """The logits of this step, run as it is: a first call compiles kernels, which no capture may."""
        logits = self._model(tokens, batch).clone()
        kept, graph = tokens.clone(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = self._model(kept, batch)
        self._captured[shape] = Captured(graph, kept, output)
        return logits


@torch.inference_mode()
def capture_all(cache: PagedKVCache, model: Callable[[Tensor, PagedBatch], Tensor], most_seqs: int) -> None:
    """Let a graphed model see every shape that up to `most_seqs` sequences can make: uniform, and of any tokens."""
    for size in (size for size in BUCKETS if size <= most_seqs):
        seqs = [cache.add() for _ in range(size)]
        _run(cache, model, seqs, [1] * size)
        for tokens in (tokens for tokens in BUCKETS if tokens >= size):
            part = seqs[: size - (tokens == size)]  # of equal counts the batch would be uniform
            _run(cache, model, part, [tokens - len(part) + 1, *[1] * (len(part) - 1)])
        cache.free(seqs)


def _run(
    cache: PagedKVCache, model: Callable[[Tensor, PagedBatch], Tensor], seqs: list[int], counts: list[int]
) -> None:
    batch = cache.prepare(seqs, counts)
    model(torch.zeros_like(batch.positions), batch)
    cache.rollback(batch)
