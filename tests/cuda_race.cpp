// A small verification by blocks whose threads are threads of the host, for the race checker
// (-fsanitize=thread): a barrier left out, or a word two threads write, is reported. Prints the
// outcome of every row, which must not depend on the schedule.
#define SPECDEC_CONCURRENT
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <mutex>
#include <thread>
#include <vector>

#include "../kernels/cuda/sample.cuh"
#include "../kernels/cuda/verify.cuh"

namespace specdec::blocks {

class Barrier {
 public:
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const int turn = turn_;
    if (++arrived_ == kThreads) {
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
  int arrived_ = 0, turn_ = 0;
};

struct Block {
  Barrier barrier;
  uint64_t lane[kThreads];
  Desk desk;
};

thread_local Block* own_block = nullptr;
thread_local int own_thread = 0;

int thread_index() { return own_thread; }
void sync() { own_block->barrier.wait(); }
uint64_t from_lane(uint64_t word, int distance) {
  own_block->lane[own_thread] = word;
  sync();
  const uint64_t other = own_block->lane[own_thread ^ distance];
  sync();
  return other;
}

template <typename Call>
void launch(void (*body)(const Call&, Desk&), const Call& call) {
  constexpr int kBlocks = 2;
  std::vector<Block> blocks(kBlocks);
  std::vector<std::thread> threads;
  for (int i = 0; i < kBlocks * kThreads; ++i) {
    threads.emplace_back([&, i] {
      own_block = &blocks[i / kThreads];
      own_thread = i % kThreads;
      body(call, own_block->desk);
    });
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

void verify(Rule rule, LawKind kind) {
  constexpr int64_t kRows = 3, kDrafted = 2, kPositions = 3, kWidth = kTile + 90;
  constexpr int64_t kCompactWidth = kTile + 20;
  std::vector<float> logits(kRows * kPositions * kWidth), draft(kRows * kDrafted * kCompactWidth);
  std::vector<int32_t> index(kCompactWidth), kinds(kRows * kDrafted, kind), status(kRows);
  std::vector<int64_t> tokens(kRows * kDrafted), count(kRows, kDrafted), seed{3, 4, 5},
      start{7, 8, 9}, accepted(kRows), token(kRows), sparse_ids(kRows * kDrafted * 2);
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
  call.queue = &queue;
  call.state = state.data();
  call.arrived = arrived.data();
  call.measured = measured.data();
  call.draft_measured = draft_measured.data();
  call.decided = decided.data();
  call.rest = rest.data();
  launch(verify_block, call);
  for (int64_t b = 0; b < kRows; ++b) {
    std::printf("%d %d %ld %ld %d\n", rule, kind, accepted[b], token[b], status[b]);
  }
}

}  // namespace specdec::blocks

int main() {
  using namespace specdec::blocks;
  verify(kMatch, kPoint);
  for (const LawKind kind : {kPoint, kCompact, kSparse}) {
    verify(kToken, kind);
    verify(kBlockwise, kind);
  }
}
