"""Other implementations of the same attention: each takes a case and its inputs and returns a function to call.

A peer that cannot serve a case raises NotImplementedError; one that is not installed is listed with the reason. Results
come as [num_tokens, num_heads, value_dim] and are compared with ours before anything is timed.
"""

import functools
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable

import torch
from attention_cases import Arguments, Case, starts_of
from gpu_engines import Call, flash_attention, flashinfer_attention, sglang_attention, vllm_attention
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

FLEX_PAGE = 128


def _uniform(case: Case) -> tuple[int, int]:
    """Queries and keys of every sequence."""
    if len({*case.queries}) > 1 or len({*case.keys}) > 1 or not case.causal:
        raise NotImplementedError("serves one length for all")
    return case.queries[0], case.keys[0]


def _contiguous(case: Case, inputs: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Query [S, H, q, D], keys and values [S, Hk, keys, D], of a uniform batch."""
    queries, keys = _uniform(case)
    query, key_cache, value_cache, table, _, _ = inputs
    used = table[:, : -(-keys // case.block)].long()
    key, value = (
        torch.stack([cache[row].flatten(0, 1)[:keys] for row in used]).transpose(1, 2).contiguous()
        for cache in (key_cache, value_cache)
    )
    return query.unflatten(0, (-1, queries)).transpose(1, 2).contiguous(), key, value


def _sdpa(backend: SDPBackend, case: Case, inputs: Arguments) -> Call:
    query, key, value = _contiguous(case, inputs)
    if query.shape[2] not in (1, key.shape[2]):
        raise NotImplementedError("its causal mask is aligned to the top left")

    def call() -> Tensor:
        with sdpa_kernel(backend):
            out = scaled_dot_product_attention(query, key, value, is_causal=query.shape[2] > 1, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    return call


def _varlen(case: Case, inputs: Arguments) -> Call:
    from torch.nn.attention.varlen import varlen_attn

    if "block_table" not in inspect.signature(varlen_attn).parameters:
        raise NotImplementedError(f"takes no block table in PyTorch {torch.__version__}")
    query, key_cache, value_cache, table, lens, _ = inputs
    query, table = query[: sum(case.queries)], table.clamp(max=key_cache.shape[0] - 1)
    starts = starts_of(case.queries, query.device)
    return lambda: varlen_attn(
        query,
        key_cache,
        value_cache,
        starts,
        None,
        max(case.queries),
        max(case.keys),
        window_size=(-1, 0),
        enable_gqa=True,
        seqused_k=lens,
        block_table=table,
    )


def _flex(case: Case, inputs: Arguments) -> Call:
    from torch.nn.attention.experimental._paged_attention import PagedAttention
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    queries, keys = _uniform(case)
    query, key, value = _contiguous(case, inputs)
    count, pages = len(case.keys), -(-keys // FLEX_PAGE)
    device = query.device
    paged = PagedAttention(count * pages, FLEX_PAGE, count, device=device)
    for seq in torch.randperm(count).tolist():
        paged.reserve(torch.tensor(seq, device=device), torch.tensor(keys, device=device))
    caches = [part.new_zeros(1, part.shape[1], count * pages * FLEX_PAGE, part.shape[3]) for part in (key, value)]
    positions = torch.arange(keys, device=device)
    for seq in range(count):  # one at a time: all at once would need several times the memory
        row = slice(seq, seq + 1)
        paged.assign(torch.tensor([seq], device=device), positions[None], key[row], value[row], *caches)

    def visible(_batch: Tensor, _head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
        return query_index + (keys - queries) >= key_index

    mask = create_block_mask(visible, count, None, queries, keys, device=device, BLOCK_SIZE=FLEX_PAGE)
    mask = paged.convert_logical_block_mask(mask, kv_len=torch.full((count,), keys, device=device))
    torch.compiler.reset()  # each case compiles a kernel of its own, and there is a limit
    flex = torch.compile(flex_attention, dynamic=False)
    return lambda: flex(query, *caches, block_mask=mask, enable_gqa=True).transpose(1, 2).flatten(0, 1)


PEERS: dict[str, Callable[[Case, Arguments], Call]] = {
    "SDPA (FlashAttention), contiguous": functools.partial(_sdpa, SDPBackend.FLASH_ATTENTION),
    "SDPA (cuDNN), contiguous": functools.partial(_sdpa, SDPBackend.CUDNN_ATTENTION),
    "varlen_attn, paged": _varlen,
    "FlexAttention, paged": _flex,
    "FlashInfer, paged": functools.partial(flashinfer_attention, True),
    "FlashInfer, paged, without tensor cores": functools.partial(flashinfer_attention, False),
    "FlashAttention 2 of vLLM, paged": functools.partial(flash_attention, 2),
    "FlashAttention 3 of vLLM, paged": functools.partial(flash_attention, 3),
    "vLLM (Triton), paged": vllm_attention,
    "SGLang (Triton), paged": sglang_attention,
}
WITHOUT_ADAPTER = ("flash_attn", "flash_attn_interface")
DISTRIBUTIONS = ("flashinfer-python", "vllm", "sglang")


def versions() -> dict[str, str]:
    """Of the packages that peers come from, as far as they are installed."""
    found = {package.metadata["Name"]: package.version for package in importlib.metadata.distributions()}
    return {name: found[name] for name in DISTRIBUTIONS if name in found}


def absent() -> dict[str, str]:
    """Packages of which nothing is measured, and why."""
    return {
        name: "no adapter here yet" if importlib.util.find_spec(name) else "not installed" for name in WITHOUT_ADAPTER
    }
