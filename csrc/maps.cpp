// The ops `project` and `range_sums`: masses of a law put together in another way.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "arguments.h"

namespace specdec {

namespace {

// A law as float64, whatever its own type.
class Masses {
 public:
  explicit Masses(const Tensor& q)
      : single_(q.scalar_type() == ScalarType::Float), row_(q.stride(0)), entry_(q.stride(1)) {
    STD_TORCH_CHECK(single_ || q.scalar_type() == ScalarType::Double,
                    "q must be float32 or float64");
    data_ = q.const_data_ptr();
  }
  double operator()(int64_t n, int64_t k) const {
    const int64_t at = n * row_ + k * entry_;
    return single_ ? static_cast<const float*>(data_)[at] : static_cast<const double*>(data_)[at];
  }

 private:
  bool single_;
  int64_t row_, entry_;
  const void* data_;
};

Tensor project(const Tensor& q_, const Tensor& row_start_, const Tensor& column_) {
  STD_TORCH_CHECK(q_.dim() == 2 && row_start_.dim() == 1 && column_.dim() == 1,
                  "project: q must be [N, K], row_start [V + 1] and column one-dimensional");
  const Masses q(q_);
  const int64_t rows = q_.size(0), entries = q_.size(1), width = row_start_.size(0) - 1;
  const int64_t listed = column_.size(0);
  const Reader<int32_t> row_start("row_start", row_start_, {width + 1});
  const Reader<int32_t> column("column", column_, {listed});
  Tensor result = new_tensor(q_, {rows, width}, ScalarType::Double);
  double* out = pointer<double>(result);
  constexpr int64_t kGrain = 16384;
  std::atomic<bool> outside{false};  // an exception of a thread would lose its message
  torch::stable::parallel_for(0, rows * width, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / width, t = i % width;
      double sum = 0.0;
      for (int64_t j = row_start(t); j < row_start(t + 1); ++j) {
        if (j < 0 || j >= listed || column(j) < 0 || column(j) >= entries) {
          outside = true;
          break;
        }
        sum += q(n, column(j));
      }
      out[i] = sum;
    }
  });
  STD_TORCH_CHECK(!outside, "project: row_start or column is out of range; column must be in [0, ",
                  entries, ")");
  return result;
}

Tensor range_sums(const Tensor& q_, const MaybeTensor& order_, const Tensor& low_,
                  const Tensor& high_) {
  STD_TORCH_CHECK(q_.dim() == 2 && low_.dim() == 2,
                  "range_sums: q, low and high must have two dimensions");
  const Masses q(q_);
  const int64_t rows = q_.size(0), entries = q_.size(1), ranges = low_.size(1);
  const int64_t length = order_ ? order_->size(0) : entries;
  const Reader<int32_t> order("order", order_, {length}, 0);
  const Reader<int64_t> low("low", low_, {rows, ranges}), high("high", high_, {rows, ranges});
  Tensor result = new_tensor(q_, {rows, ranges}, ScalarType::Double);
  double* out = pointer<double>(result);
  std::atomic<bool> outside{false};
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> edge(length + 1);
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t j = 0; j < length; ++j) {
        const int64_t k = order.given() ? order(j) : j;
        const bool inside = k >= 0 && k < entries;
        if (!inside) outside = true;
        edge[j + 1] = edge[j] + (inside ? q(n, k) : 0.0);
      }
      for (int64_t r = 0; r < ranges; ++r) {
        const auto inside = [&](int64_t end) { return std::clamp<int64_t>(end, 0, length); };
        out[n * ranges + r] = std::max(0.0, edge[inside(high(n, r))] - edge[inside(low(n, r))]);
      }
    }
  });
  STD_TORCH_CHECK(!outside, "range_sums: order must be in [0, ", entries, ")");
  return result;
}

}  // namespace

}  // namespace specdec

STABLE_TORCH_LIBRARY_IMPL(specdec_fast, CPU, library) {
  library.impl("project", TORCH_BOX(&specdec::project));
  library.impl("range_sums", TORCH_BOX(&specdec::range_sums));
}
