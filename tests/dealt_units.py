"""The units of work that a launch of attention has, in plain Python."""


def units_of(queries, keys, heads, v):
    """Every unit that the launch serves, as (sequence, unit), with its number of key tiles."""
    for sequence, (count, length) in enumerate(zip(queries, keys, strict=True)):
        rows = count * v.group
        if not v.rows_above < rows <= v.rows_upto:
            continue
        tiles = -(-rows // v.block_m)
        for unit in range(tiles * heads):
            last = (min(rows, (unit % tiles + 1) * v.block_m) - 1) // v.group
            seen = min(max(length - count + 1 + last, 0), length) if v.causal else length
            yield (sequence, unit), max(-(-seen // v.tile), 1)
