"""Plan: one step of the scheduler, enough to run it, to keep its results or to undo it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from torch_paged.memory.arrays import Ints, as_integers
from torch_paged.serving.requests import Sample, TokenLogprobs
from torch_paged.serving.writers import Ended, Writers, write


class Chunk(NamedTuple):
    """What a sample reads in a step that is not, or not yet, one of the writers.

    Attributes:
        sample: the reader.
        start: tokens that it had in the cache before.
        size: tokens that it reads.
        writes: whether it has then read all it has, so that the step draws its next token.
    """

    sample: Sample
    start: int
    size: int
    writes: bool


class Plan:
    """Which samples read how many tokens in a step. Sample i is sequence i of the batch.

    Attributes:
        batch: from the cache's `prepare`.
        writers: the first of them, which read one token and write one.
        chunks: of the others.
        samples: all of them.
    """

    def __init__(self, batch: Any, writers: Writers, chunks: list[Chunk]) -> None:
        """Opens the step: what it reads counts as cached."""
        self.batch = batch
        self.writers = writers
        self.chunks = chunks
        self.samples = [*writers.samples, *(chunk.sample for chunk in chunks)] if chunks else writers.samples
        self._known: Ints | None = None  # its tokens, once the host knows them all
        writers.open()
        self._step = writers.steps
        for sample, _, size, _ in chunks:
            sample.cached += size

    @property
    def num_tokens(self) -> int:
        """How many are read."""
        return len(self.writers) + sum(chunk.size for chunk in self.chunks)

    @property
    def changes_writers(self) -> bool:
        """Whether the next step has other ones: some come to their limit, or some have read all they had to."""
        return any(chunk.writes for chunk in self.chunks) or bool(self.writers.at_limit(self._step))

    def undo(self) -> None:
        """Its samples are as before it. Later plans were undone before."""
        self.writers.undo()
        for sample, start, _, _ in self.chunks:
            if sample.finish_reason is None:
                sample.cached = start

    def follows(self, before: Plan) -> bool:
        """Whether this reads exactly what `before` draws, row by row."""
        return not self.chunks and all(chunk.writes for chunk in before.chunks) and before.samples == self.samples

    def tokens(self) -> Ints:
        """int64 [num_tokens], what is read, in the order of the batch. What only the device knows yet stands as `~row`:
        the token that the previous step drew in that row."""
        if self._known is not None:
            return self._known
        tokens = self.writers.tokens(self._step)
        if self.chunks:
            tokens = np.concatenate([tokens, *map(_tokens, self.chunks)])
        if not len(tokens) or tokens.min() >= 0:
            self._known = tokens
        return tokens

    def write(self, drawn: Sequence[int], logprobs: Sequence[TokenLogprobs] | None) -> Ended:
        """Give a token to everybody who has read all; returns who ends with that."""
        ended: Ended = {}
        num_writers = len(self.writers)
        self.writers.write(self._step, drawn[:num_writers], logprobs, ended)
        for row, chunk in enumerate(self.chunks, num_writers):
            if chunk.writes:
                write(chunk.sample, drawn[row], logprobs[row] if logprobs else None, ended)
        return ended


def _tokens(chunk: Chunk) -> Ints:
    sample, start, size, _ = chunk
    tokens = sample.tokens[start : start + size]
    if len(tokens) < size:  # at most the last one: a step still in flight draws it
        tokens.append(~sample.row)
    return as_integers("tokens", tokens)
