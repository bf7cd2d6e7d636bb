"""One call of attention on the host. All that metadata and options decide is settled once, for calls that repeat."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_paged.kernels.attention_plan import Step, base2_factors, options_of, plan, stamp_of
from torch_paged.kernels.device import empty_strided
from torch_paged.kernels.launch import addresses
from torch_paged.kernels.vectors import dense
from torch_paged.options import PLAIN, AttentionOptions

_FLOAT32 = 4  # bytes


class _Launch(NamedTuple):
    """A step of a call, and where its workspace begins in that of the call."""

    step: Step
    stamp: int
    first: int
    row: int  # of a schedule: the last step finds its own in the first row


class AttentionCall:
    """Serves every call of one metadata, alignment and set of options, with the arguments of `paged::attention`.

    It keeps no tensor. A call allocates its results and one workspace, and launches; `HopperLauncher` allocates pieces.
    """

    def __init__(
        self,
        kernel: Any,
        query: Tensor,
        value_cache: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        cu_seqlens_q: Tensor | None,
        scale: float,
        causal: bool,
        options: AttentionOptions,
        with_lse: bool,
    ) -> None:
        self._kernel, self._causal, self._with_lse = kernel, causal, with_lse
        self._rows = query.shape[0], query.shape[1]
        self._shape = (*self._rows, value_cache.shape[3])
        self._strides = (self._shape[1] * self._shape[2], self._shape[2], 1)
        self._empty = empty_strided(query.device.type)
        # The kernel multiplies the largest score of a row, so its factor must not turn the order around.
        self._negated = scale < 0
        self._factors = base2_factors(abs(scale), options.softcap)
        ids = (block_table, seq_lens, cu_seqlens_q)
        self._copies = any(it is not None and dense(it) is not it for it in ids)
        self._as_given = not (self._negated or self._copies)
        self._launches: dict[bool, tuple[list[_Launch], int]] = {}

    def __call__(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        *,
        cu_seqlens_q: Tensor | None = None,
        scale: float | None = None,  # noqa: ARG002 - settled
        causal: bool = True,  # noqa: ARG002 - settled
        schedule: Tensor | None = None,
        **given: Any,
    ) -> Any:
        options = AttentionOptions(**given) if given else PLAIN
        if not self._as_given:
            query = -query if self._negated else query
            block_table, seq_lens = dense(block_table), dense(seq_lens)
            cu_seqlens_q = None if cu_seqlens_q is None else dense(cu_seqlens_q)
        shared = key_cache.data_ptr() == value_cache.data_ptr()
        launches, numbers = self._launches.get(shared) or self._plan(
            shared, query, key_cache, value_cache, block_table, cu_seqlens_q, options
        )
        output = self._empty(self._shape, self._strides, query.dtype)
        workspace = self._empty((numbers,), (1,), torch.float32)
        lse = self._empty(self._rows, (self._rows[1], 1), torch.float32) if self._with_lse else workspace
        if not launches:
            output.zero_()
            if self._with_lse:
                lse.copy_(_lse_of_no_key(query.shape[0], block_table, cu_seqlens_q, options.sinks))
        for step, stamp, first, row in launches:
            # Who finds a schedule reads ids before the kernel in front, which may copy them, has ended.
            if schedule is None or self._copies:
                dealt, stamp = seq_lens, 0  # without a stamp nobody looks there
            else:
                dealt = schedule[row] if row else schedule
            tensors = query, key_cache, value_cache, block_table, seq_lens, cu_seqlens_q, output, lse
            if step.ready:
                taken = [*addresses(tensors), workspace.data_ptr() + _FLOAT32 * first, dealt.data_ptr()]
            else:
                taken = step.viewed(*tensors, workspace[first:], dealt)
            step.launch(*taken, stamp, self._factors, *options_of(options))
        return (output, lse) if self._with_lse else output

    def _plan(
        self,
        shared: bool,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        block_table: Tensor,
        cu_seqlens_q: Tensor | None,
        options: AttentionOptions,
    ) -> tuple[list[_Launch], int]:
        """What to launch, and the float32 numbers of its workspace; an lse that nobody wants stands at its head."""
        steps = plan(self._kernel, query, key_cache, value_cache, block_table, cu_seqlens_q, self._causal, options)
        numbers = 0 if self._with_lse else _aligned(math.prod(self._rows))
        launches = []
        for row, step in zip(reversed(range(len(steps))), steps, strict=True):
            launches.append(_Launch(step, stamp_of(step, options), numbers, row))
            numbers += _aligned(step.workspace)
        self._launches[shared] = launches, numbers
        return self._launches[shared]


def _aligned(numbers: int) -> int:
    """At least so many float32 or int32 numbers, which fill vectors of 16 bytes."""
    return -(-numbers // 4) * 4


def _lse_of_no_key(num_tokens: int, block_table: Tensor, cu_seqlens_q: Tensor | None, sinks: Tensor | None) -> Tensor:
    """What the rows' lse is where there is no key: `[num_tokens, num_heads]`, or what expands to it."""
    nothing = torch.full((), -torch.inf, device=block_table.device)
    if sinks is None or block_table.shape[0] == 0:
        return nothing
    if cu_seqlens_q is None:
        return sinks
    row = torch.arange(num_tokens, device=block_table.device)
    return torch.where((row < cu_seqlens_q[-1])[:, None], sinks, nothing)
