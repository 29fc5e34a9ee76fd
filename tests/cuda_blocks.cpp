// Runs the blocks of kernels/cuda on the host, several at once as threads, in place of a launch;
// and exports functions of theirs that a test calls one by one.
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#include "../csrc/cuda_launch.h"
#include "../kernels/cuda/cluster.cuh"
#include "../kernels/cuda/plan.cuh"
#include "../kernels/cuda/verify.cuh"

namespace specdec::blocks {

namespace {

constexpr int64_t kRoom = 6000;  // not all tiles of a row find a place on a shelf

// Where the shared memory of this thread's block and of its cluster's blocks lies.
struct Block {
  Desk desk;
  alignas(16) char room[kRoom];
};

class Barrier {
 public:
  explicit Barrier(int size) : size_(size) {}
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const int turn = turn_;
    if (++arrived_ == size_) {
      arrived_ = 0;
      ++turn_;
      all_.notify_all();
    } else {
      all_.wait(lock, [&] { return turn != turn_; });
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable all_;
  int size_, arrived_ = 0, turn_ = 0;
};

struct Cluster {
  explicit Cluster(int size) : blocks(size), barrier(size) {
    std::memset(static_cast<void*>(blocks.data()), 0xA5, sizeof(Block) * size);
  }
  std::vector<Block> blocks;  // shared memory starts with anything
  Barrier barrier;
};

thread_local Cluster* own_cluster = nullptr;
thread_local int own_rank = 0;

// Runs body(block) for some blocks at once.
template <typename Body>
void at_once(int count, const Body& body) {
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) threads.emplace_back([&body, i] { body(i); });
  for (std::thread& thread : threads) thread.join();
}

template <typename Call>
void run_queue(void (*block)(const Call&, Desk&), const Call& call) {
  at_once(3, [&](int) {
    Cluster cluster(1);
    block(call, cluster.blocks[0].desk);
  });
}

// Clusters one after the other in an order that is not theirs, two at a time.
template <typename Call>
void run_teams(void (*team)(const Call&, uint32_t, const Team&, char*, int64_t, Desk&),
               const Call& call, uint32_t teams, int size) {
  std::atomic<uint32_t> next{0};
  at_once(2, [&](int) {
    for (uint32_t taken; (taken = next++) < teams;) {
      Cluster cluster(size);
      at_once(size, [&](int rank) {
        own_cluster = &cluster;
        own_rank = rank;
        Block& own = cluster.blocks[rank];
        team(call, teams - 1 - taken, {rank, size}, own.room, kRoom, own.desk);
      });
    }
  });
}

int forced_team() {
  const char* size = std::getenv(kTeamVariable);
  return size == nullptr ? 0 : std::atoi(size);
}

}  // namespace

void cluster_sync() { own_cluster->barrier.wait(); }
char* remote_memory(char* own, int rank) {
  const char* base = reinterpret_cast<const char*>(&own_cluster->blocks[own_rank]);
  return reinterpret_cast<char*>(&own_cluster->blocks[rank]) + (own - base);
}

const char* launch_verify(const VerifyCall& call, void* counters, size_t bytes, void*) {
  std::memset(counters, 0, bytes);
  if (forced_team() == 0) {
    const bool filters = call.filters.given() || call.draft_filters.given();
    run_queue(filters ? verify_block<true> : verify_block<false>, call);
  } else {
    run_teams(verify_team, call, teams(call), forced_team());
  }
  return nullptr;
}

const char* launch_sample(const SampleCall& call, void* counters, size_t bytes, void*) {
  std::memset(counters, 0, bytes);
  if (forced_team() == 0) {
    run_queue(call.filters.given() ? sample_block<true> : sample_block<false>, call);
  } else {
    run_teams(sample_team, call, static_cast<uint32_t>(call.rows), forced_team());
  }
  return nullptr;
}

const char* launch_softmax(const SoftmaxCall& call, void*) {
  at_once(2, [&](int i) { softmax_block(call, i, 2); });
  return nullptr;
}

const char* launch_project(const ProjectCall& call, void*) {
  at_once(2, [&](int i) { project_block(call, i, 2); });
  return nullptr;
}

const char* launch_range_sums(const RangeSumsCall& call, void*) {
  at_once(2, [&](int i) {
    Scan scan;
    range_sums_block(call, i, 2, scan);
  });
  return nullptr;
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
  const Law law = merged({tiles.data(), 0}, count, false, agreement);
  out[0] = law.peak;
  out[1] = law.total;
  out[2] = law.logsumexp(false);
}

EXPORT int64_t block_find(const uint64_t* weights, int n, uint64_t level) {
  std::vector<Desk> desk(1);
  for (int j = 0; j < kTile; ++j) desk[0].weights.at(j) = j < n ? weights[j] : 0;
  desk[0].weights.add_up();
  return found(level, 1, desk[0]).index;
}

EXPORT int64_t block_first(const int32_t* ids, int64_t size, int64_t target) {
  Agreement agreement;
  return IndexMap{ids, size}.first_from(target, agreement);
}

EXPORT int block_settled(uint64_t state, int steps) { return settled(state, steps); }

EXPORT bool block_stopped_before(uint64_t state, int i) { return stopped_before(state, i); }

EXPORT bool block_accepts(double log_p, double log_q, double u) { return accepts(log_p, log_q, u); }
