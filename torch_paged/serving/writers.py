"""Writers: the samples that decode together, and what is known of all of them at once."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from torch_paged.memory.arrays import Ints, as_integers
from torch_paged.serving.requests import Sample, TokenLogprobs

T = TypeVar("T")
Ended = dict[str, list[Sample]]  # by the reason


@dataclasses.dataclass(slots=True, eq=False)
class Writers:
    """Samples that read one token and write one, step after step, until some leave or others join.

    Most steps do the same for all of them and need not look at each: what one step draws is what the next one reads,
    and nobody ends before the first of them comes to its limit, unless a stop token is drawn. Example, limits of 5 and
    9 tokens of which 3 and 4 exist: the second step is the last one of the first sample.

    Attributes:
        samples: sample i is sequence i of the batch.
        seqs: int64 [n], their sequences in the cache.
        limits: int64 [n], how many tokens each may come to have.
        first: int64 [n], the place of the token that each reads in the first step.
        histories: the tokens of each, the lists themselves.
        stop_tokens: of all of them, and of some that have left perhaps.
        plain: nobody wants text or log-probabilities.
        next_tokens: what the step after the last completed one reads; None: it is not known yet.
        steps: how many were opened, undone ones not counted.
        completed: how many of these were completed.
        whole: False where some may have ended since.
    """

    samples: list[Sample]
    seqs: Ints
    limits: Ints
    first: Ints
    histories: list[list[int]]
    stop_tokens: frozenset[int]
    plain: bool
    next_tokens: Sequence[int] | None
    steps: int = 0
    completed: int = 0
    whole: bool = True
    _last_step: int = 0  # `steps` when the first of them comes to its limit

    def __post_init__(self) -> None:
        self._last_step = int((self.limits - self.first).min(initial=sys.maxsize)) - 1

    @classmethod
    def of(cls, samples: list[Sample]) -> Writers:
        known = all(len(sample.tokens) > sample.cached for sample in samples)
        return cls(
            samples,
            seqs=as_integers("seqs", [sample.seq for sample in samples]),
            limits=as_integers("limits", [sample.limit for sample in samples]),
            first=as_integers("first", [sample.cached for sample in samples]),
            histories=[sample.tokens for sample in samples],
            stop_tokens=frozenset[int]().union(*(sample.stop_tokens for sample in samples)),
            plain=all(sample.text is None and sample.top_logprobs is None for sample in samples),
            next_tokens=[sample.tokens[sample.cached] for sample in samples] if known else None,
        )

    def followed_by(self, leaving: Sequence[int], joining: list[Sample]) -> Writers:
        """Those that go on when some leave and others join.

        The last ones take the places of those that leave (ascending), so that few rows of the batch change.
        """
        others = Writers.of(joining) if joining else _NOBODY
        places = as_integers("places", _without(range(len(self)), leaving)) if leaving else slice(None)
        next_tokens = None
        if self.next_tokens is not None and others.next_tokens is not None and self.steps == self.completed:
            next_tokens = [*_without(self.next_tokens, leaving), *others.next_tokens]
        return Writers(
            [*_without(self.samples, leaving), *joining],
            seqs=np.concatenate([self.seqs[places], others.seqs]),
            limits=np.concatenate([self.limits[places], others.limits]),
            first=np.concatenate([self.first[places] + self.steps, others.first]),
            histories=[*_without(self.histories, leaving), *others.histories],
            stop_tokens=self.stop_tokens | others.stop_tokens,
            plain=self.plain and others.plain,
            next_tokens=next_tokens,
        )

    def __len__(self) -> int:
        return len(self.samples)

    def at_limit(self, step: int) -> list[int]:
        """Who draws its last token in this step or before: places, ascending. `step`: `steps` when it was opened."""
        if step < self._last_step:
            return []
        places: list[int] = (self.first + step + 1 >= self.limits).nonzero()[0].tolist()
        return places

    def open(self) -> None:
        """A step begins."""
        self.steps += 1
        for sample in self.samples:
            sample.cached += 1

    def undo(self) -> None:
        """The newest step is undone."""
        self.steps -= 1
        for sample in self.samples:
            if sample.finish_reason is None:
                sample.cached -= 1

    def tokens(self, step: int) -> Ints:
        """int64 [n], what a step reads; what only the device knows yet as in `Plan.tokens`."""
        if step == self.completed + 1 and self.next_tokens is not None:
            return as_integers("tokens", self.next_tokens)
        places = zip(self.samples, self.histories, (self.first + step - 1).tolist(), strict=True)
        read = [tokens[place] if place < len(tokens) else ~sample.row for sample, tokens, place in places]
        return np.array(read, dtype=np.int64)

    def write(self, step: int, drawn: Sequence[int], logprobs: Sequence[TokenLogprobs] | None, ended: Ended) -> None:
        """Give each the token that the oldest open step has drawn for it. Who ends with that is put into `ended`."""
        self.completed, self.next_tokens = step, drawn
        if not (self.whole and self.plain):
            for sample, token, logprob in zip(self.samples, drawn, logprobs or itertools.repeat(None), strict=False):
                write(sample, token, logprob, ended)
            return
        for tokens, token in zip(self.histories, drawn, strict=True):
            tokens.append(token)
        ending = {*self.at_limit(step)}  # perhaps
        if not self.stop_tokens.isdisjoint(drawn):
            ending |= {place for place, token in enumerate(drawn) if token in self.stop_tokens}
        for place in sorted(ending):
            _look_at(self.samples[place], ended)


_NOBODY = Writers.of([])


def write(sample: Sample, token: int, logprobs: TokenLogprobs | None, ended: Ended) -> None:
    """Give one sample a token, unless it has ended."""
    if sample.finish_reason is None:
        sample.write(token, logprobs)
        _look_at(sample, ended)


def _look_at(sample: Sample, ended: Ended) -> None:
    reason = sample.take_in_last_token()
    if reason is not None:
        ended.setdefault(reason, []).append(sample)


def _without(items: Sequence[T], leaving: Sequence[int]) -> list[T]:
    """A copy in which the last items have taken the places of those that leave."""
    kept = list(items)
    for place in reversed(leaving):
        last = kept.pop()
        if place < len(kept):
            kept[place] = last
    return kept
