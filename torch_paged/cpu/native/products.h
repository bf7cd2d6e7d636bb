// The two products of attention, keys by query and weights by values, in two forms:
// few rows read stored keys and values as they lie (`scores`, `accumulate`); many rows multiply packed tiles (`product`).
//
// Both are written over `Dot`, which says what one multiplication takes: Dot32 a float in every lane, Dot16 a pair of
// bf16 in every lane (their products are added up in float). Either way a lane is 32 bits.
#pragma once

#include "vec.h"

namespace paged {

struct Dot32 {
  typedef Vec Operand;
  static constexpr int PER_LANE = 1;
  INLINE Vec multiply_add(Operand a, Operand b, Vec sum) { return a * b + sum; }
  template <class T>
  INLINE Operand read(const T* from) { return load(from); }
  template <class T>
  INLINE Operand read(const T* from, int n) { return load(from, n); }
  INLINE void write(void* to, Vec v) { std::memcpy(to, &v, sizeof v); }
};

#if defined(__AVX512BF16__)
struct Dot16 {
  typedef __m512i Operand;
  static constexpr int PER_LANE = 2;
  INLINE Vec multiply_add(Operand a, Operand b, Vec sum) {
    return bit_cast<Vec>(_mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(a), bit_cast<__m512bh>(b)));
  }
  INLINE Operand read(const bf16* from) { return _mm512_loadu_si512(from); }
  INLINE Operand read(const bf16* from, int n) { return _mm512_maskz_loadu_epi16(~0u >> (32 - n), from); }
  template <class T>
  INLINE Operand read(const T* from) {
    return Bytes<T>::widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  template <class T>
  INLINE Operand read(const T* from, int n) {
    return Bytes<T>::widen(_mm256_maskz_loadu_epi8(~0u >> (32 - n), from));
  }
  INLINE void write(void* to, Vec v) {
    const HVec h = to_bf16(v);
    std::memcpy(to, &h, sizeof h);
  }

  // 32 bytes to 32 bf16, all of them exact: a table of 128 magnitudes gives each half of the result.
  template <class T>
  struct Bytes;
};

struct MagnitudeTable {
  alignas(64) uint8_t low[128], high[128];
  template <class Magnitude>
  constexpr MagnitudeTable(Magnitude magnitude) : low(), high() {
    for (int i = 0; i < 128; i++) low[i] = magnitude(i) & 0xff, high[i] = magnitude(i) >> 8;
  }
  INLINE __m512i widen(const MagnitudeTable& table, __m256i bytes) {
    const __m512i index = _mm512_castsi256_si512(bytes);
    const __m256i low = _mm512_castsi512_si256(
        _mm512_permutex2var_epi8(_mm512_load_si512(table.low), index, _mm512_load_si512(table.low + 64)));
    const __m256i high = _mm512_castsi512_si256(
        _mm512_permutex2var_epi8(_mm512_load_si512(table.high), index, _mm512_load_si512(table.high + 64)));
    const __m256i sign = _mm256_and_si256(bytes, _mm256_set1_epi8(-128));
    return _mm512_or_si512(_mm512_cvtepu8_epi16(low),
                           _mm512_slli_epi16(_mm512_cvtepu8_epi16(_mm256_or_si256(high, sign)), 8));
  }
};

struct E4M3Magnitude {
  constexpr int operator()(int i) const {
    if (i == 0x7f) return 0x7fc0;
    if (i >= 8) return (i << 4) + (120 << 7);
    if (i == 0) return 0;
    int exponent = 118, mantissa = i;  // i * 2^-9
    while (mantissa < 8) mantissa <<= 1, exponent--;
    return ((exponent + 3) << 7) + ((mantissa & 7) << 4);
  }
};
struct E5M2Magnitude {
  constexpr int operator()(int i) const {
    if (i >= 0x7c) return 0x7f80 + ((i & 3) << 5);
    if (i >= 4) return (i << 5) + (112 << 7);
    if (i == 0) return 0;
    int exponent = 111, mantissa = i;  // i * 2^-16
    while (mantissa < 4) mantissa <<= 1, exponent--;
    return ((exponent + 2) << 7) + ((mantissa & 3) << 5);
  }
};
static constexpr MagnitudeTable E4M3_TABLE{E4M3Magnitude()}, E5M2_TABLE{E5M2Magnitude()};

template <>
struct Dot16::Bytes<e4m3> {
  INLINE __m512i widen(__m256i bytes) { return MagnitudeTable::widen(E4M3_TABLE, bytes); }
};
template <>
struct Dot16::Bytes<e5m2> {
  INLINE __m512i widen(__m256i bytes) { return MagnitudeTable::widen(E5M2_TABLE, bytes); }
};
template <>
struct Dot16::Bytes<i8> {
  INLINE __m512i widen(__m256i bytes) {
    const __m512 a = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
    const __m512 b = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
    return bit_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a));
  }
};

// Elements of two rows, in pairs: lane i of `first` holds element i of a and of b, `second` goes on at W.
INLINE void pair_up(__m512i a, __m512i b, __m512i& first, __m512i& second) {
  alignas(64) static constexpr uint16_t order[2][32] = {
      {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
      {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
  first = _mm512_permutex2var_epi16(a, _mm512_load_si512(order[0]), b);
  second = _mm512_permutex2var_epi16(a, _mm512_load_si512(order[1]), b);
}
#endif

template <class Dot>
constexpr int WIDTH = W * Dot::PER_LANE;  // elements of an operand

template <class Dot>
INLINE typename Dot::Operand operand(const float* lanes) { return bit_cast<typename Dot::Operand>(read<Vec>(lanes)); }
template <class Dot>
INLINE typename Dot::Operand broadcast(const float* lane) { return bit_cast<typename Dot::Operand>(splat_int(bit_cast<int32_t>(*lane))); }

INLINE void prefetch(const char* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
}

// Rows of keys or of values, one pointer each. Behind the last, up to a multiple of W, stand rows of zeros.
typedef const char* const* Rows;

// --- few rows ---------------------------------------------------------------------------------------------------

// scores[row][key] = query row . key, for HEADS query rows at a time, W / HEADS keys at a time.
template <class Dot, class T, int HEADS>
INLINE void scores_of(const float* query, int64_t query_lanes, Rows keys, int num_keys, int dim, float* scores,
                            int64_t stride, Rows ahead, int ahead_bytes) {
  constexpr int KEYS = W / HEADS;
  for (int key = 0; key < num_keys; key += KEYS) {
    Vec sums[W] = {};
    const T* row[KEYS];
    for (int k = 0; k < KEYS; k++) row[k] = reinterpret_cast<const T*>(keys[key + k]);
    if (ahead)
      for (int k = 0; k < KEYS; k++) prefetch(ahead[key + k], ahead_bytes);
    int d = 0;
    const float* q = query;
    for (; d + WIDTH<Dot> <= dim; d += WIDTH<Dot>, q += W) {
      typename Dot::Operand heads[HEADS];
#pragma GCC unroll 8
      for (int h = 0; h < HEADS; h++) heads[h] = operand<Dot>(q + h * query_lanes);
#pragma GCC unroll 16
      for (int k = 0; k < KEYS; k++) {
        const typename Dot::Operand elements = Dot::read(row[k] + d);
#pragma GCC unroll 8
        for (int h = 0; h < HEADS; h++) sums[h * KEYS + k] = Dot::multiply_add(heads[h], elements, sums[h * KEYS + k]);
      }
    }
    if (d < dim) {
#pragma GCC unroll 16
      for (int k = 0; k < KEYS; k++) {
        const typename Dot::Operand elements = Dot::read(row[k] + d, dim - d);
#pragma GCC unroll 8
        for (int h = 0; h < HEADS; h++)
          sums[h * KEYS + k] = Dot::multiply_add(operand<Dot>(q + h * query_lanes), elements, sums[h * KEYS + k]);
      }
    }
    const Vec all = sum_each(sums);
    for (int h = 0; h < HEADS; h++)
      std::memcpy(scores + h * stride + key, reinterpret_cast<const float*>(&all) + h * KEYS, 4 * KEYS);
  }
}

template <class Dot, class T>
void scores(const float* query, int64_t query_lanes, int rows, Rows keys, int num_keys, int dim, float* out,
            int64_t stride, Rows ahead, int ahead_bytes) {
  int r = 0;
  for (; r + 4 <= rows; r += 4, ahead = nullptr)
    scores_of<Dot, T, 4>(query + r * query_lanes, query_lanes, keys, num_keys, dim, out + r * stride, stride, ahead, ahead_bytes);
  for (; r + 2 <= rows; r += 2, ahead = nullptr)
    scores_of<Dot, T, 2>(query + r * query_lanes, query_lanes, keys, num_keys, dim, out + r * stride, stride, ahead, ahead_bytes);
  for (; r < rows; r++, ahead = nullptr)
    scores_of<Dot, T, 1>(query + r * query_lanes, query_lanes, keys, num_keys, dim, out + r * stride, stride, ahead, ahead_bytes);
}

// Lanes of one key's (Dot16: two keys') values, `n` elements at most.
template <class Dot, class T, int VECS>
INLINE void value_lanes(const T* a, [[maybe_unused]] const T* b, int n, typename Dot::Operand* lanes) {
#pragma GCC unroll 4
  for (int v = 0; v < VECS; v += Dot::PER_LANE) {
    const int first = v * W, left = n - first;
    const bool whole = left >= WIDTH<Dot>;
    if constexpr (Dot::PER_LANE == 1) {
      lanes[v] = whole ? Dot::read(a + first) : left > 0 ? Dot::read(a + first, left) : typename Dot::Operand{};
    } else {
#if defined(__AVX512BF16__)
      const __m512i x = whole ? Dot::read(a + first) : left > 0 ? Dot::read(a + first, left) : __m512i{};
      const __m512i y = whole ? Dot::read(b + first) : left > 0 ? Dot::read(b + first, left) : __m512i{};
      pair_up(x, y, lanes[v], lanes[v + 1]);
#endif
    }
  }
}

// out[row] = factor[row] * out[row] + sum over keys of weight * value, for HEADS rows and VECS vectors of elements.
template <class Dot, class T, int HEADS, int VECS>
INLINE void accumulate_panel(const float* weights, int64_t weight_lanes, Rows values, int num_keys, int first,
                                   int n, const float* factors, float* out, int64_t stride, Rows ahead, int skip,
                                   int ahead_bytes) {
  Vec sums[HEADS][VECS];
#pragma GCC unroll 8
  for (int h = 0; h < HEADS; h++)
#pragma GCC unroll 8
    for (int v = 0; v < VECS; v++) sums[h][v] = read<Vec>(out + h * stride + first + v * W) * splat(factors[h]);
  for (int key = 0; key < num_keys; key += Dot::PER_LANE) {
    typename Dot::Operand lanes[VECS];
    const T* a = reinterpret_cast<const T*>(values[key]) + first;
    const T* b = reinterpret_cast<const T*>(values[key + Dot::PER_LANE - 1]) + first;
    if (n >= VECS * W)
      value_lanes<Dot, T, VECS>(a, b, VECS * W, lanes);
    else
      value_lanes<Dot, T, VECS>(a, b, n, lanes);
    if (ahead)
      for (int k = 0; k < Dot::PER_LANE; k++) prefetch(ahead[key + k] + skip, ahead_bytes);
#pragma GCC unroll 8
    for (int h = 0; h < HEADS; h++) {
      const typename Dot::Operand weight = broadcast<Dot>(weights + h * weight_lanes + key / Dot::PER_LANE);
#pragma GCC unroll 8
      for (int v = 0; v < VECS; v++) sums[h][v] = Dot::multiply_add(weight, lanes[v], sums[h][v]);
    }
  }
#pragma GCC unroll 8
  for (int h = 0; h < HEADS; h++)
#pragma GCC unroll 8
    for (int v = 0; v < VECS; v++) store(out + h * stride + first + v * W, sums[h][v]);
}

// The keys `ahead` are prefetched along the way, each panel a part of every row.
template <class Dot, class T, int HEADS>
INLINE void accumulate_rows(const float* weights, int64_t weight_lanes, Rows values, int num_keys, int dim,
                                  const float* factors, float* out, int64_t stride, Rows ahead, int ahead_bytes) {
  constexpr int VECS = PANEL_VECS;
  const int panels = (dim + VECS * W - 1) / (VECS * W), share = ((ahead_bytes + panels - 1) / panels + 63) & ~63;
  for (int p = 0; p < panels; p++) {
    const int first = p * VECS * W, skip = p * share, bytes = ahead_bytes - skip < share ? ahead_bytes - skip : share;
    accumulate_panel<Dot, T, HEADS, VECS>(weights, weight_lanes, values, num_keys, first, dim - first, factors, out,
                                          stride, bytes > 0 ? ahead : nullptr, skip, bytes);
  }
}

template <class Dot, class T>
void accumulate(const float* weights, int64_t weight_lanes, int rows, Rows values, int num_keys, int dim,
                const float* factors, float* out, int64_t stride, Rows ahead, int ahead_bytes) {
  int r = 0;
  for (; r + 4 <= rows; r += 4, ahead = nullptr)
    accumulate_rows<Dot, T, 4>(weights + r * weight_lanes, weight_lanes, values, num_keys, dim, factors + r,
                               out + r * stride, stride, ahead, ahead_bytes);
  for (; r < rows; r++, ahead = nullptr)
    accumulate_rows<Dot, T, 1>(weights + r * weight_lanes, weight_lanes, values, num_keys, dim, factors + r,
                               out + r * stride, stride, ahead, ahead_bytes);
}

}  // namespace paged
