// CPU kernels of the ops whose schemas the Python side defines.
//
// Only torch's stable ABI and its header-only part are used: one build serves every torch from
// TORCH_TARGET_VERSION on, and no Python ABI is involved.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdint>

#include "../kernels/cuda/philox.cuh"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxDims = 8;
constexpr int64_t kGrain = 8192;  // about 100 us of work, well above what waking a thread costs
constexpr int kKeys = 3;          // seed, position, offset

// Strides of the key tensors over their common broadcast shape; 0 where a tensor is broadcast.
struct Broadcast {
  int64_t dims = 0;
  int64_t numel = 1;
  std::array<int64_t, kMaxDims> shape{};
  std::array<std::array<int64_t, kMaxDims>, kKeys> stride{};
};

Broadcast broadcast(const std::array<const Tensor*, kKeys>& keys) {
  Broadcast plan;
  for (const Tensor* key : keys) plan.dims = std::max(plan.dims, key->dim());
  STD_TORCH_CHECK(plan.dims <= kMaxDims, "philox_uniform: at most ", kMaxDims, " dimensions");
  std::fill_n(plan.shape.begin(), plan.dims, 1);
  for (int k = 0; k < kKeys; ++k) {
    const int64_t shift = plan.dims - keys[k]->dim();
    for (int64_t d = shift; d < plan.dims; ++d) {
      const int64_t size = keys[k]->size(d - shift);
      if (size == 1) continue;
      STD_TORCH_CHECK(plan.shape[d] == 1 || plan.shape[d] == size,
                      "philox_uniform: seed, position and offset do not broadcast together: sizes ",
                      plan.shape[d], " and ", size, " at dimension ", d);
      plan.shape[d] = size;
      plan.stride[k][d] = keys[k]->stride(d - shift);
    }
  }
  for (int64_t d = 0; d < plan.dims; ++d) plan.numel *= plan.shape[d];
  return plan;
}

Tensor philox_uniform(const Tensor& seed, const Tensor& position, const Tensor& offset,
                      int64_t purpose, int64_t trial) {
  const std::array<const Tensor*, kKeys> keys{&seed, &position, &offset};
  std::array<const int64_t*, kKeys> data{};
  for (int k = 0; k < kKeys; ++k) {
    STD_TORCH_CHECK(keys[k]->scalar_type() == ScalarType::Long,
                    "philox_uniform: seed, position and offset must be int64");
    data[k] = keys[k]->const_data_ptr<int64_t>();
  }
  STD_TORCH_CHECK(purpose >= 0 && purpose < (int64_t{1} << 8),
                  "philox_uniform: purpose is outside [0, 2^8): ", purpose);
  STD_TORCH_CHECK(trial >= 0 && trial < (int64_t{1} << 32),
                  "philox_uniform: trial is outside [0, 2^32): ", trial);
  const Broadcast plan = broadcast(keys);
  Tensor result = torch::stable::new_empty(
      seed, {plan.shape.data(), static_cast<size_t>(plan.dims)}, ScalarType::Double);
  double* out = result.mutable_data_ptr<double>();

  const auto fill = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      std::array<int64_t, kKeys> at{};
      for (int64_t d = plan.dims - 1, rest = i; d >= 0; --d) {
        const int64_t index = rest % plan.shape[d];
        rest /= plan.shape[d];
        for (int k = 0; k < kKeys; ++k) at[k] += index * plan.stride[k][d];
      }
      out[i] =
          specdec::philox_uniform(data[0][at[0]], data[1][at[1]], data[2][at[2]],
                                  static_cast<uint32_t>(purpose), static_cast<uint32_t>(trial));
    }
  };
  if (plan.numel <= kGrain) {
    fill(0, plan.numel);
  } else {
    torch::stable::parallel_for(0, plan.numel, kGrain, fill);
  }
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(specdec_fast, CPU, library) {
  library.impl("philox_uniform", TORCH_BOX(&philox_uniform));
}
