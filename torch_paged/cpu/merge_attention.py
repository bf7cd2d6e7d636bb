"""Two attention results over disjoint keys, merged."""

import torch
from torch import Tensor


def merge_attention(output_a: Tensor, lse_a: Tensor, output_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """output = (e^lse_a output_a + e^lse_b output_b) / (e^lse_a + e^lse_b), in float32."""
    lse = torch.logaddexp(lse_a, lse_b)
    shift = lse.masked_fill(lse.isneginf(), 0)  # a row that saw nothing weighs e^-inf = 0 on both sides
    weight_a, weight_b = (lse_a - shift).exp()[..., None], (lse_b - shift).exp()[..., None]
    output = output_a.new_empty(output_a.shape)
    # A part that saw no key has no say, whatever its rows hold.
    part_a = output_a.masked_fill(lse_a.isneginf()[..., None], 0)
    part_b = output_b.masked_fill(lse_b.isneginf()[..., None], 0)
    output.copy_(weight_a * part_a + weight_b * part_b)
    return output, lse.contiguous()
