"""What the engines' kernels return, on small batches: `TRITON_INTERPRET=1 pytest -m interpreter benchmarks`."""

import os
from dataclasses import replace

import pytest
import torch
from attention_cases import Case, make
from gpu_engines import sglang_attention, vllm_attention

from torch_paged import reference

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="TRITON_INTERPRET=1 is not set"),
]

PEERS = {"vllm": vllm_attention, "sglang": sglang_attention}
CASES = {
    "few": Case((45, 33), (1, 1), heads=8, kv_heads=2),
    "many": Case((20, 33, 17), (1, 1, 1), heads=64, kv_heads=64),
    "MHA": Case((45, 33), (1, 1), heads=2, kv_heads=2),
    "block 8": Case((45, 33), (1, 1), heads=4, kv_heads=2, block=8),
    "several": Case((45, 33), (3, 3), heads=4, kv_heads=2, ragged=True),
    "prefill": Case((70,), (70,), heads=4, kv_heads=2),
    "mixed": Case((45, 33, 50), (1, 1, 20), heads=4, kv_heads=2, ragged=True),
}


@pytest.mark.parametrize("package", PEERS)
@pytest.mark.parametrize("name", CASES)
def test_engine_agrees_with_the_reference(name, package):
    pytest.importorskip(package)
    case = replace(CASES[name], dim=16, value_dim=16, dtype="fp32")
    inputs = make(case, torch.device("cpu"))
    try:
        call = PEERS[package](case, inputs)
    except NotImplementedError as reason:
        pytest.skip(str(reason))
    query, *rest, bounds = inputs
    expected = reference.attention(query, *rest, cu_seqlens_q=bounds)
    torch.testing.assert_close(call(), expected[: sum(case.queries)], rtol=1e-4, atol=1e-5)
