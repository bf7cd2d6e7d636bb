"""Two attention objects without pages: one to train with, one to check the paged cache against."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model import END_OF_TEXT, Config, Decoder


class ContiguousBatch(NamedTuple):
    """`positions` int64 `[num_tokens]`; `last_token` int64 `[rows]`, whose logits are wanted (None: all)."""

    positions: Tensor
    last_token: Tensor | None = None


class CausalAttention(nn.Module):
    """For training: the tokens are whole sequences of `length`, one after another, and nothing is kept."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def forward(self, query: Tensor, key: Tensor, value: Tensor, _: ContiguousBatch) -> Tensor:
        group = query.shape[1] // key.shape[1]
        key, value = (heads.repeat_interleave(group, dim=1) for heads in (key, value))
        query, key, value = (
            heads.unflatten(0, (-1, self.length)).transpose(1, 2) for heads in (query, key, value)
        )  # [sequences, heads, length, head_dim]
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return output.transpose(1, 2).flatten(0, 1)


class ContiguousKV(nn.Module):
    """For a check: one sequence's keys and values in one piece each, `[context, num_kv_heads, head_dim]`."""

    def __init__(self, config: Config, device: torch.device) -> None:
        super().__init__()
        shape = (config.context, config.num_kv_heads, config.head_dim)
        self.register_buffer("key", torch.zeros(shape, device=device), persistent=False)
        self.register_buffer("value", torch.zeros(shape, device=device), persistent=False)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, batch: ContiguousBatch) -> Tensor:
        self.key[batch.positions] = key
        self.value[batch.positions] = value
        group = query.shape[1] // key.shape[1]
        keys, values = (x.transpose(0, 1).repeat_interleave(group, dim=0) for x in (self.key, self.value))
        visible = torch.arange(len(self.key), device=query.device) <= batch.positions[:, None]
        output = F.scaled_dot_product_attention(query.transpose(0, 1), keys, values, attn_mask=visible)
        return output.transpose(0, 1)


@torch.inference_mode()
def greedy(config: Config, weights: dict[str, Tensor], prompt: bytes, count: int, device: torch.device) -> bytes:
    """The `count` most likely bytes after the prompt, one at a time in float32, ended early by END_OF_TEXT."""
    model = Decoder(config, [ContiguousKV(config, device) for _ in range(config.num_layers)])
    model.load_state_dict(weights)
    model.to(device, torch.float32)
    written = bytearray()
    tokens = torch.tensor(list(prompt), device=device)
    start = 0
    while len(written) < count and END_OF_TEXT not in written:
        positions = torch.arange(start, start + len(tokens), device=device)
        logits = model(tokens, ContiguousBatch(positions, last_token=positions[-1:] - start))
        start += len(tokens)
        tokens = logits.argmax(dim=-1)
        written.append(tokens.item())
    return bytes(written)
