"""The generation loop: plans go through the model, tokens are drawn on the device and read one step behind."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_paged.batch import unbacked
from torch_paged.cache import PagedKVCache
from torch_paged.memory.arrays import as_integer
from torch_paged.serving.plan import Plan
from torch_paged.serving.requests import Generation, Request, Sample, TokenLogprobs
from torch_paged.serving.sampling import Drawn, Model, Rules, check_logits, draw, rules_of, to_device
from torch_paged.serving.scheduler import Load, Scheduler
from torch_paged.serving.stream import Piece, Stream
from torch_paged.serving.text import Decode, TextStop


class _Launched(NamedTuple):
    """A step in flight: what it draws, on its way to the host."""

    plan: Plan
    drawn: Drawn
    host: Drawn
    arrived: torch.cuda.Event | None


class Engine:
    """Runs requests through a model, many at a time.

        engine = Engine(cache, model)
        generation = engine.submit(Request(prompt=[1, 2, 3]))
        while engine.step():
            ...
        generation.samples[0].written

    On a GPU the host works one step ahead: while the model runs a step on tokens that have never left the device, the
    host reads the tokens of the step before, and ends, forks and lets in samples. On a CPU the same happens in turn.
    One thread at a time may use an engine; for coroutines there is AsyncEngine.

    Args:
        cache: where the model's layers keep keys and values. Sequences of others may live in it too.
        model: `model(tokens, batch) -> logits`: tokens int64 [num_tokens], batch a PagedBatch, logits
            [num_seqs, vocab_size] of the rows `batch.last_token`, compiled or not.
        decode: text of a list of tokens, for stop strings and streamed text.
        vocab_size: of the model: prompts with other tokens are refused. None: they are not looked at, and what the
            model does with one that it does not know hits all requests of its step.
        ahead: whether to launch a step before the last one's tokens are read; None: on a GPU.
        options: of the Scheduler: `token_budget`, `max_running`, `policy`, `watermark`, `patience`.
    """

    def __init__(
        self,
        cache: PagedKVCache,
        model: Model,
        *,
        decode: Decode | None = None,
        vocab_size: int | None = None,
        ahead: bool | None = None,
        **options: Any,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be callable, got {model!r}")
        if decode is not None and not callable(decode):
            raise TypeError(f"decode must be callable, got {decode!r}")
        self._scheduler = Scheduler(cache, **options)
        self._model = model
        self._decode = decode
        self._vocab_size = None if vocab_size is None else as_integer("vocab_size", vocab_size, at_least=1)
        self._device = cache.device
        if ahead not in (None, True, False):
            raise TypeError(f"ahead must be True, False or None, got {ahead!r}")
        self._ahead = cache.device.type == "cuda" if ahead is None else bool(ahead)
        self._launched: deque[_Launched] = deque()
        self._rules: tuple[list[Sample], int, Rules] | None = None

    @property
    def load(self) -> Load:
        """How many samples run, wait and are swapped out."""
        return self._scheduler.load

    @property
    def busy(self) -> bool:
        """Whether something is left to do."""
        return self._scheduler.busy

    def submit(self, request: Request) -> Generation:
        """Queue a request. One that can never fit is finished at once, see `Generation.error`.

        Raises:
            TypeError: it is no Request.
            ValueError: it has stop strings, and the engine no `decode`; its prompt has tokens not below `vocab_size`.
        """
        if not isinstance(request, Request):
            raise TypeError(f"request must be a Request, got {request!r}")
        if request.stop_strings and self._decode is None:
            raise ValueError("stop_strings need an Engine with decode=, which turns tokens into text")
        if self._vocab_size is not None and max(request.prompt) >= self._vocab_size:
            raise ValueError(f"prompt must be token ids below {self._vocab_size}, got {max(request.prompt)}")
        generation = Generation(request)
        if self._decode is not None:
            for sample in generation.samples:
                sample.text = TextStop(self._decode, request.stop_strings, request.prompt[-1:])
        self._scheduler.submit(generation)
        return generation

    def cancel(self, generation: Generation) -> None:
        """End a request, whatever it is at. What it wrote stays; its blocks go once no launched step reads them.

        Raises:
            TypeError: it is no Generation.
            ValueError: it was not submitted to this engine.
        """
        if not isinstance(generation, Generation):
            raise TypeError(f"generation must be a Generation, got {generation!r}")
        self._scheduler.cancel(generation)

    def fail(self, error: BaseException) -> None:
        """End every request with an error, after a `step` that cannot be repeated, and forget what is in flight."""
        while self._launched:
            self._scheduler.undo(self._launched.pop().plan)
        self._scheduler.fail(error)

    def run(self, requests: Iterable[Request]) -> list[Generation]:
        """Submit requests and step until nothing is left to do. Look at their `error` before you trust them.

        If one is refused, so are all of them.
        """
        generations: list[Generation] = []
        try:
            for request in requests:
                generations.append(self.submit(request))
        except BaseException:
            for generation in generations:
                self.cancel(generation)
            raise
        while self.step():
            pass
        return generations

    def stream(self, request: Request) -> Iterator[Piece]:
        """Submit a request, and step until it is done, whatever else is under way: its tokens as they come.

        Closing the iterator early cancels the request.

        Raises:
            Exception: what went wrong with the request, after the tokens that came before.
        """
        generation = self.submit(request)
        stream = Stream(generation)
        try:
            finished = False
            while not finished:
                finished = generation.finished  # before the pieces: whoever takes them may step, too
                yield from stream.new()
                if not generation.finished:
                    self.step()
        finally:
            self.cancel(generation)
        if generation.error is not None:
            raise generation.error

    @torch.inference_mode()
    def step(self) -> bool:
        """Launch a step if there is one to launch, and take in results. False: nothing is left to do.

        If the model raises, so does this, and the step is undone: nothing is lost, and the next call tries again.

        Raises:
            TypeError: the model does not return a tensor.
            ValueError: the logits have a wrong shape; or sequences of others take all rows of the cache.
        """
        while len(self._launched) > self._ahead:  # where the results of one could not be had
            self._take_in()
        plan = self._scheduler.schedule()
        if plan is not None:
            try:
                self._launched.append(self._launch(plan))
            except BaseException:
                self._scheduler.undo(plan)
                raise
        while len(self._launched) > (self._ahead and plan is not None):
            self._take_in()
        return self.busy

    def _launch(self, plan: Plan) -> _Launched:
        batch = plan.batch
        logits = self._model(unbacked(self._tokens(plan)), batch)
        check_logits(logits, batch)
        drawn = draw(logits, batch.seq_lens, self._rules_of(plan.samples, len(logits)))
        host = drawn.to_host()
        arrived = None
        if self._device.type == "cuda":
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(self._device))
        for row, sample in enumerate(plan.samples):
            sample.row = row
        return _Launched(plan, drawn, host, arrived)

    def _tokens(self, plan: Plan) -> Tensor:
        """int64 [num_tokens] with the batch's padding. What the host has not seen comes from the step in flight."""
        before = self._launched[-1] if self._launched else None
        padded = len(plan.batch.positions)
        if before is not None and len(before.drawn.tokens) == padded and plan.follows(before.plan):
            return before.drawn.tokens
        known = plan.tokens()
        host = torch.zeros(padded, dtype=torch.int64, device="cpu")
        host.numpy()[: len(known)] = known
        tokens = to_device(host, self._device)
        if before is None:
            return tokens
        return torch.where(tokens < 0, before.drawn.tokens[(~tokens).clamp_(min=0)], tokens)

    def _rules_of(self, samples: list[Sample], rows: int) -> Rules:
        """The rules of these samples: the same as in the last step, as long as the same samples take part."""
        if self._rules is None or self._rules[1] != rows or self._rules[0] != samples:
            self._rules = samples, rows, rules_of(samples, rows, self._device)
        return self._rules[2]

    def _take_in(self) -> None:
        """The results of the oldest step in flight. If they cannot be had, it stays in flight."""
        plan, _, host, arrived = self._launched[0]
        if arrived is not None:
            arrived.synchronize()
        tokens, logprobs = host.tokens.tolist(), _logprobs(host)
        self._launched.popleft()
        self._scheduler.complete(plan, tokens, logprobs)


def _logprobs(host: Drawn) -> list[TokenLogprobs] | None:
    if host.logprob is None or host.top_logprobs is None or host.top_tokens is None:
        return None
    tops = zip(host.top_tokens.tolist(), host.top_logprobs.tolist(), strict=True)
    return [
        TokenLogprobs(logprob, list(zip(*top, strict=True)))
        for logprob, top in zip(host.logprob.tolist(), tops, strict=True)
    ]
