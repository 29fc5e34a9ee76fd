// Tensor arguments of the ops as the plain structures of kernels/cuda/call.cuh.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <optional>

#include "../kernels/cuda/call.cuh"

namespace specdec::blocks {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

template <typename T>
constexpr ScalarType scalar_type_of() {
  if constexpr (std::is_same_v<T, int32_t>) return ScalarType::Int;
  if constexpr (std::is_same_v<T, int64_t>) return ScalarType::Long;
  if constexpr (std::is_same_v<T, float>) return ScalarType::Float;
  return ScalarType::Double;
}

template <typename T>
View<T> view_of(const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes) {
  STD_TORCH_CHECK(tensor.scalar_type() == scalar_type_of<T>(), name,
                  " has another dtype than its op takes");
  STD_TORCH_CHECK(tensor.dim() == static_cast<int64_t>(sizes.size()), name, " must have ",
                  sizes.size(), " dimensions");
  View<T> view;
  view.data = static_cast<const T*>(tensor.const_data_ptr());
  int64_t d = 0;
  for (const int64_t size : sizes) {
    STD_TORCH_CHECK(tensor.size(d) == size, name, " must have size ", size, " at dimension ", d,
                    ", not ", tensor.size(d));
    view.stride[d] = tensor.stride(d);
    ++d;
  }
  return view;
}

template <typename T>
View<T> view_of(const char* name, const MaybeTensor& tensor, std::initializer_list<int64_t> sizes,
                T constant) {
  if (tensor) return view_of<T>(name, *tensor, sizes);
  View<T> view;
  view.constant = constant;
  return view;
}

// Rows with unit stride over the vocabulary; `kept` keeps a copy alive where one is made.
inline Logits logits_of(const char* name, const Tensor& tensor, int64_t dims, Tensor& kept) {
  STD_TORCH_CHECK(tensor.dim() == dims, name, " must have ", dims, " dimensions");
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, name,
      " must be float32, bfloat16 or float16");
  kept = tensor.stride(dims - 1) == 1 ? tensor : torch::stable::contiguous(tensor);
  Logits logits;
  logits.data = kept.const_data_ptr();
  logits.type = type == ScalarType::Float      ? kFloats
                : type == ScalarType::BFloat16 ? kBFloats
                                               : kHalfs;
  logits.width = kept.size(dims - 1);
  for (int64_t d = 0; d + 1 < dims; ++d) logits.stride[d] = kept.stride(d);
  return logits;
}

inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes,
                         ScalarType type) {
  return torch::stable::new_empty(like, {sizes.begin(), sizes.size()}, type);
}

template <typename T>
T* pointer(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// One buffer dealt out in parts; what is taken first is zeroed before the blocks start.
class Workspace {
 public:
  template <typename T>
  size_t take(int64_t count) {
    const size_t at = bytes_;
    bytes_ += (static_cast<size_t>(count) * sizeof(T) + 15) / 16 * 16;
    return at;
  }
  size_t bytes() const { return bytes_; }
  void allocate(const Tensor& like) {
    buffer_ = new_tensor(like, {static_cast<int64_t>(bytes_)}, ScalarType::Byte);
  }
  template <typename T>
  T* at(size_t offset) const {
    return reinterpret_cast<T*>(pointer<char>(buffer_) + offset);
  }

 private:
  size_t bytes_ = 0;
  Tensor buffer_;
};

}  // namespace specdec::blocks
