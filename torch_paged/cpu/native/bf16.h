// Pairs of bf16 in every lane, where the processor multiplies them (AVX-512 BF16): stored numbers become bf16 exactly.
#pragma once

#include "vec.h"

#if defined(__AVX512BF16__)

namespace paged {

// A table of 128 magnitudes gives each half of a result.
struct MagnitudeTable {
  alignas(64) uint8_t low[128], high[128];
  template <class Magnitude>
  constexpr MagnitudeTable(Magnitude magnitude) : low(), high() {
    for (int i = 0; i < 128; i++) low[i] = magnitude(i) & 0xff, high[i] = magnitude(i) >> 8;
  }
};

// bf16 of a float8 whose sign is off: MANTISSA bits, exponents BIAS apart, not finite from FIRST_SPECIAL on.
template <int MANTISSA, int BIAS, int FIRST_SPECIAL>
struct Magnitude {
  constexpr int operator()(int i) const {
    if (i >= FIRST_SPECIAL) return 0x7f80 + ((i & ((1 << MANTISSA) - 1)) << (7 - MANTISSA));
    if (i == 0) return 0;
    int exponent = (i >> MANTISSA) + BIAS, mantissa = i & ((1 << MANTISSA) - 1);
    if (i < 1 << MANTISSA)  // subnormal: shift until the implicit bit is there
      for (exponent++; mantissa < 1 << MANTISSA;) mantissa <<= 1, exponent--;
    return (exponent << 7) + ((mantissa & ((1 << MANTISSA) - 1)) << (7 - MANTISSA));
  }
};
static constexpr MagnitudeTable E4M3_TABLE{Magnitude<3, 120, 0x7f>()}, E5M2_TABLE{Magnitude<2, 112, 0x7c>()};

// bf16 of an integer.
struct Integer {
  constexpr int operator()(int i) const {
    if (i == 0) return 0;
    int exponent = 0;
    while (i >> (exponent + 1)) exponent++;
    return ((127 + exponent) << 7) + ((i << (7 - exponent)) & 0x7f);
  }
};
static constexpr MagnitudeTable INTEGER_TABLE{Integer()};

struct Orders {
  alignas(64) uint8_t bytes[2][64];   // of a and b in turn: the first 32 of each, the last 32
  alignas(64) uint16_t halves[2][32];
  constexpr Orders() : bytes(), halves() {
    for (int i = 0; i < 64; i++)
      for (int half = 0; half < 2; half++) {
        bytes[half][i] = uint8_t(i / 2 + 32 * half + 64 * (i % 2));
        if (i < 32) halves[half][i] = uint16_t(i / 2 + 16 * half + 32 * (i % 2));
      }
  }
};
static constexpr Orders ORDERS;

INLINE __m512i look_up(const uint8_t* table, __m512i index) {
  return _mm512_permutex2var_epi8(_mm512_load_si512(table), index, _mm512_load_si512(table + 64));
}

// Halves of 64 magnitudes and bytes whose upper bits are their signs, to 64 bf16.
INLINE void join(__m512i low, __m512i high, __m512i signs, __m512i* to) {
  high = _mm512_ternarylogic_epi32(high, signs, _mm512_set1_epi8(-128), 0xf8);  // high | (signs & 0x80)
  to[0] = _mm512_permutex2var_epi8(low, _mm512_load_si512(ORDERS.bytes[0]), high);
  to[1] = _mm512_permutex2var_epi8(low, _mm512_load_si512(ORDERS.bytes[1]), high);
}

INLINE void widen(const MagnitudeTable& table, __m512i bytes, __m512i* to) {
  join(look_up(table.low, bytes), look_up(table.high, bytes), bytes, to);
}

// 64 bytes, read from a row of the type, to 64 bf16.
INLINE void widen(const e4m3*, __m512i bytes, __m512i* to) { widen(E4M3_TABLE, bytes, to); }
INLINE void widen(const e5m2*, __m512i bytes, __m512i* to) { widen(E5M2_TABLE, bytes, to); }
INLINE void widen(const i8*, __m512i bytes, __m512i* to) {
  const __m512i size = _mm512_abs_epi8(bytes), high = look_up(INTEGER_TABLE.high, size);
  const __mmask64 is_128 = _mm512_movepi8_mask(size);  // which the table has no room for: 0x4300
  join(look_up(INTEGER_TABLE.low, size), _mm512_mask_mov_epi8(high, is_128, _mm512_set1_epi8(0x43)), bytes, to);
}

struct Dot16 {
  typedef __m512i Operand;
  static constexpr int PER_LANE = 2;
  INLINE Vec multiply_add(Operand a, Operand b, Vec sum) {
    return bit_cast<Vec>(_mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(a), bit_cast<__m512bh>(b)));
  }
  INLINE Operand read(const bf16* from) { return _mm512_loadu_si512(from); }
  INLINE Operand read(const bf16* from, int n) { return _mm512_maskz_loadu_epi16(~0u >> (32 - n), from); }
  INLINE void read_two(const bf16* from, Operand* to) { to[0] = read(from), to[1] = read(from + 32); }
  template <class T>
  INLINE Operand read(const T* from, int n = 32) {
    Operand two[2];
    widen(from, _mm512_maskz_loadu_epi8(~0u >> (32 - n), from), two);
    return two[0];
  }
  template <class T>
  INLINE void read_two(const T* from, Operand* to) { widen(from, _mm512_loadu_si512(from), to); }
  INLINE void write(void* to, Vec v) {
    const HVec h = to_bf16(v);
    std::memcpy(to, &h, sizeof h);
  }
  // Elements of two rows, one of each in a lane.
  INLINE void pair_up(Operand a, Operand b, Operand* lanes) {
    lanes[0] = _mm512_permutex2var_epi16(a, _mm512_load_si512(ORDERS.halves[0]), b);
    lanes[1] = _mm512_permutex2var_epi16(a, _mm512_load_si512(ORDERS.halves[1]), b);
  }
};

}  // namespace paged

#endif
