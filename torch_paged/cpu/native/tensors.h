// PyTorch's tensors, through its stable ABI, as the plain structures of paged.h.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>

#include "paged.h"

namespace paged {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Type type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return F32;
    case ScalarType::Half: return F16;
    case ScalarType::BFloat16: return BF16;
    case ScalarType::Float8_e4m3fn: return E4M3;
    case ScalarType::Float8_e5m2: return E5M2;
    case ScalarType::Char: return I8;
    default: throw std::invalid_argument("no kernel for this dtype");
  }
}

template <class T = char>
T* data_of(const Tensor& tensor) { return static_cast<T*>(tensor.data_ptr()); }

template <class T = char>
T* data_of(const std::optional<Tensor>& tensor) { return tensor ? data_of<T>(*tensor) : nullptr; }

template <int N>
void copy_strides(const Tensor& tensor, int64_t (&strides)[N]) {
  const auto all = tensor.strides();
  for (int i = 0; i < N; i++) strides[i] = all[i];
}

inline Cache cache_of(const Tensor& tensor, const std::optional<Tensor>& scale, const std::optional<Tensor>& scales) {
  Cache cache{};
  cache.data = data_of(tensor);
  cache.type = type_of(tensor);
  cache.dim = tensor.size(3);
  copy_strides(tensor, cache.strides);
  cache.scale = data_of<float>(scale);
  cache.scale_stride = scale && scale->dim() ? scale->stride(0) : 0;
  cache.scales = data_of<float>(scales);
  if (scales) copy_strides(*scales, cache.scales_strides);
  return cache;
}

inline RowsView rows_of(const Tensor& tensor) {
  RowsView rows{data_of(tensor), type_of(tensor), tensor.size(1), tensor.size(2), {}};
  copy_strides(tensor, rows.strides);
  return rows;
}

}  // namespace paged
