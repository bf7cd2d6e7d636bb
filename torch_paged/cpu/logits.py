"""Attention whose logits need more than a scale: windows and ALiBi as a mask that is added, softcap before it."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

_LARGEST = torch.finfo(torch.float32).max


class Mask(NamedTuple):
    """Which keys a query sees, and by how much their distance lowers the logits."""

    causal: bool
    sliding_window: int | None
    alibi_slopes: Tensor | None

    def hidden(self, query_positions: Tensor, key_positions: Tensor, lens: Tensor) -> Tensor:
        """Whether each of the queries [n, queries] does not see each of the keys: bool [n, queries, keys]."""
        distance = query_positions[:, :, None] - key_positions[:, None]
        hidden = (key_positions >= lens[:, None])[:, None].expand(distance.shape)
        if self.causal:
            hidden = hidden | (distance < 0)
        if self.sliding_window is not None:
            hidden = hidden | (distance >= self.sliding_window)
        return hidden

    def bias(self, query_positions: Tensor, key_positions: Tensor, hidden: Tensor) -> Tensor:
        """What to add to the logits: float32 [n, num_heads or 1, queries, keys]."""
        if self.alibi_slopes is None:
            return torch.zeros(hidden.shape, dtype=torch.float32).masked_fill_(hidden, -math.inf)[:, None]
        distance = (query_positions[:, :, None] - key_positions[:, None]).abs_()
        return (-self.alibi_slopes[:, None, None] * distance[:, None]).masked_fill_(hidden[:, None], -math.inf)


def capped_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """softmax(softcap * tanh(scale q k^T / softcap) + bias) v, and the logarithm of its denominator.

    The heads of `query` [n, num_heads, queries, head_dim] share those of `key` and `value`.
    """
    n, num_heads, queries, head_dim = query.shape
    num_kv_heads, keys = key.shape[1:3]
    logits = query.reshape(n, num_kv_heads, -1, head_dim) @ key.mT
    quotient = max(min(scale / softcap, _LARGEST), -_LARGEST)
    logits = logits.mul_(quotient).tanh_().mul_(softcap).view(n, num_heads, queries, keys).add_(bias)
    lse = logits.logsumexp(-1)
    weights = logits.sub_(lse.masked_fill(lse.isneginf(), 0)[..., None]).exp_()
    output = weights.view(n, num_kv_heads, -1, keys) @ value
    return output.view(n, num_heads, queries, -1), lse
