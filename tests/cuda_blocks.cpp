// Runs the blocks of kernels/cuda on the host, several at once as threads, in place of a launch;
// and exports functions of theirs that a test calls one by one.
#include <cstring>
#include <thread>
#include <vector>

#include "../csrc/cuda_launch.h"
#include "../kernels/cuda/sample.cuh"
#include "../kernels/cuda/verify.cuh"

namespace specdec::blocks {

namespace {

template <typename Call>
const char* on_host(void (*block)(const Call&, Desk&), const Call& call, void* counters,
                    size_t bytes) {
  constexpr int kBlocks = 3;
  std::memset(counters, 0, bytes);
  std::vector<std::thread> blocks;
  for (int i = 0; i < kBlocks; ++i) {
    blocks.emplace_back([&] {
      std::vector<Desk> desk(1);
      std::memset(desk.data(), 0xA5, sizeof(Desk));  // shared memory starts with anything
      block(call, desk[0]);
    });
  }
  for (std::thread& thread : blocks) thread.join();
  return nullptr;
}

}  // namespace

const char* launch_verify(const VerifyCall& call, void* counters, size_t bytes, void*) {
  return on_host(verify_block, call, counters, bytes);
}

const char* launch_sample(const SampleCall& call, void* counters, size_t bytes, void*) {
  return on_host(sample_block, call, counters, bytes);
}

}  // namespace specdec::blocks

using namespace specdec::blocks;

#define EXPORT extern "C" __attribute__((visibility("default")))

// Weights in the unit below a peak: exp(score) = out * exp(shift) * 2^(exponent - 61).
EXPORT void block_weights(float peak, const float* scores, int64_t n, uint64_t* out, float* shift,
                          int* exponent) {
  Powers powers;
  powers.fill();
  const Unit unit = Unit::below(peak);
  for (int64_t i = 0; i < n; ++i) out[i] = unit.weight(scores[i], powers);
  *shift = unit.shift;
  *exponent = unit.exponent;
}

EXPORT void block_divide(float temperature, const float* x, int64_t n, float* out) {
  const Temperature by(temperature);
  for (int64_t i = 0; i < n; ++i) out[i] = by.divide(x[i]);
}

EXPORT void block_floats(int type, const uint16_t* bits, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = type == kBFloats ? to_float(BFloat{bits[i]}) : to_float(HalfFloat{bits[i]});
  }
}

// Probabilities in multiples of 2^-60, from a logsumexp.
EXPORT void block_probabilities(double logsumexp, double scale, const float* scores, int64_t n,
                                uint64_t* out) {
  Powers powers;
  powers.fill();
  const Probability probability(Law::of_logsumexp(logsumexp), scale);
  for (int64_t i = 0; i < n; ++i) out[i] = probability(scores[i], powers);
}

// A law from its tiles, in any order: peak, total and logsumexp.
EXPORT void block_merge(const float* peaks, const uint64_t* masses, int count, double* out) {
  Agreement agreement;
  std::vector<Tile> tiles(count);
  for (int i = 0; i < count; ++i) tiles[i] = {masses[i], peaks[i], 0.0f};
  const Law law = merged(tiles.data(), count, false, agreement);
  out[0] = law.peak;
  out[1] = law.total;
  out[2] = law.logsumexp(false);
}

EXPORT int block_find(const uint64_t* weights, int n, uint64_t level) {
  std::vector<Weights> shared(1);
  for (int j = 0; j < kTile; ++j) shared[0].at(j) = j < n ? weights[j] : 0;
  shared[0].add_up();
  uint64_t below;
  return shared[0].find(level, below);
}

EXPORT int64_t block_entry(const int32_t* ids, int64_t size, int64_t target) {
  return IndexMap{ids, size}.entry_of(target);
}

EXPORT int block_settled(uint64_t state, int steps) { return settled(state, steps); }

EXPORT bool block_stopped_before(uint64_t state, int i) { return stopped_before(state, i); }

EXPORT bool block_accepts(double log_p, double log_q, double u) { return accepts(log_p, log_q, u); }
