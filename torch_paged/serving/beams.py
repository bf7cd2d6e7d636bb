"""Beam search over forks: beams share their blocks, and only what they write apart is copied."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torch_paged.batch import unbacked
from torch_paged.cache import PagedKVCache
from torch_paged.memory.arrays import as_integer, as_integers
from torch_paged.serving.requests import as_real
from torch_paged.serving.sampling import Model, check_logits, log_probabilities, to_device

_STRONGEST_PENALTY = 10.0  # a length to a greater power could overflow


class Beam(NamedTuple):
    """A continuation found by beam search.

    Attributes:
        tokens: what follows the prompt, a stop token included.
        score: the sum of their log-probabilities over their number to the power of `length_penalty`.
    """

    tokens: list[int]
    score: float


@torch.inference_mode()
def beam_search(
    cache: PagedKVCache,
    model: Model,
    prompt: Sequence[int],
    *,
    num_beams: int,
    max_new_tokens: int,
    stop_tokens: Sequence[int] = (),
    length_penalty: float = 1.0,
    namespace: Hashable = None,
) -> list[Beam]:
    """The continuations of a prompt that a search of width `num_beams` finds, the best first.

    Every step extends each beam by every token and keeps as many of these as the search is wide: those with the
    greatest sums of log-probabilities, those of -inf left out. One that ends with a stop token is complete: it leaves,
    and the search is narrower by one (Sutskever, Vinyals, Le, 2014). What is under way after `max_new_tokens` counts as
    complete.

    A beam with several successors is forked, one without is freed. So a step copies a half-full block for all but one
    of the beams that go on from it, all of them in one `copy_blocks`, and nothing for a beam with one successor.

    Args:
        cache: must have `num_beams` rows free. Nothing of the search stays in it but cached prefixes.
        model: as for `Engine`.
        prompt: token ids, at least one: any flat sequence, array or CPU tensor of integers.
        num_beams: at least 1.
        max_new_tokens: at least 1.
        stop_tokens: end a beam.
        length_penalty: the greater, the more the final order favours long beams; 0: it is that of the sums.
        namespace: whose cached prefixes the prompt may use.

    Raises:
        TypeError, ValueError: an argument is of another type or out of its range; a beam outgrows the cache's
            `max_seq_len`; the logits have a wrong shape.
        OutOfBlocks: the beams do not fit into the free blocks.
    """
    tokens = as_integers("prompt", prompt).tolist()
    if not tokens:
        raise ValueError("prompt must have at least one token, got []")
    num_beams = as_integer("num_beams", num_beams, at_least=1)
    max_new_tokens = as_integer("max_new_tokens", max_new_tokens, at_least=1)
    stops = frozenset(as_integers("stop_tokens", stop_tokens).tolist())
    length_penalty = as_real("length_penalty", length_penalty)
    if not abs(length_penalty) <= _STRONGEST_PENALTY:
        raise ValueError(
            f"length_penalty must lie in [-{_STRONGEST_PENALTY}, {_STRONGEST_PENALTY}], got {length_penalty}"
        )
    search = _Search(num_beams, stops, length_penalty, cache.device)
    seqs = [cache.add(tokens, namespace)]
    del tokens[: cache.length(seqs[0])]
    try:
        for _ in range(max_new_tokens):
            parents = search.extend(_run(cache, model, seqs, tokens))
            if not parents:
                break
            _follow(cache, seqs, parents)
            tokens = search.last_tokens
        return search.result()
    finally:
        cache.free(seqs)


def _run(cache: PagedKVCache, model: Model, seqs: list[int], tokens: list[int]) -> Tensor:
    """Logits [len(seqs), vocab_size] after a step that shares the tokens out evenly."""
    batch = cache.prepare(seqs, len(tokens) // len(seqs))
    try:
        padding = [0] * (len(batch.positions) - len(tokens))
        logits = model(unbacked(to_device(torch.tensor(tokens + padding, device="cpu"), cache.device)), batch)
        check_logits(logits, batch)
    except BaseException:
        cache.rollback(batch)
        raise
    cache.commit(batch, tokens)
    return logits[: len(seqs)]


def _follow(cache: PagedKVCache, seqs: list[int], parents: list[int]) -> None:
    """CHANGE `seqs` to those of the next beams, each of which goes on from the one at its place in `parents`."""
    branches = {parent: [seqs[parent]] for parent in parents}
    ended = [seq for place, seq in enumerate(seqs) if place not in branches]
    cache.free(ended)  # first, so that no more than `num_beams` ever live
    seqs[:] = [seq for seq in seqs if seq not in ended]
    for parent, branch in branches.items():
        successors = parents.count(parent)
        if successors > 1:
            branch += cache.fork(branch[0], successors - 1)
            seqs += branch[1:]
    seqs[:] = [branches[parent].pop() for parent in parents]


class _Search:
    """The tokens and sums of all beams; what is complete, and what is under way."""

    def __init__(
        self, num_beams: int, stop_tokens: frozenset[int], length_penalty: float, device: torch.device
    ) -> None:
        self._width = num_beams
        self._stop_tokens = stop_tokens
        self._length_penalty = length_penalty
        self._beams: list[list[int]] = [[]]
        self._sums = torch.zeros(1, dtype=torch.float64, device=device)
        self._complete: list[Beam] = []

    @property
    def last_tokens(self) -> list[int]:
        return [beam[-1] for beam in self._beams]

    def extend(self, logits: Tensor) -> list[int]:
        """Go on by one token; from which beam each of the new ones comes. Empty: all are complete.

        `logits`: [beams, vocab_size].
        """
        logprobs = log_probabilities(logits)
        logprobs = logprobs.masked_fill(logprobs.isnan(), -torch.inf)  # of a row that rules all tokens out
        sums = (self._sums[:, None] + logprobs).flatten()
        best = sums.topk(min(self._width, len(sums)))
        extended = [
            (place // logits.shape[-1], place % logits.shape[-1], total)
            for place, total in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            if total != -math.inf  # what the model rules out is no continuation
        ]
        under_way = [i for i, (_, token, _) in enumerate(extended) if token not in self._stop_tokens]
        for parent, token, total in extended:
            if token in self._stop_tokens:
                self._finish([*self._beams[parent], token], total)
        self._width -= len(extended) - len(under_way)
        self._sums = best.values[under_way]
        self._beams = [[*self._beams[extended[i][0]], extended[i][1]] for i in under_way]
        return [extended[i][0] for i in under_way]

    def _finish(self, tokens: list[int], total: float) -> None:
        self._complete.append(Beam(tokens, total / len(tokens) ** self._length_penalty))

    def result(self) -> list[Beam]:
        for beam, total in zip(self._beams, self._sums.tolist(), strict=True):
            self._finish(beam, total)
        return sorted(self._complete, key=lambda beam: -beam.score)
