"""The reference against an independent oracle: gather the keys, then PyTorch's own attention in float64."""

import math

import pytest
import torch

from torch_paged import reference
from torch_paged.testing import Storage, attention_inputs, quantised


def oracle(inputs, *, scale=None, causal=True):
    """Output and lse of each sequence by `scaled_dot_product_attention` and an explicit logsumexp."""
    query, key_cache, value_cache, table, seq_lens, bounds = inputs
    query = query.double()
    outputs, lses = [], []
    ranges = bounds.tolist() if bounds is not None else range(0, len(query) + 1, max(len(query) // len(seq_lens), 1))
    for i, keys in enumerate(seq_lens.tolist()):
        q = query[ranges[i] : ranges[i + 1]].transpose(0, 1)
        slots = [
            int(table[i, p // key_cache.shape[1]]) * key_cache.shape[1] + p % key_cache.shape[1]
            for p in range(keys if q.shape[1] else 0)
        ]
        k, v = (c.flatten(0, 1)[slots].double().transpose(0, 1) for c in (key_cache, value_cache))
        k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
        if causal:
            mask = mask.tril(keys - q.shape[1])
        seen = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        outputs.append(torch.where(mask.any(-1)[:, None], seen, 0.0).transpose(0, 1))
        logits = q @ k.mT * (scale if scale is not None else 1 / math.sqrt(q.shape[-1]))
        lses.append(logits.masked_fill(~mask, -math.inf).logsumexp(-1).T)
    return torch.cat(outputs), torch.cat(lses)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("scale", [None, -0.3, 0.0], ids=["default", "negative", "zero"])
@pytest.mark.parametrize(
    "shape",
    [
        dict(query_lens=[1, 1, 1], seq_lens=[7, 1, 33], uniform=True),
        dict(query_lens=[5, 1, 0, 9, 4], seq_lens=[5, 19, 30, 3, 21]),
        dict(query_lens=[3, 3], seq_lens=[40, 2], num_heads=6, num_kv_heads=1, head_dim=17, value_head_dim=40),
        dict(query_lens=[2, 6], seq_lens=[11, 0], num_heads=3, num_kv_heads=3, block_size=1),
    ],
    ids=["decode", "mixed", "multi-query", "empty-sequence"],
)
def test_attention_matches_oracle(shape, scale, causal):
    inputs = attention_inputs(**{"block_size": 5, **shape})
    inputs = inputs._replace(query=inputs.query.double())
    output, lse = inputs.call(reference.attention_with_lse, scale=scale, causal=causal)
    exact, exact_lse = oracle(inputs, scale=scale, causal=causal)
    torch.testing.assert_close(output, exact, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(inputs.call(reference.attention, scale=scale, causal=causal), output)


def logits_by_the_letter(q, k, scale, causal, sliding_window, softcap, slope):
    """One head's logits [queries, keys], number by number."""
    logits = torch.full((len(q), len(k)), -math.inf, dtype=torch.float64)
    for i in range(len(q)):
        position = len(k) - len(q) + i
        for j in range(len(k)):
            if (causal and j > position) or (sliding_window is not None and j <= position - sliding_window):
                continue
            logit = scale * float(q[i] @ k[j])
            if softcap:
                logit = softcap * math.tanh(logit / softcap)
            logits[i, j] = logit - slope * abs(position - j)
    return logits


def option_oracle(inputs, *, scale, causal, sliding_window, softcap, alibi_slopes, sinks):
    """`scaled_dot_product_attention` with the logits as its mask; a sink is one more key, of a value of zeros."""
    query, key_cache, value_cache, table, seq_lens, bounds = inputs
    output = torch.zeros(*query.shape[:2], value_cache.shape[3], dtype=torch.float64)
    lse = torch.full(query.shape[:2], -math.inf, dtype=torch.float64)
    group = query.shape[1] // key_cache.shape[2]
    for seq, keys in enumerate(seq_lens.tolist()):
        rows = slice(*bounds[seq : seq + 2].tolist())
        slots = [
            (int(table[seq, p // key_cache.shape[1]]) % len(key_cache), p % key_cache.shape[1]) for p in range(keys)
        ]
        for head in range(query.shape[1]):
            k, v = (
                torch.stack([cache[slot][head // group] for slot in slots]).nan_to_num()
                for cache in (key_cache, value_cache)
            )
            slope = 0.0 if alibi_slopes is None else float(alibi_slopes[head])
            bias = logits_by_the_letter(query[rows, head], k, scale, causal, sliding_window, softcap, slope)
            if sinks is not None:
                bias = torch.nn.functional.pad(bias, (0, 1), value=float(sinks[head]))
                v = torch.nn.functional.pad(v, (0, 0, 0, 1))
            nothing = torch.zeros(len(bias), 8, dtype=torch.float64), torch.zeros(len(v), 8, dtype=torch.float64)
            attended = torch.nn.functional.scaled_dot_product_attention(*nothing, v, attn_mask=bias)
            output[rows, head] = torch.where(bias.isneginf().all(-1)[:, None], 0, attended)
            lse[rows, head] = bias.logsumexp(-1)
    return output, lse


@pytest.mark.parametrize("sinks", [None, torch.tensor([-1.0, 0.5, 2.0, -torch.inf])], ids=["no-sink", "sinks"])
@pytest.mark.parametrize("slopes", [None, torch.tensor([0.5, 0.25, -0.1, 1.0])], ids=["no-alibi", "alibi"])
@pytest.mark.parametrize("softcap", [0.0, 0.7], ids=["uncapped", "softcap"])
@pytest.mark.parametrize(
    "mask",
    [
        dict(causal=True, sliding_window=None),
        dict(causal=False, sliding_window=None),
        dict(causal=True, sliding_window=1),
        dict(causal=True, sliding_window=4),
        dict(causal=True, sliding_window=99),
    ],
    ids=["causal", "full", "window-1", "window-4", "window-99"],
)
def test_options_match_oracle(mask, softcap, slopes, sinks):
    inputs = attention_inputs([4, 1, 6], [13, 9, 4], block_size=3, sliding_window=mask["sliding_window"], head_dim=16)
    inputs = inputs._replace(query=inputs.query.double())
    options = dict(mask, scale=-0.6, softcap=softcap, alibi_slopes=slopes, sinks=sinks)
    output, lse = inputs.call(reference.attention_with_lse, **options)
    doubled = inputs._replace(key_cache=inputs.key_cache.double(), value_cache=inputs.value_cache.double())
    exact, exact_lse = option_oracle(doubled, **options)
    torch.testing.assert_close(output, exact, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scales", ["scalar", "head", "token"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8], ids=str)
def test_a_stored_number_times_its_scale_is_the_true_one(dtype, scales):
    stored, options = quantised(attention_inputs([4, 1], [13, 9], block_size=3), *[Storage(dtype, scales)] * 2)
    columns = {"scalar": (), "head": (2, 1), "token": (*stored.key_cache.shape[:3], 1)}[scales]
    scale_of = iter(options.values())
    key, value = (cache.double() * next(scale_of).double().view(columns) for cache in stored[1:3])
    true = stored._replace(query=stored.query.double(), key_cache=key, value_cache=value)
    torch.testing.assert_close(
        stored._replace(query=true.query).call(reference.attention_with_lse, **options),
        true.call(reference.attention_with_lse),
        rtol=1e-12,
        atol=1e-12,
    )


def test_merge_of_disjoint_keys_is_attention_over_all():
    q, k, v = torch.randn(3, 2, 5, 8, dtype=torch.float64).unbind()
    parts = []
    for keys in (slice(0, 3), slice(3, 5), slice(0, 5)):
        logits = torch.einsum("htd,hkd->htk", q, k[:, keys])
        parts += [(logits.softmax(-1) @ v[:, keys]).transpose(0, 1), logits.logsumexp(-1).T]
    output, lse = reference.merge_attention(*parts[:4])
    torch.testing.assert_close(output, parts[4])
    torch.testing.assert_close(lse, parts[5])


def test_normalising_each_block_by_itself_is_wrong():
    """Blocks are combined by online softmax; averaging softmaxes per block, as pseudo-code often does, is not it."""
    inputs = attention_inputs([1], [12], block_size=4, uniform=True)
    exact, _ = oracle(inputs)
    per_block = []
    for block in inputs.block_table[0, :3]:
        key, value = (cache[block][None].repeat_interleave(2, 2) for cache in inputs[1:3])
        seen = torch.nn.functional.scaled_dot_product_attention(
            inputs.query[None].transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        )
        per_block.append(seen.transpose(1, 2)[0].double())
    assert (torch.stack(per_block).mean(0) - exact).abs().max() > 0.05
