#include "race.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

#include "../kernels/cuda/philox.cuh"
#include "arguments.h"

namespace specdec {

namespace {

constexpr uint32_t kRace = 7;      // randomness.Purpose
constexpr int64_t kGrain = 2;      // chunks a thread takes at once
constexpr int64_t kStretch = 128;  // entries between two looks at what has been found

bool before(const Ranked& one, const Ranked& other) {
  return one.key < other.key || (one.key == other.key && one.entry < other.entry);
}

// The first few of what was put in
class Podium {
 public:
  explicit Podium(int64_t most) : most_(most) {}

  double last() const {
    return static_cast<int64_t>(places_.size()) < most_ ? std::numeric_limits<double>::infinity()
                                                        : places_.back().key;
  }

  void put(const Ranked& one) {
    places_.insert(std::upper_bound(places_.begin(), places_.end(), one, before), one);
    if (static_cast<int64_t>(places_.size()) > most_) places_.pop_back();
  }

  const std::vector<Ranked>& places() const { return places_; }

 private:
  int64_t most_;
  std::vector<Ranked> places_;
};

// What one chunk of entries brings, put on a podium that may hold others already
class Chunk {
 public:
  Chunk(const Runners& runners, int64_t c, int64_t size)
      : runners_(runners), first_(c * kChunk), size_(size) {
    if (runners.by_score) return;
    const int32_t* ids = runners.ids ? runners.ids + first_ : nullptr;
    alignas(64) int32_t copied[kChunk];
    if (ids && padded(size) != size) {
      std::fill_n(std::copy_n(ids, size, copied), padded(size) - size, 0);
      ids = copied;
    }
    chunk_kernels().words({runners.seed, runners.position, kRace}, ids, first_, padded(size),
                          words_);
  }

  void run(const Row& row, Podium& podium) const {
    alignas(64) float scores[kChunk];
    alignas(64) double weights[kChunk];
    int32_t found[kStretch];
    const bool greedy = runners_.by_score;
    if (greedy) {
      row.scores(first_, size_, scores);
    } else {
      row.weights(first_, size_, 1.0, weights);
    }
    for (int64_t begin = 0; begin < size_; begin += kStretch) {
      const int64_t n = std::min(kStretch, padded(size_) - begin);
      const double last = podium.last();
      const int64_t hits =
          greedy ? chunk_kernels().above(scores + begin, n, static_cast<float>(-last), found)
                 : chunk_kernels().sift(words_ + begin, weights + begin, n, last, found);
      for (int64_t h = 0; h < hits; ++h) {
        const int64_t at = begin + found[h], entry = first_ + at;
        if (at >= size_) continue;
        const double key = greedy ? -static_cast<double>(scores[at]) : time(entry, weights[at]);
        if (key < std::numeric_limits<double>::infinity()) podium.put({key, entry});
      }
    }
  }

 private:
  double time(int64_t entry, double mass) const {
    const int64_t id = runners_.ids ? runners_.ids[entry] : entry;
    const double u = philox_uniform(runners_.seed, runners_.position, id, kRace, 0);
    return -std::log1p(-u) / mass;
  }

  const Runners& runners_;
  int64_t first_, size_;
  alignas(64) uint32_t words_[kChunk];
};

}  // namespace

std::vector<std::vector<Ranked>> race(const std::vector<const Row*>& rows, const Runners& runners,
                                      int64_t most, const Share& share) {
  std::vector<std::vector<Ranked>> result;
  if (rows.empty()) return result;
  const Row& any = *rows[0];
  const int64_t chunks = any.chunks(), height = static_cast<int64_t>(rows.size());
  // The chunk with the largest score first: who leads there keeps most others from being looked at
  std::vector<Podium> leaders(rows.size(), Podium(most));
  share(height, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t c = rows[r]->peak_chunk;
      Chunk(runners, c, any.chunk_size(c)).run(*rows[r], leaders[r]);
    }
  });
  std::vector<Podium> found(chunks * height, Podium(most));
  share(chunks, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const Chunk chunk(runners, c, any.chunk_size(c));
      for (int64_t r = 0; r < height; ++r) {
        if (c == rows[r]->peak_chunk) continue;
        // Later chunks of a piece know of earlier ones; what is put in twice is sorted out below
        Podium& own = found[c * height + r];
        own = c > begin && c - 1 != rows[r]->peak_chunk ? found[(c - 1) * height + r] : leaders[r];
        chunk.run(*rows[r], own);
      }
    }
  });
  for (int64_t r = 0; r < height; ++r) {
    std::vector<Ranked> all = leaders[r].places();
    for (int64_t c = 0; c < chunks; ++c) {
      const std::vector<Ranked>& more = found[c * height + r].places();
      all.insert(all.end(), more.begin(), more.end());
    }
    std::sort(all.begin(), all.end(), before);
    const auto same = [](const Ranked& a, const Ranked& b) { return a.entry == b.entry; };
    all.erase(std::unique(all.begin(), all.end(), same), all.end());
    if (static_cast<int64_t>(all.size()) > most) all.resize(most);
    result.push_back(std::move(all));
  }
  return result;
}

namespace {

// Who comes first in each row of scores: [rows, most] entries and their keys, -1 where there is
// none
std::tuple<Tensor, Tensor> race_op(const Tensor& logits_, const MaybeTensor& temperature,
                                   const MaybeTensor& top_k, const MaybeTensor& top_p,
                                   const MaybeTensor& min_p, const Tensor& seed_,
                                   const Tensor& position_, const MaybeTensor& ids_, int64_t most) {
  const Logits logits("logits", logits_, 2);
  const int64_t height = logits_.size(0);
  const FilterReader filters(temperature, top_k, top_p, min_p, height);
  const Reader<int64_t> seed("seed", seed_, {height}), position("position", position_, {height});
  STD_TORCH_CHECK(most > 0, "race: most is at least 1");
  STD_TORCH_CHECK(!ids_ || (ids_->scalar_type() == ScalarType::Int && ids_->is_contiguous() &&
                            ids_->numel() == logits.width),
                  "race: ids are an int32 for each entry");
  Tensor entries = new_tensor(logits_, {height, most}, ScalarType::Long);
  Tensor keys = new_tensor(logits_, {height, most}, ScalarType::Double);
  std::fill_n(pointer<int64_t>(entries), height * most, -1);
  std::fill_n(pointer<double>(keys), height * most, std::numeric_limits<double>::infinity());
  for (int64_t b = 0; b < height; ++b) {
    Row row = logits.row(b, 0, filters(b));
    measure({&row});
    if (row.undefined) continue;
    const Runners runners{seed(b), position(b), ids_ ? ids_->const_data_ptr<int32_t>() : nullptr,
                          row.filters.greedy()};
    const std::vector<Ranked> order = race({&row}, runners, most, share_out)[0];
    for (size_t i = 0; i < order.size(); ++i) {
      pointer<int64_t>(entries)[b * most + i] = order[i].entry;
      pointer<double>(keys)[b * most + i] = order[i].key;
    }
  }
  return {entries, keys};
}

}  // namespace

}  // namespace specdec

STABLE_TORCH_LIBRARY_IMPL(specdec_fast, CPU, library) {
  library.impl("race", TORCH_BOX(&specdec::race_op));
}
