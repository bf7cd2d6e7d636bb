// A batch of attention as units of work. What a unit is depends on its sequence alone, and parts are merged in the
// order of their keys: results depend neither on the other sequences nor on the number of threads.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "paged.h"

namespace paged {
namespace {

constexpr int64_t PART_KEYS = 1024;
constexpr int64_t UNITS_PER_THREAD = 8;
constexpr int64_t SMALL_WORK = 64 << 10;  // multiply-adds of 4 rows: below, waking threads costs more than it saves

// Queries of one sequence that stand in one tile of rows: for each part of the keys and KV heads side by side, a unit.
struct Tile {
  Unit unit;  // what its units have in common
  int64_t parts, part_keys, first_unit;
  float* memory;
  std::atomic<int>* missing;  // parts, for each KV head

  int64_t stacks(const Attention& a) const { return (a.num_kv_heads + unit.kv_heads - 1) / unit.kv_heads; }
};

int64_t queries_of(const Batch& batch, int64_t seq, int64_t& first) {
  if (!batch.cu_seqlens_q) {
    const int64_t count = batch.num_tokens / batch.num_seqs;
    first = seq * count;
    return count;
  }
  first = batch.cu_seqlens_q[seq * batch.cu_seqlens_q_stride];
  return batch.cu_seqlens_q[(seq + 1) * batch.cu_seqlens_q_stride] - first;
}

// Keys that at least one of the queries from `position` on sees.
void visible_keys(const Attention& a, int64_t position, int64_t queries, int64_t num_keys, Unit& unit) {
  unit.end_key = a.causal ? std::clamp<int64_t>(position + queries, 0, num_keys) : num_keys;
  unit.first_key = std::min(unit.end_key, std::max<int64_t>(0, std::max<int64_t>(0, position) - a.window + 1));
}

// The exact message, with the value and its place, is Python's to give: torch_paged/bounds.py.
[[noreturn]] void refuse() {
  throw std::out_of_range("a length, a bound of the queries, or a block id is out of range");
}

void check_bounds(const Attention& a, const Batch& batch) {
  if (batch.cu_seqlens_q) {
    int64_t before = batch.cu_seqlens_q[0];
    if (before != 0) refuse();
    for (int64_t i = 1; i <= batch.num_seqs; i++) {
      const int64_t now = batch.cu_seqlens_q[i * batch.cu_seqlens_q_stride];
      if (now < before) refuse();
      before = now;
    }
    if (before > batch.num_tokens) refuse();
  }
  const int64_t limit = batch.table_width * a.block_size;
  for (int64_t seq = 0; seq < batch.num_seqs; seq++) {
    const int64_t num_keys = batch.seq_lens[seq * batch.seq_lens_stride];
    if (num_keys < 0 || num_keys > limit) refuse();
    int64_t token;
    const int64_t queries = queries_of(batch, seq, token);
    if (queries == 0 || num_keys == 0) continue;
    Unit seen;
    visible_keys(a, num_keys - queries, queries, num_keys, seen);
    const int32_t* row = a.table + seq * a.table_strides[0];
    uint32_t largest = 0;
    for (int64_t i = seen.first_key / a.block_size; i * a.block_size < seen.end_key; i++)
      largest = std::max(largest, uint32_t(row[i * a.table_strides[1]]));
    if (largest >= uint64_t(batch.num_blocks)) refuse();
  }
}

void add_tiles(const Attention& a, const Batch& batch, int64_t seq, std::vector<Tile>& tiles) {
  int64_t token;
  const int64_t queries = queries_of(batch, seq, token), num_keys = batch.seq_lens[seq * batch.seq_lens_stride];
  const int64_t rows = std::clamp<int64_t>(32768 / std::max(a.key.dim, a.value.dim), 64, 256);
  const int64_t tile_queries = std::max<int64_t>(1, rows / a.group);
  for (int64_t first = 0; first < queries; first += tile_queries) {
    Tile tile{};
    Unit& unit = tile.unit;
    unit.blocks = a.table + seq * a.table_strides[0];
    unit.token = token + first;
    unit.queries = std::min(tile_queries, queries - first);
    unit.position = num_keys - queries + first;
    visible_keys(a, unit.position, unit.queries, num_keys, unit);
    // A part's rows should take little memory beside the keys that they saw.
    tile.part_keys = std::max(PART_KEYS, 16 * unit.queries * a.group);
    tile.parts = std::max<int64_t>(1, (unit.end_key - unit.first_key + tile.part_keys - 1) / tile.part_keys);
    tiles.push_back(tile);
  }
}

// Rows behind the last query belong to nobody.
void clear_padding(const Attention& a, const Batch& batch) {
  if (!batch.cu_seqlens_q) return;
  const int64_t heads = a.num_kv_heads * a.group, size = a.value.dim * size_of(a.query_type);
  const int64_t used = batch.cu_seqlens_q[batch.num_seqs * batch.cu_seqlens_q_stride] * heads;
  const int64_t rows = batch.num_tokens * heads;
  if (used == rows) return;
  std::memset(a.output + used * size, 0, (rows - used) * size);
  std::fill(a.lse + used, a.lse + rows, -INFINITY);
}

// Says how many KV heads a unit has, and numbers the units; returns how many they are. Few rows wait for memory, which
// is fastest in long runs: they take many heads, as long as every thread gets units enough to end with the others.
int64_t number_units(const Attention& a, std::vector<Tile>& tiles) {
  int64_t single = 0, units = 0;
  for (const Tile& tile : tiles) single += tile.parts * a.num_kv_heads;
  const int64_t most = std::min<int64_t>(a.num_kv_heads, 8);
  const int64_t heads = std::clamp<int64_t>(single / (UNITS_PER_THREAD * num_threads()), 1, most);
  for (Tile& tile : tiles) {
    tile.unit.kv_heads = tile.unit.queries * a.group > FEW_ROWS ? 1 : heads;
    tile.first_unit = units;
    units += tile.parts * tile.stacks(a);
  }
  return units;
}

// Unit number `i` of a tile: parts in turn, and within a part the heads, which may lie in the same blocks.
void attend_unit(const Attention& a, const Tile& tile, int64_t i) {
  Unit unit = tile.unit;
  const int64_t part = i / tile.stacks(a);
  unit.kv_head = i % tile.stacks(a) * unit.kv_heads;
  unit.kv_heads = std::min(unit.kv_heads, a.num_kv_heads - unit.kv_head);
  if (tile.parts == 1) return attend(a, unit);
  const int64_t size = part_floats(a, unit);
  unit.part_stride = tile.parts * size;
  float* const parts = tile.memory + unit.kv_head * unit.part_stride;
  unit.part = parts + part * size;
  unit.first_key += part * tile.part_keys;
  unit.end_key = std::min(unit.end_key, unit.first_key + tile.part_keys);
  attend(a, unit);
  for (int64_t h = 0; h < unit.kv_heads; h++)
    if (tile.missing[unit.kv_head + h].fetch_sub(1, std::memory_order_acq_rel) == 1)
      merge_parts(a, unit.of_head(h), parts + h * unit.part_stride, tile.parts);
}

}  // namespace

void attend_batch(const Attention& a, const Batch& batch) {
  check_bounds(a, batch);
  clear_padding(a, batch);
  std::vector<Tile> tiles;
  tiles.reserve(batch.num_seqs);
  for (int64_t seq = 0; seq < batch.num_seqs; seq++) add_tiles(a, batch, seq, tiles);
  if (tiles.empty()) return;
  int64_t floats = 0, counters = 0, work = 0;
  for (const Tile& tile : tiles) {
    if (tile.parts > 1) floats += part_floats(a, tile.unit) * tile.parts * a.num_kv_heads, counters += a.num_kv_heads;
    const int64_t rows = std::max<int64_t>(4, tile.unit.queries * a.group);
    work += (tile.unit.end_key - tile.unit.first_key) * a.num_kv_heads * (a.key.dim + a.value.dim) * rows / 4;
  }
  const std::unique_ptr<float[]> memory(new float[floats]);
  const std::unique_ptr<std::atomic<int>[]> missing(new std::atomic<int>[counters]);
  float* part = memory.get();
  std::atomic<int>* counter = missing.get();
  for (Tile& tile : tiles) {
    if (tile.parts == 1) continue;
    tile.memory = part, tile.missing = counter;
    part += part_floats(a, tile.unit) * tile.parts * a.num_kv_heads;
    for (int64_t head = 0; head < a.num_kv_heads; head++) *counter++ = int(tile.parts);
  }
  const int64_t units = number_units(a, tiles);
  // The last tiles of a prompt see most keys: first come the large ones.
  parallel(units, work < SMALL_WORK, [&](int64_t i) {
    const int64_t unit = units - 1 - i;
    const auto after = std::upper_bound(tiles.begin(), tiles.end(), unit,
                                        [](int64_t u, const Tile& tile) { return u < tile.first_unit; });
    attend_unit(a, after[-1], unit - after[-1].first_unit);
  });
}

}  // namespace paged
