// The two products of attention, keys by query and weights by values, in two forms:
// few rows read stored keys and values as they lie (`scores`, `accumulate`), many rows multiply packed tiles (tiles.h).
//
// Both are written over `Dot`, which says what one multiplication takes: Dot32 a float in every lane, Dot16 (bf16.h) a
// pair of bf16 (their products are added up in float). Either way a lane is 32 bits.
#pragma once

#include "bf16.h"

namespace paged {

struct Dot32 {
  typedef Vec Operand;
  static constexpr int PER_LANE = 1;
  INLINE Vec multiply_add(Operand a, Operand b, Vec sum) { return a * b + sum; }
  template <class T>
  INLINE Operand read(const T* from) { return load(from); }
  template <class T>
  INLINE Operand read(const T* from, int n) { return load(from, n); }
  template <class T>
  INLINE void read_two(const T* from, Operand* to) { to[0] = load(from), to[1] = load(from + W); }
  INLINE void write(void* to, Vec v) { std::memcpy(to, &v, sizeof v); }
  INLINE void pair_up(Operand a, Operand, Operand* lanes) { *lanes = a; }
};

template <class Dot>
constexpr int WIDTH = W * Dot::PER_LANE;  // elements of an operand

// N lanes of v to each of W / N rows.
template <int N, int PART, int... I>
INLINE void store_parts(float* to, int64_t stride, Vec v, Indices<I...>) {
  typedef float Part __attribute__((vector_size(4 * N)));
  const Part part = __builtin_shufflevector(v, v, (PART * N + I)...);
  std::memcpy(to + PART * stride, &part, sizeof part);
  if constexpr ((PART + 1) * N < W) store_parts<N, PART + 1>(to, stride, v, Indices<I...>());
}

template <class Dot>
INLINE typename Dot::Operand operand(const float* lanes) {
  return bit_cast<typename Dot::Operand>(read<Vec>(lanes));
}
template <class Dot>
INLINE typename Dot::Operand broadcast(const float* lane) {
  return bit_cast<typename Dot::Operand>(splat_int(bit_cast<int32_t>(*lane)));
}

// A whole operand, or its first n elements where there are no more, or zeros.
template <class Dot, class T>
INLINE typename Dot::Operand read_some(const T* from, int n) {
  return n >= WIDTH<Dot> ? Dot::read(from) : n > 0 ? Dot::read(from, n) : typename Dot::Operand{};
}

// To the second-level cache: what is on its way to the first takes up its few miss buffers.
INLINE void prefetch(const char* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
}

// Rows of keys or of values, one pointer each. Behind the last, up to a multiple of W, stand rows of zeros.
typedef const char* const* Rows;

// scores[row][key] = query row . key, for HEADS query rows at a time, W / HEADS keys at a time.
template <class Dot, class T, int HEADS>
void scores_of(const float* query, int64_t query_lanes, Rows keys, int num_keys, int dim, float* scores,
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
    for (; d + 2 * WIDTH<Dot> <= dim; d += 2 * WIDTH<Dot>, q += 2 * W) {
      typename Dot::Operand heads[HEADS][2];
#pragma GCC unroll 8
      for (int h = 0; h < HEADS; h++)
        for (int half = 0; half < 2; half++) heads[h][half] = operand<Dot>(q + h * query_lanes + half * W);
#pragma GCC unroll 16
      for (int k = 0; k < KEYS; k++) {
        typename Dot::Operand elements[2];
        Dot::read_two(row[k] + d, elements);
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++)
#pragma GCC unroll 8
          for (int h = 0; h < HEADS; h++)
            sums[h * KEYS + k] = Dot::multiply_add(heads[h][half], elements[half], sums[h * KEYS + k]);
      }
    }
    for (; d < dim; d += WIDTH<Dot>, q += W) {
#pragma GCC unroll 16
      for (int k = 0; k < KEYS; k++) {
        const typename Dot::Operand elements = read_some<Dot>(row[k] + d, dim - d);
#pragma GCC unroll 8
        for (int h = 0; h < HEADS; h++)
          sums[h * KEYS + k] = Dot::multiply_add(operand<Dot>(q + h * query_lanes), elements, sums[h * KEYS + k]);
      }
    }
    const Vec all = sum_each(sums);
    store_parts<KEYS, 0>(scores + key, stride, all, typename MakeIndices<KEYS>::type());
  }
}

template <class Dot, class T>
void scores(const float* query, int64_t query_lanes, int rows, Rows keys, int num_keys, int dim, float* out,
            int64_t stride, Rows ahead, int ahead_bytes) {
  int r = 0;
  const auto some = [&](auto of, int heads) {
    for (; r + heads <= rows; r += heads, ahead = nullptr)
      of(query + r * query_lanes, query_lanes, keys, num_keys, dim, out + r * stride, stride, ahead, ahead_bytes);
  };
  some(scores_of<Dot, T, 4>, 4);
  some(scores_of<Dot, T, 2>, 2);
  some(scores_of<Dot, T, 1>, 1);
}

// Lanes of one key's (Dot16: two keys') values, `n` elements at most.
template <class Dot, class T, int VECS>
INLINE void value_lanes(const T* a, [[maybe_unused]] const T* b, int n, typename Dot::Operand* lanes) {
  constexpr int OPERANDS = VECS / Dot::PER_LANE;
  typename Dot::Operand x[OPERANDS], y[OPERANDS];
#pragma GCC unroll 4
  for (int i = 0; i < OPERANDS; i += 2) {
    const int first = i * WIDTH<Dot>, left = n - first;
    if (left >= 2 * WIDTH<Dot>) {
      Dot::read_two(a + first, x + i);
      if constexpr (Dot::PER_LANE == 2) Dot::read_two(b + first, y + i);
    } else {
      for (int j = 0; j < 2; j++) {
        x[i + j] = read_some<Dot>(a + first + j * WIDTH<Dot>, left - j * WIDTH<Dot>);
        if constexpr (Dot::PER_LANE == 2) y[i + j] = read_some<Dot>(b + first + j * WIDTH<Dot>, left - j * WIDTH<Dot>);
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < OPERANDS; i++) Dot::pair_up(x[i], y[i], lanes + i * Dot::PER_LANE);
}

// out[row] = factor[row] * out[row] + sum over keys of weight * value, for HEADS rows and VECS vectors of elements.
template <class Dot, class T, int HEADS, int VECS>
INLINE void accumulate_panel(const float* weights, int64_t weight_lanes, Rows values, int num_keys, int first,
                             int n, const float* factors, float* out, int64_t stride, Rows ahead, int skip,
                             int ahead_bytes) {
  Vec sums[HEADS][VECS] = {};  // of these keys alone: small sums round little
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
    for (int v = 0; v < VECS; v++) {
      float* const to = out + h * stride + first + v * W;
      store(to, read<Vec>(to) * splat(factors[h]) + sums[h][v]);
    }
}

// The keys `ahead` are prefetched along the way, each panel a part of every row.
template <class Dot, class T, int HEADS>
void accumulate_rows(const float* weights, int64_t weight_lanes, Rows values, int num_keys, int dim,
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
