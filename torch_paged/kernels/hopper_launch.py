"""Launches attention's Hopper kernel in the place of the general one."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from torch_paged.kernels.attention_hopper import attention_hopper
from torch_paged.kernels.attention_schedule import DEALT, ROOM
from torch_paged.kernels.deal_pieces import deal_pieces, list_room
from torch_paged.kernels.hopper_loader import COLUMNS
from torch_paged.kernels.launch import Launcher
from torch_paged.kernels.launch_config import AttentionLaunch
from torch_paged.kernels.piece_list import num_piece_ints
from torch_paged.kernels.rounds import begin_rounds

_MAX_MAPS = 1024


class _Address(NamedTuple):
    """What a descriptor needs of a tensor; it does not keep the tensor alive."""

    pointer: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.pointer


class HopperLauncher:
    """Takes the arguments of the general kernel, of calls that one `Launcher` could serve.

    `schedule` writes for all layers what each call would otherwise find out for itself.
    """

    ready = False  # it takes tensors alone

    def __init__(self, launch: AttentionLaunch) -> None:
        self._programs, self._rows = launch.programs, launch.variant.copy_rows
        self._once, self._rounds = launch.rounds == 1, max(launch.rounds, 2)  # of whole units there are two turns
        self._rows_of_unit = launch.variant.group, launch.variant.block_m
        self._partial = launch.partial_floats
        self._starts = (self._rounds - 1) * launch.programs + 1
        constants, few_warps = dict(V=launch.variant), dict(num_warps=4, maxnreg=64, **launch.overlap_option)
        self._begin = Launcher(begin_rounds, (self._starts, 1, 1), constants, few_warps)
        padded = dict(PROGRAMS=launch.padded_programs, **constants)
        self._deal, self._deal_once = (
            Launcher(deal_pieces, (launch.programs, self._rounds, 1), padded, few_warps) for _ in range(2)
        )
        one_part = launch.options | dict(num_warps=4)
        self._attend = Launcher(attention_hopper, (launch.programs, 1, 1), constants, one_part)
        self._maps: dict[Any, TensorDescriptor] = {}

    def __call__(
        self, query: Tensor, caches: tuple[Tensor, Tensor], block_table: Tensor, seq_lens: Tensor,
        cu_seqlens_q: Tensor | None, schedule: Tensor, stamp: int, output: Tensor, lse: Tensor, workspace: Tensor,
        scale: float | tuple[float, float],
        num_tokens: int, num_seqs: int, num_kv_heads: int, num_blocks: int, max_keys: int, query_strides: Any,
        _cache_strides: Any, table_stride: int, window: int, _slopes: None, sinks: Tensor | None, *_: Any,
    ) -> None:  # fmt: skip
        batch = num_tokens, num_seqs, num_kv_heads, max_keys, window
        partial, handoff = workspace, workspace[self._partial :].view(torch.int32)
        starts = self._begin_rounds(seq_lens, cu_seqlens_q, batch, stamp == 0)
        room, run = self._room(num_tokens, num_seqs, num_kv_heads)
        pieces = handoff.new_empty(num_piece_ints(self._programs, self._rounds, room))
        begun = schedule, stamp, pieces, partial, handoff
        self._deal(seq_lens, cu_seqlens_q, starts, *begun, *batch, room, run)
        self._attend(
            query, self._map(caches[0]), self._map(caches[1]), block_table, seq_lens, cu_seqlens_q, pieces, output,
            lse, partial, handoff, scale, num_tokens, num_seqs, num_kv_heads, num_blocks, max_keys, self._rounds,
            query_strides, table_stride, window, sinks,
        )  # fmt: skip

    def fits(self, num_tokens: int, num_seqs: int, num_kv_heads: int) -> bool:
        """Whether a schedule has room for so many tokens."""
        room, _ = self._room(num_tokens, num_seqs, num_kv_heads)
        return num_piece_ints(self._programs, self._rounds, room) <= ROOM

    def schedule(
        self, seq_lens: Tensor, cu_seqlens_q: Tensor | None, row: Tensor, num_tokens: int, num_seqs: int,
        num_kv_heads: int, max_keys: int, window: int,
    ) -> None:  # fmt: skip
        """Writes to the row of a schedule all but its stamp."""
        batch = num_tokens, num_seqs, num_kv_heads, max_keys, window
        starts = self._begin_rounds(seq_lens, cu_seqlens_q, batch, True)
        nothing = None, 0, row[DEALT.value :], None, None
        room = self._room(num_tokens, num_seqs, num_kv_heads)
        self._deal_once(seq_lens, cu_seqlens_q, starts, *nothing, *batch, *room)

    def _room(self, num_tokens: int, num_seqs: int, num_kv_heads: int) -> tuple[int, int]:
        return list_room(self._programs, self._rounds, num_tokens, num_seqs, num_kv_heads, *self._rows_of_unit)

    def _begin_rounds(
        self, seq_lens: Tensor, cu_seqlens_q: Tensor | None, batch: tuple[int, ...], wanted: bool
    ) -> Tensor | None:
        """Where the pieces of rounds begin, if they are `wanted`; None where there is but one."""
        if self._once:
            return None
        starts = seq_lens.new_empty(self._starts, dtype=torch.int64)
        if wanted:
            self._begin(seq_lens, cu_seqlens_q, starts, *batch, self._programs, self._rounds)
        return starts

    def _map(self, cache: Tensor) -> TensorDescriptor:
        """How the copy engine finds rows of `cache`; from call to call only addresses change."""
        known_by = cache.data_ptr(), cache.shape, cache.stride()
        found = self._maps.get(known_by)
        if found is None:
            if len(self._maps) >= _MAX_MAPS:
                self._maps.clear()
            (blocks, slots, heads, dim), strides = cache.shape, cache.stride()
            rows, parts = self._rows, slots // self._rows
            # Size, stride and what a copy has of it. Any legal stride will do where there is one block, or one head.
            outer = [(blocks, strides[0] if blocks > 1 else 8, 1)] + [(parts, rows * strides[1], 1)] * (parts > 1)
            inner = [(rows, strides[1], rows), (heads, strides[2] if heads > 1 else 8, 1), (dim, 1, COLUMNS.value)]
            shape, steps, box = (list(of_all) for of_all in zip(*outer, *inner, strict=True))
            layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=len(box))
            address = _Address(cache.data_ptr(), cache.dtype)
            found = self._maps[known_by] = TensorDescriptor(address, shape, steps, box, layout)
        return found
