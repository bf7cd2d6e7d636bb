"""What a caller asks for, and what comes of it: Request, then Generation and its Samples."""

from __future__ import annotations

import dataclasses
import math
import numbers
import secrets
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from torch_paged.memory.arrays import as_integer, as_integers
from torch_paged.serving.random_numbers import GAMMA, mix, signed
from torch_paged.serving.text import TextStop


def _require(holds: Any, rule: str, actual: Any) -> None:
    if not holds:
        raise ValueError(f"{rule}, got {actual!r}")


def as_real(name: str, value: Any) -> float:
    """A single number as a float."""
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a real number, got {value!r}")
    try:
        return float(value)
    except OverflowError:  # an integer beyond all floats, and so out of any range
        return math.inf


def _set(instance: Any, **values: Any) -> None:
    """Fields of a frozen dataclass, from its own `__post_init__`."""
    for name, value in values.items():
        object.__setattr__(instance, name, value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn from the model's distribution.

    Attributes:
        temperature: divides the logits; 0: the most likely token, and nothing below counts.
        top_k: only the k most likely tokens, and those that are as likely as the last of these; 0: all.
        top_p: of these, only the fewest whose probabilities add up to at least this, 0 to 1, and their equals.
        min_p: of these, only tokens at least this share as likely as the most likely one, 0 to 1.
        seed: the same seed draws the same tokens, whatever else is in the batch; None: a random one.
        logprobs: None: no log-probabilities; n: that of the token and those of the n most likely ones. They are the
            model's own, before temperature and the cuts.

    Raises:
        ValueError: one of them is out of its range.
        TypeError: one of them is of another type.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _set(self, **{name: as_real(name, getattr(self, name)) for name in ("temperature", "top_p", "min_p")})
        _require(0 <= self.temperature < math.inf, "temperature must be at least 0 and finite", self.temperature)
        _require(0 < self.top_p <= 1, "top_p must lie in (0, 1]", self.top_p)
        _require(0 <= self.min_p <= 1, "min_p must lie in [0, 1]", self.min_p)
        _set(self, top_k=as_integer("top_k", self.top_k, at_least=0))
        if self.seed is not None:
            _set(self, seed=as_integer("seed", self.seed, at_least=-(1 << 63)))
        if self.logprobs is not None:
            _set(self, logprobs=as_integer("logprobs", self.logprobs, at_least=0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt and how to go on from it.

    Attributes:
        prompt: token ids, at least one: any flat sequence, array or CPU tensor of integers; kept as a list.
        max_new_tokens: at most so many tokens are written, at least 1.
        sampling: how they are drawn.
        samples: continuations, each of its own; the prompt is read once, and its blocks are shared.
        stop_tokens: a sample ends with the first of these, which is its last token and not in its text.
        stop_strings: a sample ends where its text has one of these, which is cut off. Needs the engine's `decode`.
        priority: the higher, the sooner.
        namespace: prompts find cached prefixes of their own namespace alone.

    Raises:
        ValueError: one of them is out of its range.
        TypeError: one of them is of another type; the namespace is not hashable.
    """

    prompt: Sequence[int]
    max_new_tokens: int = 64
    sampling: Sampling = Sampling()
    samples: int = 1
    stop_tokens: Sequence[int] = ()
    stop_strings: Sequence[str] = ()
    priority: float = 0.0
    namespace: Hashable = None

    def __post_init__(self) -> None:
        prompt = as_integers("prompt", self.prompt)
        _require(len(prompt) > 0, "prompt must have at least one token", prompt.tolist())
        _require(prompt.min() >= 0, "prompt must be token ids of at least 0", int(prompt.min()))
        _require(not isinstance(self.stop_strings, str), "stop_strings must be a list of strings", self.stop_strings)
        if not isinstance(self.sampling, Sampling):
            raise TypeError(f"sampling must be a Sampling, got {self.sampling!r}")
        if not isinstance(self.stop_strings, Iterable):
            raise TypeError(f"stop_strings must be a list of strings, got {self.stop_strings!r}")
        stop_strings = tuple(self.stop_strings)
        if not all(isinstance(stop, str) for stop in stop_strings):
            raise TypeError(f"stop_strings must be strings, got {stop_strings!r}")
        _require(all(stop_strings), "stop_strings must not be empty", stop_strings)
        _set(
            self,
            prompt=prompt.tolist(),
            max_new_tokens=as_integer("max_new_tokens", self.max_new_tokens, at_least=1),
            samples=as_integer("samples", self.samples, at_least=1),
            stop_tokens=as_integers("stop_tokens", self.stop_tokens).tolist(),
            stop_strings=stop_strings,
            priority=as_real("priority", self.priority),
        )
        _require(math.isfinite(self.priority), "priority must be finite", self.priority)
        try:
            hash(self.namespace)
        except TypeError:
            raise TypeError(f"namespace must be hashable, got {self.namespace!r}") from None


class TokenLogprobs:
    """Of one token: its own log-probability, and the most likely tokens with theirs, the likeliest first."""

    __slots__ = ("logprob", "top")

    def __init__(self, logprob: float, top: list[tuple[int, float]]) -> None:
        self.logprob = logprob
        self.top = top


class Sample:
    """One continuation of a request's prompt. Read it freely; the scheduler alone writes.

    Example: a prompt of 5 tokens of which a step has been launched that reads the last 2; its token is not known yet:

        tokens [p p p p p]    length 6    cached 5    unread 1

    Attributes:
        tokens: the prompt and what was written so far.
        logprobs: of each written token, where the request asked for them.
        text: of the written tokens but a stop token, as far as they make whole characters, where the engine has a
            `decode`.
        finish_reason: None as long as it goes on, then "stop" (a stop token or string), "length", "cancelled" or
            "error".
        error: what went wrong, with the finish reason "error".
        seq: its sequence in the cache, -1 without one.
        cached: tokens that the cache holds, those of launched steps included.
        forks: the samples that part from this one when its prompt is read, all but the last token.
    """

    __slots__ = (
        "cached", "error", "finish_reason", "forks", "generation", "index", "key", "limit", "logprobs", "row", "seed",
        "seq", "state", "stop_tokens", "text", "tokens", "top_logprobs",
    )  # fmt: skip

    def __init__(self, generation: Generation, index: int, seed: int) -> None:
        request = generation.request
        self.generation = generation
        self.index = index
        self.seed = signed(mix(seed + index * GAMMA))
        self.tokens = list(request.prompt)
        self.top_logprobs = request.sampling.logprobs
        self.logprobs: list[TokenLogprobs] = []
        self.text: TextStop | None = None
        self.finish_reason: str | None = None
        self.error: BaseException | None = None
        self.stop_tokens = frozenset(request.stop_tokens)
        self.limit = len(self.tokens) + request.max_new_tokens
        self.cached = 0
        self.seq = -1
        self.row = -1
        self.forks: list[Sample] = []
        self.key: tuple[float, int, int] = (0.0, 0, 0)
        self.state = "new"

    @property
    def written(self) -> list[int]:
        """The tokens written so far."""
        return self.tokens[len(self.generation.request.prompt) :]

    @property
    def length(self) -> int:
        """Tokens that exist, on the device or here: who has read all that is known here has written one more."""
        return max(len(self.tokens), self.cached + 1)

    @property
    def unread(self) -> int:
        """Tokens that the next steps shall read. The last one of a prompt is left for each fork to read."""
        return self.length - self.cached - bool(self.forks)

    @property
    def decodes(self) -> bool:
        """Whether it has read all but its last token, and writes further ones."""
        return not self.forks and len(self.tokens) <= self.cached + 1 < self.limit

    def write(self, token: int, logprobs: TokenLogprobs | None) -> None:
        """Append a token that was drawn."""
        self.tokens.append(token)
        if logprobs is not None and self.top_logprobs is not None:
            del logprobs.top[self.top_logprobs :]  # others of the batch may want more
            self.logprobs.append(logprobs)

    def take_in_last_token(self) -> str | None:
        """Once for each appended token: it goes to the text. Returns the reason to end, if there is one now."""
        token = self.tokens[-1]
        if token in self.stop_tokens:
            return "stop"
        try:
            stopped = self.text is not None and self.text.feed(token)
        except Exception as error:  # the caller's decode: this sample's trouble alone
            self.error = error
            return "error"
        if stopped:
            return "stop"
        return "length" if len(self.tokens) == self.limit else None

    def end(self, reason: str, error: BaseException | None) -> None:
        """Nothing follows."""
        self.finish_reason, self.error = reason, error or self.error
        if self.text is not None and self.error is None:
            try:
                self.text.finish()
            except Exception as broken:
                self.finish_reason, self.error = "error", broken


class Generation:
    """A submitted request.

    Attributes:
        request: as submitted.
        samples: its continuations.
        owner: stands for the scheduler that it was submitted to.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.owner: object = None
        seed = request.sampling.seed
        seed = secrets.randbits(64) if seed is None else mix(seed)
        self.samples = [Sample(self, index, seed) for index in range(request.samples)]

    @property
    def finished(self) -> bool:
        return all(sample.finish_reason is not None for sample in self.samples)

    @property
    def error(self) -> BaseException | None:
        """What went wrong with one of the samples, if anything did."""
        return next((sample.error for sample in self.samples if sample.error is not None), None)
