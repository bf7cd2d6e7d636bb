"""Rotary position embedding, and the rotated keys with their values into the caches."""

import torch
from torch import Tensor

from torch_paged.cpu.append import append


def rotary_append(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    key_cache: Tensor,
    value_cache: Tensor | None,
    slot_mapping: Tensor,
    interleaved: bool,
    *scales: Tensor | None,
) -> Tensor:
    """Return the rotated query; WRITE the rotated keys, and the values, as `append` does."""
    cos, sin = (angles[positions].float()[:, None] for angles in (cos, sin))
    append(_rotate(key, cos, sin, interleaved), value, key_cache, value_cache, slot_mapping, *scales)
    return _rotate(query, cos, sin, interleaved)


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The first 2 r columns of [num_tokens, num_heads, head_dim] turned by angles [num_tokens, 1, r], in float32."""
    half = cos.shape[2]
    side_by_side = -1 if interleaved else -2
    pairs = heads[..., : 2 * half].unflatten(-1, (half, 2) if interleaved else (2, half))
    a, b = pairs.float().unbind(side_by_side)
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), side_by_side).flatten(-2)
    return torch.cat((turned.to(heads.dtype), heads[..., 2 * half :]), -1)
