// The law of a drafted position, and what is left of the target's law once it is subtracted.
#pragma once

#include <cstdint>
#include <vector>

#include "arguments.h"
#include "rows.h"

namespace specdec {

enum LawKind : int32_t { kPoint = 0, kCompact = 1, kSparse = 2 };

// Some entries of a row, side by side.
struct Range {
  int64_t begin = 0, end = 0;
};

// The map from compact entries to target ids, ascending; none: entry k is id k.
struct IndexMap {
  const int32_t* id = nullptr;
  int64_t size = 0;

  // The entries that stand for the target ids from `low` to before `high`.
  Range entries(int64_t low, int64_t high) const;
};

// Log masses of listed target ids.
struct SparseLaw {
  const Reader<int64_t>* id = nullptr;
  const Reader<double>* log_mass = nullptr;
  int64_t row = 0, position = 0, size = 0;

  int64_t id_at(int64_t s) const { return (*id)(row, position, s); }
  double log_mass_at(int64_t s) const { return (*log_mass)(row, position, s); }
  bool undefined(int64_t width) const;
};

struct Law {
  LawKind kind = kPoint;
  int64_t token = -1;
  Row row;
  IndexMap map;
  Range drawn;  // the entries the token may have been drawn as
  SparseLaw sparse;
  bool sparse_undefined = false;

  bool undefined() const { return kind == kCompact ? row.undefined : sparse_undefined; }
  double log_q() const;
  // target -= q over the target ids of one chunk.
  void subtract(int64_t chunk, int64_t n, double* target) const;
};

// max(0, weight * p - q), or weight * p where q is not defined: masses by chunk, and their sum.
struct Residual {
  const Row* p = nullptr;
  const Law* law = nullptr;
  double weight = 1.0;
  std::vector<double> masses;
  double sum = 0.0;

  // The weights of one chunk, padded; returns their sum.
  double fill(int64_t chunk, double* out) const;
  // One draw; from p where nothing is left.
  int64_t draw(double u) const;
};

// Fills masses and sum, all residuals at once.
void measure(std::vector<Residual*>& residuals, const Share& share);

}  // namespace specdec
