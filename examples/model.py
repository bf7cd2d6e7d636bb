"""A byte-level language model of the Llama architecture: RMSNorm, RoPE, grouped-query attention, SwiGLU.

A layer is given an attention object and calls `kv(query, key, value, batch)`: nothing else here knows how keys
and values are kept. `PagedKVCache.layers[i]` is one; `contiguous.py` has two more, to train with and to check.
Tokens are flat, `[num_tokens]`: `batch` tells where they stand and whose they are.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

END_OF_TEXT = 0  # the byte that never occurs in source text stands between files


@dataclasses.dataclass(frozen=True)
class Config:
    dim: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    ffn_dim: int = 768
    vocab_size: int = 256
    context: int = 512
    rope_base: float = 10000.0
    norm_eps: float = 1e-5


class Attention(nn.Module):
    def __init__(self, config: Config, kv: nn.Module) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.query = nn.Linear(config.dim, config.num_heads * config.head_dim, bias=False)
        self.key = nn.Linear(config.dim, config.num_kv_heads * config.head_dim, bias=False)
        self.value = nn.Linear(config.dim, config.num_kv_heads * config.head_dim, bias=False)
        self.output = nn.Linear(config.num_heads * config.head_dim, config.dim, bias=False)
        self.kv = kv

    def forward(self, hidden: Tensor, rotation: tuple[Tensor, Tensor], batch: Any) -> Tensor:
        projections = self.query, self.key, self.value
        query, key, value = (project(hidden).unflatten(-1, (-1, self.head_dim)) for project in projections)
        attended = self.kv(rotate(query, rotation), rotate(key, rotation), value, batch)
        return self.output(attended.flatten(-2))


class FeedForward(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(hidden)) * self.up(hidden))


class Layer(nn.Module):
    def __init__(self, config: Config, kv: nn.Module) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, kv)
        self.feed_forward_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, hidden: Tensor, rotation: tuple[Tensor, Tensor], batch: Any) -> Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden), rotation, batch)
        return hidden + self.feed_forward(self.feed_forward_norm(hidden))


class Decoder(nn.Module):
    """`kv_layers[i]` attends for layer i; the embedding is also the output matrix."""

    def __init__(self, config: Config, kv_layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Layer(config, kv) for kv in kv_layers)
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)

    def forward(self, tokens: Tensor, batch: Any) -> Tensor:
        """Logits `[rows, vocab_size]` of the rows `batch.last_token`, or of every row where that is `None`.

        `tokens` is int64 `[num_tokens]`; `batch` has `positions` (int64 `[num_tokens]`), `last_token` (int64
        `[rows]` or None) and whatever the attention objects read.
        """
        hidden = self.embedding(tokens)
        rotation = rotary(batch.positions, self.config, hidden.dtype)
        kv = self.layers[0].attention.kv
        if hasattr(kv, "scheduled"):  # a paged cache: its attention's work is dealt out once for all layers
            batch = kv.scheduled(batch, self.config.num_heads)
        for layer in self.layers:
            hidden = layer(hidden, rotation, batch)
        if batch.last_token is not None:
            hidden = hidden[batch.last_token]
        return F.linear(self.norm(hidden), self.embedding.weight)


def rotary(positions: Tensor, config: Config, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine `[num_tokens, 1, head_dim / 2]` of every position's angles, found in float32."""
    even = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32)
    angles = positions[:, None, None] * config.rope_base ** (-even / config.head_dim)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(heads: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turns `[num_tokens, heads, head_dim]` by its positions' angles; the halves are the two coordinates."""
    cos, sin = rotation
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


def save(model: Decoder, path: Path, **notes: str) -> None:
    """Writes the weights as bfloat16, the configuration and the notes beside them."""
    weights = {name: tensor.detach().cpu().bfloat16() for name, tensor in model.state_dict().items()}
    config = json.dumps(dataclasses.asdict(model.config))
    safetensors.torch.save_file(weights, path, metadata={"config": config, **notes})


def load(path: Path) -> tuple[Config, dict[str, Tensor]]:
    """The configuration and the weights, for `Decoder(config, ...).load_state_dict(weights)`."""
    with safe_open(path, framework="pt") as file:
        config = Config(**json.loads(file.metadata()["config"]))
    return config, safetensors.torch.load_file(path)
