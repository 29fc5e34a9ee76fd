// Rows of scores and what is drawn from them. The law of a row is defined in specdec_fast/ops.py.
//
// A row is cut into chunks of kChunk entries. Each chunk's mass is known relative to the chunk's
// own largest score after one reading; a draw finds the chunk by those masses and reads that one
// again. No buffer is as long as a row, and nothing depends on how chunks are dealt out to threads.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "chunk.h"

namespace specdec {

struct Filters {
  float temperature = 1.0f;  // 0: the point mass on the largest logit
  int32_t top_k = 0;
  float top_p = 1.0f;
  float min_p = 0.0f;

  bool greedy() const { return temperature == 0.0f; }
  bool any() const { return !greedy() && (top_k > 0 || top_p < 1.0f || min_p > 0.0f); }
};

struct Row {
  const char* data = nullptr;
  Float type = kFloat32;
  int64_t width = 0;
  Filters filters;

  // Kept are scores above the threshold, and those equal to it from id `cutoff` on.
  float threshold = -std::numeric_limits<float>::infinity();
  int64_t cutoff = 0;

  // Filled in by measure(). An entry has mass exp(score - peak), their sum is `total`.
  std::vector<double> masses;  // by chunk
  double peak = 0.0;
  int64_t peak_chunk = 0;  // the first chunk that holds it
  double total = 0.0;
  bool undefined = false;  // holds a NaN, or nothing but -inf
  bool infinite =
      false;  // holds +inf: those entries count as the largest float, all others as -inf
  bool measured = false;

  int64_t chunks() const { return (width + kChunk - 1) / kChunk; }
  int64_t chunk_size(int64_t c) const {
    return width - c * kChunk < kChunk ? width - c * kChunk : kChunk;
  }

  // Scores of chunk c after temperature and filters, padded. Returns the largest, NaN if there is
  // one, and +inf where `out` holds the largest float in its place.
  float scores(int64_t c, float* out) const { return scores(c * kChunk, chunk_size(c), out); }
  // The same of n entries from `first` on, at most a chunk.
  float scores(int64_t first, int64_t n, float* out) const;
  // scale * p of the entries of chunk c, padded.
  void weights(int64_t c, double scale, double* out) const {
    weights(c * kChunk, chunk_size(c), scale, out);
  }
  // The same of n entries from `first` on, at most a chunk.
  void weights(int64_t first, int64_t n, double scale, double* out) const;
  // log p of one entry; -inf for an id outside the row.
  double log_prob(int64_t id) const;
  // The entry of the largest logit, the lowest id among equals.
  int64_t argmax() const;
  double logsumexp() const;
};

// Calls body(begin, end) for pieces of [0, count), about `grain` each, on whatever threads there
// are.
using Body = std::function<void(int64_t begin, int64_t end)>;
using Share = std::function<void(int64_t count, int64_t grain, const Body& body)>;

// By torch's threads.
void share_out(int64_t count, int64_t grain, const Body& body);

// Measures rows that are not yet; all of them at once, so that threads share one long row as well
// as many. Rows at temperature 0 get only their peak.
void measure(const std::vector<Row*>& rows, const Share& share = share_out);

// Where chunk masses cross u of their sum: the smallest entry whose cumulative mass exceeds it.
// `fill` writes a chunk's weights, on the scale of the masses, to a buffer. An entry without mass
// is never returned; -1 if no entry has any.
int64_t pick(const std::vector<double>& masses, int64_t width, double u,
             const std::function<void(int64_t chunk, double* weights)>& fill);

// One draw from a measured, defined row.
int64_t draw(const Row& row, double u);

// Sets threshold and cutoff from the filters; `peaks` are the chunks' largest scores.
void filter(Row& row, const std::vector<float>& peaks);

}  // namespace specdec
