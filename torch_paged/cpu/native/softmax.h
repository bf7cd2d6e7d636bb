// The softmax between the two products, a chunk of keys at a time, and what a unit keeps of its rows meanwhile.
#pragma once

#include <cmath>

#include "tiles.h"

namespace paged {

constexpr int FEW_CHUNK = 64;  // keys
constexpr int TILE_CHUNK = 128;

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// The rows of one KV head in the making, in the thread's scratch memory.
struct State {
  int rows, chunk;
  int64_t padded;  // rows in memory: products work on whole blocks of them
  int query_lanes, value_lanes;  // from one row to the next
  float *query, *scores, *weights, *out, *packed;
  float *maxima, *sums, *factors;

  State(const Attention& a, const Unit& u, int per_lane) {  // of the unit's first KV head
    rows = int(u.queries * a.group);
    chunk = tiled() ? TILE_CHUNK : FEW_CHUNK;
    query_lanes = int(round_up(a.key.dim, W * per_lane)) / per_lane;
    value_lanes = int(round_up(a.value.dim, PANEL));
    padded = tiled() ? round_up(rows + ROW_BLOCK - 1, 16) : rows;
    const int64_t all = padded * u.kv_heads, tile = tiled() ? int64_t(chunk) * most(query_lanes, value_lanes) : 0;
    const int64_t sizes[] = {all * query_lanes, all * value_lanes, padded * chunk, padded * chunk, tile, all, all, all};
    float** const parts[] = {&query, &out, &scores, &weights, &packed, &maxima, &sums, &factors};
    int64_t total = 0;
    for (int64_t size : sizes) total += size;
    float* memory = reinterpret_cast<float*>(thread_scratch(total * 4));
    for (int i = 0; i < 8; i++) *parts[i] = memory, memory += sizes[i];
    for (int64_t i = 0; i < all; i++) maxima[i] = -INFINITY, sums[i] = 0, factors[i] = 1;
    std::memset(out, 0, all * value_lanes * 4);
  }

  // The unit's KV heads share what lives no longer than a chunk of one of them.
  State of_head(int64_t i) const {
    State s = *this;
    const int64_t skip = i * padded;
    s.query += skip * query_lanes, s.out += skip * value_lanes;
    s.maxima += skip, s.sums += skip, s.factors += skip;
    return s;
  }
  bool tiled() const { return rows > FEW_ROWS; }
};

// Logits of one vector of scores: key scales, softcap, bias by distance.
INLINE Vec logits(Vec x, const Attention& a, const float* key_scales, float slope, Vec distance) {
  if (key_scales) x *= read<Vec>(key_scales);
  if (a.softcap != 0) x = splat(a.softcap) * tanh_of(x * splat(1 / a.softcap));
  if (slope != 0) x -= splat(slope) * maximum(distance, -distance);
  return x;
}

// Weights of one row over `count` keys from `first_key` on, and the factor of what it has accumulated before. PLAIN:
// all keys are visible, the logits are `scale` > 0 times the scores.
template <class Dot, bool PLAIN>
INLINE void soften(const Attention& a, const Unit& u, const State& s, int r, int64_t first_key, int count,
                   float scale, const float* key_scales, const float* value_scales) {
  float* x = s.scores + int64_t(r) * s.chunk;
  float* weights = s.weights + int64_t(r) * (s.chunk / Dot::PER_LANE);
  const int64_t position = u.position + r / a.group - first_key;
  const int begin = PLAIN ? 0 : int(least(count, most(0, position - a.window + 1)));
  const int end = PLAIN ? count : int(a.causal ? most(begin, least(count, position + 1)) : count);
  const int64_t head = u.kv_head * a.group + r % a.group;
  const float slope = !PLAIN && a.alibi_slopes ? a.alibi_slopes[head * a.alibi_stride] : 0;
  const IVec lanes = lane_numbers();
  Vec largest = splat(-INFINITY);
  for (int i = begin / W * W; i < end; i += W) {
    Vec v = read<Vec>(x + i);
    if constexpr (!PLAIN) {
      const IVec key = lanes + splat_int(i);
      v = logits(v * splat(scale), a, key_scales ? key_scales + i : nullptr, slope,
                 __builtin_convertvector(key, Vec) - splat(float(position)));
      v = select((key >= begin) & (key < end), v, splat(-INFINITY));
      store(x + i, v);
    }
    largest = maximum(v, largest);
  }
  if (!PLAIN) scale = 1;  // it is in the logits
  const float peak = max_lanes(largest), before = s.maxima[r], now = std::fmax(before, peak * scale);
  const bool seen = now > -INFINITY;
  s.maxima[r] = now;
  s.factors[r] = seen && now != before ? exp2_negative(splat((before - now) * LOG2_E))[0] : 1;
  // The difference first: it is exact where it is small, and the largest weight is 1.
  const Vec factor = splat(scale * LOG2_E), shift = splat(now > before ? peak : before / scale);
  Vec sum{};
  for (int i = 0; i < count; i += W) {
    Vec v{};
    if (seen && i + W > begin && i < end) {
      v = exp2_negative((read<Vec>(x + i) - shift) * factor);
      sum += v;
      if (!PLAIN && value_scales) v *= read<Vec>(value_scales + i);
    }
    Dot::write(weights + i / Dot::PER_LANE, v);
  }
  s.sums[r] = s.sums[r] * s.factors[r] + sum_lanes(sum);
  if (!seen)  // no key is visible, or its logit is no number
    for (int i = begin; i < end; i++)
      if (x[i] != x[i]) s.sums[r] = NAN;
}

template <class Dot>
void soften_rows(const Attention& a, const Unit& u, const State& s, int first_row, int end_row, int64_t first_key,
                 int count, const float* key_scales, const float* value_scales) {
  const float scale = a.scale * (a.key.scale ? a.key.scale[u.kv_head * a.key.scale_stride] : 1);
  const bool options = key_scales || value_scales || a.softcap != 0 || a.alibi_slopes;
  const int64_t last = u.position + u.queries - 1;
  const bool all_visible = (!a.causal || u.position >= first_key + count - 1) && last - a.window < first_key;
  if (scale > 0 && !options && all_visible && count % W == 0)
    for (int r = first_row; r < end_row; r++)
      soften<Dot, true>(a, u, s, r, first_key, count, scale, nullptr, nullptr);
  else
    for (int r = first_row; r < end_row; r++)
      soften<Dot, false>(a, u, s, r, first_key, count, scale, key_scales, value_scales);
}

}  // namespace paged
