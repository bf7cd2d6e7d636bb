"""The reference against an independent oracle: gather the keys, then PyTorch's own attention in float64."""

import math

import pytest
import torch

from torch_paged import reference
from torch_paged.testing import attention_inputs


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
