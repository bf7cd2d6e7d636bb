// Rows on their way out: divided by the denominator, the sink in it, narrowed to query's type.
#pragma once

#include <cmath>

#include "softmax.h"

namespace paged {

inline void finish_row(const Attention& a, const Unit& u, int64_t r, float largest, float sum, const float* values) {
  const int64_t head = u.kv_head * a.group + r % a.group;
  const int64_t row = (u.token + r / a.group) * a.num_kv_heads * a.group + head;
  float factor = 1;
  const float sink = a.sinks ? a.sinks[head * a.sinks_stride] : -INFINITY;
  if (sink != -INFINITY) {
    const float now = std::fmax(largest, sink);
    factor = std::exp(largest - now);
    sum = sum * factor + (sink == now ? 1 : std::exp(sink - now));
    largest = now;
  }
  const bool seen = sum != 0;  // the largest weight is 1
  a.lse[row] = seen ? largest + std::log(sum) : -INFINITY;
  factor = seen ? factor / sum * (a.value.scale ? a.value.scale[u.kv_head * a.value.scale_stride] : 1) : 0;
  char* out = a.output + row * a.value.dim * size_of(a.query_type);
  for (int64_t i = 0; i < a.value.dim; i += W)
    store_row(out, a.query_type, i, read<Vec>(values + i) * splat(factor), int(least(W, a.value.dim - i)));
}

inline void finish(const Attention& a, const Unit& u, const State& s) {
  float* const part_values = u.part ? u.part + 2 * s.rows : nullptr;
  for (int64_t r = 0; r < s.rows; r++) {
    const float* values = s.out + r * s.value_lanes;
    if (u.part) {
      u.part[r] = s.maxima[r], u.part[s.rows + r] = s.sums[r];
      std::memcpy(part_values + r * s.value_lanes, values, s.value_lanes * 4);
    } else {
      finish_row(a, u, r, s.maxima[r], s.sums[r], values);
    }
  }
}

}  // namespace paged
