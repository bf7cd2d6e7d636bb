"""A small model whose layers attend over a PagedKVCache, and such a cache."""

import torch
from torch import nn

from torch_paged.batch import unbacked
from torch_paged.cache import PagedKVCache

LAYERS, HEADS, KV_HEADS, DIM, WIDTH, VOCABULARY = 3, 4, 2, 16, 64, 50
MAX_SEQ_LEN, BLOCK_SIZE = 256, 4


class Layer(nn.Module):
    def __init__(self, kv):
        super().__init__()
        self.kv = kv
        self.query, self.output = nn.Linear(WIDTH, HEADS * DIM), nn.Linear(HEADS * DIM, WIDTH)
        self.key, self.value = nn.Linear(WIDTH, KV_HEADS * DIM), nn.Linear(WIDTH, KV_HEADS * DIM)

    def forward(self, hidden, batch, *before):
        """`before`: the arguments that a functional layer wants first."""
        parts = [
            project(hidden).unflatten(-1, (-1, DIM)) * torch.cos(batch.positions * 0.1)[:, None, None]
            for project in (self.query, self.key, self.value)
        ]
        return hidden + self.output(self.kv(*before, *parts, batch).flatten(1))


class Model(nn.Module):
    def __init__(self, kvs, functional=False):
        super().__init__()
        torch.manual_seed(0)
        self.functional = functional
        self.embedding, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.layers = nn.ModuleList(Layer(kv) for kv in kvs)

    def forward(self, tokens, batch, caches=None):
        hidden = self.embedding(tokens)
        for index, layer in enumerate(self.layers):
            hidden = layer(unbacked(hidden), batch, *((caches, index) if self.functional else ()))
        return self.head(hidden[batch.last_token])


def make_cache(**options):
    defaults = dict(num_blocks=512, max_seqs=64, max_seq_len=MAX_SEQ_LEN, dtype=torch.float32, device="cpu")
    return PagedKVCache(LAYERS, KV_HEADS, DIM, block_size=BLOCK_SIZE, **(defaults | options))
