// Bytes from here to there, where many are written past the caches.
#pragma once

#include "vec.h"

namespace paged {

// Where it begins, `to` must stand at a multiple of a vector's size.
INLINE void store_past_caches(char* to, Vec v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(reinterpret_cast<float*>(to), bit_cast<__m512>(v));
#elif defined(__AVX__)
  _mm256_stream_ps(reinterpret_cast<float*>(to), bit_cast<__m256>(v));
#elif defined(__x86_64__)
  _mm_stream_ps(reinterpret_cast<float*>(to), bit_cast<__m128>(v));
#else
  std::memcpy(to, &v, sizeof v);
#endif
}

// What was stored past the caches comes before what this thread stores from here on.
INLINE void finish_stores() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// `past_caches`: a store then need not read the line that it overwrites, and nothing is pushed out of the caches.
INLINE void copy_bytes(const char* from, char* to, int64_t bytes, bool past_caches) {
  constexpr int64_t STEP = sizeof(Vec);
  past_caches &= reinterpret_cast<uintptr_t>(to) % STEP == 0;
  int64_t i = 0;
  for (; i + STEP <= bytes; i += STEP) {
    const Vec v = read<Vec>(from + i);
    if (past_caches)
      store_past_caches(to + i, v);
    else
      std::memcpy(to + i, &v, sizeof v);
  }
  std::memcpy(to + i, from + i, bytes - i);
}

}  // namespace paged
