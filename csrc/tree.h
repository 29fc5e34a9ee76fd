// Drafts that are trees: `llama_branch` (branch.cpp) lets a drafter write one, `llama_climb`
// (climb.cpp) lets a target judge one. docs/trees.md has the rule and its proof.
//
// A node is a token behind its parent's. Its keys and values lie at a column of its own, behind the
// text; it sees the text and the nodes above it, in the order and with the arithmetic of a text
// that holds just those, so its scores are bit for bit that text's.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "llama_pass.h"
#include "rows.h"

namespace specdec {

using Clock = std::chrono::steady_clock;
constexpr int64_t kMostNodes = 256;

inline int64_t nanoseconds(Clock::duration time) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(time).count();
}

// Lanes of a pass, some of them nodes of trees
class Grove {
 public:
  // A token whose text stands in the columns before it
  void put(int64_t token, int64_t row, int64_t column, int64_t hidden) {
    add(token, row, column, hidden, column, std::numeric_limits<int64_t>::max(), {});
  }

  // A node whose tree begins at a column; `path` has the places of the nodes down to it, its own
  // last.
  void put(int64_t token, int64_t row, int64_t begin, int64_t hidden, std::vector<int64_t> path) {
    const int64_t column = begin + static_cast<int64_t>(path.size()) - 1, place = path.back();
    add(token, row, column, hidden, place, begin, std::move(path));
  }

  int64_t size() const { return static_cast<int64_t>(tokens_.size()); }
  const int64_t* tokens() const { return tokens_.data(); }

  Lanes lanes() {
    at_.clear();
    for (const std::vector<int64_t>& path : paths_) at_.push_back(path.data());
    return {size(),        row_.data(),  column_.data(), hidden_.data(),
            place_.data(), fork_.data(), at_.data()};
  }

 private:
  void add(int64_t token, int64_t row, int64_t column, int64_t hidden, int64_t place, int64_t fork,
           std::vector<int64_t> path) {
    tokens_.push_back(token);
    row_.push_back(row), column_.push_back(column), hidden_.push_back(hidden);
    place_.push_back(place), fork_.push_back(fork);
    paths_.push_back(std::move(path));
  }

  std::vector<int64_t> tokens_, row_, column_, hidden_, place_, fork_;
  std::vector<std::vector<int64_t>> paths_;
  std::vector<const int64_t*> at_;
};

inline Row row_of(const float* logits, int64_t width, const Filters& filters) {
  Row row;
  row.data = reinterpret_cast<const char*>(logits);
  row.width = width;
  row.filters = filters;
  return row;
}

// --- how the operations are called
// ---------------------------------------------------------------

// The last is how many reals there are, -1 where the caller has counted them
using Operation = std::vector<int64_t> (*)(const int64_t*, int64_t, const double*, int64_t);

// With numbers as they lie in memory; the report takes their place.
template <Operation operation>
int64_t entry(int64_t* numbers, const double* reals, int64_t count) noexcept try {
  const std::vector<int64_t> report = operation(numbers, count, reals, -1);
  std::copy(report.begin(), report.end(), numbers);
  return 0;
} catch (...) {
  return 1;  // the operation says why
}

template <Operation operation>
std::vector<int64_t> call(std::vector<int64_t> numbers, std::vector<double> reals) {
  return operation(numbers.data(), static_cast<int64_t>(numbers.size()), reals.data(),
                   static_cast<int64_t>(reals.size()));
}

}  // namespace specdec
