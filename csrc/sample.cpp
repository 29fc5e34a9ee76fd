// The ops `sample` and `softmax`.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "../kernels/cuda/philox.cuh"
#include "arguments.h"
#include "rows.h"

namespace specdec {

namespace {

std::vector<Row> measured_rows(const Logits& logits, const FilterReader& filters, int64_t rows) {
  std::vector<Row> result;
  result.reserve(rows);
  for (int64_t b = 0; b < rows; ++b) result.push_back(logits.row(b, 0, filters(b)));
  std::vector<Row*> all;
  for (Row& row : result) all.push_back(&row);
  measure(all);
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sample(
    const Tensor& logits_, const MaybeTensor& temperature, const MaybeTensor& top_k,
    const MaybeTensor& top_p, const MaybeTensor& min_p, const Tensor& seed_,
    const Tensor& position_, const MaybeTensor& offset_, int64_t purpose) {
  const Logits logits("logits", logits_, 2);
  const int64_t rows = logits_.size(0);
  const FilterReader filters(temperature, top_k, top_p, min_p, rows);
  const Reader<int64_t> seed("seed", seed_, {rows}), position("position", position_, {rows}),
      offset("offset", offset_, {rows}, 0);

  Tensor token = new_tensor(logits_, {rows}, ScalarType::Long);
  Tensor log_prob = new_tensor(logits_, {rows}, ScalarType::Double);
  Tensor logsumexp = new_tensor(logits_, {rows}, ScalarType::Double);
  Tensor status = new_tensor(logits_, {rows}, ScalarType::Int);
  const std::vector<Row> all = measured_rows(logits, filters, rows);
  const auto finish = [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const Row& row = all[b];
      const double u =
          philox_uniform(seed(b), position(b), offset(b), static_cast<uint32_t>(purpose), 0);
      const int64_t drawn = row.undefined ? 0 : draw(row, u);
      pointer<int64_t>(token)[b] = drawn;
      pointer<double>(log_prob)[b] = row.log_prob(drawn);
      pointer<double>(logsumexp)[b] = row.logsumexp();
      pointer<int32_t>(status)[b] = row.undefined;
    }
  };
  torch::stable::parallel_for(0, rows, 4, finish);  // a draw takes about 5 us
  return {token, log_prob, logsumexp, status};
}

Tensor softmax(const Tensor& logits_, const MaybeTensor& temperature, const MaybeTensor& top_k,
               const MaybeTensor& top_p, const MaybeTensor& min_p) {
  const Logits logits("logits", logits_, 2);
  const int64_t rows = logits_.size(0), width = logits.width;
  const FilterReader filters(temperature, top_k, top_p, min_p, rows);
  Tensor result = new_tensor(logits_, {rows, width}, ScalarType::Double);
  const std::vector<Row> all = measured_rows(logits, filters, rows);
  double* out = pointer<double>(result);
  const int64_t chunks = (width + kChunk - 1) / kChunk;
  torch::stable::parallel_for(0, rows * chunks, 4, [&](int64_t begin, int64_t end) {
    alignas(64) double weights[kChunk];
    for (int64_t i = begin; i < end; ++i) {
      const Row& row = all[i / chunks];
      const int64_t c = i % chunks, n = row.chunk_size(c);
      double* to = out + (i / chunks) * width + c * kChunk;
      if (row.undefined) {
        std::fill_n(to, n, std::numeric_limits<double>::quiet_NaN());
      } else if (row.filters.greedy()) {
        std::fill_n(to, n, 0.0);
      } else {
        row.weights(c, 1.0, weights);
        std::copy_n(weights, n, to);
      }
    }
  });
  for (int64_t b = 0; b < rows; ++b) {
    if (all[b].filters.greedy() && !all[b].undefined) out[b * width + all[b].argmax()] = 1.0;
  }
  return result;
}

// Which instruction set the kernels use, an index into dispatch.CAPABILITIES.
int64_t cpu_capability() {
  const ChunkKernels* kernels = &chunk_kernels();
  return kernels == avx512_kernels() ? 2 : kernels == avx2_kernels() ? 1 : 0;
}

}  // namespace

}  // namespace specdec

STABLE_TORCH_LIBRARY_IMPL(specdec_fast, CompositeExplicitAutograd, library) {
  library.impl("cpu_capability", TORCH_BOX(&specdec::cpu_capability));
}

STABLE_TORCH_LIBRARY_IMPL(specdec_fast, CPU, library) {
  library.impl("sample", TORCH_BOX(&specdec::sample));
  library.impl("softmax", TORCH_BOX(&specdec::softmax));
}
