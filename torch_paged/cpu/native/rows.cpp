// Rows of keys and values into slots, rotated and quantised on the way; rows of two attention results merged.
#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "copy.h"
#include "quantise.h"

namespace paged {
namespace {

constexpr int64_t LONGEST = 576 + W;
constexpr int64_t PIECE = 512;    // of rows to be merged, which may have any length
constexpr int64_t TOGETHER = 16;  // rows that one thread takes at a time
constexpr int64_t SMALL_BYTES = 64 << 10, LARGE_BYTES = 1 << 20;

template <class T>
INLINE void widen_row(const T* from, int64_t stride, int64_t dim, float* to) {
  int64_t i = 0;
  if (stride == 1)
    for (; i + W <= dim; i += W) store(to + i, load(from + i));
  for (; i < dim; i++) {
    const Vec one = load(from + i * stride, 1);
    to[i] = one[0];
  }
}

void read_row(const char* from, Type type, int64_t stride, int64_t dim, float* to) {
  if (type == F32) return widen_row(reinterpret_cast<const float*>(from), stride, dim, to);
  if (type == F16) return widen_row(reinterpret_cast<const f16*>(from), stride, dim, to);
  widen_row(reinterpret_cast<const bf16*>(from), stride, dim, to);
}

void write_row(const float* from, int64_t dim, Type type, char* to) {
  for (int64_t i = 0; i < dim; i += W) store_row(to, type, i, read<Vec>(from + i), int(dim - i < W ? dim - i : W));
}

const char* row_of(const RowsView& rows, int64_t token, int64_t head) {
  return rows.data + (token * rows.strides[0] + head * rows.strides[1]) * size_of(rows.type);
}

// Largest magnitude of a row, NaN if it has one.
float largest_magnitude(const float* row, int64_t dim) {
  float largest = 0;
  for (int64_t i = 0; i < dim; i++) {
    const float size = std::fabs(row[i]);
    largest = size > largest || size != size ? size : largest;
    if (size != size) break;
  }
  return largest;
}

void quantise_row(const Append& a, int64_t token, int64_t head, int64_t block, int64_t offset, char* to) {
  alignas(64) float row[LONGEST];
  const RowsView& rows = a.rows;
  read_row(row_of(rows, token, head), rows.type, rows.strides[2], rows.dim, row);
  float scale = a.cache.scale ? a.cache.scale[head * a.cache.scale_stride] : 1;
  if (a.new_scales) {
    const int64_t* strides = a.cache.scales_strides;
    scale = largest_magnitude(row, rows.dim) / largest_of(a.cache.type);
    if (scale < 1.17549435e-38f) scale = 1;  // a row of zeros
    a.new_scales[block * strides[0] + offset * strides[1] + head * strides[2]] = scale;
  }
  for (int64_t i = 0; i < rows.dim; i += W) {
    const BVec stored = quantise(read<Vec>(row + i) / splat(scale), a.cache.type);
    std::memcpy(to + i, &stored, rows.dim - i < W ? rows.dim - i : W);
  }
}

void copy_elements(const char* from, int64_t stride, int64_t count, int64_t size, char* to) {
  for (int64_t i = 0; i < count; i++) std::memcpy(to + i * size, from + i * stride * size, size);
}

void append_row(const Append& a, int64_t token, int64_t slot, bool many) {
  const int64_t block = slot / a.block_size, offset = slot % a.block_size, size = size_of(a.cache.type);
  const RowsView& rows = a.rows;
  char* to = const_cast<char*>(a.cache.data) + (block * a.cache.strides[0] + offset * a.cache.strides[1]) * size;
  const bool quantised = a.cache.type != rows.type, together = rows.strides[2] == 1 && !quantised;
  if (together && rows.strides[1] == rows.dim && a.cache.strides[2] == rows.dim) {
    copy_bytes(row_of(rows, token, 0), to, rows.num_heads * rows.dim * size, many);
    return;
  }
  for (int64_t head = 0; head < rows.num_heads; head++, to += a.cache.strides[2] * size) {
    if (quantised)
      quantise_row(a, token, head, block, offset, to);
    else if (together)
      copy_bytes(row_of(rows, token, head), to, rows.dim * size, many);
    else
      copy_elements(row_of(rows, token, head), rows.strides[2], rows.dim, size, to);
  }
}

void check_slots(const Slots& slots) {
  for (int64_t i = 0; i < slots.count; i++)
    if (slots.data[i * slots.stride] >= slots.limit) throw std::out_of_range("a slot is out of range");
}

int64_t bytes_of(const RowsView& rows, int64_t count) { return count * rows.num_heads * rows.dim * size_of(rows.type); }

// work(row) for every row, TOGETHER at a time.
template <class Work>
void each_row(int64_t count, bool small, const Work& work) {
  parallel((count + TOGETHER - 1) / TOGETHER, small, [&](int64_t i) {
    for (int64_t row = i * TOGETHER; row < count && row < (i + 1) * TOGETHER; row++) work(row);
    finish_stores();
  });
}

// One head of one token, turned: pairs (i, i + half), or (2 i, 2 i + 1) where interleaved.
void rotate(const float* row, const float* cos, const float* sin, int64_t half, int64_t dim, bool interleaved,
            float* out) {
  const int64_t step = interleaved ? 2 : 1, across = interleaved ? 1 : half;
  for (int64_t i = 0; i < half; i++) {
    const float a = row[i * step], b = row[i * step + across];
    out[i * step] = a * cos[i] - b * sin[i];
    out[i * step + across] = b * cos[i] + a * sin[i];
  }
  std::memcpy(out + 2 * half, row + 2 * half, (dim - 2 * half) * 4);
}

void rotate_heads(const Rotation& r, const RowsView& rows, int64_t token, char* to) {
  alignas(64) float cos[LONGEST], sin[LONGEST], row[LONGEST], turned[LONGEST];
  const int64_t position = r.positions[token * r.positions_stride], size = size_of(r.type);
  read_row(r.cos + position * r.cos_strides[0] * size, r.type, r.cos_strides[1], r.half, cos);
  read_row(r.sin + position * r.sin_strides[0] * size, r.type, r.sin_strides[1], r.half, sin);
  for (int64_t head = 0; head < rows.num_heads; head++, to += rows.dim * size_of(rows.type)) {
    read_row(row_of(rows, token, head), rows.type, rows.strides[2], rows.dim, row);
    rotate(row, cos, sin, r.half, rows.dim, r.interleaved, turned);
    write_row(turned, rows.dim, rows.type, to);
  }
}

// Elements [first, first + count) of a row, as many as `to` has room for; zeros where its part saw no key and so has no
// say, whatever it holds.
void read_piece(const RowsView& rows, int64_t token, int64_t head, int64_t first, int64_t count, bool seen, float* to) {
  std::memset(to, 0, PIECE * 4);
  const char* from = row_of(rows, token, head) + first * rows.strides[2] * size_of(rows.type);
  if (seen) read_row(from, rows.type, rows.strides[2], count, to);
}

void merge_row(const Merge& m, int64_t token, int64_t head) {
  alignas(64) float a[PIECE], b[PIECE];
  const int64_t row = token * m.a.num_heads + head;
  const float lse_a = m.lse_a[token * m.lse_a_strides[0] + head * m.lse_a_strides[1]];
  const float lse_b = m.lse_b[token * m.lse_b_strides[0] + head * m.lse_b_strides[1]];
  const float largest = lse_a > lse_b || lse_a != lse_a ? lse_a : lse_b;
  char* out = m.out + row * m.a.dim * size_of(m.a.type);
  if (largest == -INFINITY) {
    m.lse[row] = -INFINITY;
    std::memset(out, 0, m.a.dim * size_of(m.a.type));
    return;
  }
  const float weight_a = std::exp(lse_a - largest), weight_b = std::exp(lse_b - largest), sum = weight_a + weight_b;
  m.lse[row] = largest + std::log(sum);
  for (int64_t first = 0; first < m.a.dim; first += PIECE) {
    const int64_t count = std::min(PIECE, m.a.dim - first);
    read_piece(m.a, token, head, first, count, lse_a != -INFINITY, a);
    read_piece(m.b, token, head, first, count, lse_b != -INFINITY, b);
    for (int64_t i = 0; i < count; i += W)
      store(a + i, splat(weight_a / sum) * read<Vec>(a + i) + splat(weight_b / sum) * read<Vec>(b + i));
    write_row(a, count, m.a.type, out + first * size_of(m.a.type));
  }
}

}  // namespace

void append_rows(const Append* sides, int num_sides, const Slots& slots) {
  check_slots(slots);
  const int64_t bytes = bytes_of(sides[0].rows, slots.count);
  each_row(slots.count, bytes < SMALL_BYTES, [&](int64_t row) {
    const int64_t slot = slots.data[row * slots.stride];
    for (int side = 0; side < num_sides && slot >= 0; side++) append_row(sides[side], row, slot, bytes >= LARGE_BYTES);
  });
}

void rotary_append_rows(const Rotation& r, const Append* sides, int num_sides, const Slots& slots, int64_t num_tokens) {
  check_slots(slots);
  for (int64_t i = 0; i < num_tokens; i++) {
    const int64_t position = r.positions[i * r.positions_stride];
    if (position < 0 || position >= r.num_positions) throw std::out_of_range("a position is out of range");
  }
  const RowsView keys = sides[0].rows;
  const bool many = bytes_of(keys, num_tokens) >= LARGE_BYTES;
  each_row(num_tokens, bytes_of(r.query, num_tokens) < SMALL_BYTES, [&](int64_t row) {
    rotate_heads(r, r.query, row, r.rotated + row * bytes_of(r.query, 1));
    const int64_t slot = row < slots.count ? slots.data[row * slots.stride] : -1;
    if (slot < 0) return;
    Append turned = sides[0];
    turned.rows.data = thread_scratch(bytes_of(keys, 1));
    turned.rows.strides[0] = 0, turned.rows.strides[1] = keys.dim, turned.rows.strides[2] = 1;
    rotate_heads(r, keys, row, turned.rows.data);
    append_row(turned, row, slot, many);
    if (num_sides > 1) append_row(sides[1], row, slot, many);
  });
}

void merge_rows(const Merge& m, int64_t num_tokens) {
  each_row(num_tokens, bytes_of(m.a, num_tokens) < SMALL_BYTES, [&](int64_t token) {
    for (int64_t head = 0; head < m.a.num_heads; head++) merge_row(m, token, head);
  });
}

}  // namespace paged
