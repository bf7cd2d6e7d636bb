"""Stored numbers and what they stand for: widening, scales, and query rows that float16 can hold."""

import triton
import triton.language as tl

_TINY: tl.constexpr = tl.constexpr(2.0**-100)
_INSIDE_FLOAT16: tl.constexpr = tl.constexpr(2.0**14)
HEADROOM: tl.constexpr = tl.constexpr(2.0**15)  # what float16 leaves above 1


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
def _int8_to_float16(four):
    """float16 of int8, four at a time: a byte and 0x64 is 1024 and what the byte says."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 bytes, offset;
        xor.b32 bytes, $2, 0x80808080;
        mov.b32 offset, 0x64806480;
        prmt.b32 $0, bytes, 0x64646464, 0x4140;
        prmt.b32 $1, bytes, 0x64646464, 0x4342;
        sub.f16x2 $0, $0, offset;
        sub.f16x2 $1, $1, offset;
        }
        """,
        "=&r,=&r,r", [four], tl.float16, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def widen(stored, like: tl.constexpr, S: tl.constexpr):
    """`stored` in the type of products with queries or weights of type `like`."""
    if S.dtype == "":
        wide = stored
    elif S.dtype == "int8" and S.packed:
        wide = _int8_to_float16(stored)
    else:
        if S.dtype == "e4m3 bits":
            stored = e4m3_bits_to_float16(stored)
        wide = stored.to(tl.float16)
    if like.primitive_bitwidth == 32:
        wide = wide.to(tl.float32)
    return wide


# From two pairs in $2: $0 is float16 of their first numbers, $1 of their second ones.
_E4M3_PAIRS: tl.constexpr = tl.constexpr("""
    {
    .reg .b32 bytes;
    .reg .b16 first, second;
    prmt.b32 bytes, $2, 0, 0x3120;
    mov.b32 {first, second}, bytes;
    cvt.rn.f16x2.e4m3x2 $0, first;
    cvt.rn.f16x2.e4m3x2 $1, second;
    }
""")
_E5M2_PAIRS: tl.constexpr = tl.constexpr("""
    prmt.b32 $0, $2, 0, 0x2404;
    and.b32 $1, $2, 0xff00ff00;
""")
_INT8_PAIRS: tl.constexpr = tl.constexpr("""
    {
    .reg .b32 bytes, offset;
    xor.b32 bytes, $2, 0x80808080;
    mov.b32 offset, 0x64806480;
    prmt.b32 $0, bytes, 0x64646464, 0x4240;
    prmt.b32 $1, bytes, 0x64646464, 0x4341;
    sub.f16x2 $0, $0, offset;
    sub.f16x2 $1, $1, offset;
    }
""")


@triton.jit
def widen_pairs(pairs, S: tl.constexpr):
    """float16 of the first and of the second of each two stored numbers that stand together in one of 16 bits."""
    if S.packed:
        CODE: tl.constexpr = _E4M3_PAIRS if S.dtype == "e4m3" else _E5M2_PAIRS if S.dtype == "e5m2" else _INT8_PAIRS
        first, second = tl.inline_asm_elementwise(
            CODE, "=&r,=&r,r", [pairs], (tl.float16, tl.float16), is_pure=True, pack=2
        )
    else:
        codes = pairs.to(tl.uint16, bitcast=True)
        first, second = codes.to(tl.uint8), (codes >> 8).to(tl.uint8)
        if S.dtype == "e5m2":
            first, second = first.to(tl.float8e5, bitcast=True), second.to(tl.float8e5, bitcast=True)
        elif S.dtype == "int8":
            first, second = first.to(tl.int8, bitcast=True), second.to(tl.int8, bitcast=True)
        first, second = widen(first, tl.float16, S), widen(second, tl.float16, S)
    return first, second


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
