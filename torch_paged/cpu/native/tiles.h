// Many rows: tiles of keys and values packed into panels, and one blocked matrix product for both.
//
//   packed[panel][step][PANEL lanes]: keys in lanes, a step is a lane of the head dim; or elements of the value in
//   lanes, a step is a key (Dot16: a pair of either)
#pragma once

#include "products.h"

namespace paged {

constexpr int PANEL = PANEL_VECS * W;
constexpr int ROW_BLOCK = 6;

template <class Dot, class T>
void pack_keys(Rows keys, int num_keys, int dim, float* packed) {
  const int steps = (dim + Dot::PER_LANE - 1) / Dot::PER_LANE;
  for (int key = 0; key < num_keys; key += W) {
    float* out = packed + key / PANEL * (PANEL * steps) + key % PANEL;
    for (int step = 0; step < steps; step += W) {
      const int first = step * Dot::PER_LANE, left = dim - first;
      Vec lanes[W];
#pragma GCC unroll 16
      for (int k = 0; k < W; k++) {
        const T* row = reinterpret_cast<const T*>(keys[key + k]) + first;
        lanes[k] = bit_cast<Vec>(left >= WIDTH<Dot> ? Dot::read(row) : Dot::read(row, left));
      }
      transpose(lanes);
      const int count = steps - step < W ? steps - step : W;
      if (count == W) {
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) store(out + (step + i) * PANEL, lanes[i]);
      } else {
        for (int i = 0; i < count; i++) store(out + (step + i) * PANEL, lanes[i]);
      }
    }
  }
}

template <class Dot, class T>
void pack_values(Rows values, int num_keys, int dim, float* packed) {
  const int steps = (num_keys + Dot::PER_LANE - 1) / Dot::PER_LANE;
  for (int first = 0; first < dim; first += PANEL)
    for (int step = 0; step < steps; step++, packed += PANEL) {
      typename Dot::Operand lanes[PANEL_VECS];
      const T* a = reinterpret_cast<const T*>(values[step * Dot::PER_LANE]) + first;
      const T* b = reinterpret_cast<const T*>(values[step * Dot::PER_LANE + Dot::PER_LANE - 1]) + first;
      if (dim - first >= PANEL)
        value_lanes<Dot, T, PANEL_VECS>(a, b, PANEL, lanes);
      else
        value_lanes<Dot, T, PANEL_VECS>(a, b, dim - first, lanes);
#pragma GCC unroll 4
      for (int v = 0; v < PANEL_VECS; v++) store(packed + v * W, bit_cast<Vec>(lanes[v]));
    }
}

template <class Dot, int ROWS>
INLINE void product_block(const float* a, int64_t a_stride, const float* packed, int steps, const float* factors,
                          float* out, int64_t stride) {
  Vec sums[ROWS][PANEL_VECS] = {};
  for (int step = 0; step < steps; step++) {
    typename Dot::Operand b[PANEL_VECS];
#pragma GCC unroll 4
    for (int v = 0; v < PANEL_VECS; v++) b[v] = operand<Dot>(packed + step * PANEL + v * W);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      const typename Dot::Operand lane = broadcast<Dot>(a + r * a_stride + step);
#pragma GCC unroll 4
      for (int v = 0; v < PANEL_VECS; v++) sums[r][v] = Dot::multiply_add(lane, b[v], sums[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int v = 0; v < PANEL_VECS; v++) {
      float* const to = out + r * stride + v * W;
      store(to, factors ? read<Vec>(to) * splat(factors[r]) + sums[r][v] : sums[r][v]);
    }
}

// out[row][column] = factors[row] * out[row][column] + sum over steps; without factors, out is not read.
// Works on whole blocks of rows: memory behind the last row must be there.
template <class Dot>
void product(const float* a, int64_t a_stride, int rows, const float* packed, int steps, int columns,
             const float* factors, float* out, int64_t stride) {
  for (int column = 0; column < columns; column += PANEL, packed += PANEL * steps) {
    for (int r = 0; r < rows; r += ROW_BLOCK)
      product_block<Dot, ROW_BLOCK>(a + r * a_stride, a_stride, packed, steps, factors ? factors + r : nullptr,
                                    out + r * stride + column, stride);
  }
}

}  // namespace paged
