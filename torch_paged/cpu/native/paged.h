// What the operators and the kernels share: plain data.
#pragma once

#include <cstdint>

namespace paged {

enum Type : int { F32, F16, BF16, E4M3, E5M2, I8, NUM_TYPES };

inline int size_of(Type type) { return type == F32 ? 4 : type <= BF16 ? 2 : 1; }

// A cache [num_blocks, block_size, num_kv_heads, dim] and its scales; strides in elements, the last one is 1.
struct Cache {
  const char* data;
  Type type;
  int64_t dim;
  int64_t strides[3];
  const float* scale;  // static, null: 1; of head h at scale[h * scale_stride]
  int64_t scale_stride;
  const float* scales;  // per token and head, null: none
  int64_t scales_strides[3];
};

struct Attention {
  const char* query;  // [num_tokens, num_heads, key.dim]
  Type query_type;
  int64_t query_strides[2];
  Cache key, value;
  const int32_t* table;
  int64_t table_strides[2];
  int64_t block_size, num_kv_heads, group;
  float scale;
  bool causal;
  int64_t window;  // keys that a query sees at most, its own included
  float softcap;   // 0: none
  const float *alibi_slopes, *sinks;  // per head, null: none
  int64_t alibi_stride, sinks_stride;
  char* output;  // contiguous [num_tokens, num_heads, value.dim], query's type
  float* lse;    // contiguous [num_tokens, num_heads]
};

constexpr int FEW_ROWS = 8;  // of a unit and KV head: up to here they read stored keys as they lie

// Queries of one sequence, KV heads side by side, and a range of keys: what one thread computes at a time.
// Rows of a KV head are (query, head) pairs: row r is query r / group and the group's head r % group.
struct Unit {
  const int32_t* blocks;   // the sequence's row of the table
  int64_t token, queries;  // rows of query and output
  int64_t position;        // of the first query
  int64_t first_key, end_key;
  int64_t kv_head, kv_heads;  // the first one, and how many
  float* part;  // where a part of the keys leaves its rows; null: all keys are in this unit, write the output
  int64_t part_stride;  // from one KV head's rows to the next one's

  Unit of_head(int64_t i) const {
    Unit unit = *this;
    unit.kv_head += i, unit.kv_heads = 1;
    if (part) unit.part += i * part_stride;
    return unit;
  }
};

// What the values of the arguments say: who has how many queries and keys. Strides in elements.
struct Batch {
  int64_t num_seqs, num_tokens, num_blocks, table_width;
  const int32_t *seq_lens, *cu_seqlens_q;  // cu_seqlens_q null: num_tokens / num_seqs queries each
  int64_t seq_lens_stride, cu_seqlens_q_stride;
};

// Rows [num_rows, num_heads, dim] in memory, any strides.
struct RowsView {
  char* data;
  Type type;
  int64_t num_heads, dim;
  int64_t strides[3];
};

// Where rows of keys or values go: slots of a cache, quantised on the way where its type says so.
struct Append {
  RowsView rows;
  Cache cache;
  float* new_scales;  // a scale for each token and head to write, strides as cache.scales_strides; null: none
  int64_t block_size;
};

struct Slots {
  const int64_t* data;
  int64_t stride, count, limit;  // negative: skip; the limit is out of range
};

// Angles of positions, [num_positions, half] each.
struct Rotation {
  const char *cos, *sin;
  Type type;
  int64_t half, cos_strides[2], sin_strides[2];
  const int64_t* positions;
  int64_t positions_stride, num_positions;
  bool interleaved;
  RowsView query;
  char* rotated;  // contiguous, the query's shape and type
};

struct Merge {
  RowsView a, b;
  const float *lse_a, *lse_b;
  int64_t lse_a_strides[2], lse_b_strides[2];
  char* out;
  float* lse;
};

// Blocks of one tensor, any shape and strides: the first dimension counts them. Sizes and strides of the others.
struct Blocks {
  char* data;
  int64_t size;  // of an element, in bytes
  int64_t num_blocks, block_stride;
  const int64_t *sizes, *strides;
  int64_t dims;
};

// Attention over the whole batch, on all threads. Throws std::out_of_range before anything is written.
void attend_batch(const Attention&, const Batch&);
// Likewise: std::out_of_range, or std::invalid_argument where an order of copies would matter, before any write.
void append_rows(const Append* sides, int num_sides, const Slots&);  // key, and value where there is one
void rotary_append_rows(const Rotation&, const Append* sides, int num_sides, const Slots&, int64_t num_tokens);
void merge_rows(const Merge&, int64_t num_tokens);
void copy_blocks(const Blocks* caches, int64_t num_caches, const int64_t* pairs, const int64_t (&strides)[2],
                 int64_t count);
void gather_blocks(const Blocks* caches, int64_t num_caches, const int64_t* blocks, int64_t stride, int64_t count,
                   char* out);
void scatter_blocks(const char* source, const Blocks* caches, int64_t num_caches, const int64_t* blocks, int64_t stride,
                    int64_t count);

void attend(const Attention&, const Unit&);
// Of one KV head:
void merge_parts(const Attention&, const Unit&, const float* parts, int64_t count);
int64_t part_floats(const Attention&, const Unit&);  // that attend leaves at unit.part

int64_t num_threads();
// work(context, i) for i from 0 to count - 1, on PyTorch's threads; on the calling one alone if `small`.
void parallel(int64_t count, bool small, void (*work)(void* context, int64_t i), void* context);

template <class Work>
void parallel(int64_t count, bool small, const Work& work) {
  parallel(count, small, [](void* context, int64_t i) { (*static_cast<const Work*>(context))(i); },
           const_cast<Work*>(&work));
}

// Memory of the calling thread that only grows: 64-byte aligned, kept for the next call.
char* thread_scratch(int64_t bytes);

}  // namespace paged
