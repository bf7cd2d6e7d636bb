"""Tokens of a generation as they come."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch_paged.serving.requests import Generation, TokenLogprobs


class Piece(NamedTuple):
    """What is new of one sample.

    Attributes:
        sample: which of the request's samples.
        token: its new token; None: only text follows, or the end.
        text: new text; what may turn out to be part of a stop string or of a longer character comes later.
        logprobs: of the token, where the request asked for them.
        finish_reason: with the last piece of a sample, why it ended. After an error there may be no such piece.
    """

    sample: int
    token: int | None
    text: str = ""
    logprobs: TokenLogprobs | None = None
    finish_reason: str | None = None


class Stream:
    """Remembers what of a generation has been handed on."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._tokens = [0] * len(generation.samples)
        self._characters = [0] * len(generation.samples)
        self._ended = [False] * len(generation.samples)

    def new(self) -> Iterator[Piece]:
        """What has come since the last call."""
        for index, sample in enumerate(self._generation.samples):
            if self._ended[index]:
                continue
            start = len(self._generation.request.prompt) + self._tokens[index]
            tokens: list[int | None] = [*sample.tokens[start:]]
            logprobs = sample.logprobs[self._tokens[index] :]
            self._tokens[index] += len(tokens)
            text = ""
            if sample.text is not None:
                text = sample.text.text[self._characters[index] : sample.text.ready]
                self._characters[index] += len(text)
            reason = sample.finish_reason
            self._ended[index] = reason is not None
            if not tokens and (text or reason not in (None, "error")):  # an error is raised in the end
                tokens = [None]
            for i, token in enumerate(tokens):
                last = i == len(tokens) - 1
                yield Piece(
                    index,
                    token,
                    text if last else "",
                    logprobs[i] if i < len(logprobs) else None,
                    reason if last else None,
                )
