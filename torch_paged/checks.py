"""What every operator demands of its arguments' dtypes, shapes, strides, devices and options.

One function an operator, with the operator's own signature, run by its fake kernel and at the head of every
implementation. Values (ids, slots, lengths) are the duty of `bounds`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torch_paged.matching import Matcher, form, name_of, require
from torch_paged.options import FLOAT_DTYPES, QUANTISED_DTYPES, SCHEDULE_SHAPE

_INT32 = (torch.int32,)
_INT64 = (torch.int64,)
_FLOAT32 = (torch.float32,)
_FLOAT32_LIMITS = torch.finfo(torch.float32)


def attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    sliding_window: int | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    schedule: Tensor | None = None,
    **scales: Tensor | None,
) -> None:
    """Arguments of `paged::attention` and `paged::attention_with_lse`."""
    _numbers(scale, softcap, sliding_window, causal)
    match = Matcher(query)
    match("query", query, FLOAT_DTYPES, ("num_tokens", "num_heads", "head_dim"), unit_last_stride=True)
    _caches(match, query.dtype, "query", key_cache, value_cache)
    _scales(match, key_cache, value_cache, **scales)
    for name, per_head in (("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if per_head is not None:
            match(name, per_head, _FLOAT32, ("num_heads",))
    match("block_table", block_table, _INT32, ("num_seqs", "max_blocks_per_seq"))
    match("seq_lens", seq_lens, _INT32, ("num_seqs",))
    _heads(match)
    _queries(match, cu_seqlens_q)
    if schedule is not None:
        _schedule_layout(match, schedule)


schedule = attention  # `paged::schedule` has the arguments of a call that it is for


def _numbers(scale: float | None, softcap: float, sliding_window: int | None, causal: bool) -> None:
    if isinstance(scale, float) and not abs(scale) <= _FLOAT32_LIMITS.max:
        raise ValueError(f"scale must be a finite number in float32, got {scale}")
    if isinstance(softcap, float) and not (softcap == 0 or _FLOAT32_LIMITS.tiny <= softcap <= _FLOAT32_LIMITS.max):
        raise ValueError(f"softcap must be 0 (off) or a positive normal number in float32, got {softcap}")
    if sliding_window is not None:
        require(sliding_window >= 1, lambda: f"sliding_window must be at least 1, got {sliding_window}")
        if not causal:
            raise ValueError(f"sliding_window needs causal=True, got sliding_window={sliding_window}, causal=False")


def _heads(match: Matcher) -> None:
    num_heads, num_kv_heads = match.sizes["num_heads"], match.sizes["num_kv_heads"]
    require(
        num_heads % num_kv_heads == 0,
        lambda: f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}",
    )
    require(num_heads >= 1, lambda: f"num_heads must be at least 1, got {num_heads}")


def _queries(match: Matcher, cu_seqlens_q: Tensor | None) -> None:
    """How query's rows are shared out among the sequences."""
    size = match.sizes
    num_tokens, num_seqs = size["num_tokens"], size["num_seqs"]
    if cu_seqlens_q is None:
        require(
            num_tokens == num_seqs * (num_tokens // torch.sym_max(num_seqs, 1)),
            lambda: (
                "without cu_seqlens_q, num_tokens must be a multiple of num_seqs, "
                f"got {num_tokens} tokens and {num_seqs} sequences"
            ),
        )
    else:
        match("cu_seqlens_q", cu_seqlens_q, _INT32, ("num_seqs + 1",))
        require(
            size["num_seqs + 1"] == num_seqs + 1,
            lambda: (
                f"cu_seqlens_q must be int32 [num_seqs + 1] with num_seqs = {num_seqs}, "
                f"got int32 [{size['num_seqs + 1']}]"
            ),
        )


def _schedule_layout(match: Matcher, schedule: Tensor) -> None:
    match("schedule", schedule, _INT32, ("launches", "numbers"))
    size, strides = match.sizes, schedule.stride()
    require(
        (size["launches"] == SCHEDULE_SHAPE[0]) & (size["numbers"] == SCHEDULE_SHAPE[1]),
        lambda: f"schedule must be int32 {list(SCHEDULE_SHAPE)}, as paged::schedule makes it, got {form(schedule)}",
    )
    require(
        (strides[0] == SCHEDULE_SHAPE[1]) & (strides[1] == 1),
        lambda: f"schedule must be contiguous, as paged::schedule makes it, got strides {list(strides)}",
    )


def merge_attention(output_a: Tensor, lse_a: Tensor, output_b: Tensor, lse_b: Tensor) -> None:
    """Arguments of `paged::merge_attention`."""
    match = Matcher(output_a)
    for name, output, lse in (("a", output_a, lse_a), ("b", output_b, lse_b)):
        match(f"output_{name}", output, FLOAT_DTYPES, ("num_tokens", "num_heads", "value_head_dim"))
        match(f"lse_{name}", lse, _FLOAT32, ("num_tokens", "num_heads"))


def append(
    key: Tensor,
    value: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor | None,
    slot_mapping: Tensor,
    **scales: Tensor | None,
) -> None:
    """Arguments of `paged::append`."""
    match = Matcher(key)
    _rows_and_caches(match, key, value, key_cache, value_cache, slot_mapping)
    _scales(match, key_cache, value_cache, **scales)


def rotary_append(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    key_cache: Tensor,
    value_cache: Tensor | None,
    slot_mapping: Tensor,
    *,
    interleaved: bool = False,  # noqa: ARG001 - both values are served
    **scales: Tensor | None,
) -> None:
    """Arguments of `paged::rotary_append`."""
    match = Matcher(query)
    match("query", query, FLOAT_DTYPES, ("num_tokens", "num_heads", "head_dim"))
    if key is not None and key.dtype != query.dtype:
        raise TypeError(f"key must have query's dtype {name_of(query.dtype)}, got {name_of(key.dtype)}")
    _rows_and_caches(match, key, value, key_cache, value_cache, slot_mapping)
    _scales(match, key_cache, value_cache, **scales)
    match("cos", cos, FLOAT_DTYPES, ("num_positions", "rotary_dim / 2"))
    match("sin", sin, (cos.dtype,), ("num_positions", "rotary_dim / 2"))
    match("positions", positions, _INT64, ("num_tokens",))
    half, head_dim = match.sizes["rotary_dim / 2"], match.sizes["head_dim"]
    require(
        (half >= 1) & (2 * half <= head_dim),
        lambda: f"cos must have 1 to head_dim / 2 = {head_dim / 2:g} columns, got {form(cos)}",
    )


def _rows_and_caches(
    match: Matcher,
    key: Tensor,
    value: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor | None,
    slot_mapping: Tensor,
) -> None:
    if (value is None) != (value_cache is None):
        given, missing = ("value", "value_cache") if value_cache is None else ("value_cache", "value")
        raise ValueError(f"value and value_cache must be given together, got {given} without {missing}")
    match("key", key, FLOAT_DTYPES, ("num_tokens", "num_kv_heads", "head_dim"))
    if value is not None:
        match("value", value, (key.dtype,), ("num_tokens", "num_kv_heads", "value_head_dim"))
    _caches(match, key.dtype, "key", *((key_cache,) if value_cache is None else (key_cache, value_cache)))
    match("slot_mapping", slot_mapping, _INT64, ("num_slots",))
    slots, tokens = match.sizes["num_slots"], match.sizes["num_tokens"]
    require(slots <= tokens, lambda: f"slot_mapping must have at most key's {tokens} rows, got {slots}")


def copy_blocks(caches: Sequence[Tensor], block_pairs: Tensor) -> None:
    """Arguments of `paged::copy_blocks`."""
    match = Matcher(block_pairs)
    match("block_pairs", block_pairs, _INT64, ("num_pairs", "2"))
    require(match.sizes["2"] == 2, lambda: f"block_pairs must be int64 [num_pairs, 2], got {form(block_pairs)}")
    _block_list(match, caches)


def gather_blocks(caches: Sequence[Tensor], blocks: Tensor, out: Tensor) -> None:
    """Arguments of `paged::gather_blocks`."""
    _staging("out", out, blocks, caches)


def scatter_blocks(source: Tensor, blocks: Tensor, caches: Sequence[Tensor]) -> None:
    """Arguments of `paged::scatter_blocks`."""
    _staging("source", source, blocks, caches)


def _caches(match: Matcher, dtype: torch.dtype, like: str, *caches: Tensor | None) -> None:
    """A key cache, or it and a value cache, for rows of `dtype`, that of argument `like`."""
    stored = (dtype, *QUANTISED_DTYPES)
    for name, cache, dim in zip(("key_cache", "value_cache"), caches, ("head_dim", "value_head_dim"), strict=False):
        if cache is not None and cache.dtype not in stored:
            others = ", ".join(map(name_of, QUANTISED_DTYPES))
            raise TypeError(
                f"{name} must have {like}'s dtype {name_of(dtype)}, or {others}, got {name_of(cache.dtype)}"
            )
        match(name, cache, stored, ("num_blocks", "block_size", "num_kv_heads", dim), unit_last_stride=True)
    sizes = match.sizes
    require(sizes["block_size"] >= 1, lambda: f"block_size must be at least 1, got {sizes['block_size']}")
    require(sizes["num_kv_heads"] >= 1, lambda: f"num_kv_heads must be at least 1, got {sizes['num_kv_heads']}")
    key_dim = sizes["head_dim"]
    value_dim = sizes.get("value_head_dim", 512)
    require(
        ((key_dim >= 16) & (key_dim <= 512) & (value_dim >= 16) & (value_dim <= 512))
        | ((key_dim == 576) & (value_dim == 512)),
        lambda: (
            "head_dim and value_head_dim must be 16 to 512, or 576 with value_head_dim 512, "
            f"got {key_dim} and {value_dim}"
        ),
    )


def _scales(
    match: Matcher,
    key_cache: Tensor,
    value_cache: Tensor | None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    key_scale_cache: Tensor | None = None,
    value_scale_cache: Tensor | None = None,
) -> None:
    sides = (("key", key_cache, key_scale, key_scale_cache), ("value", value_cache, value_scale, value_scale_cache))
    for side, cache, scale, scale_cache in sides:
        given = [f"{side}_scale"] * (scale is not None) + [f"{side}_scale_cache"] * (scale_cache is not None)
        if given and (cache is None or cache.dtype not in QUANTISED_DTYPES):
            stored = "no" if cache is None else f"an unquantised {name_of(cache.dtype)}"
            raise ValueError(f"{given[0]} must be None with {stored} {side}_cache, got one")
        if len(given) == 2:
            raise ValueError(f"{side}_scale (static) and {side}_scale_cache (per token) exclude each other, got both")
        if cache is not None and cache.dtype == torch.int8 and not given:
            raise ValueError(f"{side}_cache of int8 needs {side}_scale or {side}_scale_cache, got neither")
        if scale is not None:
            if scale.dtype != torch.float32:
                raise TypeError(f"{side}_scale must be float32, 0-dim or [num_kv_heads], got {form(scale)}")
            match(f"{side}_scale", scale, _FLOAT32, ("num_kv_heads",) if scale.dim() else ())
        if scale_cache is not None:
            match(f"{side}_scale_cache", scale_cache, _FLOAT32, ("num_blocks", "block_size", "num_kv_heads"))


def _block_list(match: Matcher, caches: Sequence[Tensor]) -> None:
    for index, cache in enumerate(caches):
        name = f"caches[{index}]"
        if cache.dim() == 0:
            raise ValueError(f"{name} must be [num_blocks, ...], got a 0-dim tensor")
        if cache.device != match.device:
            raise ValueError(f"{name} must be on {match.device} like the others, got {cache.device}")
        known = match.sizes.setdefault("num_blocks", cache.shape[0])
        require(
            known == cache.shape[0],
            lambda: f"caches must have the same first dimension, got {known} and, in {name}, {cache.shape[0]}",
        )


def _staging(name: str, staging: Tensor | None, blocks: Tensor, caches: Sequence[Tensor]) -> None:
    """`staging`, row by row, holds a block of every cache in turn."""
    match = Matcher(blocks)
    match("blocks", blocks, _INT64, ("num_rows",))
    _block_list(match, caches)
    if staging is None:
        raise TypeError(f"{name} must be a tensor of as many rows as blocks, got None")
    if staging.device != match.device:
        raise ValueError(f"{name} must be on {match.device} like the others, got {staging.device}")
    dtypes = {cache.dtype for cache in caches}
    if staging.dtype != torch.uint8 and dtypes != {staging.dtype}:
        expected = " or ".join(sorted({"uint8", *map(name_of, dtypes)})) if len(dtypes) == 1 else "uint8"
        raise TypeError(f"{name} must be {expected}, got {form(staging)}")
    if staging.dim() == 0:
        raise ValueError(f"{name} must be [num_rows, ...], got a 0-dim tensor")
    if not staging.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {list(staging.stride())}")
    rows = match.sizes["num_rows"]
    require(staging.shape[0] == rows, lambda: f"{name} must have {rows} rows like blocks, got {form(staging)}")
    row_bytes = math.prod(staging.shape[1:]) * staging.element_size()
    block_bytes = sum(math.prod(cache.shape[1:]) * cache.element_size() for cache in caches)
    require(
        row_bytes == block_bytes,
        lambda: f"{name} must hold {block_bytes} bytes a row, one block of every cache, got {row_bytes} bytes",
    )
