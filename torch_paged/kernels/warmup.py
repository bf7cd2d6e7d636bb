"""Compiles, before the first request, every kernel that a model can come to need."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from torch_paged.kernels.append import append
from torch_paged.kernels.attention import attention
from torch_paged.kernels.attention_plan import problem_of
from torch_paged.kernels.copy_blocks import copy_blocks
from torch_paged.kernels.device import device_of
from torch_paged.kernels.gather_blocks import gather_blocks, scatter_blocks
from torch_paged.kernels.launch_config import AttentionLaunch, attention_launches
from torch_paged.kernels.launch_tiles import LONG, MANY_ROWS, MANY_UNITS, SHARED, SHORT_WINDOW
from torch_paged.kernels.merge_attention import merge_attention
from torch_paged.kernels.rotary_append import rotary_append
from torch_paged.kernels.schedule import schedule
from torch_paged.options import SCHEDULE_SHAPE, AttentionOptions


def warmup(
    device: torch.device,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    value_head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    *,
    cache_dtype: torch.dtype,
    scales: str | None,
    rotary_dim: int | None,
    interleaved: bool,
    causal: bool,
    progress: Callable[[int, int], None] | None,
    **options: bool,
) -> int:
    """Launches each kernel on zeros, for decode, several tokens, prefill and ragged batches; returns how many
    batches these were.

    Caches are head-major, as PagedKVCache makes them, and token-major; values are a cache of their own and, where keys
    have more columns, also a view of the keys. Triton compiles only what differs.
    """
    sizes = [(2, num_kv_heads, block_size, dim) for dim in (head_dim, value_head_dim, 1)]
    types = (cache_dtype, cache_dtype, torch.float32)
    head_major = [
        torch.zeros(size, dtype=it, device=device).transpose(1, 2) for size, it in zip(sizes, types, strict=True)
    ]
    token_major = [cache.contiguous() for cache in head_major]
    given = _options(num_heads, device, **options)
    batches: list[tuple[_Model, Tensor, Tensor, int, int, bool]] = []
    for keys, values, ones in (head_major, token_major):
        model = _Model(num_heads, dtype, causal, _scaled(given, scales, ones[..., 0]))
        _write(model, keys, values)
        if rotary_dim is not None:
            _rotate_and_write(model, keys, values, rotary_dim, interleaved)
        models = [model]
        if given.sliding_window:  # a short one may have other kernels
            models.append(model._replace(options=model.options._replace(sliding_window=1)))
        for its_values in [values] if value_head_dim >= head_dim else [values, keys[..., :value_head_dim]]:
            known: set[AttentionLaunch] = set()
            for one in models:
                batches += [(one, keys, its_values, *kind) for kind in _kinds(one, keys, its_values, known)]
    for done, batch in enumerate(batches, 1):
        arguments = _batch(*batch)
        schedule(*arguments, causal, batch[0].options, arguments[0].new_empty(SCHEDULE_SHAPE, dtype=torch.int32))
        output, lse = attention(*arguments, 1.0, causal, batch[0].options)
        if done == 1:
            merge_attention(output, lse, output, lse)
        if progress is not None:
            progress(done, len(batches))
    return len(batches)


class _Model(NamedTuple):
    """What a model brings to the caches."""

    num_heads: int
    dtype: torch.dtype
    causal: bool
    options: AttentionOptions

    @property
    def scales(self) -> tuple[Tensor | None, ...]:
        """As `append` takes them."""
        return self.options[4:]


_Batch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]


def _options(
    num_heads: int, device: torch.device, *, sliding_window: bool, softcap: bool, alibi_slopes: bool, sinks: bool
) -> AttentionOptions:
    """Any values of the options that are on."""
    per_head = torch.zeros(num_heads, dtype=torch.float32, device=device)
    return AttentionOptions(
        sliding_window=2 * SHORT_WINDOW if sliding_window else None,
        softcap=1.0 if softcap else 0.0,
        alibi_slopes=per_head if alibi_slopes else None,
        sinks=per_head if sinks else None,
    )


def _scaled(options: AttentionOptions, kind: str | None, of_tokens: Tensor) -> AttentionOptions:
    """`options` with scales of both caches."""
    if kind is None:
        return options
    if kind == "token":
        return options._replace(key_scale_cache=of_tokens, value_scale_cache=of_tokens)
    scale = of_tokens[0, 0].contiguous() if kind == "head" else of_tokens[0, 0, 0]
    return options._replace(key_scale=scale, value_scale=scale)


def _batch(model: _Model, keys: Tensor, values: Tensor, sequences: int, tokens: int, ragged: bool) -> _Batch:
    """Arguments of attention for so many sequences, the first of which share so many query tokens evenly."""
    table = torch.zeros(sequences, 1, dtype=torch.int32, device=keys.device)
    starts = torch.arange(sequences + 1, dtype=torch.int32, device=keys.device) * -(-tokens // sequences)
    query = torch.zeros(tokens, model.num_heads, keys.shape[3], dtype=model.dtype, device=keys.device)
    return query, keys, values, table, table[:, 0], starts.clamp(max=tokens) if ragged else None


def _kinds(model: _Model, keys: Tensor, values: Tensor, known: set[AttentionLaunch]) -> list[tuple[int, int, bool]]:
    """Numbers of sequences and of tokens, uniform and ragged, that between them need every launch not yet `known`."""
    query, _, _, table, _, _ = _batch(model, keys, values, 1, 1, False)
    problem = problem_of(query, keys, values, table, None, model.causal, model.options)
    kinds: list[tuple[int, int, bool]] = []
    few = range(1, MANY_ROWS * keys.shape[2] // model.num_heads + 2)
    batches = [(1, tokens) for tokens in few] + [(MANY_UNITS, MANY_UNITS * queries) for queries in few]
    for times in range(9):  # the last of them are dealt out in rounds
        batches += [(1, LONG << times), (1 << times, SHARED << times)]
    padded = [(MANY_UNITS, tokens) for tokens in few]  # by sequences without queries
    for ragged, (sequences, tokens) in [*itertools.product((False, True), batches), *((True, each) for each in padded)]:
        asked = replace(problem, num_seqs=sequences, num_tokens=tokens, ragged=ragged)
        launches = attention_launches(asked, device_of(keys.device))
        # These decide grids alone.
        compiled = {replace(launch, unit_rows=0, rounds=min(launch.rounds, 2)) for launch in launches}
        if not compiled <= known:
            known |= compiled
            kinds.append((sequences, tokens, ragged))
    return kinds


def _rows(model: _Model, *caches: Tensor) -> list[Tensor]:
    """Two rows for each of the caches."""
    return [torch.zeros(2, cache.shape[2], cache.shape[3], dtype=model.dtype, device=cache.device) for cache in caches]


def _write(model: _Model, keys: Tensor, values: Tensor) -> None:
    """Writes nothing, in every way that caches of two layers can be written."""
    num_heads, block_size = keys.shape[2], keys.shape[1]
    new_keys, new_values = _rows(model, keys, values)
    nowhere = torch.full((2,), -1, device=keys.device)
    append(new_keys, new_values, keys, values, nowhere, *model.scales)
    append(new_keys, None, keys, None, nowhere, *_key_alone(model.scales))
    # The second layer's blocks stand elsewhere in a packed row. A latent cache is its keys alone.
    for caches in ([keys, values] * 2, [keys] * 2):
        rows = keys.new_empty(2, sum(cache.shape[3] for cache in caches) * num_heads * block_size)
        copy_blocks(caches, nowhere[:0].view(0, 2))
        gather_blocks(caches, nowhere, rows)
        scatter_blocks(rows, nowhere, caches)


def _rotate_and_write(model: _Model, keys: Tensor, values: Tensor, rotary_dim: int, interleaved: bool) -> None:
    """Rotates, and writes nothing."""
    new_keys, new_values = _rows(model, keys, values)
    query = new_keys.new_zeros(2, model.num_heads, keys.shape[3])
    nowhere = torch.full((2,), -1, device=keys.device)
    for dtype in {torch.float32, model.dtype}:
        angles = torch.zeros(2, rotary_dim // 2, dtype=dtype, device=keys.device)
        arguments = (angles, angles, nowhere)
        rotary_append(query, new_keys, new_values, *arguments, keys, values, nowhere, interleaved, *model.scales)
        rotary_append(query, new_keys, None, *arguments, keys, None, nowhere, interleaved, *_key_alone(model.scales))


def _key_alone(scales: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Scales without those of values."""
    return scales[0], None, scales[2], None
