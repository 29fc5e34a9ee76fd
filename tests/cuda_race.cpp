// A small verification by blocks whose threads are threads of the host, for the race checker
// (-fsanitize=thread): a barrier left out, or a word two threads write, is reported. Prints the
// outcome of every row, which must not depend on the schedule.
#define SPECDEC_CONCURRENT
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "../kernels/cuda/cluster.cuh"
#include "../kernels/cuda/verify.cuh"

namespace specdec::blocks {

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

constexpr int64_t kRoom = 6000;  // a tile has 4096 bytes: not all of them find a place on a shelf

struct Block {
  Barrier barrier{kThreads};
  uint64_t lane[kThreads];
  Desk desk;
  alignas(16) char room[kRoom];
};

struct Cluster {
  explicit Cluster(int size) : blocks(size), barrier(size * kThreads) {}
  std::vector<Block> blocks;
  Barrier barrier;
};

thread_local Cluster* own_cluster = nullptr;
thread_local int own_rank = 0, own_thread = 0;

Block& own_block() { return own_cluster->blocks[own_rank]; }
int thread_index() { return own_thread; }
void sync() { own_block().barrier.wait(); }
uint64_t from_lane(uint64_t word, int distance) {
  own_block().lane[own_thread] = word;
  sync();
  const uint64_t other = own_block().lane[own_thread ^ distance];
  sync();
  return other;
}
void cluster_sync() { own_cluster->barrier.wait(); }
char* remote_memory(char* own, int rank) {
  const char* base = reinterpret_cast<const char*>(&own_block());
  return reinterpret_cast<char*>(&own_cluster->blocks[rank]) + (own - base);
}

// `count` clusters at once, each thread of theirs a thread of the host.
template <typename Body>
void launch(int count, int size, const Body& body) {
  std::vector<std::unique_ptr<Cluster>> clusters;
  std::vector<std::thread> threads;
  for (int c = 0; c < count; ++c) {
    clusters.push_back(std::make_unique<Cluster>(size));
    for (int i = 0; i < size * kThreads; ++i) {
      threads.emplace_back([&body, cluster = clusters.back().get(), c, i] {
        own_cluster = cluster;
        own_rank = i / kThreads;
        own_thread = i % kThreads;
        body(c, own_block());
      });
    }
    if (threads.size() < 8 * kThreads) continue;
    for (std::thread& thread : threads) thread.join();
    threads.clear();
  }
  for (std::thread& thread : threads) thread.join();
}

template <typename T>
View<T> view(const std::vector<T>& data, int64_t s0, int64_t s1 = 0, int64_t s2 = 0) {
  View<T> result;
  result.data = data.data();
  result.stride[0] = s0;
  result.stride[1] = s1;
  result.stride[2] = s2;
  return result;
}

// By blocks and a queue, or by teams of a size; with all filters or none.
void verify(Rule rule, LawKind kind, int team, bool filters) {
  constexpr int64_t kRows = 2, kDrafted = 2, kPositions = 3, kWidth = kTile + 90;
  constexpr int64_t kCompactWidth = kTile + 20;
  std::vector<float> logits(kRows * kPositions * kWidth), draft(kRows * kDrafted * kCompactWidth);
  std::vector<int32_t> index(kCompactWidth), kinds(kRows * kDrafted, kind), status(kRows);
  std::vector<int64_t> tokens(kRows * kDrafted), count(kRows, kDrafted), seed{3, 4}, start{7, 8},
      accepted(kRows), token(kRows), sparse_ids(kRows * kDrafted * 2);
  std::vector<double> log_prob(kRows * kPositions), sparse_log_q(kRows * kDrafted * 2, -0.7);
  for (size_t i = 0; i < logits.size(); ++i) logits[i] = std::sin(0.7f * i) * 3;
  for (size_t i = 0; i < draft.size(); ++i) draft[i] = std::cos(0.3f * i) * 3;
  for (int64_t k = 0; k < kCompactWidth; ++k) index[k] = static_cast<int32_t>(k + 30);
  for (size_t i = 0; i < tokens.size(); ++i) {
    tokens[i] = 40 + 5 * i;
    sparse_ids[2 * i] = tokens[i];
    sparse_ids[2 * i + 1] = tokens[i] + 1;
  }
  VerifyCall call;
  call.logits = {logits.data(), kFloats, kWidth, {kPositions * kWidth, kWidth}};
  call.temperature.constant = 0.8f;
  call.draft_temperature.constant = 1.0f;
  call.draft_logsumexp.constant = std::nan("");
  call.tokens = view(tokens, kDrafted, 1);
  call.count = view(count, 1);
  call.kind = view(kinds, kDrafted, 1);
  call.draft_logits = {
      draft.data(), kFloats, kCompactWidth, {kDrafted * kCompactWidth, kCompactWidth}};
  call.map = {index.data(), kCompactWidth};
  call.sparse_ids = view(sparse_ids, kDrafted * 2, 2, 1);
  call.sparse_log_q = view(sparse_log_q, kDrafted * 2, 2, 1);
  if (filters) {
    call.filters.top_k.constant = call.draft_filters.top_k.constant = 700;
    call.filters.top_p.constant = call.draft_filters.top_p.constant = 0.93f;
    call.filters.min_p.constant = 0.001f;
  }
  call.seed = view(seed, 1);
  call.start = view(start, 1);
  call.rows = kRows;
  call.positions = kPositions;
  call.drafted = kDrafted;
  call.listed = 2;
  call.base = 0;
  call.rule = rule;
  call.accepted = accepted.data();
  call.token = token.data();
  call.log_prob = log_prob.data();
  call.status = status.data();
  call.tiles = call.logits.tiles();
  call.draft_tiles = rule == kMatch ? 0 : call.draft_logits.tiles();
  call.run = 1;
  uint32_t queue = 0;
  std::vector<uint64_t> state(kRows);
  std::vector<uint32_t> arrived(kRows * kPositions);
  std::vector<Tile> measured(kRows * kPositions * call.tiles);
  std::vector<Tile> draft_measured(kRows * kDrafted * call.draft_tiles);
  std::vector<Decision> decided(kRows * kPositions);
  std::vector<Rest> rest(kRows * call.tiles);
  std::vector<Cut> cut(kRows * kPositions), draft_cut(kRows * kDrafted);
  std::vector<Outcome> outcome(kRows * kPositions);
  call.queue = &queue;
  call.state = state.data();
  call.arrived = arrived.data();
  call.measured = measured.data();
  call.draft_measured = draft_measured.data();
  call.decided = decided.data();
  call.rest = rest.data();
  call.cut = cut.data();
  call.draft_cut = draft_cut.data();
  call.outcome = outcome.data();
  if (team == 0) {
    launch(2, 1, [&](int, Block& block) {
      filters ? verify_block<true>(call, block.desk) : verify_block<false>(call, block.desk);
    });
  } else {
    launch(teams(call), team, [&](int item, Block& block) {
      verify_team(call, item, {own_rank, team}, block.room, kRoom, block.desk);
    });
  }
  for (int64_t b = 0; b < kRows; ++b) {
    std::printf("%d %d %d %ld %ld %d\n", rule, kind, filters, accepted[b], token[b], status[b]);
  }
}

}  // namespace specdec::blocks

// The size of the teams, 0 for blocks and a queue.
int main(int, char** arguments) {
  using namespace specdec::blocks;
  const int team = std::atoi(arguments[1]);
  verify(kMatch, kPoint, team, false);
  verify(kToken, kSparse, team, false);
  verify(kBlockwise, kPoint, team, false);
  verify(kToken, kCompact, team, false);
  verify(kBlockwise, kCompact, team, true);
}
