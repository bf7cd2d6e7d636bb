"""Paged attention: softmax(scale * Q K^T) V over keys and values that stand in the blocks of a table.

One kernel serves decode, prefill and everything between. Its work is dealt out on the device (see `schedule`); what a
program leaves unfinished because its piece ends inside a unit, a second small kernel combines.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from torch_paged.kernels.attention_combine import LN_2
from torch_paged.kernels.attention_plan import Step, plan, step_of
from torch_paged.kernels.attention_tiles import attend, load_query, store_rows
from torch_paged.kernels.launch_config import AttentionLaunch
from torch_paged.kernels.schedule import SEQUENCES, deal, key_count, next_sequence, query_range, query_tiles
from torch_paged.kernels.vectors import dense
from torch_paged.options import PLAIN, AttentionOptions


@triton.jit
def _visible(token, queries, keys, V: tl.constexpr):
    """Number of keys that query `token` of a sequence sees."""
    if V.causal:
        seen = tl.minimum(tl.maximum(keys - queries + 1 + token, 0), keys)
    else:
        seen = token * 0 + keys
    return seen


@triton.jit
def _nothing_seen(V: tl.constexpr):
    """Maximum, sum and the two pieces of the output of rows that have seen no key; an absent piece is anything."""
    BLOCK_M: tl.constexpr = V.block_m
    V0: tl.constexpr = V.value_widths[0]
    V1: tl.constexpr = V.value_widths[1]
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    output0 = tl.zeros([BLOCK_M, V0], tl.float32)
    output1 = total
    if V1 > 0:
        output1 = tl.zeros([BLOCK_M, V1], tl.float32)
    return largest, total, output0, output1


@triton.jit
def _write_output(output, lse, state, first_row, row, valid, V: tl.constexpr):
    """Writes the finished rows `first_row + row`; those that saw no key are zeros and -inf."""
    V0: tl.constexpr = V.value_widths[0]
    V1: tl.constexpr = V.value_widths[1]
    largest, total, output0, output1 = state
    factor = 1.0 / tl.where(total > 0, total, 1.0)
    tl.store(lse + first_row + row, (largest + tl.log2(total)) * LN_2, mask=valid)
    base = output + first_row * V.value_dim
    store_rows(base, row, output0 * factor[:, None], valid, 0, V0, V.value_dim)
    if V1 > 0:
        store_rows(base, row, output1 * factor[:, None], valid, V0, V1, V.value_dim)


@triton.jit
def _write_sums(partial, largest, total, row, valid, V: tl.constexpr):
    """Writes (maximum, sum) pairs of the workspace, which stand behind all outputs."""
    sums = partial + tl.num_programs(0) * (2 * V.block_m * V.value_dim)
    tl.store(sums + 2 * row, largest, mask=valid)
    tl.store(sums + 2 * row + 1, total, mask=valid)


@triton.jit
def _write_partial(partial, state, slot, lane, valid, V: tl.constexpr):
    """Leaves `state` in a slot of the workspace."""
    V0: tl.constexpr = V.value_widths[0]
    V1: tl.constexpr = V.value_widths[1]
    largest, total, output0, output1 = state
    first_row = slot * V.block_m
    _write_sums(partial, largest, total, first_row + lane, valid, V)
    base = partial + first_row * V.value_dim
    store_rows(base, lane, output0, valid, 0, V0, V.value_dim)
    if V1 > 0:
        store_rows(base, lane, output1, valid, V0, V1, V.value_dim)


@triton.jit(
    do_not_specialize=["num_tokens", "num_seqs", "num_kv_heads", "num_blocks", "max_keys", "table_stride"],
    do_not_specialize_on_alignment=["block_table", "seq_lens", "cu_seqlens_q"],
)
def _attention(
    query, key_cache, value_cache, block_table, seq_lens, cu_seqlens_q, output, lse, partial, handoff, scale,
    num_tokens, num_seqs, num_kv_heads, num_blocks, max_keys, query_strides, key_strides, value_strides, table_stride,
    V: tl.constexpr,
):  # fmt: skip
    """Grid: one persistent program per resident thread block, each with an equal piece of the row of all units.

    units     |  sequence 0, head 0  |  sequence 0, head 1  | s 1, h 0 | s 1, h 1 | ...
    programs  |-------- 0 --------|-------- 1 --------|-------- 2 --------| ...
                                  ^ a unit cut here leaves a partial result with both of its programs
    """
    BLOCK_M: tl.constexpr = V.block_m
    TILE: tl.constexpr = V.tile
    K0: tl.constexpr = V.key_widths[0]
    K1: tl.constexpr = V.key_widths[1]
    num_heads = num_kv_heads * V.group
    if V.overlap:
        gdc_launch_dependents()
        gdc_wait()
    lane = tl.arange(0, BLOCK_M)
    program = tl.program_id(0)
    left_before = 0  # what of a unit begun by others this program leaves: 0 nothing, 1 a part, 2 the last part
    left_sequence = -1  # the unit that it begins and leaves to others to end
    left_unit = 0

    sequence, unit, first, units, end_tile = deal(
        seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, max_keys, V
    )
    # What each thread's position alone decides would otherwise be computed before this loop, and kept in registers.
    for index in tl.range(0, units, disable_licm=True):
        start, queries = query_range(sequence, cu_seqlens_q, num_tokens, num_seqs, V)
        keys = key_count(sequence, seq_lens, num_seqs, max_keys)
        tiles = tl.maximum(query_tiles(queries, V), 1)
        if V.single_tile:
            head = unit
            first_row = unit * 0
        else:
            head = unit // tiles
            first_row = unit % tiles * BLOCK_M
        first_token = first_row // V.group
        # Rows are (query token, head of the group), packed: a tile may begin amid the heads of a token.
        rows = tl.minimum(queries * V.group - first_row, BLOCK_M)
        packed = first_row % V.group + lane
        visible = _visible(first_token + packed // V.group, queries, keys, V)
        key_tiles = tl.maximum(tl.cdiv(_visible((first_row + rows - 1) // V.group, queries, keys, V), TILE), 1)
        last = tl.minimum(tl.where(index == units - 1, end_tile, key_tiles), key_tiles)
        if first < last:
            valid = lane < rows
            query_head = query + (start + first_token).to(tl.int64) * query_strides[0]
            query_head += (head * V.group).to(tl.int64) * query_strides[1]
            query_rows = (packed // V.group).to(tl.int64) * query_strides[0]
            query_rows += (packed % V.group).to(tl.int64) * query_strides[1]
            query0 = load_query(query_head + query_rows, valid, 0, K0, V)
            query1 = query0
            if K1 > 0:
                query1 = load_query(query_head + query_rows, valid, K0, K1, V)
            state = _nothing_seen(V)
            key_head = key_cache + head.to(tl.int64) * key_strides[2]
            value_head = value_cache + head.to(tl.int64) * value_strides[2]
            table = block_table + sequence.to(tl.int64) * table_stride
            masked = first
            if V.unmasked_first:
                unmasked = _visible(first_token, queries, keys, V) // TILE
                masked = tl.minimum(tl.maximum(unmasked, first), last)
                state = attend(
                    state, (query0, query1), key_head, value_head, key_strides, value_strides, table, first, masked,
                    visible, keys, num_blocks, scale, False, V,
                )  # fmt: skip
            state = attend(
                state, (query0, query1), key_head, value_head, key_strides, value_strides, table, masked, last,
                visible, keys, num_blocks, scale, True, V,
            )  # fmt: skip
            if (first == 0) & (last == key_tiles):
                first_output = (start + first_token).to(tl.int64) * num_heads + head * V.group
                output_row = packed // V.group * num_heads + packed % V.group
                _write_output(output, lse, state, first_output, output_row, valid, V)
            else:
                begun_here = first == 0
                _write_partial(partial, state, 2 * program + begun_here.to(tl.int32), lane, valid, V)
                left_sequence = tl.where(begun_here, sequence, left_sequence)
                left_unit = tl.where(begun_here, unit, left_unit)
                left_before = tl.where(begun_here, left_before, tl.where(last == key_tiles, 2, 1))
        first = first * 0
        unit += 1
        if unit >= tiles * num_kv_heads:
            unit = unit * 0
            sequence = next_sequence(sequence, tl.arange(0, SEQUENCES), cu_seqlens_q, num_tokens, num_seqs, V)
    if left_before == 0:  # others may look here for a part: an empty one
        _write_sums(partial, lane * 0.0 - float("inf"), lane * 0.0, 2 * program * BLOCK_M + lane, lane < BLOCK_M, V)
    tl.store(handoff + program, left_before)
    tl.store(handoff + tl.num_programs(0) + program, left_sequence)
    tl.store(handoff + 2 * tl.num_programs(0) + program, left_unit)


def _take(
    step: Step,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor | None,
    output: Tensor,
    lse: Tensor,
    scale: float,
) -> None:
    partial = query.new_empty(step.partial_floats, dtype=torch.float32)
    handoff = query.new_empty(step.handoff_ints, dtype=torch.int32)
    # For exp2. Not 0, as 0 * -inf is NaN: small enough to leave all visible keys equal.
    base2_scale = max(scale / math.log(2), 1e-36)
    step.attend(
        query, key_cache, value_cache, block_table, seq_lens, cu_seqlens_q, output, lse, partial, handoff, base2_scale,
        *step.sizes, *step.layout,
    )  # fmt: skip
    step.combine(partial, handoff, cu_seqlens_q, output, lse, *step.sizes)


def launch_attention(
    launch: AttentionLaunch,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor | None,
    output: Tensor,
    lse: Tensor,
    scale: float,
) -> None:
    """Writes the rows of `output` and `lse` whose sequences `launch` serves: for tests and benchmarks."""
    step = step_of(_attention, launch, query, key_cache, value_cache, block_table)
    _take(step, query, key_cache, value_cache, block_table, seq_lens, cu_seqlens_q, output, lse, scale)


def attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor | None,
    scale: float,
    causal: bool,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """Attention of `query` over the cached keys of its sequences; reads no length on the host and allocates by shape.

    Args:
        query: `[num_tokens, num_heads, head_dim]`, unit last stride.
        key_cache: `[num_blocks, block_size, num_kv_heads, head_dim]`, query's dtype, unit last stride.
        value_cache: `[num_blocks, block_size, num_kv_heads, value_dim]`, likewise; may be a view of `key_cache`.
        block_table: int32 `[num_seqs, max_blocks]`. An id out of range reads some other block, never faults.
        seq_lens: int32 `[num_seqs]`.
        cu_seqlens_q: int32 `[num_seqs + 1]`, or None: every sequence has `num_tokens / num_seqs` queries.
        scale: any finite factor of the logits.
        causal: query i of q sees keys up to `seq_len - q + i`.
        options: as in `AttentionOptions`.

    Returns:
        Output `[num_tokens, num_heads, value_dim]` in query's dtype, and float32 lse `[num_tokens, num_heads]`.
    """
    if options != PLAIN or not query.dtype == key_cache.dtype == value_cache.dtype:
        raise NotImplementedError(f"not supported here yet: {options}, caches of {key_cache.dtype}")
    if scale < 0:  # the kernel multiplies the largest score of a row, so its factor must not turn the order around
        query, scale = -query, -scale
    block_table, seq_lens = dense(block_table), dense(seq_lens)
    cu_seqlens_q = None if cu_seqlens_q is None else dense(cu_seqlens_q)
    num_tokens, num_heads, _ = query.shape
    output = query.new_empty(num_tokens, num_heads, value_cache.shape[3])
    lse = query.new_empty(num_tokens, num_heads, dtype=torch.float32)
    steps = plan(_attention, query, key_cache, value_cache, block_table, cu_seqlens_q, causal)
    if not steps:
        return output.zero_(), lse.fill_(float("-inf"))
    for step in steps:
        _take(step, query, key_cache, value_cache, block_table, seq_lens, cu_seqlens_q, output, lse, scale)
    return output, lse
