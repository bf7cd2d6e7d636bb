"""Deals attention's work out once a step, for all layers whose calls agree in shapes and lengths."""

from torch import Tensor

from torch_paged.kernels.attention import steps_of
from torch_paged.kernels.attention_plan import options_of, stamp_of
from torch_paged.kernels.vectors import dense
from torch_paged.options import AttentionOptions


def schedule(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor | None,
    causal: bool,
    options: AttentionOptions,
    schedule: Tensor,
) -> None:
    """Writes to int32 `schedule`, zeros, what `attention` will look for: its last launch in the first row.

    Other arguments are those of `attention`. What a row holds: see `attention_schedule`.
    """
    seq_lens, cu_seqlens_q = dense(seq_lens), None if cu_seqlens_q is None else dense(cu_seqlens_q)
    steps = steps_of(query, key_cache, value_cache, block_table, cu_seqlens_q, causal, options)
    for row, step in zip(schedule, reversed(steps), strict=False):
        if step.schedule is not None:
            _, max_keys, *_ = step.layout
            window = options_of(options)[0]
            step.schedule(seq_lens, cu_seqlens_q, row, *step.sizes, max_keys, window)
            row[:1].fill_(stamp_of(step, options))  # last, by a kernel of its own: see `attention_schedule`
