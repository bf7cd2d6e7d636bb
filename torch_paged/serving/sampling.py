"""From logits to tokens, for all samples of a batch at once and each by its own rules and seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_paged.batch import PagedBatch
from torch_paged.serving.random_numbers import FACTORS, GAMMA, signed
from torch_paged.serving.requests import Sample, Sampling

_SMALLEST_TEMPERATURE = 1e-5  # below, a logit's quotient could overflow
_LARGEST_SCORE = torch.finfo(torch.float32).max
_NO_LIMIT = torch.iinfo(torch.int64).max

Model = Callable[[Tensor, PagedBatch], Tensor]  # `model(tokens, batch) -> logits`, see Engine and `check_logits`


class Rules(NamedTuple):
    """How each row of a batch is drawn. The tensors lie on the device; the flags spare work that no row needs.

    Attributes:
        temperature, top_p, min_p: float32 [rows, 1].
        top_k: int64 [rows, 1], the largest integer where there is none.
        seed: int64 [rows].
        greedy: no row is drawn: the most likely token of each.
        widest: the greatest top_k of the rows that are cut; 0: one of them has none.
        cut: whether some row has top_k, top_p or min_p.
        logprobs: None, or the most log-probabilities that a row wants.
    """

    temperature: Tensor
    top_p: Tensor
    min_p: Tensor
    top_k: Tensor
    seed: Tensor
    greedy: bool
    widest: int
    cut: bool
    logprobs: int | None


class Drawn(NamedTuple):
    """Tokens drawn, on the device.

    Attributes:
        tokens: int64 [rows].
        logprob: float32 [rows], of the token; None where nobody asked.
        top_logprobs, top_tokens: float32 and int64 [rows, n], the likeliest first.
    """

    tokens: Tensor
    logprob: Tensor | None = None
    top_logprobs: Tensor | None = None
    top_tokens: Tensor | None = None

    def to_host(self) -> Drawn:
        """On their way to the host, which has to wait for them."""
        parts = (None if part is None else part.to("cpu", non_blocking=True) for part in self)
        return Drawn(*parts)  # type: ignore[arg-type]


def check_logits(logits: Any, batch: PagedBatch) -> None:
    """Raise TypeError or ValueError unless they are what a model owes: [rows of `batch.last_token`, vocab_size]."""
    rule = "the model must return logits [num_seqs, vocab_size] of the rows batch.last_token"
    if not isinstance(logits, Tensor):
        raise TypeError(f"{rule}, got {type(logits).__name__}")
    rows = len(batch.last_token)
    if logits.ndim != 2 or len(logits) != rows or not logits.shape[1]:
        raise ValueError(f"{rule}, expected {rows} rows, got shape {list(logits.shape)}")


def draw(logits: Tensor, positions: Tensor, rules: Rules) -> Drawn:
    """Draw a token from each row.

    A row's result depends on its logits, its rules, its seed and its position alone: the random number is a hash of
    the seed and the position, and tokens are laid out in the order of the vocabulary, whatever cuts other rows ask
    for. It is turned into a token by inverting the cumulative distribution, in float64.

    Args:
        logits: [rows, vocab_size], of any floating dtype.
        positions: int [rows], the place of the drawn token in its sequence.
        rules: of the rows.
    """
    likeliest = logits.argmax(dim=-1)
    if rules.greedy:
        return _with_logprobs(likeliest, logits, rules)
    scores = logits.float() / rules.temperature.clamp(min=_SMALLEST_TEMPERATURE)
    scores.clamp_(max=_LARGEST_SCORE)  # as in `log_probabilities`
    if rules.cut:
        scores = scores.masked_fill(scores < _lowest_score(scores, rules), -torch.inf)
    cumulative = (scores - scores.amax(dim=-1, keepdim=True)).double().exp_().cumsum_(dim=-1)
    target = cumulative[:, -1:] * uniform(rules.seed, positions)[:, None]
    drawn = torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_(max=logits.shape[-1] - 1)
    tokens = torch.where(rules.temperature[:, 0] == 0, likeliest, drawn)
    return _with_logprobs(tokens, logits, rules)


def _lowest_score(scores: Tensor, rules: Rules) -> Tensor:
    """[rows, 1], the score of the least likely token that is left after top_k, then top_p, then min_p; or -inf.

    Each keeps the likeliest tokens, down to some place in their order. Where the last place is shared by tokens of
    equal score, all of them are left.
    """
    width = min(rules.widest, scores.shape[-1])
    ordered = scores.topk(width).values if width else scores.sort(dim=-1, descending=True).values
    ranks = torch.arange(ordered.shape[-1], device=scores.device)
    probabilities = ordered.masked_fill(ranks >= rules.top_k, -torch.inf).softmax(dim=-1, dtype=torch.float64)
    before = probabilities.cumsum(dim=-1) - probabilities
    kept = (ranks < rules.top_k) & (before < rules.top_p) & (probabilities >= rules.min_p * probabilities[:, :1])
    whole = (rules.top_k == _NO_LIMIT) & (rules.top_p >= 1) & (rules.min_p <= 0)
    last = kept.sum(dim=-1, keepdim=True).clamp_(min=1) - 1  # padding and NaN keep none
    return ordered.gather(-1, last).masked_fill(whole, -torch.inf)


def _with_logprobs(tokens: Tensor, logits: Tensor, rules: Rules) -> Drawn:
    if rules.logprobs is None:
        return Drawn(tokens)
    logprobs = log_probabilities(logits)
    top = logprobs.topk(min(rules.logprobs, logits.shape[-1]))
    return Drawn(tokens, logprobs.gather(-1, tokens[:, None])[:, 0], top.values, top.indices)


def log_probabilities(logits: Tensor) -> Tensor:
    """float32, of the logits of each row. Infinite ones are equal, and leave others no chance."""
    return logits.float().clamp(max=_LARGEST_SCORE).log_softmax(dim=-1)


def uniform(seed: Tensor, position: Tensor) -> Tensor:
    """float64 [rows] in [0, 1): a hash of int64 seeds and int positions, 48 bits of it.

    The hash is the finaliser of SplitMix64 over the stream's counter, see random_numbers.py.
    """
    x = seed + position.to(torch.int64) * signed(GAMMA)
    x = (x ^ _shift(x, 30)) * signed(FACTORS[0])
    x = (x ^ _shift(x, 27)) * signed(FACTORS[1])
    return _shift(x ^ _shift(x, 31), 16).double() * 2.0**-48


def _shift(x: Tensor, bits: int) -> Tensor:
    """A logical shift to the right of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def rules_of(samples: list[Sample], rows: int, device: torch.device) -> Rules:
    """The rules of a batch: those of `samples`, padded to `rows` with greedy ones, in one copy to the device."""
    each: list[Sampling] = [sample.generation.request.sampling for sample in samples]
    wanted = [sampling.logprobs for sampling in each if sampling.logprobs is not None]
    drawn = [sampling for sampling in each if sampling.temperature > 0]
    cut = [sampling for sampling in drawn if sampling.top_k or sampling.top_p < 1 or sampling.min_p > 0]
    all_limited = all(sampling.top_k for sampling in cut)
    padding = rows - len(samples)
    host = torch.zeros(rows, 5, dtype=torch.int64, device="cpu")
    reals = host.view(torch.float64)
    if drawn:
        for column, values in enumerate(
            ([s.temperature for s in each], [s.top_p for s in each], [s.min_p for s in each])
        ):
            reals[: len(each), column] = torch.tensor(values, dtype=torch.float64, device="cpu")
        limits = [min(s.top_k or _NO_LIMIT, _NO_LIMIT) for s in each] + [1] * padding
        host[:, 3] = torch.tensor(limits, device="cpu")
        host[: len(each), 4] = torch.tensor([sample.seed for sample in samples], device="cpu")
    sent = to_device(host, device)
    temperature, top_p, min_p = sent.view(torch.float64)[:, :3].float().split(1, dim=1)
    return Rules(
        temperature=temperature,
        top_p=top_p,
        min_p=min_p,
        top_k=sent[:, 3:4],
        seed=sent[:, 4],
        greedy=not drawn,
        widest=max((sampling.top_k for sampling in cut), default=0) if all_limited else 0,
        cut=bool(cut),
        logprobs=max(wanted, default=None),
    )


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A copy that the host does not wait for: PyTorch keeps the pinned memory until it is done."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
