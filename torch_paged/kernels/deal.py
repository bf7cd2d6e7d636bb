"""Deals attention's work out to programs, on the device: no length is ever needed on the host.

A unit (see `units`) costs about what it has keys to read. All units stand in a row, sequence by sequence; each program
takes an equal, contiguous piece of that row, so that a program's piece may begin and end inside a unit.

Worked example: 2 KV heads, one query each for sequences of 128 and 64 keys, tiles of 64 keys, 4 programs:

    unit      sequence 0, head 0    sequence 0, head 1    sequence 1, head 0    sequence 1, head 1
    keys      0......64......128    0......64......128    0......64             0......64
    program   |----- 0 -----|------- 1 --------|------------- 2 -----------|-------- 3 ----------|

A position is (sequence, unit of the sequence, key tile of the unit, counted from the first that it sees).
"""

import triton
import triton.language as tl

from torch_paged.kernels.units import SEQUENCES, following, key_count, late_tiles, query_range, query_tiles

LAST_TILE: tl.constexpr = tl.constexpr(2**31 - 1)  # of any unit
SEQUENCE: tl.constexpr = tl.constexpr(0)  # where the numbers of a piece stand in memory, see `piece_of`
UNIT: tl.constexpr = tl.constexpr(1)
FIRST: tl.constexpr = tl.constexpr(2)
UNITS: tl.constexpr = tl.constexpr(3)
END: tl.constexpr = tl.constexpr(4)
PIECE: tl.constexpr = tl.constexpr(5)


@triton.jit
def _work(tile, queries, keys, num_kv_heads, window, V: tl.constexpr):
    """Cost of the query tiles before `tile`, without late ones."""
    work = _cost(tile, queries, keys, window, V)
    if V.copy_rows:
        late = late_tiles(queries, keys, num_kv_heads, V)
        work = tl.maximum(work - _cost(late, queries, keys, window, V), 0)
    return work


@triton.jit
def _cost(tile, queries, keys, window, V: tl.constexpr):
    """Cost of the query tiles before `tile`: the keys that each of them sees, times the group, plus a fixed part."""
    tile = tile.to(tl.int64)
    if V.has.window and V.single_tile:
        keys = tl.minimum(keys, queries - 1 + tl.minimum(window, keys))
    if V.causal and not V.single_tile:
        seen = tl.maximum(keys - queries, 0).to(tl.int64) * V.group
        work = tile * (seen + V.unit_cost) + tile * (tile + 1) // 2 * V.block_m
        if V.has.window:
            # From the tile on that stands `seen + tile * V.block_m` behind the first key, more than the window does,
            # each sees a window and itself.
            most = window.to(tl.int64) * V.group
            growing = tl.minimum(tl.maximum(tl.cdiv(most - seen, V.block_m), 0), tile)
            work = tile * (V.unit_cost + V.block_m) + (tile - growing) * most
            work += growing * seen + growing * (growing - 1) // 2 * V.block_m
    else:
        work = tile * (keys.to(tl.int64) * V.group + V.unit_cost)
    return work


@triton.jit
def _sequence_work(
    sequence, seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, max_keys, window, V: tl.constexpr
):
    """Work of the units of `sequence`, and their number, which counts late ones too."""
    _, queries = query_range(sequence, cu_seqlens_q, num_tokens, num_seqs, V)
    keys = key_count(sequence, seq_lens, num_seqs, max_keys)
    tiles = query_tiles(queries, V)
    return _work(tiles, queries, keys, num_kv_heads, window, V) * num_kv_heads, tiles * num_kv_heads


@triton.jit
def _position(
    offset, near, sequence, seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, max_keys, window,
    V: tl.constexpr,
):  # fmt: skip
    """The unit that stands `offset` into the work of `sequence`, and how far into that unit.

    What is as `near` to the beginning of a unit stands there.
    """
    _, queries = query_range(sequence, cu_seqlens_q, num_tokens, num_seqs, V)
    keys = key_count(sequence, seq_lens, num_seqs, max_keys)
    tiles = query_tiles(queries, V)
    head_work = _work(tiles, queries, keys, num_kv_heads, window, V)
    # Dividing 64-bit numbers is a slow call, so estimate and correct: at most one off, as there are few heads.
    head = (offset.to(tl.float32) / tl.maximum(head_work, 1).to(tl.float32)).to(tl.int32)
    head -= (head * head_work > offset).to(tl.int32)
    head += ((head + 1) * head_work <= offset).to(tl.int32)
    head = tl.where(head_work > 0, head, 0)
    offset -= head * head_work
    low = tl.zeros_like(tiles)
    work = head_work
    if not V.single_tile:
        high = tl.maximum(tiles, 1)
        while high - low > 1:
            middle = (low + high) // 2
            inside = _work(middle, queries, keys, num_kv_heads, window, V) <= offset
            low = tl.where(inside, middle, low)
            high = tl.where(inside, high, middle)
        before = _work(low, queries, keys, num_kv_heads, window, V)
        work = _work(low + 1, queries, keys, num_kv_heads, window, V) - before
        offset -= before
    next_one = (offset > near) & (work - offset <= near)
    return head * tiles + low + next_one.to(tl.int32), tl.where((offset <= near) | next_one, 0, offset)


@triton.jit
def all_work(seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, max_keys, V: tl.constexpr, window=0):
    """Work of all units but late ones, and of the longest unit; how many units there are, if all are alike, else 0."""
    lane = tl.arange(0, SEQUENCES)
    work = tl.zeros([SEQUENCES], tl.int64)
    longest = tl.zeros([SEQUENCES], tl.int64)
    most = tl.zeros([SEQUENCES], tl.int64)
    all_units = tl.zeros([SEQUENCES], tl.int32)
    for first in range(0, _rows_of_batch(num_seqs, V), SEQUENCES):
        sequence = first + lane
        more, units = _sequence_work(
            sequence, seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, max_keys, window, V
        )
        work += more
        most = tl.maximum(most, more)
        all_units += units
        keys = key_count(sequence, seq_lens, num_seqs, max_keys).to(tl.int64)
        if V.has.window:
            keys = tl.minimum(keys, window)  # but for the few more that not all rows of a unit see
        longest = tl.maximum(longest, tl.where(units > 0, keys * V.group + V.unit_cost, 0))
    total = tl.sum(work)
    count = tl.sum(all_units)
    alike = 0
    if V.single_tile:
        alike = tl.where(tl.max(most) * (count // num_kv_heads) == total, count, 0)
    return total, tl.max(longest), alike


@triton.jit
def _rows_of_batch(num_seqs, V: tl.constexpr):
    """Sequences, and in a ragged batch what stands past the last one."""
    return num_seqs + 1 if V.ragged else num_seqs


@triton.jit
def tile_at(inside, V: tl.constexpr):
    """The first key tile of a unit that is not before an offset into it."""
    return tl.cdiv(inside, V.group * V.tile).to(tl.int32)


@triton.jit
def locate(
    begin, end, seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, max_keys, V: tl.constexpr, window=0, near=0
):
    """What stands between two offsets of the row of all work; those `near` to where a unit begins stand there.

    Returns the sequence and unit at `begin` and how far inside it is, how many units are touched, and the key tile at
    which the last of them ends.
    """
    lane = tl.arange(0, SEQUENCES)
    num_rows = _rows_of_batch(num_seqs, V)
    before = begin * 0
    begin_before = before
    end_before = before
    begin_sequence = num_seqs * 0
    end_sequence = begin_sequence
    units = begin_sequence
    for first in range(0, num_rows, SEQUENCES):
        work, count = _sequence_work(
            first + lane, seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, max_keys, window, V
        )
        after = before + tl.cumsum(work)
        begin_sequence += tl.sum((after <= begin).to(tl.int32))
        end_sequence += tl.sum((after <= end).to(tl.int32))
        begin_before = tl.maximum(begin_before, tl.max(tl.where(after <= begin, after, 0)))
        end_before = tl.maximum(end_before, tl.max(tl.where(after <= end, after, 0)))
        units += tl.sum(tl.where((after > begin) & (after <= end), count, 0))
        before += tl.sum(work)
    # Work is 0 past the last sequence, which counts those rows as ended too.
    begin_sequence = tl.minimum(begin_sequence, num_rows)
    end_sequence = tl.minimum(end_sequence, num_rows)
    begin_unit, inside = _position(
        begin - begin_before, near, begin_sequence, seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads,
        max_keys, window, V,
    )  # fmt: skip
    end_unit, end_inside = _position(
        end - end_before, near, end_sequence, seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads,
        max_keys, window, V,
    )  # fmt: skip
    units += end_unit - begin_unit
    # A piece that ends between two units ends with the whole of the first.
    end_tile = tile_at(end_inside, V)
    whole = end_tile == 0
    return begin_sequence, begin_unit, inside, units + 1 - whole.to(tl.int32), tl.where(whole, LAST_TILE, end_tile)


@triton.jit
def _divided(total, count):
    """`total / count` in 64 bits, rounded up: division of such numbers is a slow call."""
    result = (total.to(tl.float32) / count.to(tl.float32)).to(tl.int64)
    result += ((total - result * count).to(tl.float32) / count.to(tl.float32)).to(tl.int64)
    rest = total - result * count
    return result + (rest > 0).to(tl.int64) - (rest <= -count).to(tl.int64)


@triton.jit
def equal_share(total, V: tl.constexpr, alike=0):
    """Begin and end of this program's share, and how near to a unit's beginning is as good as there.

    Of so many units that are `alike`, each is cut into as many parts, or programs get as many whole ones each, where
    that makes shares hardly longer.
    """
    # Less than four tiles are not worth a second program on a multiprocessor.
    several = tl.maximum(tl.cdiv(total, 2 * V.least_work), tl.num_programs(0) // V.resident)
    needed = tl.minimum(tl.minimum(tl.cdiv(total, V.least_work), several), tl.num_programs(0))
    needed = tl.maximum(needed, 1).to(tl.int32)
    count = needed
    units = 1
    parts = 1
    if alike > 0:
        # Programs have `units` whole ones each, or a unit has `parts`.
        units = tl.cdiv(alike, needed)
        parts = tl.maximum(needed // alike, 1)
        work = total.to(tl.float32)
        if work * units / (parts * alike) <= work * 1.04 / needed + V.unit_cost:
            count = alike
        else:
            units = 1
            parts = 1
    whole = _divided(total, count) * units
    share = (whole.to(tl.float32) / parts).to(tl.int64) + 1
    program = tl.program_id(0)
    before = program // parts * whole
    begin = tl.minimum(before + tl.minimum(program % parts * share, whole), total)
    end = tl.minimum(before + tl.minimum((program % parts + 1) * share, whole), total)
    return begin, end, tl.minimum(share // 4, V.unit_cost)


@triton.jit
def share_of(seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, max_keys, V: tl.constexpr, window):
    """Begin and end of this program's share of all work, and how near to a unit's beginning is as good as there."""
    total, _, alike = all_work(seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, max_keys, V, window)
    return equal_share(total, V, alike)


@triton.jit
def piece_of(
    begin, end, near, seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, max_keys, V: tl.constexpr, window
):
    """Sequence, unit and tile at which a share begins, how many units it touches, and the tile at which the last ends.

    One that would begin or end near a unit's beginning does so there: that costs less than to combine two parts.
    """
    sequence, unit, inside, units, end_tile = locate(
        begin, end, seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, max_keys, V, window, near
    )
    if units > 0:
        _, queries = query_range(sequence, cu_seqlens_q, num_tokens, num_seqs, V)
        tiles = query_tiles(queries, V)
        sequence, unit = following(sequence, unit, tiles, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, V)
    return sequence, unit, tile_at(inside, V), units, end_tile


@triton.jit
def read_piece(piece, valid=True):
    """What `write_piece` wrote."""
    sequence = tl.load(piece + SEQUENCE, mask=valid, other=0)
    unit = tl.load(piece + UNIT, mask=valid, other=0)
    first = tl.load(piece + FIRST, mask=valid, other=0)
    units = tl.load(piece + UNITS, mask=valid, other=0)
    return sequence, unit, first, units, tl.load(piece + END, mask=valid, other=0)


@triton.jit
def write_piece(piece, sequence, unit, first, units, end_tile, valid=True):
    """Writes a piece, or several."""
    tl.store(piece + SEQUENCE, sequence, mask=valid)
    tl.store(piece + UNIT, unit, mask=valid)
    tl.store(piece + FIRST, first, mask=valid)
    tl.store(piece + UNITS, units, mask=valid)
    tl.store(piece + END, end_tile, mask=valid)


@triton.jit
def deal(seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, max_keys, V: tl.constexpr, window=0):
    """The piece of this program, see `piece_of`."""
    begin, end, near = share_of(seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, max_keys, V, window)
    return piece_of(begin, end, near, seq_lens, cu_seqlens_q, num_tokens, num_seqs, num_kv_heads, max_keys, V, window)
