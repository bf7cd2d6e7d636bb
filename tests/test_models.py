"""Layers shaped like those of known models: a paged cache step by step against plain attention over whole sequences."""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from torch_paged import PagedKVCache, attention, rotary_append
from torch_paged.testing import assert_within_budget

DIM, HEADS, HEAD_DIM = 48, 8, 16
STEPS = [(9, 14), (16, 1), (7, 5), (1, 1), (1, 3), (1, 1)]  # prompts, then chunks, then decoding, of two sequences
LENS = [sum(counts) for counts in zip(*STEPS, strict=True)]
GEMMA2_WINDOWS = [11, None]
GEMMA3_WINDOWS = [8, 8, None]
GPT_OSS_WINDOWS = [8, None]
GPT_OSS_SINKS = [torch.linspace(-2, 2, HEADS), torch.linspace(3, -1, HEADS)]
SLOPES = 2.0 ** -torch.arange(1, HEADS + 1)


class Family(NamedTuple):
    """What sets a model apart. `plain` is its attention as published: query, key, value [heads, n, dim] -> output."""

    plain: Callable
    layers: list[dict]  # keywords of the operator
    rotary_bases: list[float] | None = None
    num_kv_heads: int = 2
    query_key_norm: bool = False


def distances(query):
    rows = torch.arange(query.shape[1], device=query.device)
    return rows[:, None] - rows


def llama(query, key, value, layer):  # noqa: ARG001
    scores = query @ key.mT / math.sqrt(HEAD_DIM)
    return scores.masked_fill(distances(query) < 0, -math.inf).softmax(-1) @ value


def windowed(scores, window):
    far = torch.zeros_like(scores, dtype=torch.bool) if window is None else distances(scores) >= window
    return scores.masked_fill(far | (distances(scores) < 0), -math.inf)


def gemma2(query, key, value, layer):
    scores = query @ key.mT * 24**-0.5
    scores = torch.tanh(scores / 1.5) * 1.5
    return windowed(scores, GEMMA2_WINDOWS[layer]).softmax(-1) @ value


def gemma3(query, key, value, layer):
    return windowed(query @ key.mT * 24**-0.5, GEMMA3_WINDOWS[layer]).softmax(-1) @ value


def gpt_oss(query, key, value, layer):
    scores = windowed(query @ key.mT / math.sqrt(HEAD_DIM), GPT_OSS_WINDOWS[layer])
    sink = GPT_OSS_SINKS[layer].to(scores)[:, None, None].expand(-1, scores.shape[1], 1)
    return torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ value


def bloom(query, key, value, layer):  # noqa: ARG001
    """The slope times the key's position: a row's constant does not change its softmax."""
    positions = torch.arange(key.shape[1], device=key.device)
    scores = query @ key.mT / math.sqrt(HEAD_DIM) + SLOPES.to(query)[:, None, None] * positions
    return windowed(scores, None).softmax(-1) @ value


def mpt(query, key, value, layer):  # noqa: ARG001
    """The slope times how far the key is from the last one, as a negative bias."""
    back = torch.arange(1 - key.shape[1], 1, device=key.device)
    scores = query @ key.mT * HEAD_DIM**-0.5 + back * SLOPES.to(query)[:, None, None]
    return windowed(scores, None).softmax(-1) @ value


FAMILIES = {
    "llama-3": Family(llama, [{}] * 2, [500000] * 2),
    "qwen-3": Family(llama, [{}] * 2, [1000000] * 2, query_key_norm=True),
    "gemma-2": Family(
        gemma2,
        [dict(scale=24**-0.5, softcap=1.5, sliding_window=window) for window in GEMMA2_WINDOWS],
        [10000] * 2,
        num_kv_heads=4,
    ),
    "gemma-3": Family(
        gemma3,
        [dict(scale=24**-0.5, sliding_window=window) for window in GEMMA3_WINDOWS],
        [10000, 10000, 1000000],
        num_kv_heads=4,
        query_key_norm=True,
    ),
    "gpt-oss": Family(
        gpt_oss,
        [
            dict(sinks=sinks, sliding_window=window)
            for sinks, window in zip(GPT_OSS_SINKS, GPT_OSS_WINDOWS, strict=True)
        ],
        [150000] * 2,
    ),
    "bloom": Family(bloom, [dict(alibi_slopes=SLOPES)] * 2, num_kv_heads=HEADS),
    "mpt": Family(mpt, [dict(alibi_slopes=SLOPES)] * 2, num_kv_heads=HEADS),
}


class Stack(torch.nn.Module):
    """Attention layers with their projections and norms; `attend(layer, query, key, value)` is given."""

    def __init__(self, family):
        super().__init__()
        widths = (HEADS, family.num_kv_heads, family.num_kv_heads)
        self.norms = torch.nn.ModuleList(torch.nn.RMSNorm(DIM) for _ in range(len(family.layers)))
        self.query_norms, self.key_norms = (
            torch.nn.ModuleList(
                torch.nn.RMSNorm(HEAD_DIM) if family.query_key_norm else torch.nn.Identity()
                for _ in range(len(family.layers))
            )
            for _ in range(2)
        )
        self.projections = torch.nn.ModuleList(
            torch.nn.ModuleList(torch.nn.Linear(DIM, width * HEAD_DIM, bias=False) for width in widths)
            for _ in range(len(family.layers))
        )
        self.outputs = torch.nn.ModuleList(torch.nn.Linear(HEADS * HEAD_DIM, DIM) for _ in range(len(family.layers)))
        for name, parameter in self.named_parameters():
            torch.nn.init.normal_(parameter, 1 if "norm" in name else 0, 0.3)

    def forward(self, hidden, attend):
        for layer, norm in enumerate(self.norms):
            query, key, value = (
                projection(norm(hidden)).unflatten(-1, (-1, HEAD_DIM)) for projection in self.projections[layer]
            )
            attended = attend(layer, self.query_norms[layer](query), self.key_norms[layer](key), value)
            hidden = hidden + self.outputs[layer](attended.flatten(-2))
        return hidden


def angles(family, layer, count):
    frequencies = family.rotary_bases[layer] ** -(torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM)
    table = torch.arange(count)[:, None] * frequencies
    return table.cos(), table.sin()


def whole_sequence(family, stack, hidden):
    """All layers over one sequence at once, keys in one piece."""

    def attend(layer, query, key, value):
        query, key, value = (heads.transpose(0, 1) for heads in (query, key, value))
        if family.rotary_bases:
            cos, sin = (table.to(query).repeat(1, 2) for table in angles(family, layer, len(hidden)))
            query, key = (
                heads * cos + torch.cat((-heads[..., HEAD_DIM // 2 :], heads[..., : HEAD_DIM // 2]), -1) * sin
                for heads in (query, key)
            )
        key, value = (heads.repeat_interleave(HEADS // family.num_kv_heads, 0) for heads in (key, value))
        return family.plain(query, key, value, layer).transpose(0, 1)

    return stack(hidden, attend)


def step_by_step(family, stack, hidden, device):
    """The same of two sequences over a paged cache, in STEPS: a list of the rows of each."""
    cache = PagedKVCache(
        len(family.layers), family.num_kv_heads, HEAD_DIM, block_size=4, num_blocks=24, max_seqs=2, max_seq_len=64,
        dtype=torch.float32, device=device,
    )  # fmt: skip
    for tensor in sum(cache.tensors(), ()):
        tensor.fill_(math.nan)
    seqs = [cache.add(), cache.add()]
    done, rows = [0, 0], [[], []]
    for counts in STEPS:
        batch = cache.prepare(seqs, list(counts))

        def attend(layer, query, key, value, batch=batch):
            options = {
                name: option.to(device) if isinstance(option, torch.Tensor) else option
                for name, option in family.layers[layer].items()
            }
            if not family.rotary_bases:
                return cache(layer, query, key, value, batch, **options)
            caches = cache.layers[layer].key_cache, cache.layers[layer].value_cache
            cos, sin = (table.float().to(device) for table in angles(family, layer, 64))
            query = rotary_append(query, key, value, cos, sin, batch.positions, *caches, batch.slot_mapping)
            return attention(
                query, *caches, batch.block_table, batch.seq_lens, cu_seqlens_q=batch.cu_seqlens_q, **options
            )

        new = [hidden[i][done[i] : done[i] + count] for i, count in enumerate(counts)]
        output = stack(torch.cat(new), attend)
        cache.commit(batch)
        for i, part in enumerate(output.split(list(counts))):
            rows[i].append(part)
            done[i] += counts[i]
    return [torch.cat(parts) for parts in rows]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Not the interpreter too: it takes long to say what the operators' own tests say."""
    return request.param


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_layers_like_those_of(name, device):
    family = FAMILIES[name]
    stack = Stack(family).to(device)
    hidden = [torch.randn(length, DIM, device=device) for length in LENS]
    low = [whole_sequence(family, stack, rows) for rows in hidden]
    paged = step_by_step(family, stack, hidden, device)
    exact = [whole_sequence(family, stack.double(), rows.double()) for rows in hidden]
    assert_within_budget(torch.cat(paged), torch.cat(exact), torch.cat(low))


@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name].layers[0]])
@torch.no_grad()
def test_layers_differ_without_their_options(name):
    """So that the test above can fail."""
    family = FAMILIES[name]
    stack = Stack(family)
    hidden = [torch.randn(length, DIM) for length in LENS]
    bare = step_by_step(family._replace(layers=[{}] * len(family.layers)), stack, hidden, "cpu")
    paged = step_by_step(family, stack, hidden, "cpu")
    assert (torch.cat(bare) - torch.cat(paged)).abs().max() > 0.01
