"""Continuous batching by hand, as `torch_paged.serving.Engine` does it for you, over a paged KV cache.

Reading prompts in chunks, writing, and forking go into one ragged batch.

A step gives every request the tokens that the cache has not seen: one for a request that writes, a chunk for one
whose prompt is still being read. So there is one kind of step, whatever the requests are at.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from model import END_OF_TEXT
from torch_paged import PagedKVCache, unbacked

TOKEN_BUDGET = 256  # tokens a step at most, over all requests


@dataclasses.dataclass(eq=False)
class Request:
    """Text being written: the cache holds the first `cached` bytes of it, the model has yet to read the rest."""

    name: str
    prompt: bytes
    seq: int
    samples: int = 1  # what it forks into once its prompt is read
    temperature: float = 0.0  # 0: greedy
    cached: int = 0
    written: bytes = b""

    @property
    def unread(self) -> bytes:
        return (self.prompt + self.written)[self.cached :]

    def done(self, limit: int) -> bool:
        return len(self.written) >= limit or END_OF_TEXT in self.written


def plan(requests: list[Request]) -> dict[Request, bytes]:
    """What each request reads in the next step: writers come first, then chunks of prompts, within the budget."""
    chunks, budget = {}, TOKEN_BUDGET
    for request in sorted(requests, key=lambda request: len(request.unread)):
        # Before a fork the prompt's last token is left over: every sample reads it, to choose what follows.
        chunk = request.unread[: len(request.unread) - (request.samples > 1)][:budget]
        if chunk:
            chunks[request] = chunk
            budget -= len(chunk)
    return chunks


def fork_where_read(cache: PagedKVCache, requests: list[Request]) -> list[Request]:
    """The requests, with the samples of those whose prompt is in the cache but for its last token."""
    samples = []
    for request in requests:
        if request.samples > 1 and len(request.unread) == 1:
            seqs = cache.fork(request.seq, request.samples - 1)
            request.samples = 1
            samples += [dataclasses.replace(request, seq=seq) for seq in seqs]
    return requests + samples


def choose(logits: Tensor, temperatures: Tensor, generator: torch.Generator) -> bytes:
    """A token for each row of `[rows, vocab_size]`: argmax(logits + temperature * Gumbel noise) is a sample."""
    uniform = torch.rand(logits.shape, generator=generator).clamp_(min=1e-20)
    noise = -torch.log(-torch.log(uniform))
    scores = logits.float() + (temperatures[:, None] * noise).to(logits.device)
    return bytes(scores.argmax(dim=-1).tolist())


class Generation:
    """Runs requests to their ends, and keeps the figures.

    Steps in which requests only write are compiled, but for every fourth, which is eager for comparison; steps that
    read prompts are eager.

    Attributes:
        rates: tokens a second of each step in which requests only wrote, by "eager" and "compiled".
        fullest: the cache's statistics of the step with the most blocks in use.
    """

    def __init__(self, cache: PagedKVCache, model: nn.Module, seed: int, compiled: bool = True) -> None:
        self.cache = cache
        self.models = {"eager": model, "compiled": torch.compile(model, fullgraph=True)}
        self.rates: dict[str, list[float]] = {how: [] for how in self.models}
        self.compiled = compiled
        self.generator = torch.Generator().manual_seed(seed)
        self.fullest = cache.stats()

    def run(self, requests: list[Request], limit: int) -> Iterator[tuple[str, list[Request]]]:
        """Before every step: how it is run, and the requests under way. Each writes at most `limit` bytes."""
        while requests:
            requests = fork_where_read(self.cache, requests)
            chunks = plan(requests)
            only_writing = max(map(len, chunks.values())) == 1
            compared = len(self.rates["eager"]) * 3 > len(self.rates["compiled"])
            how = "compiled" if self.compiled and only_writing and compared else "eager"
            yield how, requests
            start = time.monotonic()
            self.step(self.models[how], chunks)
            if only_writing:
                self.rates[how].append(len(chunks) / (time.monotonic() - start))
            self.cache.free([request.seq for request in requests if request.done(limit)])
            requests = [request for request in requests if not request.done(limit)]

    @torch.inference_mode()
    def step(self, model: Callable[..., Tensor], chunks: dict[Request, bytes]) -> None:
        """Reads the chunks; a request that has nothing unread left writes its next token."""
        batch = self.cache.prepare([request.seq for request in chunks], [len(chunk) for chunk in chunks.values()])
        try:
            tokens = torch.tensor(list(b"".join(chunks.values())), device=batch.positions.device)
            logits = model(unbacked(tokens), batch)
        except BaseException:
            self.cache.rollback(batch)
            raise
        self.cache.commit(batch)
        self.fullest = max(self.fullest, self.cache.stats(), key=lambda stats: stats.blocks_used)
        temperatures = torch.tensor([request.temperature for request in chunks])
        text = choose(logits, temperatures, self.generator)
        for i, (request, chunk) in enumerate(chunks.items()):
            request.cached += len(chunk)
            if not request.unread:
                request.written += text[i : i + 1]
