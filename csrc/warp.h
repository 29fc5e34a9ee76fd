// The scores that a drafter's tokens are drawn from.
#pragma once

#include <cstring>
#include <limits>
#include <vector>

#include "rows.h"

namespace specdec {

// Float32 scores as rows, measured by those filters
inline std::vector<Row> measured(const std::vector<const float*>& from, int64_t width,
                                 const Filters& filters, const Share& share) {
  std::vector<Row> rows(from.size());
  std::vector<Row*> all;
  for (size_t i = 0; i < from.size(); ++i) {
    rows[i].data = reinterpret_cast<const char*>(from[i]);
    rows[i].width = width;
    rows[i].filters = filters;
    all.push_back(&rows[i]);
  }
  measure(all, share);
  return rows;
}

// Logits by temperature, -inf where a filter leaves no mass; to where they come from, or elsewhere.
inline void warp(const std::vector<const float*>& from, const std::vector<float*>& to,
                 int64_t width, const Filters& filters, const Share& share) {
  constexpr float kForbidden = -std::numeric_limits<float>::infinity();
  const int64_t n = static_cast<int64_t>(from.size()), chunks = (width + kChunk - 1) / kChunk;
  std::vector<Row> rows;
  if (filters.any()) rows = measured(from, width, filters, share);
  bool settled = !filters.any() && filters.temperature == 1.0f;
  for (int64_t i = 0; i < n; ++i) settled = settled && from[i] == to[i];
  if (settled) return;
  share(n * chunks, 1, [&](int64_t begin, int64_t end) {
    alignas(64) float scores[kChunk];
    alignas(64) double weights[kChunk];
    for (int64_t k = begin; k < end; ++k) {
      const int64_t i = k / chunks, c = k % chunks, size = std::min(kChunk, width - c * kChunk);
      const bool undefined = filters.any() && rows[i].undefined;
      if (filters.any() && !undefined) rows[i].weights(c, 1.0, weights);
      chunk_kernels().load[kFloat32](from[i] + c * kChunk, size, filters.temperature, scores);
      for (int64_t j = 0; filters.any() && j < size; ++j) {
        if (undefined || !(weights[j] > 0.0)) scores[j] = kForbidden;
      }
      std::memcpy(to[i] + c * kChunk, scores, size * sizeof(float));
    }
  });
}

}  // namespace specdec
