// Vectors of W floats by the compiler's vector extension, what instruction sets add, and the conversions to and from
// the stored types.
#pragma once

#include <cstring>

#include "paged.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

namespace paged {

#if defined(__AVX512F__)
constexpr int W = 16, PANEL_VECS = 4;
#elif defined(__AVX__)
constexpr int W = 8, PANEL_VECS = 2;
#elif defined(__aarch64__)
constexpr int W = 4, PANEL_VECS = 4;
#else
constexpr int W = 4, PANEL_VECS = 2;
#endif

typedef float Vec __attribute__((vector_size(4 * W)));
typedef int32_t IVec __attribute__((vector_size(4 * W)));
typedef uint32_t UVec __attribute__((vector_size(4 * W)));
typedef uint16_t HVec __attribute__((vector_size(2 * W)));
typedef uint8_t BVec __attribute__((vector_size(W)));
typedef int8_t SVec __attribute__((vector_size(W)));

struct f16 { uint16_t bits; };
struct bf16 { uint16_t bits; };
struct e4m3 { uint8_t bits; };
struct e5m2 { uint8_t bits; };
typedef int8_t i8;

template <class To, class From>
INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class V>
INLINE V read(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// The first n elements, zeros behind them; nothing past them is touched.
template <class V>
INLINE V read(const void* from, int n) {
#if defined(__AVX512BW__)
  constexpr int size = sizeof(V) / W;
  const __mmask16 mask = __mmask16((1u << n) - 1);
  if constexpr (size == 4) return bit_cast<V>(_mm512_maskz_loadu_epi32(mask, from));
  if constexpr (size == 2) return bit_cast<V>(_mm256_maskz_loadu_epi16(mask, from));
  if constexpr (size == 1) return bit_cast<V>(_mm_maskz_loadu_epi8(mask, from));
#endif
  V v{};
  std::memcpy(&v, from, n * (sizeof(V) / W));
  return v;
}

INLINE Vec splat(float x) { return x - Vec{}; }
INLINE IVec splat_int(int32_t x) { return x - IVec{}; }
INLINE Vec select(IVec where, Vec a, Vec b) {
  return bit_cast<Vec>((where & bit_cast<IVec>(a)) | (~where & bit_cast<IVec>(b)));
}
// Where a or b is NaN, b.
INLINE Vec maximum(Vec a, Vec b) { return a > b ? a : b; }
INLINE Vec minimum(Vec a, Vec b) { return a < b ? a : b; }

INLINE IVec lane_numbers() {
  IVec lanes;
  for (int i = 0; i < W; i++) lanes[i] = i;
  return lanes;
}

template <int... I>
struct Indices {};
template <int N, int... I>
struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <int... I>
struct MakeIndices<0, I...> { typedef Indices<I...> type; };
typedef MakeIndices<W>::type Lanes;

// Chunks of CHUNK lanes of a and b in turn: the even ones (ODD = 0) or the odd ones of both.
template <int CHUNK, int ODD, int... I>
INLINE Vec chunks(Vec a, Vec b, Indices<I...>) {
  return __builtin_shufflevector(a, b, ((I / CHUNK * 2 + ODD) * CHUNK + I % CHUNK)...);
}

// v[i] becomes the sum of lanes of vectors: lane i of the result sums v[i]. `count` is W.
template <int CHUNK = W / 2>
INLINE Vec sum_each(Vec* v) {
#pragma GCC unroll 16
  for (int i = 0; i < CHUNK; i++)
    v[i] = chunks<CHUNK, 0>(v[2 * i], v[2 * i + 1], Lanes()) + chunks<CHUNK, 1>(v[2 * i], v[2 * i + 1], Lanes());
  if constexpr (CHUNK > 1) return sum_each<CHUNK / 2>(v);
  return v[0];
}

template <int CHUNK, int HALF, int... I>
INLINE Vec exchange(Vec a, Vec b, Indices<I...>) {
  return __builtin_shufflevector(a, b, ((I & CHUNK) ? W + (I & ~CHUNK) : (I & ~CHUNK)) + HALF * CHUNK ...);
}

// The W x W matrix of 32-bit lanes, transposed in place.
template <int CHUNK = W / 2>
INLINE void transpose(Vec* v) {
#pragma GCC unroll 16
  for (int i = 0; i < W; i++)
    if (!(i & CHUNK)) {
      const Vec a = v[i], b = v[i + CHUNK];
      v[i] = exchange<CHUNK, 0>(a, b, Lanes());
      v[i + CHUNK] = exchange<CHUNK, 1>(a, b, Lanes());
    }
  if constexpr (CHUNK > 1) transpose<CHUNK / 2>(v);
}

template <int CHUNK, int... I>
INLINE Vec swapped(Vec a, Indices<I...>) {
  return __builtin_shufflevector(a, a, (I ^ CHUNK)...);
}

template <int CHUNK = W / 2>
INLINE float sum_lanes(Vec a) {
  a += swapped<CHUNK>(a, Lanes());
  if constexpr (CHUNK > 1) return sum_lanes<CHUNK / 2>(a);
  return a[0];
}

template <int CHUNK = W / 2>
INLINE float max_lanes(Vec a) {
  a = maximum(a, swapped<CHUNK>(a, Lanes()));
  if constexpr (CHUNK > 1) return max_lanes<CHUNK / 2>(a);
  return a[0];
}

INLINE Vec polynomial(Vec, Vec sum) { return sum; }
template <class... Rest>
INLINE Vec polynomial(Vec x, Vec sum, float next, Rest... rest) {
  return polynomial(x, sum * x + splat(next), rest...);
}

constexpr float LOG2_E = 1.44269504f;

// 2^x for x <= 0, to about one unit in the last place; 0 where the result would be subnormal, for -infinity too; NaN
// stays NaN.
INLINE Vec exp2_negative(Vec x) {
  x = maximum(splat(-127.0f), x);
#if defined(__AVX512F__)
  const Vec n = bit_cast<Vec>(_mm512_roundscale_ps(bit_cast<__m512>(x), 8));
#else
  const Vec magic = splat(12582912.0f);  // adding it rounds to an integer
  const Vec n = x + magic - magic;
#endif
  const Vec p = polynomial(x - n, splat(1.5353359e-4f), 1.3398875e-3f, 9.6184369e-3f, 5.5503324e-2f, 2.4022648e-1f,
                           6.9314718e-1f, 1.0f);
  return p * bit_cast<Vec>((__builtin_convertvector(n, IVec) + 127) << 23);
}

// tanh(x), to a few units in the last place: an odd polynomial near 0, where the formula would cancel.
INLINE Vec tanh_of(Vec x) {
  const Vec size = maximum(x, -x), square = x * x;
  const Vec p = polynomial(square, splat(0.00359213f), -0.00886324f, 0.02186949f, -0.05396825f, 0.13333333f,
                           -0.33333333f);
  const Vec small = x + x * square * p;
  const Vec e = exp2_negative(size * splat(-2 * LOG2_E));
  const Vec large = (splat(1.0f) - e) / (splat(1.0f) + e);
  return select(size < splat(0.35f), small, select(x < Vec{}, -large, large));
}

// W stored numbers, as they lie in memory, to floats.

INLINE Vec half_bits_to_float(UVec h) {
  const UVec magnitude = (h & 0x7fffu) << 13;
  // Exponents are 112 apart; a product mends subnormal ones, 0x7c00 and above are infinite or NaN.
  const Vec finite = bit_cast<Vec>(magnitude) * splat(5.192296858534828e33f);
  const Vec special = bit_cast<Vec>(magnitude | 0x7f800000u);
  const Vec size = select(bit_cast<IVec>(magnitude) >= 0x0f800000, special, finite);
  return bit_cast<Vec>(bit_cast<UVec>(size) | ((h & 0x8000u) << 16));
}

INLINE Vec half_to_float(HVec h) {
#if defined(__AVX512F__)
  return bit_cast<Vec>(_mm512_cvtph_ps(bit_cast<__m256i>(h)));
#elif defined(__F16C__)
  return bit_cast<Vec>(_mm256_cvtph_ps(bit_cast<__m128i>(h)));
#else
  return half_bits_to_float(__builtin_convertvector(h, UVec));
#endif
}

template <class T> struct Stored;
template <> struct Stored<float> {
  typedef Vec Raw;
  INLINE Vec widen(Raw raw) { return raw; }
};
template <> struct Stored<f16> {
  typedef HVec Raw;
  INLINE Vec widen(Raw raw) { return half_to_float(raw); }
};
template <> struct Stored<bf16> {
  typedef HVec Raw;
  INLINE Vec widen(Raw raw) { return bit_cast<Vec>(__builtin_convertvector(raw, UVec) << 16); }
};
template <> struct Stored<e5m2> {  // the upper half of a float16
  typedef BVec Raw;
  INLINE Vec widen(Raw raw) { return half_to_float(__builtin_convertvector(raw, HVec) << 8); }
};
template <> struct Stored<e4m3> {
  typedef BVec Raw;
  INLINE Vec widen(Raw raw) {
    const UVec bits = __builtin_convertvector(raw, UVec), magnitude = bits & 0x7fu;
    const Vec normal = bit_cast<Vec>((magnitude << 20) + 0x3c000000u);
    const Vec subnormal = __builtin_convertvector(bit_cast<IVec>(magnitude), Vec) * splat(0.001953125f);
    const Vec finite = select(bit_cast<IVec>(magnitude) < 8, subnormal, normal);
    const Vec size = select(bit_cast<IVec>(magnitude) == 0x7f, splat(__builtin_nanf("")), finite);
    return bit_cast<Vec>(bit_cast<UVec>(size) | ((bits & 0x80u) << 24));
  }
};
template <> struct Stored<i8> {
  typedef SVec Raw;
  INLINE Vec widen(Raw raw) { return __builtin_convertvector(__builtin_convertvector(raw, IVec), Vec); }
};

template <class T>
INLINE Vec load(const T* from) { return Stored<T>::widen(read<typename Stored<T>::Raw>(from)); }
template <class T>
INLINE Vec load(const T* from, int n) { return Stored<T>::widen(read<typename Stored<T>::Raw>(from, n)); }

INLINE void store(float* to, Vec v) { std::memcpy(to, &v, sizeof v); }

// To bf16, round to nearest even; a NaN stays one.
INLINE HVec to_bf16(Vec v) {
#if defined(__AVX512BF16__)
  return bit_cast<HVec>(_mm512_cvtneps_pbh(bit_cast<__m512>(v)));
#else
  const UVec bits = bit_cast<UVec>(v);
  const UVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const UVec nan = (bits >> 16) | 0x40u;
  return __builtin_convertvector(bit_cast<UVec>(select(v == v, bit_cast<Vec>(rounded), bit_cast<Vec>(nan))), HVec);
#endif
}

// To fp16, round to nearest even.
INLINE HVec to_half(Vec v) {
#if defined(__AVX512F__)
  return bit_cast<HVec>(_mm512_cvtps_ph(bit_cast<__m512>(v), 0));
#elif defined(__F16C__)
  return bit_cast<HVec>(_mm256_cvtps_ph(bit_cast<__m256>(v), 0));
#else
  const UVec bits = bit_cast<UVec>(v), sign = (bits >> 16) & 0x8000u;
  const Vec size = bit_cast<Vec>(bits & 0x7fffffffu);
  const UVec magnitude = bit_cast<UVec>(size);
  // Adding a power of two drops the bits that a subnormal has no room for; a normal loses its last 13.
  const UVec subnormal = bit_cast<UVec>(size + splat(0.5f)) - 0x3f000000u;
  const UVec normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  Vec half = select(bit_cast<IVec>(magnitude) < 0x38800000, bit_cast<Vec>(subnormal), bit_cast<Vec>(normal));
  half = select(bit_cast<IVec>(magnitude) >= 0x477ff000, bit_cast<Vec>(splat_int(0x7c00)), half);
  half = select(size == size, half, bit_cast<Vec>(splat_int(0x7e00)));
  return __builtin_convertvector(bit_cast<UVec>(half) | sign, HVec);
#endif
}

// The first n lanes, narrowed to `type`, as elements i and on of `out`.
INLINE void store_row(char* out, Type type, int64_t i, Vec v, int n) {
  char bytes[4 * W];
  if (type == F32)
    std::memcpy(bytes, &v, sizeof v);
  else {
    const HVec half = type == BF16 ? to_bf16(v) : to_half(v);
    std::memcpy(bytes, &half, sizeof half);
  }
  std::memcpy(out + i * size_of(type), bytes, n * size_of(type));
}

}  // namespace paged
