"""Stored numbers and what they stand for: widening, scales, and query rows that float16 can hold."""

import triton
import triton.language as tl

_TINY: tl.constexpr = tl.constexpr(2.0**-100)
_INSIDE_FLOAT16: tl.constexpr = tl.constexpr(2.0**14)


@triton.jit
def e4m3_bits_to_float16(code):
    """float16 of e4m3 codes in bytes, as s eeee mmm and s eeeee mmm0000000 differ by 2^8 alone, subnormals too.

    The one code of each sign that is no number carries into the exponent of no number.
    """
    code = code.to(tl.uint16)
    magnitude = code & 0x7F
    bits = ((code & 0x80) << 8) | (magnitude << 7) | (((magnitude + 1) & 0x80) << 7)
    return bits.to(tl.float16, bitcast=True) * 256.0


@triton.jit
def widen(stored, like: tl.constexpr, S: tl.constexpr):
    """`stored` in the type of products with queries or weights of type `like`."""
    if S.dtype == "":
        wide = stored
    else:
        if S.dtype == "e4m3 bits":
            stored = e4m3_bits_to_float16(stored)
        WIDE: tl.constexpr = tl.float16 if S.float8 and like.primitive_bitwidth == 16 else like
        wide = stored.to(WIDE)
    return wide


@triton.jit
def normalise(query0, query1, V: tl.constexpr):
    """Query rows divided by powers of two until float16 holds them, and those powers, float32 [BLOCK_M, 1]."""
    largest = tl.max(tl.abs(query0.to(tl.float32)), 1)
    if V.key_widths[1] > 0:
        largest = tl.maximum(largest, tl.max(tl.abs(query1.to(tl.float32)), 1))
    exponent = tl.maximum(largest, _TINY).to(tl.int32, bitcast=True) & 0x7F800000
    power = (exponent.to(tl.float32, bitcast=True) / _INSIDE_FLOAT16)[:, None]
    inverse = 1.0 / power
    query0 = (query0.to(tl.float32) * inverse).to(tl.float16)
    if V.key_widths[1] > 0:
        query1 = (query1.to(tl.float32) * inverse).to(tl.float16)
    else:
        query1 = query0
    return (query0, query1), power


@triton.jit
def static_scale(scale, head, S: tl.constexpr):
    """The scale of one head's stored numbers; 1 where tokens have their own."""
    if S.scale == "scalar":
        factor = tl.load(scale)
    elif S.scale == "head":
        factor = tl.load(scale + head)
    else:
        factor = 1.0
    return factor
