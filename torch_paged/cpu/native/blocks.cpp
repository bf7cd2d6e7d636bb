// Whole blocks: copied within their caches, gathered to rows of a staging buffer, scattered back.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "paged.h"

namespace paged {
namespace {

constexpr int64_t SMALL_BYTES = 64 << 10;

// How one block is copied: loops around runs of bytes that lie together on both sides.
class Copy {
 public:
  // The elements of `blocks`, from strides to strides in bytes.
  Copy(const Blocks& blocks, std::vector<int64_t> from, std::vector<int64_t> to) : run_(blocks.size) {
    for (int64_t d = 0; d < blocks.dims; d++) {
      const Loop loop{blocks.sizes[d], from[d], to[d]};
      if (loop.count != 1) loops_.push_back(loop);
    }
    // Longest strides first; a row-major side keeps its order.
    std::stable_sort(loops_.begin(), loops_.end(), [](const Loop& a, const Loop& b) { return a.to > b.to; });
    std::vector<Loop> merged;
    for (const Loop& loop : loops_) {
      Loop* const outer = merged.empty() ? nullptr : &merged.back();
      if (outer && outer->from == loop.from * loop.count && outer->to == loop.to * loop.count)
        *outer = {outer->count * loop.count, loop.from, loop.to};
      else
        merged.push_back(loop);
    }
    if (!merged.empty() && merged.back().from == run_ && merged.back().to == run_) {
      run_ *= merged.back().count;
      merged.pop_back();
    }
    loops_ = merged;
  }

  void operator()(const char* from, char* to) const { copy(0, from, to); }

 private:
  struct Loop {
    int64_t count, from, to;
  };

  void copy(size_t depth, const char* from, char* to) const {
    if (depth == loops_.size()) {
      std::memcpy(to, from, run_);
      return;
    }
    const Loop& loop = loops_[depth];
    for (int64_t i = 0; i < loop.count; i++, from += loop.from, to += loop.to) copy(depth + 1, from, to);
  }

  std::vector<Loop> loops_;
  int64_t run_;
};

int64_t elements(const Blocks& blocks) {
  int64_t count = 1;
  for (int64_t d = 0; d < blocks.dims; d++) count *= blocks.sizes[d];
  return count;
}

std::vector<int64_t> stored_strides(const Blocks& blocks) {
  std::vector<int64_t> strides(blocks.dims);
  for (int64_t d = 0; d < blocks.dims; d++) strides[d] = blocks.strides[d] * blocks.size;
  return strides;
}

std::vector<int64_t> row_major_strides(const Blocks& blocks) {
  std::vector<int64_t> strides(blocks.dims);
  int64_t stride = blocks.size;
  for (int64_t d = blocks.dims - 1; d >= 0; d--) strides[d] = stride, stride *= blocks.sizes[d];
  return strides;
}

char* block_of(const Blocks& cache, int64_t block) { return cache.data + block * cache.block_stride * cache.size; }

// Rows of a staging buffer hold the blocks of every cache in turn: gathered to there, or scattered from constant rows.
template <class Byte>
void copy_staged(const Blocks* caches, int64_t num_caches, const int64_t* blocks, int64_t stride, int64_t count,
                 Byte* rows) {
  constexpr bool gathering = !std::is_const_v<Byte>;
  std::vector<int64_t> offsets;
  std::vector<Copy> copies;
  int64_t row_bytes = 0;
  for (int64_t i = 0; i < num_caches; i++) {
    const auto stored = stored_strides(caches[i]), dense = row_major_strides(caches[i]);
    copies.emplace_back(caches[i], gathering ? stored : dense, gathering ? dense : stored);
    offsets.push_back(row_bytes);
    row_bytes += elements(caches[i]) * caches[i].size;
  }
  parallel(count * num_caches, row_bytes * count < SMALL_BYTES, [&](int64_t i) {
    const int64_t row = i / num_caches, cache = i % num_caches, block = blocks[row * stride];
    if (block < 0) return;
    char* const stored = block_of(caches[cache], block);
    Byte* const staged = rows + row * row_bytes + offsets[cache];
    if constexpr (gathering) copies[cache](stored, staged);
    else copies[cache](staged, stored);
  });
}

void check_blocks(const Blocks* caches, const int64_t* blocks, int64_t stride, int64_t count) {
  for (int64_t i = 0; i < count; i++)
    if (blocks[i * stride] >= caches[0].num_blocks) throw std::out_of_range("a block id is out of range");
}

}  // namespace

void copy_blocks(const Blocks* caches, int64_t num_caches, const int64_t* pairs, const int64_t (&strides)[2],
                 int64_t count) {
  if (num_caches == 0) return;
  struct Pair {
    int64_t source, destination;
  };
  std::vector<Pair> kept;
  std::vector<bool> is_source(caches[0].num_blocks), is_destination(caches[0].num_blocks);
  for (int64_t i = 0; i < count; i++) {
    const Pair pair{pairs[i * strides[0]], pairs[i * strides[0] + strides[1]]};
    if (pair.source < 0 || pair.destination < 0) continue;
    if (std::max(pair.source, pair.destination) >= caches[0].num_blocks)
      throw std::out_of_range("a block id is out of range");
    if (is_destination[pair.destination]) throw std::invalid_argument("a destination occurs twice");
    is_source[pair.source] = is_destination[pair.destination] = true;
    kept.push_back(pair);
  }
  for (const Pair& pair : kept)
    if (is_destination[pair.source]) throw std::invalid_argument("a destination is also a source");
  std::vector<Copy> copies;
  int64_t bytes = 0;
  for (int64_t i = 0; i < num_caches; i++) {
    copies.emplace_back(caches[i], stored_strides(caches[i]), stored_strides(caches[i]));
    bytes += elements(caches[i]) * caches[i].size * int64_t(kept.size());
  }
  parallel(num_caches * int64_t(kept.size()), bytes < SMALL_BYTES, [&](int64_t i) {
    const int64_t cache = i / int64_t(kept.size());
    const Pair& pair = kept[i % int64_t(kept.size())];
    copies[cache](block_of(caches[cache], pair.source), block_of(caches[cache], pair.destination));
  });
}

void gather_blocks(const Blocks* caches, int64_t num_caches, const int64_t* blocks, int64_t stride, int64_t count,
                   char* out) {
  if (num_caches == 0) return;
  check_blocks(caches, blocks, stride, count);
  copy_staged(caches, num_caches, blocks, stride, count, out);
}

void scatter_blocks(const char* source, const Blocks* caches, int64_t num_caches, const int64_t* blocks, int64_t stride,
                    int64_t count) {
  if (num_caches == 0) return;
  check_blocks(caches, blocks, stride, count);
  std::vector<bool> written(caches[0].num_blocks);
  for (int64_t i = 0; i < count; i++) {
    const int64_t block = blocks[i * stride];
    if (block < 0) continue;
    if (written[block]) throw std::invalid_argument("a block occurs twice");
    written[block] = true;
  }
  copy_staged(caches, num_caches, blocks, stride, count, source);
}

}  // namespace paged
