// Which kernel takes a call: decided here, by its shape alone.
//
// Few rows are bound by launches and dependent steps: each position gets a team of blocks that keep
// its rows on chip (cluster.cuh). Many rows are bound by memory: blocks that stay on the device
// take tiles from a queue and skip what lies behind a stop (sample.cuh, verify.cuh). The constants
// are guesses until they are measured; SPECDEC_FAST_CUDA_TEAM forces a team size, 0 the queue.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace specdec::blocks {

constexpr int kMostTeam = 8;    // what every device with clusters can place
constexpr int kLeastTeam = 2;   // a block alone gains nothing over the queue
constexpr int kLeastTiles = 2;  // of a row a block should have
constexpr const char* kTeamVariable = "SPECDEC_FAST_CUDA_TEAM";

// Blocks of a team, the same power of two for all positions, so that all of them are on the device
// at once; 0: blocks and a queue.
inline int team_size(int64_t positions, int tiles, int processors, bool clusters) {
  if (!clusters || positions == 0) return 0;
  if (const char* forced = std::getenv(kTeamVariable)) {
    const int size = std::atoi(forced);
    return size < 0 ? 0 : size < kMostTeam ? size : kMostTeam;
  }
  int size = kMostTeam;
  while (size > 1 && (positions * size > processors || tiles < size * kLeastTiles)) size /= 2;
  return size < kLeastTeam ? 0 : size;
}

}  // namespace specdec::blocks
