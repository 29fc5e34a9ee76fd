// The ops `project` and `range_sums`: masses of a law put together in another way.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <type_traits>
#include <vector>

#include "arguments.h"

namespace specdec {

namespace {

// Calls back with a law's entries in their own type.
template <typename Body>
void with_entries(const Tensor& q, const Body& body) {
  const ScalarType type = q.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double,
                  "q must be float32 or float64");
  if (type == ScalarType::Float) {
    body(static_cast<const float*>(q.const_data_ptr()));
  } else {
    body(static_cast<const double*>(q.const_data_ptr()));
  }
}

// Entries of one row in a given order, as float64; what is out of range counts as 0 and is noted.
template <typename T>
struct Listed {
  const T* row;
  int64_t stride, entries;
  const int32_t* order;  // or null: as they stand
  bool outside = false;

  double operator()(int64_t j) {
    const int64_t k = order ? order[j] : j;
    const bool inside = static_cast<uint64_t>(k) < static_cast<uint64_t>(entries);
    outside |= !inside;
    return inside ? static_cast<double>(row[k * stride]) : 0.0;
  }
};

Tensor project(const Tensor& q, const Tensor& row_start_, const Tensor& column_) {
  STD_TORCH_CHECK(q.dim() == 2 && row_start_.dim() == 1 && column_.dim() == 1,
                  "project: q must be [N, K], row_start [V + 1] and column one-dimensional");
  STD_TORCH_CHECK(row_start_.scalar_type() == ScalarType::Int, "row_start must be int32");
  STD_TORCH_CHECK(column_.scalar_type() == ScalarType::Int, "column must be int32");
  const Tensor starts = torch::stable::contiguous(row_start_);
  const Tensor columns = torch::stable::contiguous(column_);
  const int64_t rows = q.size(0), entries = q.size(1), width = starts.size(0) - 1;
  const int64_t listed = columns.size(0);
  const auto* start = static_cast<const int32_t*>(starts.const_data_ptr());
  const auto* column = static_cast<const int32_t*>(columns.const_data_ptr());
  Tensor result = new_tensor(q, {rows, width}, ScalarType::Double);
  double* out = pointer<double>(result);
  // Target tokens at a time: their entries are gathered first, by a loop without a branch that
  // depends on the map, and added up from the first-level cache.
  constexpr int64_t kTokens = 1024;
  const int64_t chunks = (width + kTokens - 1) / kTokens;
  std::atomic<bool> outside{false};  // an exception of a thread would lose its message
  with_entries(q, [&](const auto* data) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(data)>>;
    torch::stable::parallel_for(0, rows * chunks, 8, [&](int64_t begin, int64_t end) {
      std::vector<double> gathered;
      for (int64_t item = begin; item < end; ++item) {
        const int64_t n = item / chunks, first = item % chunks * kTokens;
        const int64_t last = std::min(first + kTokens, width);
        const int64_t from = start[first], to = start[last];
        if (from < 0 || to > listed || from > to) {
          outside = true;
          continue;
        }
        Listed<T> law{data + n * q.stride(0), q.stride(1), entries, column};
        gathered.resize(to - from);
        for (int64_t j = from; j < to; ++j) gathered[j - from] = law(j);
        if (law.outside) outside = true;
        for (int64_t t = first; t < last; ++t) {
          double sum = 0.0;
          const int64_t stop = std::min<int64_t>(start[t + 1], to);
          for (int64_t j = std::max<int64_t>(start[t], from); j < stop; ++j) {
            sum += gathered[j - from];
          }
          out[n * width + t] = sum;
        }
      }
    });
  });
  STD_TORCH_CHECK(!outside, "project: row_start or column is out of range; column must be in [0, ",
                  entries, ")");
  return result;
}

constexpr int64_t kTile = 64;

// edge[i] = mass of the first i tiles; four tiles at once, whose sums do not wait for each other.
template <typename T>
void tile_edges(Listed<T>& law, int64_t tiles, std::vector<double>& edge) {
  constexpr int64_t kLanes = 4;
  edge.assign(tiles + 1, 0.0);
  for (int64_t tile = 0; tile < tiles; tile += kLanes) {
    const int64_t lanes = std::min(kLanes, tiles - tile);
    double sum[kLanes]{};
    for (int64_t i = 0; i < kTile; ++i) {
      for (int64_t lane = 0; lane < lanes; ++lane) sum[lane] += law((tile + lane) * kTile + i);
    }
    for (int64_t lane = 0; lane < lanes; ++lane) {
      edge[tile + lane + 1] = edge[tile + lane] + sum[lane];
    }
  }
}

// Mass before entry `end`: its tiles, and what is left of the last one in order. The bits do not
// depend on which ranges are asked for.
template <typename T>
double mass_before(Listed<T>& law, const std::vector<double>& edge, int64_t end) {
  const int64_t tile = end / kTile;
  double sum = 0.0;
  for (int64_t j = tile * kTile; j < end; ++j) sum += law(j);
  return edge[tile] + sum;
}

Tensor range_sums(const Tensor& q, const MaybeTensor& order_, const Tensor& low_,
                  const Tensor& high_) {
  STD_TORCH_CHECK(q.dim() == 2 && low_.dim() == 2,
                  "range_sums: q, low and high must have two dimensions");
  const int64_t rows = q.size(0), entries = q.size(1), ranges = low_.size(1);
  const Reader<int64_t> low("low", low_, {rows, ranges}), high("high", high_, {rows, ranges});
  const int32_t* order = nullptr;
  int64_t length = entries;
  MaybeTensor listed;  // keeps a copy alive
  if (order_) {
    STD_TORCH_CHECK(order_->dim() == 1 && order_->scalar_type() == ScalarType::Int,
                    "order must be one-dimensional int32");
    listed = torch::stable::contiguous(*order_);
    order = static_cast<const int32_t*>(listed->const_data_ptr());
    length = listed->size(0);
  }
  Tensor result = new_tensor(q, {rows, ranges}, ScalarType::Double);
  double* out = pointer<double>(result);
  std::atomic<bool> outside{false};
  with_entries(q, [&](const auto* data) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(data)>>;
    torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      std::vector<double> edge, every;
      for (int64_t n = begin; n < end; ++n) {
        Listed<T> law{data + n * q.stride(0), q.stride(1), entries, order};
        tile_edges(law, length / kTile, edge);
        const bool many = ranges * kTile > length;  // then every entry's edge is looked up
        if (many) {
          every.resize(length + 1);
          for (int64_t tile = 0; tile * kTile <= length; ++tile) {
            const int64_t stop = std::min((tile + 1) * kTile, length + 1);
            double sum = 0.0;
            for (int64_t j = tile * kTile; j < stop; ++j) {
              every[j] = edge[tile] + sum;
              if (j < length) sum += law(j);
            }
          }
        } else {
          mass_before(law, edge, length);  // looks at the entries behind the last tile
        }
        const auto before = [&](int64_t place) {
          place = std::clamp<int64_t>(place, 0, length);
          return many ? every[place] : mass_before(law, edge, place);
        };
        for (int64_t r = 0; r < ranges; ++r) {
          out[n * ranges + r] = std::max(0.0, before(high(n, r)) - before(low(n, r)));
        }
        if (law.outside) outside = true;
      }
    });
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
