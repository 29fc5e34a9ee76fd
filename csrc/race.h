// Races: the entries of a row in the order in which they come first, each taking an exponential
// time with the entry's mass as its rate. The first has the row's law. The time of a token hangs on
// (seed, position, token) alone, so target and drafter that race with the same numbers often agree
// on who comes first (docs/trees.md).
#pragma once

#include <cstdint>
#include <vector>

#include "rows.h"

namespace specdec {

struct Ranked {
  double key;  // smallest first, the lower entry among equals
  int64_t entry;
};

struct Runners {
  int64_t seed, position;
  const int32_t* ids = nullptr;  // of each entry; null: its place
  bool by_score = false;         // no race: in the order of their scores
};

// The `most` first entries of each of some measured, defined rows of the same width. By score the
// key is the score with another sign. Entries without mass do not take part.
std::vector<std::vector<Ranked>> race(const std::vector<const Row*>& rows, const Runners& runners,
                                      int64_t most, const Share& share);

}  // namespace specdec
