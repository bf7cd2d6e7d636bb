// The operators of namespace paged_native: what torch_paged.cpu.native calls once shapes and dtypes are checked.
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>
#include <vector>

#include "tensors.h"

namespace paged {

char* thread_scratch(int64_t bytes) {
  struct Memory {
    char* data = nullptr;
    int64_t size = 0;
    ~Memory() { std::free(data); }
  };
  static thread_local Memory memory;
  if (bytes > memory.size) {
    std::free(memory.data);
    memory.size = (bytes + bytes / 4 + 4095) / 4096 * 4096;
    memory.data = static_cast<char*>(std::aligned_alloc(4096, memory.size));
    if (!memory.data) memory.size = 0, throw std::bad_alloc();
  }
  return memory.data;
}

int64_t num_threads() { return torch::stable::get_num_threads(); }

void parallel(int64_t count, bool small, void (*work)(void* context, int64_t i), void* context) {
  const int64_t threads = small ? 1 : std::min(num_threads(), count);
  if (threads <= 1) {
    for (int64_t i = 0; i < count; i++) work(context, i);
    return;
  }
  std::atomic<int64_t> next{0};  // who is free takes the next one
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; begin++)
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(context, i);
  });
}

namespace {

typedef std::optional<Tensor> Optional;

void attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table, Tensor seq_lens,
               Optional cu_seqlens_q, double scale, bool causal, int64_t sliding_window, double softcap,
               Optional alibi_slopes, Optional sinks, Optional key_scale, Optional value_scale,
               Optional key_scale_cache, Optional value_scale_cache, Tensor output, Tensor lse) {
  Attention a{};
  a.query = data_of(query);
  a.query_type = type_of(query);
  copy_strides(query, a.query_strides);
  a.key = cache_of(key_cache, key_scale, key_scale_cache);
  a.value = cache_of(value_cache, value_scale, value_scale_cache);
  a.table = data_of<int32_t>(block_table);
  copy_strides(block_table, a.table_strides);
  a.block_size = key_cache.size(1);
  a.num_kv_heads = key_cache.size(2);
  a.group = query.size(1) / a.num_kv_heads;
  a.scale = float(scale);
  a.causal = causal;
  a.window = std::min<int64_t>(sliding_window, int64_t(1) << 40);  // positions are added to it
  a.softcap = float(softcap);
  a.alibi_slopes = data_of<float>(alibi_slopes);
  a.alibi_stride = alibi_slopes ? alibi_slopes->stride(0) : 0;
  a.sinks = data_of<float>(sinks);
  a.sinks_stride = sinks ? sinks->stride(0) : 0;
  a.output = data_of(output);
  a.lse = data_of<float>(lse);
  Batch batch{};
  batch.num_seqs = block_table.size(0);
  batch.num_tokens = query.size(0);
  batch.num_blocks = key_cache.size(0);
  batch.table_width = block_table.size(1);
  batch.seq_lens = data_of<int32_t>(seq_lens);
  batch.seq_lens_stride = seq_lens.stride(0);
  batch.cu_seqlens_q = data_of<int32_t>(cu_seqlens_q);
  batch.cu_seqlens_q_stride = cu_seqlens_q ? cu_seqlens_q->stride(0) : 0;
  attend_batch(a, batch);
}

Append append_of(const Tensor& rows, const Tensor& cache, const Optional& scale, const Optional& scales) {
  return {rows_of(rows), cache_of(cache, scale, scales), data_of<float>(scales), cache.size(1)};
}

Slots slots_of(const Tensor& slots, const Tensor& cache) {
  return {data_of<int64_t>(slots), slots.stride(0), slots.size(0), cache.size(0) * cache.size(1)};
}

void append(Tensor key, Optional value, Tensor key_cache, Optional value_cache, Tensor slot_mapping, Optional key_scale,
            Optional value_scale, Optional key_scale_cache, Optional value_scale_cache) {
  Append sides[2] = {append_of(key, key_cache, key_scale, key_scale_cache), {}};
  if (value) sides[1] = append_of(*value, *value_cache, value_scale, value_scale_cache);
  append_rows(sides, value ? 2 : 1, slots_of(slot_mapping, key_cache));
}

void rotary_append(Tensor query, Tensor key, Optional value, Tensor cos, Tensor sin, Tensor positions, Tensor key_cache,
                   Optional value_cache, Tensor slot_mapping, bool interleaved, Optional key_scale,
                   Optional value_scale, Optional key_scale_cache, Optional value_scale_cache, Tensor rotated) {
  Rotation r{};
  r.cos = data_of(cos);
  r.sin = data_of(sin);
  r.type = type_of(cos);
  r.half = cos.size(1);
  copy_strides(cos, r.cos_strides);
  copy_strides(sin, r.sin_strides);
  r.positions = data_of<int64_t>(positions);
  r.positions_stride = positions.stride(0);
  r.num_positions = cos.size(0);
  r.interleaved = interleaved;
  r.query = rows_of(query);
  r.rotated = data_of(rotated);
  Append sides[2] = {append_of(key, key_cache, key_scale, key_scale_cache), {}};
  if (value) sides[1] = append_of(*value, *value_cache, value_scale, value_scale_cache);
  rotary_append_rows(r, sides, value ? 2 : 1, slots_of(slot_mapping, key_cache), query.size(0));
}

void merge_attention(Tensor output_a, Tensor lse_a, Tensor output_b, Tensor lse_b, Tensor output, Tensor lse) {
  Merge m{};
  m.a = rows_of(output_a);
  m.b = rows_of(output_b);
  m.lse_a = data_of<float>(lse_a);
  m.lse_b = data_of<float>(lse_b);
  copy_strides(lse_a, m.lse_a_strides);
  copy_strides(lse_b, m.lse_b_strides);
  m.out = data_of(output);
  m.lse = data_of<float>(lse);
  merge_rows(m, output_a.size(0));
}

std::vector<Blocks> blocks_of(const std::vector<Tensor>& caches) {
  std::vector<Blocks> all;
  for (const Tensor& cache : caches) {
    const auto sizes = cache.sizes(), strides = cache.strides();
    all.push_back({data_of(cache), int64_t(cache.element_size()), sizes[0], strides[0], sizes.data() + 1,
                   strides.data() + 1, cache.dim() - 1});
  }
  return all;
}

void copy_blocks_of(std::vector<Tensor> caches, Tensor block_pairs) {
  int64_t strides[2];
  copy_strides(block_pairs, strides);
  copy_blocks(blocks_of(caches).data(), caches.size(), data_of<int64_t>(block_pairs), strides, block_pairs.size(0));
}

void gather_blocks_of(std::vector<Tensor> caches, Tensor blocks, Tensor out) {
  gather_blocks(blocks_of(caches).data(), caches.size(), data_of<int64_t>(blocks), blocks.stride(0), blocks.size(0),
                data_of(out));
}

void scatter_blocks_of(Tensor source, Tensor blocks, std::vector<Tensor> caches) {
  scatter_blocks(data_of(source), blocks_of(caches).data(), caches.size(), data_of<int64_t>(blocks), blocks.stride(0),
                 blocks.size(0));
}

STABLE_TORCH_LIBRARY(paged_native, library) {
  library.def(
      "attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table, Tensor seq_lens, "
      "Tensor? cu_seqlens_q, float scale, bool causal, int sliding_window, float softcap, Tensor? alibi_slopes, "
      "Tensor? sinks, Tensor? key_scale, Tensor? value_scale, Tensor? key_scale_cache, Tensor? value_scale_cache, "
      "Tensor(a!) output, Tensor(b!) lse) -> ()");
  library.def(
      "append(Tensor key, Tensor? value, Tensor(a!) key_cache, Tensor(b!)? value_cache, Tensor slot_mapping, "
      "Tensor? key_scale, Tensor? value_scale, Tensor(c!)? key_scale_cache, Tensor(d!)? value_scale_cache) -> ()");
  library.def(
      "rotary_append(Tensor query, Tensor key, Tensor? value, Tensor cos, Tensor sin, Tensor positions, "
      "Tensor(a!) key_cache, Tensor(b!)? value_cache, Tensor slot_mapping, bool interleaved, Tensor? key_scale, "
      "Tensor? value_scale, Tensor(c!)? key_scale_cache, Tensor(d!)? value_scale_cache, Tensor(e!) rotated) -> ()");
  library.def(
      "merge_attention(Tensor output_a, Tensor lse_a, Tensor output_b, Tensor lse_b, Tensor(a!) output, "
      "Tensor(b!) lse) -> ()");
  library.def("copy_blocks(Tensor(a!)[] caches, Tensor block_pairs) -> ()");
  library.def("gather_blocks(Tensor[] caches, Tensor blocks, Tensor(a!) out) -> ()");
  library.def("scatter_blocks(Tensor source, Tensor blocks, Tensor(a!)[] caches) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(paged_native, CPU, library) {
  library.impl("attention", TORCH_BOX(&attention));
  library.impl("append", TORCH_BOX(&append));
  library.impl("rotary_append", TORCH_BOX(&rotary_append));
  library.impl("merge_attention", TORCH_BOX(&merge_attention));
  library.impl("copy_blocks", TORCH_BOX(&copy_blocks_of));
  library.impl("gather_blocks", TORCH_BOX(&gather_blocks_of));
  library.impl("scatter_blocks", TORCH_BOX(&scatter_blocks_of));
}

}  // namespace
}  // namespace paged
