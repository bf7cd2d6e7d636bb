"""The units of work that a launch of attention has, in plain Python."""


def units_of(queries, keys, heads, v, window=None):
    """Every unit that the launch serves, as (sequence, unit), with the number of key tiles that its rows see."""
    for sequence, (count, length) in enumerate(zip(queries, keys, strict=True)):
        rows = count * v.group
        if not v.rows_above < rows <= v.rows_upto:
            continue
        tiles = -(-rows // v.block_m)
        for unit in range(tiles * heads):
            first_row = unit % tiles * v.block_m
            hidden = 0 if window is None else max(_seen_by(first_row // v.group, count, length, v) - window, 0)
            seen = _seen_by((min(rows, first_row + v.block_m) - 1) // v.group, count, length, v)
            yield (sequence, unit), max(-(-seen // v.tile) - hidden // v.tile, 1)


def _seen_by(token, queries, keys, v):
    """Keys that a query of a sequence sees without a window."""
    return min(max(keys - queries + 1 + token, 0), keys) if v.causal else keys
