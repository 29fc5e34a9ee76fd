// The ops `softmax`, `project` and `range_sums`, whose outputs are as long as what they read.
#pragma once

#include "call.cuh"

namespace specdec::blocks {

// Probabilities of rows whose draw (the op `sample`) is known.
struct SoftmaxCall {
  Logits logits;
  View<float> temperature;
  int64_t rows;
  int tiles;
  // Of the draw
  const int64_t* token;
  const double *log_prob, *logsumexp;
  const int32_t* status;
  const Cut* cut;
  double* out;  // [rows, width]
};

SPECDEC_HOST_DEVICE double probability(const SoftmaxCall& call, int64_t b, const Row& row,
                                       int64_t id) {
  if (call.status[b] != 0) return __builtin_nan("");
  if (row.greedy) return id == call.token[b] ? 1.0 : 0.0;
  const float score = row.score(id);
  const double logsumexp = call.logsumexp[b];
  // Entries of +inf share the mass: each has what the one drawn has
  if (logsumexp == __builtin_huge_val()) return score == kInfinity ? exp(call.log_prob[b]) : 0.0;
  return exp(static_cast<double>(score) - logsumexp);
}

// Block `first` of `blocks` that share the work, here and below.
SPECDEC_HOST_DEVICE void softmax_block(const SoftmaxCall& call, int64_t first, int64_t blocks) {
  for (int64_t item = first; item < call.rows * call.tiles; item += blocks) {
    const int64_t b = item / call.tiles;
    const int tile = static_cast<int>(item % call.tiles);
    Row row = call.logits.row(b, 0, call.temperature(b));
    row.cut = call.cut[b];
    const int64_t from = static_cast<int64_t>(tile) * kTile;
    threads([&](int t) {
      for (int j = t; j < row.tile_size(tile); j += kThreads) {
        call.out[b * row.width + from + j] = probability(call, b, row, from + j);
      }
    });
  }
}

// A law as float64, whatever its own type.
struct Masses {
  const void* data;
  bool single;
  int64_t row, entry;  // strides

  SPECDEC_HOST_DEVICE double operator()(int64_t n, int64_t k) const {
    const int64_t at = n * row + k * entry;
    return single ? static_cast<const float*>(data)[at] : static_cast<const double*>(data)[at];
  }
};

struct ProjectCall {
  Masses q;
  View<int32_t> row_start, column;
  int64_t rows, entries, width, listed;
  double* out;  // [rows, width]
};

// One thread a target token, which adds up in the map's order; what is out of range has no mass.
SPECDEC_HOST_DEVICE void project_block(const ProjectCall& call, int64_t first, int64_t blocks) {
  threads([&](int t) {
    for (int64_t i = first * kThreads + t; i < call.rows * call.width; i += blocks * kThreads) {
      const int64_t n = i / call.width, token = i % call.width;
      int64_t j = call.row_start(token), end = call.row_start(token + 1);
      j = j < 0 ? 0 : j;
      end = end < call.listed ? end : call.listed;
      double sum = 0.0;
      for (; j < end; ++j) {
        const int64_t k = call.column(j);
        if (k >= 0 && k < call.entries) sum += call.q(n, k);
      }
      call.out[i] = sum;
    }
  });
}

struct RangeSumsCall {
  Masses q;
  View<int32_t> order;
  View<int64_t> low, high;
  int64_t rows, entries, length, ranges;
  double* edge;  // [rows, length + 1]
  double* out;   // [rows, ranges]
};

// A block's sums of one tile, in shared memory.
struct Scan {
  double share[kThreads];          // of 16 entries
  double group[kThreads / kEach];  // of 16 shares

  SPECDEC_HOST_DEVICE double before(int t) const {
    double sum = 0.0;
    for (int g = 0; g < t / kEach; ++g) sum += group[g];
    for (int s = t / kEach * kEach; s < t; ++s) sum += share[s];
    return sum;
  }
};

// The mass of all entries in front of each, [length + 1], by one block.
SPECDEC_HOST_DEVICE void write_edges(const RangeSumsCall& call, int64_t n, double* edge,
                                     Scan& scan) {
  const auto mass = [&](int64_t j) {
    if (j >= call.length) return 0.0;
    const int64_t k = call.order.data != nullptr ? call.order(j) : j;
    return k >= 0 && k < call.entries ? call.q(n, k) : 0.0;
  };
  double before = 0.0;  // all tiles so far
  for (int64_t first = 0; first <= call.length; first += kTile) {
    threads([&](int t) {
      double sum = 0.0;
#pragma unroll 1
      for (int e = 0; e < kEach; ++e) sum += mass(first + t * kEach + e);
      scan.share[t] = sum;
    });
    sync();
    threads([&](int t) {
      if (t >= kThreads / kEach) return;
      double sum = 0.0;
      for (int e = 0; e < kEach; ++e) sum += scan.share[t * kEach + e];
      scan.group[t] = sum;
    });
    sync();
    threads([&](int t) {
      double sum = before + scan.before(t);
#pragma unroll 1
      for (int e = 0; e < kEach; ++e) {
        const int64_t j = first + t * kEach + e;
        if (j <= call.length) edge[j] = sum;
        sum += mass(j);
      }
    });
    before += scan.before(kThreads);
    sync();
  }
}

SPECDEC_HOST_DEVICE void range_sums_block(const RangeSumsCall& call, int64_t first, int64_t blocks,
                                          Scan& scan) {
  for (int64_t n = first; n < call.rows; n += blocks) {
    double* edge = call.edge + n * (call.length + 1);
    write_edges(call, n, edge, scan);
    threads([&](int t) {
      const auto at = [&](int64_t end) {
        return edge[end < 0 ? 0 : end < call.length ? end : call.length];
      };
      for (int64_t r = t; r < call.ranges; r += kThreads) {
        const double sum = at(call.high(n, r)) - at(call.low(n, r));
        call.out[n * call.ranges + r] = sum > 0.0 ? sum : 0.0;
      }
    });
    sync();
  }
}

}  // namespace specdec::blocks
