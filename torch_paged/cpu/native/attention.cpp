// One unit of attention: online softmax over chunks of keys, the KV heads of a chunk in turn.
//
//   scores  = query . key                   [rows, keys]
//   weights = e^(logit - largest so far)    [rows, keys]
//   out     = factor * out + weights . value    [rows, value dim]
#include "finish.h"

namespace paged {

struct alignas(64) Zeros { char bytes[576 * 4 + 64]; };
static const Zeros zeros{};

template <class Dot>
struct Products {
  decltype(&scores<Dot, float>) scores;
  decltype(&accumulate<Dot, float>) accumulate;
  decltype(&pack_keys<Dot, float>) pack_keys;
  decltype(&pack_values<Dot, float>) pack_values;
};

template <class Dot, class T>
constexpr Products<Dot> products_of() {
  return {scores<Dot, T>, accumulate<Dot, T>, pack_keys<Dot, T>, pack_values<Dot, T>};
}

template <class Dot>
static const Products<Dot>& products(Type type);

template <>
const Products<Dot32>& products<Dot32>(Type type) {
  static constexpr Products<Dot32> table[NUM_TYPES] = {products_of<Dot32, float>(), products_of<Dot32, f16>(),
                                                       products_of<Dot32, bf16>(),  products_of<Dot32, e4m3>(),
                                                       products_of<Dot32, e5m2>(),  products_of<Dot32, i8>()};
  return table[type];
}

#if defined(__AVX512BF16__)
template <>
const Products<Dot16>& products<Dot16>(Type type) {
  static constexpr Products<Dot16> table[NUM_TYPES] = {
      {}, {}, products_of<Dot16, bf16>(), products_of<Dot16, e4m3>(), products_of<Dot16, e5m2>(),
      products_of<Dot16, i8>()};
  return table[type];
}
#endif

// A chunk's keys or values: where each row lies, and its scale where tokens have one.
struct Chunk {
  const char* rows[TILE_CHUNK];
  float scales[TILE_CHUNK];

  // `count` of `chunk` rows; behind the last stand rows of zeros.
  void find(const Cache& cache, const Attention& a, const Unit& u, int64_t first, int count, int chunk) {
    const int64_t size = size_of(cache.type), step = cache.strides[1] * size;
    int64_t column = first / a.block_size, slot = first % a.block_size;
    for (int i = 0; i < count; column++, slot = 0) {
      const int64_t block = u.blocks[column * a.table_strides[1]];
      const char* row = cache.data + (block * cache.strides[0] + u.kv_head * cache.strides[2]) * size + slot * step;
      const int end = count - i < a.block_size - slot ? count : i + int(a.block_size - slot);
      if (cache.scales) {
        const float* scale = cache.scales + block * cache.scales_strides[0] + slot * cache.scales_strides[1] +
                             u.kv_head * cache.scales_strides[2];
        for (int j = i; j < end; j++, scale += cache.scales_strides[1]) scales[j] = *scale;
      }
      for (; i < end; i++, row += step) rows[i] = row;
    }
    for (int i = count; i < chunk; i++) rows[i] = zeros.bytes, scales[i] = 0;
  }
};

template <class Dot, class T>
void load_rows(const Attention& a, const Unit& u, const State& s) {
  for (int r = 0; r < s.rows; r++) {
    const T* from = reinterpret_cast<const T*>(a.query) + (u.token + r / a.group) * a.query_strides[0] +
                    (u.kv_head * a.group + r % a.group) * a.query_strides[1];
    float* to = s.query + int64_t(r) * s.query_lanes;
    for (int d = 0; d < a.key.dim; d += WIDTH<Dot>, to += W) {
      const auto lanes = d + WIDTH<Dot> <= a.key.dim ? Dot::read(from + d) : Dot::read(from + d, int(a.key.dim - d));
      std::memcpy(to, &lanes, sizeof lanes);
    }
  }
}

template <class Dot>
void load_query(const Attention& a, const Unit& u, const State& s) {
  if constexpr (Dot::PER_LANE == 2) return load_rows<Dot, bf16>(a, u, s);
  else if (a.query_type == F32) load_rows<Dot, float>(a, u, s);
  else if (a.query_type == F16) load_rows<Dot, f16>(a, u, s);
  else load_rows<Dot, bf16>(a, u, s);
}

// A chunk of one KV head's keys and values.
struct HeadChunk {
  Chunk keys, values;
  int64_t first;
  int count, head;

  // Number `i` of the unit's. The heads take turns: in memory they stand side by side, so it is read in long runs.
  void find(const Attention& a, const Unit& unit, int64_t i, int chunk) {
    head = int(i % unit.kv_heads);
    first = unit.first_key + i / unit.kv_heads * chunk;
    count = int(least(chunk, unit.end_key - first));
    const Unit u = unit.of_head(head);
    keys.find(a.key, a, u, first, count, chunk);
    values.find(a.value, a, u, first, count, chunk);
  }
};

// How far ahead memory is asked: 64 KB of bf16 at a head dim of 128. More did not make reading any faster.
constexpr int64_t AHEAD = 2, RING = AHEAD + 1;  // the one at work, and those that are asked for

template <class Dot>
struct Attend {
  const Attention& a;
  const Unit& unit;
  const int chunk = unit.queries * a.group > FEW_ROWS ? TILE_CHUNK : FEW_CHUNK;
  const int key_dim = int(a.key.dim), value_dim = int(a.value.dim);
  const int key_bytes = key_dim * size_of(a.key.type), value_bytes = value_dim * size_of(a.value.type);
  const Products<Dot>&for_keys = products<Dot>(a.key.type), &for_values = products<Dot>(a.value.type);

  void operator()() const {
    HeadChunk ring[RING];
    const int64_t chunks = unit.first_key < unit.end_key ? (unit.end_key - unit.first_key + chunk - 1) / chunk : 0;
    const int64_t count = chunks * unit.kv_heads;
    for (int64_t i = 0; i < least(AHEAD, count); i++) start(ring[i], i);
    const State states(a, unit, Dot::PER_LANE);
    for (int64_t h = 0; h < unit.kv_heads; h++) load_query<Dot>(a, unit.of_head(h), states.of_head(h));
    for (int64_t i = 0; i < count; i++) {
      const HeadChunk& now = ring[i % RING];
      HeadChunk* const ahead = i + AHEAD < count ? &ring[(i + AHEAD) % RING] : nullptr;
      if (ahead) ahead->find(a, unit, i + AHEAD, chunk);
      take(now, ahead, unit.of_head(now.head), states.of_head(now.head));
    }
    for (int64_t h = 0; h < unit.kv_heads; h++) finish(a, unit.of_head(h), states.of_head(h));
  }

  void start(HeadChunk& first, int64_t i) const {
    first.find(a, unit, i, chunk);
    for (int key = 0; key < first.count; key++) prefetch(first.keys.rows[key], key_bytes);
    for (int key = 0; key < first.count; key++) prefetch(first.values.rows[key], value_bytes);
  }

  // What lies `ahead` is prefetched meanwhile.
  void take(const HeadChunk& now, const HeadChunk* ahead, const Unit& u, const State& s) const {
    const Chunk &keys = now.keys, &values = now.values;
    // Rows before `begin` stand before all these keys; for those from `end` on they are out of the window.
    const int begin = a.causal ? int(most(0, now.first - u.position) * a.group) : 0;
    const int end = int(least(u.queries, now.first + now.count - 1 + a.window - u.position) * a.group);
    if (begin >= end) return;
    const int weight_lanes = chunk / Dot::PER_LANE;
    const float* query = s.query + int64_t(begin) * s.query_lanes;
    float* scores = s.scores + int64_t(begin) * chunk;
    float* weights = s.weights + int64_t(begin) * weight_lanes;
    float* out = s.out + int64_t(begin) * s.value_lanes;
    if (s.tiled()) {
      for_keys.pack_keys(keys.rows, now.count, key_dim, s.packed);
      product<Dot>(query, s.query_lanes, end - begin, s.packed, (key_dim + Dot::PER_LANE - 1) / Dot::PER_LANE,
                   now.count, nullptr, scores, chunk);
    } else {
      for_keys.scores(query, s.query_lanes, end - begin, keys.rows, now.count, key_dim, scores, chunk,
                      ahead ? ahead->keys.rows : nullptr, key_bytes);
    }
    soften_rows<Dot>(a, u, s, begin, end, now.first, now.count, a.key.scales ? keys.scales : nullptr,
                     a.value.scales ? values.scales : nullptr);
    if (s.tiled()) {
      for_values.pack_values(values.rows, now.count, value_dim, s.packed);
      product<Dot>(weights, weight_lanes, end - begin, s.packed, (now.count + Dot::PER_LANE - 1) / Dot::PER_LANE,
                   s.value_lanes, s.factors + begin, out, s.value_lanes);
      // It took whole blocks of rows; those from `end` on have seen no key yet, and nobody has written their weights.
      if (end < s.rows)
        std::memset(s.out + int64_t(end) * s.value_lanes, 0,
                    (round_up(end - begin, ROW_BLOCK) - (end - begin)) * s.value_lanes * 4);
    } else {
      for_values.accumulate(weights, weight_lanes, end - begin, values.rows, now.count, value_dim, s.factors + begin,
                            out, s.value_lanes, ahead ? ahead->values.rows : nullptr, value_bytes);
    }
  }
};

void attend(const Attention& a, const Unit& u) {
#if defined(__AVX512BF16__)
  const auto pairs = [](Type type) { return type != F32 && type != F16; };
  if (a.query_type == BF16 && pairs(a.key.type) && pairs(a.value.type)) return Attend<Dot16>{a, u}();
#endif
  Attend<Dot32>{a, u}();
}

// Maxima, sums and values of all rows.
int64_t part_floats(const Attention& a, const Unit& u) {
  return u.queries * a.group * (round_up(a.value.dim, PANEL) + 2);
}

// The parts of the same rows, in the order of their keys: each weighs e^(its maximum - the largest).
void merge_parts(const Attention& a, const Unit& u, const float* parts, int64_t count) {
  const int64_t rows = u.queries * a.group, lanes = round_up(a.value.dim, PANEL), size = part_floats(a, u);
  float* const values = reinterpret_cast<float*>(thread_scratch(lanes * 4));
  for (int64_t r = 0; r < rows; r++) {
    float largest = -INFINITY, sum = 0;
    for (int64_t i = 0; i < count; i++) largest = std::fmax(largest, parts[i * size + r]);
    const float shift = largest > -INFINITY ? largest : 0;
    std::memset(values, 0, lanes * 4);
    for (int64_t i = 0; i < count; i++) {
      const float* part = parts + i * size;
      const float weight = std::exp(part[r] - shift);
      sum += weight * part[rows + r];
      for (int64_t d = 0; d < lanes; d += W)
        store(values + d, read<Vec>(values + d) + splat(weight) * read<Vec>(part + (2 * rows + r * lanes) + d));
    }
    finish_row(a, u, r, largest, sum, values);
  }
}

}  // namespace paged
