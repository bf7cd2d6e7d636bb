"""Logits: what becomes of products of queries and keys, and which of them a row sees."""

import triton
import triton.language as tl

LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def tanh(x):
    """Hyperbolic tangent, within a few units of the last place: by a power of two, and near 0 by its series."""
    square = x * x
    series = x * (1.0 + square * (-1 / 3 + square * (2 / 15 - square * (17 / 315))))
    # 1 - 2 / (inf + 1) is 1, so that nothing overflows.
    power = 1.0 - 2.0 / (tl.exp2(x * (2 * LOG2_E)) + 1.0)
    return tl.where(square < 0.04, series, power)


@triton.jit
def sees(position, rows, V: tl.constexpr):
    """[BLOCK_M, TILE] whether the rows see the keys at `position`."""
    visible = rows[0][:, None]
    seen = position < visible
    if V.has.window:
        seen = seen & (position >= visible - rows[3])
    return seen


@triton.jit
def logits(products, tile, rows, factor, cap, V: tl.constexpr):
    """Logits, to base 2, of the products with a tile of keys: c tanh(s / c) - slope |query position - key position|.

    `rows` is every row's number of visible keys, its position and its slope to base 2, and the window; `factor` is
    scale / c, or the scale to base 2 where nothing caps, and `cap` c to base 2.
    """
    scores = products * factor
    if V.has.softcap:
        scores = tanh(scores) * cap
    if V.has.alibi:
        # Whole numbers are subtracted as such before they are rounded to float32: a tile may lie far behind the first.
        distance = (rows[1] - tile * V.tile).to(tl.float32)[:, None] - tl.arange(0, V.tile).to(tl.float32)[None, :]
        if not V.causal:
            distance = tl.abs(distance)
        scores -= rows[2][:, None] * distance
    return scores
