"""Steps of a cache between `prepare` and `commit` or `rollback`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from torch_paged.batch import PagedBatch
from torch_paged.functional import copy_blocks
from torch_paged.memory import IntegrityError, MemoryManager, Step
from torch_paged.memory.arrays import as_integer
from torch_paged.staging import Staging
from torch_paged.token_feed import TokenFeed


class OpenSteps:
    """Each open step with its batch. What `PagedKVCache` says of its methods of the same names holds.

    Args:
        caches: of each group of layers, all that is made of its blocks.
    """

    def __init__(
        self, memory: MemoryManager, staging: Staging, feed: TokenFeed, caches: Sequence[Sequence[Tensor]]
    ) -> None:
        self._memory = memory
        self._staging = staging
        self._feed = feed
        self._caches = caches
        self._open: dict[int, tuple[PagedBatch, Step]] = {}

    def prepare(self, seqs: Sequence[int], counts: int | Sequence[int], ahead: int, ragged: bool) -> PagedBatch:
        step = self._memory.prepare(seqs, counts, ahead, ragged)
        try:
            batch, copies = self._staging.send(step)
            for caches, pairs in zip(self._caches, copies, strict=True):
                if pairs is not None:
                    copy_blocks(caches, pairs)
        except BaseException:
            self._staging.forget()
            self._memory.rollback(step)
            raise
        self._open[id(batch)] = (batch, step)
        return batch

    def commit(self, batch: PagedBatch, tokens: Any, advanced: int) -> None:
        step = self._step_of(batch)
        advanced = as_integer("advanced", advanced, at_least=0)
        expected = len(step.positions) + advanced * len(step.rows)
        fetched = None if tokens is None else self._feed.fetch(tokens)
        if fetched is not None and len(fetched[0]) != expected:
            raise ValueError(f"tokens must be the {expected} tokens of the step, got {len(fetched[0])}")
        self._memory.commit(step, advanced)
        del self._open[id(batch)]
        if fetched is not None:
            self._feed.put(step, advanced, *fetched)
        self._memory.release_unseen(step)

    def rollback(self, batch: PagedBatch) -> None:
        self._memory.rollback(self._step_of(batch))
        del self._open[id(batch)]

    def check_integrity(self) -> None:
        if len(self._open) != len(self._memory.steps):
            raise IntegrityError("broken invariant: every open step has a batch")

    def _step_of(self, batch: PagedBatch) -> Step:
        _, step = self._open.get(id(batch), (None, None))
        if step is None:
            raise ValueError(
                "the batch is no open step of this cache: it was committed or rolled back before, or did not come from "
                "its prepare (those of advance() and scheduled() are committed with the one that they were made from)"
            )
        return step
