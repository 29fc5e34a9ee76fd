#include "rows.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace specdec {

namespace {

constexpr float kLargest = std::numeric_limits<float>::max();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kGrain = 4;       // chunks a thread takes at once: about 5 us
constexpr int64_t kPeakGrain = 16;  // the same where only their peaks are wanted

int64_t entry_size(Float type) { return type == kFloat32 ? 4 : 2; }

// All chunks of some rows, numbered through.
class Chunks {
 public:
  Chunks(const std::vector<Row*>& rows, const Share& share)
      : rows_(rows), share_(share), first_{0} {
    for (const Row* row : rows) first_.push_back(first_.back() + row->chunks());
  }

  template <typename Body>
  void each(const Body& body, int64_t grain = kGrain) const {
    if (first_.back() == 0) return;
    share_(first_.back(), grain, [&](int64_t begin, int64_t end) {
      size_t r = std::upper_bound(first_.begin(), first_.end(), begin) - first_.begin() - 1;
      for (int64_t i = begin; i < end; ++i) {
        while (i >= first_[r + 1]) ++r;
        body(*rows_[r], r, i - first_[r]);
      }
    });
  }

 private:
  const std::vector<Row*>& rows_;
  const Share& share_;
  std::vector<int64_t> first_;
};

// The parts of a row that come from all its chunks' peaks.
void set_peak(Row& row, const std::vector<float>& peaks) {
  float peak = -kInfinity;
  for (size_t c = 0; c < peaks.size(); ++c) {
    if (std::isnan(peaks[c])) row.undefined = true;
    if (peaks[c] > peak) {
      peak = peaks[c];
      row.peak_chunk = c;
    }
  }
  row.infinite = peak == kInfinity;
  row.peak = std::min(peak, kLargest);
  row.undefined |= peak == -kInfinity;
}

// From masses relative to each chunk's own peak to masses relative to the row's.
void set_total(Row& row, const std::vector<float>& peaks) {
  row.total = 0.0;
  for (size_t c = 0; c < peaks.size(); ++c) {
    row.masses[c] = peaks[c] == -kInfinity
                        ? 0.0
                        : row.masses[c] * std::exp(std::min(peaks[c], kLargest) - row.peak);
    row.total += row.masses[c];
  }
}

}  // namespace

float Row::scores(int64_t first, int64_t n, float* out) const {
  float peak = chunk_kernels().load[type](data + first * entry_size(type), n,
                                          filters.greedy() ? 1.0f : filters.temperature, out);
  if (peak == kInfinity) {
    for (int64_t j = 0; j < n; ++j) out[j] = out[j] == kInfinity ? kLargest : -kInfinity;
  }
  if (threshold == -kInfinity) return peak;
  const int64_t kept_from = cutoff - first;
  peak = -kInfinity;
  for (int64_t j = 0; j < n; ++j) {
    const bool kept = out[j] > threshold || (out[j] == threshold && j >= kept_from);
    out[j] = kept ? out[j] : -kInfinity;
    peak = out[j] > peak ? out[j] : peak;
  }
  return peak;
}

void Row::weights(int64_t first, int64_t n, double scale, double* out) const {
  alignas(64) float buffer[kChunk];
  scores(first, n, buffer);
  chunk_kernels().exps(buffer, padded(n), peak, scale / total, out);
}

double Row::log_prob(int64_t id) const {
  if (undefined) return std::numeric_limits<double>::quiet_NaN();
  if (id < 0 || id >= width) return -std::numeric_limits<double>::infinity();
  if (filters.greedy()) return id == argmax() ? 0.0 : -std::numeric_limits<double>::infinity();
  alignas(64) float score[kLanes];
  chunk_kernels().load[type](data + id * entry_size(type), 1, filters.temperature, score);
  if (infinite) score[0] = score[0] == kInfinity ? kLargest : -kInfinity;
  if (score[0] < threshold || (score[0] == threshold && id < cutoff)) score[0] = -kInfinity;
  return score[0] - peak - std::log(total);
}

int64_t Row::argmax() const {
  alignas(64) float buffer[kChunk];
  scores(peak_chunk, buffer);
  const int64_t n = chunk_size(peak_chunk);
  const int64_t place = std::find(buffer, buffer + n, static_cast<float>(peak)) - buffer;
  return peak_chunk * kChunk + std::min(place, n - 1);
}

double Row::logsumexp() const {
  if (undefined) return std::numeric_limits<double>::quiet_NaN();
  if (infinite) return std::numeric_limits<double>::infinity();
  return filters.greedy() ? peak : peak + std::log(total);
}

void share_out(int64_t count, int64_t grain, const Body& body) {
  torch::stable::parallel_for(0, count, grain, body);
}

void measure(const std::vector<Row*>& all, const Share& share) {
  std::vector<Row*> rows;
  for (Row* row : all) {
    if (!row->measured) rows.push_back(row);
  }
  std::vector<std::vector<float>> peaks(rows.size());
  for (size_t r = 0; r < rows.size(); ++r) {
    peaks[r].resize(rows[r]->chunks());
    rows[r]->masses.assign(rows[r]->chunks(), 0.0);
    rows[r]->measured = true;
  }
  const auto sums = [&](Row& row, size_t r, int64_t c) {
    alignas(64) float buffer[kChunk];
    const float peak = peaks[r][c] = row.scores(c, buffer);
    if (peak == -kInfinity || row.filters.greedy()) return;
    row.masses[c] =
        chunk_kernels().sum_exp(buffer, padded(row.chunk_size(c)), std::min(peak, kLargest));
  };
  const bool peaks_alone =
      std::all_of(rows.begin(), rows.end(), [](const Row* row) { return row->filters.greedy(); });
  Chunks(rows, share)
      .each(
          [&](Row& row, size_t r, int64_t c) {
            if (!row.filters.any()) return sums(row, r, c);
            alignas(64) float buffer[kChunk];
            peaks[r][c] = row.scores(c, buffer);
          },
          peaks_alone ? kPeakGrain : kGrain);

  std::vector<Row*> filtered;
  std::vector<size_t> place;
  for (size_t r = 0; r < rows.size(); ++r) {
    set_peak(*rows[r], peaks[r]);
    if (rows[r]->undefined || !rows[r]->filters.any()) continue;
    filtered.push_back(rows[r]);
    place.push_back(r);
  }
  share(static_cast<int64_t>(filtered.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) filter(*filtered[i], peaks[place[i]]);
  });
  Chunks(filtered, share).each([&](Row& row, size_t i, int64_t c) {
    float& peak = peaks[place[i]][c];
    if (peak < row.threshold) {
      peak = -kInfinity;
    } else {
      sums(row, place[i], c);
    }
  });
  for (size_t r = 0; r < rows.size(); ++r) {
    if (!rows[r]->undefined && !rows[r]->filters.greedy()) set_total(*rows[r], peaks[r]);
  }
}

int64_t pick(const std::vector<double>& masses, int64_t width, double u,
             const std::function<void(int64_t, double*)>& fill) {
  double total = 0.0;
  for (const double mass : masses) total += mass;
  if (!(total > 0.0)) return -1;
  const double level = std::min(u * total, std::nextafter(total, 0.0));

  double below = 0.0;
  alignas(64) double weights[kChunk];
  for (size_t c = 0; c < masses.size(); ++c) {
    if (below + masses[c] > level) {
      const int64_t n = std::min(kChunk, width - static_cast<int64_t>(c) * kChunk);
      fill(c, weights);
      double edge = below;
      int64_t last = -1;  // entry by entry the sum may stay below what it is by lanes
      for (int64_t j = 0; j < n && !(edge > level); ++j) {
        if (!(weights[j] > 0.0)) continue;
        edge += weights[j];
        last = c * kChunk + j;
      }
      if (last >= 0) return last;
    }
    below += masses[c];
  }
  return -1;
}

int64_t draw(const Row& row, double u) {
  if (row.filters.greedy()) return row.argmax();
  return pick(row.masses, row.width, u,
              [&](int64_t c, double* weights) { row.weights(c, row.total, weights); });
}

}  // namespace specdec
