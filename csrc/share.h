// A team of threads as what rows share their work by (rows.h).
#pragma once

#include <algorithm>
#include <cstdint>

#include "rows.h"
#include "team.h"

namespace specdec {

// The pieces of a job go to whoever of the team is free; valid as long as the team is.
inline Share share_of(Team& team) {
  return [&team](int64_t count, int64_t grain, const Body& body) {
    team.share((count + grain - 1) / grain,
               [&](int64_t piece) { body(piece * grain, std::min((piece + 1) * grain, count)); });
  };
}

// Calls lead(share), with a team where there are so many chunks of rows to read at once that it
// pays to wake one.
template <class Lead>
void together(int64_t chunks, const Lead& lead) {
  constexpr int64_t kFew = 12;  // about 10 us
  if (chunks <= kFew) {
    lead([](int64_t count, int64_t, const Body& body) {
      if (count > 0) body(0, count);
    });
  } else {
    Team::gather([&](Team& team) { lead(share_of(team)); });
  }
}

}  // namespace specdec
