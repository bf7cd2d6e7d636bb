"""What the serving examples share: the small language model over a paged cache, and bytes as tokens."""

from pathlib import Path

import torch
from torch import nn

from model import Decoder, load
from torch_paged import PagedKVCache

WEIGHTS = Path(__file__).parent / "weights.safetensors"


def build(num_blocks: int, max_seqs: int, device: str = "cpu") -> tuple[PagedKVCache, nn.Module]:
    """A cache of `num_blocks` blocks of 16 tokens, and the demo model whose layers keep their keys and values in it."""
    config, weights = load(WEIGHTS)
    cache = PagedKVCache(
        config.num_layers,
        config.num_kv_heads,
        config.head_dim,
        num_blocks=num_blocks,
        max_seqs=max_seqs,
        max_seq_len=config.context,
        dtype=torch.float32,
        device=device,
    )
    model = Decoder(config, cache.layers).to(device)
    model.load_state_dict(weights)
    return cache, model


def decode(tokens: list[int]) -> str:
    return bytes(tokens).decode(errors="replace")
