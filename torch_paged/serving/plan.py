"""Plan: one step of the scheduler, enough to run it, to keep its results or to undo it."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch_paged.serving.requests import Sample


@dataclasses.dataclass(slots=True, eq=False)
class Plan:
    """Which samples read how many tokens in a step. Sample i is sequence i of the batch.

    Attributes:
        batch: from the cache's `prepare`.
        samples: who takes part.
        counts: tokens that each reads; 1: one each.
        starts: how many tokens each had in the cache before.
        writes: whether each has then read all it has, so that the step draws its next token; None: all have, with one
            token each.
    """

    batch: Any
    samples: list[Sample]
    counts: int | list[int]
    starts: list[int]
    writes: list[bool] | None
    _known: list[int] | None = None  # its tokens, once the host knows them all

    def follows(self, before: Plan) -> bool:
        """Whether this reads exactly what `before` draws, row by row."""
        return self.writes is None and (before.writes is None or all(before.writes)) and before.samples == self.samples

    def tokens(self) -> list[int]:
        """The tokens to read, in the order of the batch. What only the device knows yet stands as `~row`: the token
        that the previous step drew in that row."""
        if self._known is not None:
            return self._known
        tokens = self._collect()
        if min(tokens) >= 0:
            self._known = tokens
        return tokens

    def _collect(self) -> list[int]:
        if self.writes is None:
            return [
                sample.tokens[start] if start < len(sample.tokens) else ~sample.row
                for sample, start in zip(self.samples, self.starts, strict=True)
            ]
        assert isinstance(self.counts, list)
        tokens: list[int] = []
        for sample, start, count in zip(self.samples, self.starts, self.counts, strict=True):
            chunk = sample.tokens[start : start + count]
            tokens += chunk
            if len(chunk) < count:  # at most the last one: a step still in flight draws it
                tokens.append(~sample.row)
        return tokens
