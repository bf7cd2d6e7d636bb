// Floats to the 8-bit types, rounded to nearest even, never past the largest number.
#pragma once

#include "vec.h"

namespace paged {

inline float largest_of(Type type) { return type == E4M3 ? 448.0f : type == E5M2 ? 57344.0f : 127.0f; }

// MANTISSA bits behind the point, SUBNORMAL * 2^-23 the smallest step, BIAS the difference of the exponents' biases.
template <int MANTISSA, int BIAS>
INLINE UVec to_float8(Vec v, float subnormal) {
  constexpr int SHIFT = 23 - MANTISSA;
  const UVec bits = bit_cast<UVec>(v), magnitude = bits & 0x7fffffffu;
  const Vec size = bit_cast<Vec>(magnitude);
  const UVec rounded = (magnitude + ((1u << (SHIFT - 1)) - 1) + ((magnitude >> SHIFT) & 1u)) >> SHIFT;
  const UVec normal = rounded - (unsigned(BIAS) << MANTISSA);
  const UVec small = bit_cast<UVec>(size + splat(subnormal)) - bit_cast<uint32_t>(subnormal);
  Vec result = select(bit_cast<IVec>(magnitude) < ((BIAS + 1) << 23), bit_cast<Vec>(small), bit_cast<Vec>(normal));
  result = select(v == v, result, bit_cast<Vec>(splat_int(0x7f)));
  return bit_cast<UVec>(result) | ((bits >> 24) & 0x80u);
}

INLINE BVec quantise(Vec v, Type type) {
  if (type == I8) {
    const Vec inside = select(v == v, minimum(maximum(v, splat(-128.0f)), splat(127.0f)), Vec{});
    return __builtin_convertvector(bit_cast<UVec>(inside + splat(12582912.0f)), BVec);  // rounds to an integer
  }
  const Vec limit = splat(largest_of(type));
  const Vec inside = select(v == v, minimum(maximum(v, -limit), limit), v);
  return __builtin_convertvector(type == E4M3 ? to_float8<3, 120>(inside, 16384.0f) : to_float8<2, 112>(inside, 128.0f),
                                 BVec);
}

}  // namespace paged
