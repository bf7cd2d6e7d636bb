"""The attentions that serving engines call, as they call them: FlashInfer, FlashAttention, vLLM's, SGLang's.

What an engine prepares once a step for all layers is prepared here and not timed; its cache is copied into its own
layout. `gpu_peers.py` says what an adapter is.
"""

import functools
import importlib.util
from collections.abc import Callable, Iterable
from typing import Any

import torch
import triton
from attention_cases import Arguments, Case, starts_of
from torch import Tensor

from torch_paged.kernels.device import device_of

Call = Callable[[], Tensor]
SGLANG_SPLITS = 8  # at most, of a sequence: its `triton_attention_num_kv_splits`


def _installed(package: str) -> None:
    if not importlib.util.find_spec(package):
        raise NotImplementedError("not installed")


@functools.cache
def _workspace(device: torch.device) -> Tensor:
    return torch.empty(256 * 2**20, dtype=torch.uint8, device=device)


def flashinfer_attention(tensor_cores: bool, case: Case, inputs: Arguments) -> Call:
    """Its plan, on the host, knows the lengths and is not part of what is timed. Decode has two kernels."""
    _installed("flashinfer")
    import flashinfer

    query, key_cache, value_cache, table, _, _ = inputs
    query = query[: sum(case.queries)]
    pages = [-(-keys // case.block) for keys in case.keys]
    starts = starts_of(pages, query.device)
    ids = torch.cat([row[:count] for row, count in zip(table, pages, strict=True)])
    in_last = torch.tensor([(keys - 1) % case.block + 1 for keys in case.keys], device=query.device).int()
    caches = key_cache.transpose(1, 2), value_cache.transpose(1, 2)
    heads = query.shape[1], key_cache.shape[2], query.shape[2]
    if max(case.queries) == 1:
        decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            _workspace(query.device), "HND", use_tensor_cores=tensor_cores
        )
        decode.plan(starts, ids, in_last, *heads, case.block, q_data_type=query.dtype, kv_data_type=query.dtype)
        return lambda: decode.run(query, caches)
    if not tensor_cores:
        raise NotImplementedError("serves decode")
    prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(query.device), "HND")
    bounds = starts_of(case.queries, query.device)
    prefill.plan(bounds, starts, ids, in_last, *heads, case.block, causal=case.causal, q_data_type=query.dtype)
    return lambda: prefill.run(query, caches)


@functools.cache
def _scratch(device: torch.device, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Float32 tensors that all calls share, as the layers of an engine do."""
    return [torch.empty(shape, device=device) for shape in shapes]


def _vllm_arguments(
    case: Case, inputs: Arguments, sliding_window: int | None = None, softcap: float = 0.0
) -> dict[str, Any]:
    """What vLLM's attentions share. Its cache is token-major and holds a token's key and value side by side."""
    _installed("vllm")
    if case.block % 16 or case.dim != case.value_dim:
        raise NotImplementedError("serves blocks of a multiple of 16, and one head dim")
    query, key_cache, value_cache, table, lens, _ = inputs
    query = query[: sum(case.queries)]
    key, value = torch.cat((key_cache, value_cache), -1).contiguous().split(case.dim, -1)
    return {
        "q": query,
        "k": key,
        "v": value,
        "out": torch.empty_like(query),
        "cu_seqlens_q": starts_of(case.queries, query.device),
        "max_seqlen_q": max(case.queries),
        "seqused_k": lens,
        "max_seqlen_k": max(case.keys),
        "softmax_scale": case.dim**-0.5,
        "causal": case.causal,
        "window_size": (-1, -1) if sliding_window is None else (sliding_window - 1, 0),
        "softcap": softcap,
        "block_table": table.clamp(max=key_cache.shape[0] - 1),
    }


def vllm_attention(case: Case, inputs: Arguments, sinks: Tensor | None = None, **options: Any) -> Call:
    """Few sequences of few queries are cut into 16 segments each, as its TritonAttentionMetadataBuilder decides."""
    arguments = _vllm_arguments(case, inputs, **options)
    from vllm.v1.attention.ops.triton_unified_attention import MAX_3D_QUERY_LEN, unified_attention

    few = 128 // case.kv_heads
    segments = (few * min(max(case.queries), MAX_3D_QUERY_LEN), case.heads, 16)
    device, padded = inputs[0].device, triton.next_power_of_2(case.dim)
    parts, greatest, sums = _scratch(device, (*segments, padded), segments, segments)

    def call() -> Tensor:
        unified_attention(
            **arguments,
            sinks=sinks,
            q_descale=None,
            k_descale=None,
            v_descale=None,
            seq_threshold_3D=few,
            num_par_softmax_segments=16,
            softmax_segm_output=parts,
            softmax_segm_max=greatest,
            softmax_segm_expsum=sums,
        )
        return arguments["out"]

    return call


def flash_attention(version: int, case: Case, inputs: Arguments, sinks: Tensor | None = None, **options: Any) -> Call:
    """FlashAttention as vLLM builds and calls it: version 3 plans on the device once a step, with at most 32 splits."""
    arguments = _vllm_arguments(case, inputs, **options)
    if sinks is not None:
        arguments["s_aux"] = sinks.to(inputs[0].dtype)
    from vllm.vllm_flash_attn import fa_version_unsupported_reason, flash_attn_varlen_func, get_scheduler_metadata

    if problem := fa_version_unsupported_reason(version):
        raise NotImplementedError(problem)
    if version == 3:
        arguments["num_splits"] = 32 if sum(case.queries) <= 512 else 0  # tokens of its largest CUDA graph
        arguments["scheduler_metadata"] = get_scheduler_metadata(
            len(case.keys),
            max(case.queries),
            max(case.keys),
            case.heads,
            case.kv_heads,
            case.dim,
            arguments["seqused_k"],
            inputs[0].dtype,
            cu_seqlens_q=arguments["cu_seqlens_q"],
            page_size=case.block,
            causal=case.causal,
            window_size=arguments["window_size"],
            has_softcap=arguments["softcap"] > 0,
            num_splits=arguments["num_splits"],
        )
    return lambda: flash_attn_varlen_func(**arguments, fa_version=version)


def _sglang_slots(case: Case, inputs: Arguments, lens: Iterable[int]) -> Tensor:
    """Where the first tokens of every sequence lie in a cache of single tokens."""
    table, offsets = inputs[3].long(), torch.arange(case.block, device=inputs[3].device)
    rows = zip(table, lens, strict=True)
    return torch.cat([(row[:, None] * case.block + offsets).flatten()[:count] for row, count in rows])


def sglang_attention(case: Case, inputs: Arguments) -> Call:
    """Its cache is token-major, of single tokens; their slots and the number of splits are found once a step.

    The keys of the chunk itself are read where its projections left them, not in the cache.
    """
    _installed("sglang")
    from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd
    from sglang.kernels.ops.attention.extend_attention import extend_attention_fwd
    from sglang.kernels.ops.attention.metadata import get_num_kv_splits_triton

    query, key_cache, value_cache, _, lens, _ = inputs
    query, scale, device = query[: sum(case.queries)], case.dim**-0.5, device_of(query.device)
    key, value = (cache.flatten(0, 1).contiguous() for cache in (key_cache, value_cache))
    out = query.new_empty(*query.shape[:2], case.value_dim)
    if max(case.queries) == 1:
        starts, slots = starts_of(case.keys, query.device), _sglang_slots(case, inputs, case.keys)
        splits, shape = torch.empty_like(lens), (len(case.keys), case.heads, SGLANG_SPLITS)
        logits, lse = _scratch(query.device, (*shape, case.value_dim), shape)
        batch = len(lens), 1, case.heads, case.kv_heads, SGLANG_SPLITS, device.multiprocessors
        get_num_kv_splits_triton[(1,)](splits, lens, *batch, MAX_NUM_SEQ=max(256, triton.next_power_of_2(len(lens))))
        buffers, dependent = (starts, slots, logits, lse, splits, SGLANG_SPLITS), device.capability >= 90

        def decode() -> Tensor:
            decode_attention_fwd(query, key, value, out, *buffers, scale, 1.0, 1.0, use_pdl=dependent)
            return out

        return decode
    before = [keys - queries for keys, queries in zip(case.keys, case.queries, strict=True)]
    every = _sglang_slots(case, inputs, case.keys).split(case.keys)
    own = torch.cat([slots[first:] for slots, first in zip(every, before, strict=True)])
    chunk, bounds = (key[own], value[own]), starts_of(case.queries, query.device).long()
    prefix = starts_of(before, query.device), _sglang_slots(case, inputs, before)
    rest = None, case.causal, None, max(case.queries), 1.0, 1.0, scale

    def extend() -> Tensor:
        extend_attention_fwd(query, *chunk, out, key, value, bounds, *prefix, *rest)
        return out

    return extend
