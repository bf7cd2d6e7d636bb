"""What a call of attention launches: decided by its tensors' metadata, and remembered, as decoding repeats one call."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from torch_paged.kernels.attention_combine import combine_launcher
from torch_paged.kernels.attention_schedule import MOST_PROGRAMS, schedule_launcher
from torch_paged.kernels.device import device_of
from torch_paged.kernels.features import Features
from torch_paged.kernels.launch import Launcher, Plans, layout
from torch_paged.kernels.launch_config import AttentionLaunch, attention_launches
from torch_paged.kernels.launch_tiles import SHORT_WINDOW
from torch_paged.kernels.problem import Problem
from torch_paged.kernels.storage import stored_in, viewed
from torch_paged.kernels.vectors import dense, effective_strides
from torch_paged.options import PLAIN, AttentionOptions

if TYPE_CHECKING:
    from torch_paged.kernels.hopper_launch import HopperLauncher

_LIMIT = 2**31 - 1
_LARGEST = torch.finfo(torch.float32).max


class Step(NamedTuple):
    """One launch of the kernel and of the one that combines, with all that the metadata of a call decide."""

    attend: Launcher | HopperLauncher
    combine: Launcher
    rows_combined: int  # of a unit, by one of its programs
    schedule: Callable[..., None] | None  # writes what the two find in a schedule, where they look for one
    stamp: int  # of such a schedule; 0: they do not
    workspace: int  # its float32 or int32 numbers
    sizes: tuple[int, int, int]  # num_tokens, num_seqs, num_kv_heads
    layout: tuple[Any, ...]  # the arguments behind these
    key_view: torch.dtype | None  # what the kernel takes the key cache for, if not for what it is
    value_view: torch.dtype | None

    @property
    def ready(self) -> bool:
        """Whether addresses may stand for tensors."""
        return self.attend.ready and self.combine.ready

    def viewed(self, query: Tensor, key_cache: Tensor, value_cache: Tensor, *others: Any) -> list[Any]:
        """The first arguments of `launch`, the caches as what the kernel takes them for."""
        if self.key_view:
            key_cache = viewed(key_cache, self.key_view)
        if self.value_view:
            value_cache = viewed(value_cache, self.value_view)
        return [query, key_cache, value_cache, *others]

    def launch(
        self, query: Any, key_cache: Any, value_cache: Any, block_table: Any, seq_lens: Any, cu_seqlens_q: Any,
        output: Any, lse: Any, workspace: Any, schedule: Any, stamp: int, factors: Any, window: int, slopes: Any,
        sinks: Any, *scales: Any,
    ) -> None:  # fmt: skip
        """Both kernels, with tensors or, once it is `ready`, with addresses."""
        caches = key_cache, value_cache
        self.attend(
            query, caches, block_table, seq_lens, cu_seqlens_q, schedule, stamp, output, lse, workspace, factors,
            *self.sizes, *self.layout, window, slopes, sinks, *scales,
        )  # fmt: skip
        self.combine(workspace, cu_seqlens_q, schedule, stamp, output, lse, sinks, *self.sizes, self.rows_combined)


_plans: Plans[tuple[Step, ...]] = Plans()


def plan(
    kernel: Any,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor | None,
    causal: bool,
    options: AttentionOptions,
) -> tuple[Step, ...]:
    """The launches of `kernel` for a call, none if no row sees a key; made once for calls that differ in contents."""
    shared = key_cache.data_ptr() == value_cache.data_ptr()
    metadata = (
        query.device, layout(query), layout(key_cache), layout(value_cache), shared,
        block_table.shape, block_table.stride(), cu_seqlens_q is None, causal, _metadata(options),
    )  # fmt: skip
    steps = _plans.get(metadata)
    if steps is None:
        problem = problem_of(query, key_cache, value_cache, block_table, cu_seqlens_q, causal, options)
        served = problem.ragged or problem.num_seqs > 0
        some = problem.num_tokens > 0 and served and 0 not in (key_cache.shape[0], block_table.shape[1])
        launches = attention_launches(problem, device_of(query.device)) if some else ()
        planned = tuple(step_of(kernel, it, query, key_cache, value_cache, block_table, options) for it in launches)
        steps = _plans.remember(metadata, planned)
    return steps


def _metadata(options: AttentionOptions) -> tuple[Any, ...] | None:
    """What of `options` decides which kernel runs and how it reads them."""
    if options is PLAIN:
        return None
    window = options.sliding_window is not None, _is_short(options.sliding_window)
    given = (*window, options.softcap > 0, *(tensor is not None for tensor in options[2:4]))
    return given + tuple(None if scale is None else (scale.shape, scale.stride()) for scale in options[4:])


def _is_short(window: int | None) -> bool:
    return window is not None and window <= SHORT_WINDOW


def step_of(
    kernel: Any,
    launch: AttentionLaunch,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    options: AttentionOptions,
) -> Step:
    """`launch` of `kernel` for a call."""
    num_blocks, block_size, num_kv_heads, _ = key_cache.shape
    variant = launch.variant
    values = viewed(value_cache, torch.int16) if variant.value_pairs else value_cache
    cache_strides = tuple(effective_strides(cache)[:3] for cache in (key_cache, values))
    scale_caches = options.key_scale_cache, options.value_scale_cache
    if scale_caches != (None, None):
        cache_strides += tuple((0, 0, 0) if scales is None else effective_strides(scales) for scales in scale_caches)
    max_keys = min(block_table.shape[1] * block_size, 2**31 - 1024)
    sizes = query.shape[0], block_table.shape[0], num_kv_heads
    units = block_table.shape[0] * num_kv_heads if variant.single_tile else launch.programs  # that can be cut
    attend = _launcher(kernel, launch)
    write: Callable[..., None] | None = None
    if not isinstance(attend, Launcher):
        write = attend.schedule if attend.fits(*sizes) else None
    elif launch.programs <= MOST_PROGRAMS:
        write = schedule_launcher(launch)
    return Step(
        attend=attend,
        combine=combine_launcher(launch, units),
        rows_combined=launch.rows_combined(units),
        schedule=write,
        stamp=_stamp(launch, (*sizes, max_keys)) if write else 0,
        workspace=launch.partial_floats + launch.handoff_ints,
        sizes=sizes,
        layout=(
            num_blocks, max_keys, _query_strides(query), cache_strides, block_table.stride(0),
        ),
        key_view=torch.uint8 if variant.has.key.bytes else None,
        value_view=torch.int16 if variant.value_pairs else torch.uint8 if variant.has.value.bytes else None,
    )  # fmt: skip


def _stamp(launch: AttentionLaunch, sizes: tuple[int, ...]) -> int:
    """A positive number for all that, beside lengths and a window, decides how work is dealt out (see `deal`)."""
    v = launch.variant
    rows = v.group, v.block_m, v.single_tile, v.rows_above, v.rows_upto
    costs = v.tile, v.unit_cost, v.least_work, v.resident
    dealt = launch.programs, sizes, rows, costs, v.causal, v.ragged, v.has.window, launch.rounds
    return zlib.crc32(repr(dealt).encode()) >> 1 | 1


def stamp_of(step: Step, options: AttentionOptions) -> int:
    """What names a schedule for `step`: with a window, its length counts too. 0 if there can be none."""
    window = options.sliding_window
    return step.stamp if window is None or step.stamp == 0 else (step.stamp ^ min(window, _LIMIT)) or 1


def base2_factors(scale: float, softcap: float) -> float | tuple[float, float]:
    """`factor` and `cap` of `logits`, with which a logit to base 2 is `cap * tanh(factor * q.k)`; without a cap, one.

    No factor is 0, as 0 * -inf is NaN: one this small leaves all visible keys equal.
    """
    if not softcap:
        return min(max(scale / math.log(2), 1e-36), _LARGEST)
    softcap = min(max(softcap, 1e-20), 1e20)  # beyond these it is as good as 0 or off, and float32 would overflow
    return min(scale / softcap, _LARGEST), softcap / math.log(2)


def options_of(options: AttentionOptions) -> tuple[Any, ...]:
    """The last arguments of attention, those of `options` that do not change a layout."""
    if options is PLAIN:
        return 0, None, None, None, None
    window, _, slopes, sinks, key_scale, value_scale, key_scale_cache, value_scale_cache = options
    return (
        0 if window is None else min(window, _LIMIT),
        None if slopes is None else dense(slopes),
        None if sinks is None else dense(sinks),
        dense(key_scale) if key_scale is not None else key_scale_cache,
        dense(value_scale) if value_scale is not None else value_scale_cache,
    )


def features_of(query: Tensor, key_cache: Tensor, value_cache: Tensor, options: AttentionOptions) -> Features:
    """Which options a call has."""
    key = stored_in(key_cache, query.dtype, options.key_scale, options.key_scale_cache)
    return Features(
        window=options.sliding_window is not None,
        softcap=options.softcap > 0,
        alibi=options.alibi_slopes is not None,
        sinks=options.sinks is not None,
        key=key,
        value=stored_in(value_cache, query.dtype, options.value_scale, options.value_scale_cache),
        normalised=bool(key.dtype) and query.dtype == torch.bfloat16,
    )


def _launcher(kernel: Any, launch: AttentionLaunch) -> Launcher | HopperLauncher:
    """Launches `kernel`, or what serves in its place."""
    if launch.variant.copy_rows:
        from torch_paged.kernels.hopper_launch import HopperLauncher

        return HopperLauncher(launch)
    return Launcher(kernel, (launch.programs, 1, 1), dict(V=launch.variant), launch.options)


def problem_of(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor | None,
    causal: bool,
    options: AttentionOptions = PLAIN,
) -> Problem:
    """The shapes and layout of a call, from its tensors."""
    return Problem(
        num_tokens=query.shape[0],
        num_seqs=block_table.shape[0],
        num_heads=query.shape[1],
        num_kv_heads=key_cache.shape[2],
        head_dim=query.shape[2],
        value_dim=value_cache.shape[3],
        block_size=key_cache.shape[1],
        itemsize=query.element_size(),
        causal=causal,
        ragged=cu_seqlens_q is not None,
        aligned=all(_aligned(tensor) for tensor in (query, key_cache, value_cache)),
        shared_values=key_cache.data_ptr() == value_cache.data_ptr()
        and key_cache.dtype == value_cache.dtype
        and key_cache.stride() == value_cache.stride()
        and key_cache.shape[3] >= value_cache.shape[3],
        features=features_of(query, key_cache, value_cache, options),
        copyable=_copyable(key_cache) and _copyable(value_cache),
        short_window=_is_short(options.sliding_window),
    )


def _query_strides(query: Tensor) -> tuple[int, int]:
    """Strides of a token and of a head. A single token counts as one of several, whose kernel shall serve it too."""
    head = effective_strides(query)[1]
    return (query.shape[1] * query.shape[2] if query.shape[0] == 1 else query.stride(0)), head


def _aligned(tensor: Tensor) -> bool:
    """Whether every row of `tensor` starts at a multiple of 16 bytes."""
    strides = effective_strides(tensor)[:-1]
    return tensor.data_ptr() % 16 == 0 and all(stride * tensor.element_size() % 16 == 0 for stride in strides)


def _copyable(cache: Tensor) -> bool:
    """Whether a descriptor of the copy engine can name the strides of `cache`."""
    strides = [stride for size, stride in zip(cache.shape[:-1], cache.stride(), strict=False) if size > 1]
    return _aligned(cache) and all(0 < stride < 2**36 for stride in strides)
