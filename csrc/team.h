// Threads that share the pieces of one job after another.
//
// A forward pass is a hundred short jobs in a row. Waking threads for each costs as much as a
// job, so they are woken once a pass and wait for the next job spinning. The lead needs nobody's
// help: it takes every piece that nobody else has taken, and waits only for pieces that are being
// worked on. Where others want the cores as well, a thread may lose its core in the middle of one;
// a lead that has waited long, in a pass or for its end, works alone for a while.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace specdec {

class Team {
 public:
  // Calls lead(team) on this thread, with others at hand to share its jobs.
  template <class Lead>
  static void gather(const Lead& lead) {
    Team team;
    const int64_t size = std::min<int64_t>(torch::stable::get_num_threads(), kMost);
    Solitude& solitude = Solitude::shared();
    if (size < 2 || solitude.left.load(std::memory_order_relaxed) > 0) {
      if (size > 1) solitude.left.fetch_sub(1, std::memory_order_relaxed);
      lead(team);
      return;
    }
    team.size_ = size;
    const auto begun = Clock::now();
    auto over = begun;
    torch::stable::parallel_for(0, size, 1, [&](int64_t begin, int64_t) {
      if (begin == 0) {
        const Over let_go{team};
        lead(team);
        over = Clock::now();
      } else {
        team.help(begin);
      }
    });
    // A thread that has not had a core yet keeps the pass from ending, too
    const auto end = Clock::now();
    const auto waited = team.waited_ + (end - over);
    if (waited > kLong && waited > (end - begun) / 4) {
      const int passes = solitude.next.load(std::memory_order_relaxed);
      solitude.left.store(passes, std::memory_order_relaxed);
      solitude.next.store(std::min(2 * passes, kMostAlone), std::memory_order_relaxed);
    } else {
      solitude.next.store(kLeastAlone, std::memory_order_relaxed);
    }
  }

  int64_t size() const { return size_; }

  // Calls piece(i) for every i below count; returns when all are done. A thread takes neighbouring
  // pieces while its own share lasts.
  template <class Piece>
  void share(int64_t count, const Piece& piece) {
    if (size_ < 2 || count < 2) {
      for (int64_t i = 0; i < count; ++i) piece(i);
      return;
    }
    call_.store([](const void* body, int64_t i) { (*static_cast<const Piece*>(body))(i); },
                std::memory_order_relaxed);
    body_.store(&piece, std::memory_order_relaxed);
    count_.store(count, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    const uint32_t epoch = ++last_;
    for (int64_t t = 0; t < size_; ++t) {
      shares_[t].next.store(word(epoch, begin(t, count)), std::memory_order_relaxed);
    }
    epoch_.store(epoch, std::memory_order_release);
    work(0, epoch);
    if (done_.load(std::memory_order_acquire) == count) return;
    const auto since = Clock::now();
    for (int spins = 0; done_.load(std::memory_order_acquire) < count;) wait(spins);
    waited_ += Clock::now() - since;
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr int64_t kMost = 64;
  static constexpr auto kLong = std::chrono::milliseconds(1);
  static constexpr int kLeastAlone = 8;  // passes
  static constexpr int kMostAlone = 64;
  static constexpr int kSpins = 1 << 11;  // some tens of microseconds
  static constexpr uint32_t kOver = 0xffffffff;

  struct Over {  // lets the others go, also where the lead throws
    Team& team;
    ~Over() { team.epoch_.store(kOver, std::memory_order_release); }
  };

  struct alignas(64) Share {
    std::atomic<uint64_t>
        next;  // epoch and first piece not taken: late threads take none of a new job
  };

  // Passes that a lead makes alone: twice as many each time that company was slow again
  struct Solitude {
    std::atomic<int> left{0};
    std::atomic<int> next{kLeastAlone};

    static Solitude& shared() {
      static Solitude solitude;
      return solitude;
    }
  };

  static uint64_t word(uint32_t epoch, int64_t piece) {
    return static_cast<uint64_t>(epoch) << 32 | static_cast<uint64_t>(piece);
  }

  int64_t begin(int64_t thread, int64_t count) const { return count * thread / size_; }

  static void wait(int& spins) {
    if (++spins < kSpins) {
#if defined(__x86_64__)
      _mm_pause();
#endif
    } else {
      std::this_thread::yield();  // more threads than cores
    }
  }

  void help(int64_t thread) {
    uint32_t seen = 0;
    for (int spins = 0;;) {
      const uint32_t epoch = epoch_.load(std::memory_order_acquire);
      if (epoch == kOver) return;
      if (epoch == seen) {
        wait(spins);
        continue;
      }
      seen = epoch;
      spins = 0;
      work(thread, epoch);
    }
  }

  // First this thread's own share, then what others have left
  void work(int64_t thread, uint32_t epoch) {
    const auto call = call_.load(std::memory_order_relaxed);
    const void* body = body_.load(std::memory_order_relaxed);
    const int64_t count = count_.load(std::memory_order_relaxed);
    int64_t finished = 0;
    for (int64_t s = 0; s < size_; ++s) {
      const int64_t owner = (thread + s) % size_, end = begin(owner + 1, count);
      std::atomic<uint64_t>& next = shares_[owner].next;
      for (uint64_t at = next.load(std::memory_order_acquire);
           at >> 32 == epoch && static_cast<int64_t>(at & 0xffffffff) < end;) {
        if (!next.compare_exchange_weak(at, at + 1, std::memory_order_acq_rel)) continue;
        call(body, static_cast<int64_t>(at & 0xffffffff));
        ++finished;
        at = next.load(std::memory_order_acquire);
      }
    }
    if (finished) done_.fetch_add(finished, std::memory_order_acq_rel);
  }

  int64_t size_ = 1;
  uint32_t last_ = 0;
  Clock::duration waited_{0};
  std::atomic<void (*)(const void*, int64_t)> call_{nullptr};
  std::atomic<const void*> body_{nullptr};
  std::atomic<int64_t> count_{0};
  alignas(64) std::atomic<uint32_t> epoch_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  std::array<Share, kMost> shares_{};
};

}  // namespace specdec
