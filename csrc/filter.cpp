// top-k, top-p and min-p as one threshold a row, without sorting it.
//
// Where few entries are left they are sorted after all. Else the score that splits a row is found
// digit by digit: its bits, read as an integer that orders like the float, are fixed 11, 11 and 10
// at a time by a histogram of the entries that agree so far. The histogram counts entries for top-k
// and adds their masses for top-p.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "rows.h"

namespace specdec {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr std::array<int, 3> kShift{21, 10, 0};
constexpr int kBins = 2048;

// Integers in the order of the floats; both zeros get one.
uint32_t ordered(float score) {
  const float plain = score + 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &plain, sizeof(bits));
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

float score_of(uint32_t key) {
  const uint32_t bits = key >> 31 ? key & 0x7fffffffu : ~key;
  float score;
  std::memcpy(&score, &bits, sizeof(score));
  return score;
}

// Calls body(id, score, mass) for every entry of the row that is kept so far, in the order of the
// ids.
template <typename Body>
void each_kept(const Row& row, const std::vector<float>& peaks, bool with_mass, const Body& body) {
  alignas(64) float scores[kChunk];
  alignas(64) double masses[kChunk];
  for (int64_t c = 0; c < row.chunks(); ++c) {
    if (peaks[c] == -kInfinity || peaks[c] < row.threshold) continue;
    row.scores(c, scores);
    const int64_t n = row.chunk_size(c);
    if (with_mass) chunk_kernels().exps(scores, padded(n), row.peak, 1.0, masses);
    for (int64_t j = 0; j < n; ++j) {
      if (scores[j] != -kInfinity) body(c * kChunk + j, scores[j], with_mass ? masses[j] : 1.0);
    }
  }
}

struct Candidate {
  float score;
  int64_t id;
};

// The entries kept so far if they are few; nothing if they are not.
std::vector<Candidate> few_kept(const Row& row, const std::vector<float>& peaks) {
  constexpr size_t kFew = 4096;
  std::vector<Candidate> result;
  alignas(64) float scores[kChunk];
  for (int64_t c = 0; c < row.chunks(); ++c) {
    if (peaks[c] == -kInfinity || peaks[c] < row.threshold) continue;
    row.scores(c, scores);
    for (int64_t j = 0; j < row.chunk_size(c); ++j) {
      if (scores[j] == -kInfinity) continue;
      if (result.size() == kFew) return {};
      result.push_back({scores[j], c * kChunk + j});
    }
  }
  return result;
}

// What a search stopped at: a score, and the sum over the entries it had passed.
struct Split {
  float score = -kInfinity;
  double passed = 0.0;
};

// Goes through the kept entries by score, upwards or downwards, up to where their sum passes a
// limit: `stop(sum, total)` says whether it has. The last bin with entries stops whatever it says.
template <typename Stop>
Split search(const Row& row, const std::vector<float>& peaks, bool with_mass, bool upwards,
             const Stop& stop) {
  Split split;
  uint32_t prefix = 0;
  std::vector<double> sum(kBins);
  std::vector<int64_t> count(kBins);
  double total = 0.0;
  for (size_t level = 0; level < kShift.size(); ++level) {
    const int shift = kShift[level];
    const uint32_t known = level == 0 ? 0 : ~uint32_t{0} << kShift[level - 1];
    const uint32_t mask = (level == 2 ? 1024 : kBins) - 1;
    std::fill(sum.begin(), sum.end(), 0.0);
    std::fill(count.begin(), count.end(), 0);
    each_kept(row, peaks, with_mass, [&](int64_t, float score, double mass) {
      const uint32_t key = ordered(score);
      if ((key & known) != prefix) return;
      sum[key >> shift & mask] += mass;
      ++count[key >> shift & mask];
    });
    if (level == 0) {
      for (const double s : sum) total += s;
    }
    int64_t bin = -1;
    double passed = split.passed;
    for (int64_t i = 0; i <= mask; ++i) {
      const int64_t b = upwards ? i : mask - i;
      if (count[b] == 0) continue;
      if (bin >= 0) passed += sum[bin];
      bin = b;
      if (stop(passed + sum[b], total)) break;
    }
    split.passed = passed;
    prefix |= static_cast<uint32_t>(bin) << shift;
  }
  split.score = score_of(prefix);
  return split;
}

void keep_top_k(Row& row, const std::vector<float>& peaks) {
  const int64_t k = row.filters.top_k;
  if (k >= row.width) return;
  if (k <= row.chunks()) {  // k chunks have an entry as large as the k-th largest of their peaks
    std::vector<float> best = peaks;
    std::nth_element(best.begin(), best.begin() + (k - 1), best.end(), std::greater<float>());
    row.threshold = std::min(best[k - 1], static_cast<float>(row.peak));
  }
  std::vector<Candidate> few = few_kept(row, peaks);
  if (!few.empty()) {
    const auto place = few.begin() + (std::min<int64_t>(k, few.size()) - 1);
    std::nth_element(few.begin(), place, few.end(),
                     [](const Candidate& a, const Candidate& b) { return a.score > b.score; });
    row.threshold = place->score;
    return;
  }
  const Split split = search(row, peaks, false, false,
                             [&](double sum, double) { return sum >= static_cast<double>(k); });
  row.threshold = split.score;
}

void keep_top_p(Row& row, const std::vector<float>& peaks) {
  const double share = 1.0 - static_cast<double>(row.filters.top_p);
  std::vector<Candidate> few = few_kept(row, peaks);
  if (!few.empty()) {
    std::sort(few.begin(), few.end(), [](const Candidate& a, const Candidate& b) {
      return a.score < b.score || (a.score == b.score && a.id < b.id);
    });
    std::vector<double> edge;
    for (const Candidate& entry : few) {
      edge.push_back((edge.empty() ? 0.0 : edge.back()) + std::exp(entry.score - row.peak));
    }
    size_t first = 0;
    while (first + 1 < few.size() && edge[first] <= share * edge.back()) ++first;
    row.threshold = few[first].score;
    row.cutoff = few[first].id;
    return;
  }
  double limit = 0.0;
  const Split split = search(row, peaks, true, true, [&](double sum, double total) {
    limit = share * total;
    return sum > limit;
  });
  // Of the entries that share the score, the first few may still fall under the limit
  const double mass = std::exp(split.score - row.peak);
  int64_t first = -1, passed = 0;  // the first that stays, and how many before it do not
  each_kept(row, peaks, false, [&](int64_t id, float score, double) {
    if (score != split.score) return;
    if (first < 0 || split.passed + static_cast<double>(passed) * mass <= limit) {
      first = id;
      ++passed;
    }
  });
  row.threshold = split.score;
  row.cutoff = first;
}

void keep_min_p(Row& row) {
  const double floor = row.peak + std::log(std::min(1.0, static_cast<double>(row.filters.min_p)));
  float smallest = static_cast<float>(floor);
  if (smallest < floor) smallest = std::nextafter(smallest, kInfinity);
  if (smallest <= row.threshold) return;
  row.threshold = smallest;
  row.cutoff = 0;
}

}  // namespace

void filter(Row& row, const std::vector<float>& peaks) {
  if (row.filters.top_k > 0) keep_top_k(row, peaks);
  if (row.filters.top_p < 1.0f) keep_top_p(row, peaks);
  if (row.filters.min_p > 0.0f) keep_min_p(row);
}

}  // namespace specdec
