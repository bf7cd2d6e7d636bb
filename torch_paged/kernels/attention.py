"""Paged attention: softmax(scale * Q K^T) V over keys and values that stand in the blocks of a table.

One kernel serves decode, prefill and everything between. Its work is dealt out on the device (see `deal`); what a
program leaves unfinished because its piece ends inside a unit, a second small kernel combines.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from torch_paged.kernels.attention_call import AttentionCall
from torch_paged.kernels.attention_combine import handoff_in
from torch_paged.kernels.attention_plan import Step, base2_factors, options_of, plan, stamp_of, step_of
from torch_paged.kernels.attention_rows import first_seen, rows_of, sinks_of, visible_to
from torch_paged.kernels.attention_schedule import is_scheduled, scheduled_piece
from torch_paged.kernels.attention_state import nothing_seen, write_output, write_partial, write_sums
from torch_paged.kernels.attention_tiles import attend, prefetch, query_of
from torch_paged.kernels.deal import deal
from torch_paged.kernels.launch_config import AttentionLaunch
from torch_paged.kernels.units import following, key_count, query_range, query_tiles
from torch_paged.options import PLAIN, AttentionOptions


@triton.jit
def _attend_unit(
    state, query, caches, cache_strides, table, first, last, bounds, rows, span, num_blocks, factor, cap,
    V: tl.constexpr,
):  # fmt: skip
    """`attend` over key tiles [first, last); with no mask between the `bounds`, where every row sees every key.

    tiles     first ---- masked ---- bounds[0] ---- unmasked ---- bounds[1] ---- masked ---- last
    """
    masked = first
    if V.unmasked_first:
        unmasked = first
        if V.has.window:
            unmasked = tl.minimum(tl.maximum(bounds[0], first), last)
            state = attend(
                state, query, caches, cache_strides, table, first, unmasked, rows, span, num_blocks, factor, cap,
                True, V,
            )  # fmt: skip
        masked = tl.minimum(tl.maximum(bounds[1], unmasked), last)
        state = attend(
            state, query, caches, cache_strides, table, unmasked, masked, rows, span, num_blocks, factor, cap, False, V
        )
    return attend(
        state, query, caches, cache_strides, table, masked, last, rows, span, num_blocks, factor, cap, True, V
    )


@triton.jit
def _of_head(caches, key_scale, value_scale, strides, head, V: tl.constexpr):
    """Keys and values of one head and, where tokens have them, their scales, else anything."""
    key_cache = caches[0] + head.to(tl.int64) * strides[0][2]
    value_cache = caches[1] + head.to(tl.int64) * strides[1][2]
    key_scales = key_cache
    value_scales = value_cache
    if V.has.key.scale == "token":
        key_scales = key_scale + head.to(tl.int64) * strides[2][2]
    if V.has.value.scale == "token":
        value_scales = value_scale + head.to(tl.int64) * strides[3][2]
    return key_cache, value_cache, key_scales, value_scales


@triton.jit(
    do_not_specialize=[
        "stamp", "num_tokens", "num_seqs", "num_kv_heads", "num_blocks", "max_keys", "table_stride", "window",
    ],
    do_not_specialize_on_alignment=[
        "block_table", "seq_lens", "cu_seqlens_q", "schedule", "alibi_slopes", "sinks", "key_scale", "value_scale",
    ],
)  # fmt: skip
def _attention(
    query, caches, block_table, seq_lens, cu_seqlens_q, schedule, stamp, output, lse, workspace, scale,
    num_tokens, num_seqs, num_kv_heads, num_blocks, max_keys, query_strides, cache_strides, table_stride,
    window, alibi_slopes, sinks, key_scale, value_scale, V: tl.constexpr,
):  # fmt: skip
    """Grid: one persistent program per resident thread block, each with an equal piece of the row of all units.

    units     |  sequence 0, head 0  |  sequence 0, head 1  | s 1, h 0 | s 1, h 1 | ...
    programs  |-------- 0 --------|-------- 1 --------|-------- 2 --------| ...
                                  ^ a unit cut here leaves a partial result with both of its programs
    """
    BLOCK_M: tl.constexpr = V.block_m
    TILE: tl.constexpr = V.tile
    num_heads = num_kv_heads * V.group
    lane = tl.arange(0, BLOCK_M)
    program = tl.program_id(0)
    left_before = 0  # what of a unit begun by others this program leaves: 0 nothing, 1 a part, 2 the last part
    left_sequence = -1  # the unit that it begins and leaves to others to end
    left_unit = 0

    if V.overlap:
        gdc_launch_dependents()
    scheduled = is_scheduled(schedule, stamp)
    sequence, unit, first, units, end_tile = scheduled_piece(schedule, stamp)
    if not scheduled:
        if V.overlap:
            gdc_wait()
        sequence, unit, first, units, end_tile = deal(
            seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, max_keys, V, window
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
        head = tl.minimum(head, num_kv_heads - 1)  # whatever a schedule of other lengths says
        first_token = first_row // V.group
        # Rows are (query token, head of the group), packed: a tile may begin amid the heads of a token.
        rows = tl.minimum(queries * V.group - first_row, BLOCK_M)
        last_token = (first_row + rows - 1) // V.group
        packed = first_row % V.group + lane
        if V.overlap and V.has.alibi:
            gdc_wait()  # the kernel before may have written the slopes
        its_rows = rows_of(packed, first_token, head, queries, keys, alibi_slopes, window, V)
        low = first_seen(first_token, queries, keys, window, V)
        skipped = low // TILE  # tiles that no row sees; `first` and `end_tile` count from the first that one does
        key_tiles = tl.maximum(tl.cdiv(visible_to(last_token, queries, keys, V), TILE) - skipped, 1)
        last = tl.minimum(tl.where(index == units - 1, end_tile, key_tiles), key_tiles)
        if first < last:
            its_table = block_table + sequence.to(tl.int64) * table_stride
            its_caches = _of_head(caches, key_scale, value_scale, cache_strides, head, V)
            if V.overlap:
                if (stamp != 0) & (index == 0):  # not `scheduled`, which would have to be kept till here
                    prefetch(its_caches, cache_strides, its_table, first + skipped, (low, keys), num_blocks, V)
                gdc_wait()
            valid = lane < rows
            query_head = query + (start + first_token).to(tl.int64) * query_strides[0]
            query_head += (head * V.group).to(tl.int64) * query_strides[1]
            query_rows = (packed // V.group).to(tl.int64) * query_strides[0]
            query_rows += (packed % V.group).to(tl.int64) * query_strides[1]
            its_query, factor, cap = query_of(query_head + query_rows, valid, scale, key_scale, head, V)
            state = nothing_seen(value_scale, head, V)
            state = _attend_unit(
                state, its_query, its_caches, cache_strides, its_table, first + skipped, last + skipped,
                (tl.cdiv(first_seen(last_token, queries, keys, window, V), TILE),
                 visible_to(first_token, queries, keys, V) // TILE),
                its_rows, (low, keys), num_blocks, factor, cap, V,
            )  # fmt: skip
            if (first == 0) & (last == key_tiles):
                first_output = (start + first_token).to(tl.int64) * num_heads + head * V.group
                output_row = packed // V.group * num_heads + packed % V.group
                sink = sinks_of(packed, head, sequence, num_seqs, sinks, V)
                write_output(output, lse, state, sink, first_output, output_row, valid, V)
            else:
                begun_here = first == 0
                write_partial(workspace, state, 2 * program + begun_here.to(tl.int32), lane, valid, V)
                left_sequence = tl.where(begun_here, sequence, left_sequence)
                left_unit = tl.where(begun_here, unit, left_unit)
                left_before = tl.where(begun_here, left_before, tl.where(last == key_tiles, 2, 1))
        first = first * 0
        sequence, unit = following(sequence, unit + 1, tiles, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, V)
    if V.overlap:
        gdc_wait()
    if left_before == 0:  # others may look here for a part: an empty one
        write_sums(workspace, lane * 0.0 - float("inf"), lane * 0.0, 2 * program * BLOCK_M + lane, lane < BLOCK_M, V)
    handoff = handoff_in(workspace, tl.num_programs(0), V)
    tl.store(handoff + program, left_before)
    tl.store(handoff + tl.num_programs(0) + program, left_sequence)
    tl.store(handoff + 2 * tl.num_programs(0) + program, left_unit)


def steps_of(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor | None,
    causal: bool,
    options: AttentionOptions,
) -> tuple[Step, ...]:
    """The launches of a call, none if no row sees a key."""
    return plan(_attention, query, key_cache, value_cache, block_table, cu_seqlens_q, causal, options)


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
    options: AttentionOptions = PLAIN,
    schedule: Tensor | None = None,
) -> None:
    """Writes the rows of `output` and `lse` whose sequences `launch` serves: for tests and benchmarks."""
    step = step_of(_attention, launch, query, key_cache, value_cache, block_table, options)
    workspace = query.new_empty(step.workspace, dtype=torch.float32)
    dealt, stamp = (seq_lens, 0) if schedule is None else (schedule, stamp_of(step, options))
    step.launch(
        *step.viewed(query, key_cache, value_cache, block_table, seq_lens, cu_seqlens_q, output, lse, workspace),
        dealt, stamp, base2_factors(scale, options.softcap), *options_of(options),
    )  # fmt: skip


def prepare_attention(
    query: Tensor,
    key_cache: Tensor,  # noqa: ARG001
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor | None,
    scale: float,
    causal: bool,
    options: AttentionOptions,
    with_lse: bool,
) -> AttentionCall:
    """`attention` for calls like this one, returning its output alone unless `with_lse`."""
    return AttentionCall(
        _attention, query, value_cache, block_table, seq_lens, cu_seqlens_q, scale, causal, options, with_lse
    )


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
    schedule: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of `query` over the cached keys of its sequences; reads no length on the host and allocates by shape.

    Args:
        query: `[num_tokens, num_heads, head_dim]`, unit last stride.
        key_cache: `[num_blocks, block_size, num_kv_heads, head_dim]`, query's dtype, float8_e4m3fn, float8_e5m2 or
            int8, unit last stride.
        value_cache: `[num_blocks, block_size, num_kv_heads, value_dim]`, likewise; may be a view of `key_cache`.
        block_table: int32 `[num_seqs, max_blocks]`. An id out of range reads some other block, never faults.
        seq_lens: int32 `[num_seqs]`.
        cu_seqlens_q: int32 `[num_seqs + 1]`, or None: every sequence has `num_tokens / num_seqs` queries.
        scale: any finite factor of the logits.
        causal: query i of q sees keys up to `seq_len - q + i`.
        options: as in `AttentionOptions`.
        schedule: from `schedule`, or None.

    Returns:
        Output `[num_tokens, num_heads, value_dim]` in query's dtype, and float32 lse `[num_tokens, num_heads]`.
    """
    call = prepare_attention(
        query, key_cache, value_cache, block_table, seq_lens, cu_seqlens_q, scale, causal, options, True
    )
    given = {} if options is PLAIN else options._asdict()
    output, lse = call(
        query, key_cache, value_cache, block_table, seq_lens, cu_seqlens_q=cu_seqlens_q, schedule=schedule, **given
    )
    return output, lse
