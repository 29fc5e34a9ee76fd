// Tensor arguments of the ops as typed pointers with strides.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "rows.h"
#include "torch_call.h"

namespace specdec {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

template <typename T>
constexpr ScalarType scalar_type_of();
template <>
constexpr ScalarType scalar_type_of<int32_t>() {
  return ScalarType::Int;
}
template <>
constexpr ScalarType scalar_type_of<int64_t>() {
  return ScalarType::Long;
}
template <>
constexpr ScalarType scalar_type_of<float>() {
  return ScalarType::Float;
}
template <>
constexpr ScalarType scalar_type_of<double>() {
  return ScalarType::Double;
}

// Reads a tensor of up to three dimensions of any strides; one that is not given reads as a
// constant.
template <typename T>
class Reader {
 public:
  Reader() = default;
  explicit Reader(T constant) : constant_(constant) {}

  Reader(const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes) {
    STD_TORCH_CHECK(tensor.scalar_type() == scalar_type_of<T>(), name,
                    " has another dtype than its op takes");
    STD_TORCH_CHECK(tensor.dim() == static_cast<int64_t>(sizes.size()), name, " must have ",
                    sizes.size(), " dimensions");
    int64_t d = 0;
    for (const int64_t size : sizes) {
      STD_TORCH_CHECK(tensor.size(d) == size, name, " must have size ", size, " at dimension ", d,
                      ", not ", tensor.size(d));
      stride_[d] = tensor.stride(d);
      ++d;
    }
    data_ = static_cast<const T*>(tensor.const_data_ptr());
    given_ = true;
  }

  // Numbers in rows that lie so far apart
  explicit Reader(const T* data, int64_t apart = 1)
      : data_(data), stride_{apart, 1, 0}, given_(true) {}

  Reader(const char* name, const MaybeTensor& tensor, std::initializer_list<int64_t> sizes,
         T constant)
      : Reader(tensor ? Reader(name, *tensor, sizes) : Reader(constant)) {}

  bool given() const { return given_; }
  T operator()(int64_t i, int64_t j = 0, int64_t k = 0) const {
    return given_ ? data_[i * stride_[0] + j * stride_[1] + k * stride_[2]] : constant_;
  }

 private:
  const T* data_ = nullptr;
  int64_t stride_[3]{};
  bool given_ = false;
  T constant_{};
};

// Temperature and filters, one of each a row.
class FilterReader {
 public:
  explicit FilterReader(const Filters& all)
      : temperature_(all.temperature), top_k_(all.top_k), top_p_(all.top_p), min_p_(all.min_p) {}

  FilterReader(const MaybeTensor& temperature, const MaybeTensor& top_k, const MaybeTensor& top_p,
               const MaybeTensor& min_p, int64_t rows)
      : temperature_("temperature", temperature, {rows}, 1.0f),
        top_k_("top_k", top_k, {rows}, 0),
        top_p_("top_p", top_p, {rows}, 1.0f),
        min_p_("min_p", min_p, {rows}, 0.0f) {}

  Filters operator()(int64_t row) const {
    return {temperature_(row), top_k_(row), top_p_(row), min_p_(row)};
  }

 private:
  Reader<float> temperature_;
  Reader<int32_t> top_k_;
  Reader<float> top_p_, min_p_;
};

// Logits of two or three dimensions, unit stride over the last one, as rows.
class Logits {
 public:
  Logits(const char* name, const Tensor& tensor, int64_t dims) : tensor_(tensor) {
    STD_TORCH_CHECK(tensor.dim() == dims, name, " must have ", dims, " dimensions");
    const ScalarType type = tensor.scalar_type();
    type_ = type == ScalarType::Float      ? kFloat32
            : type == ScalarType::BFloat16 ? kBFloat16
                                           : kFloat16;
    STD_TORCH_CHECK(type_ != kFloat16 || type == ScalarType::Half, name,
                    " must be float32, bfloat16 or float16");
    if (tensor.stride(dims - 1) != 1) tensor_ = torch::stable::contiguous(tensor);
    width = tensor_.size(dims - 1);
    data_ = static_cast<const char*>(tensor_.const_data_ptr());
    const int64_t size = type_ == kFloat32 ? 4 : 2;
    for (int64_t d = 0; d + 1 < dims; ++d) stride_[d] = tensor_.stride(d) * size;
  }

  // [.., positions, width] float32, side by side
  Logits(const float* data, int64_t positions, int64_t width)
      : width(width),
        type_(kFloat32),
        data_(reinterpret_cast<const char*>(data)),
        stride_{positions * width * 4, width * 4} {}

  Row row(int64_t i, int64_t j, const Filters& filters) const {
    Row result;
    result.data = data_ + i * stride_[0] + j * stride_[1];
    result.type = type_;
    result.width = width;
    result.filters = filters;
    return result;
  }

  int64_t width = 0;

 private:
  Tensor tensor_;  // keeps a copy alive
  Float type_;
  const char* data_ = nullptr;
  int64_t stride_[2]{};
};

// Made without the dispatcher, whose way to a tensor is a long one where it is not in the caches
inline Tensor new_tensor(const Tensor&, std::initializer_list<int64_t> sizes, ScalarType type) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;)
    strides[d - 1] = strides[d] * std::max<int64_t>(sizes.begin()[d], 1);
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle made;
  succeeded(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(),
                                     strides.data(), dtype, aoti_torch_device_type_cpu(), 0,
                                     &made));
  return Tensor(made);
}

template <typename T>
T* pointer(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace specdec
