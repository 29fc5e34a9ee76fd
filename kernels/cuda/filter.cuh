// top-k, top-p and min-p as one cut through a row, without sorting it.
//
// The score to cut at is found digit by digit: its bits, read as an integer that orders like the
// float, are fixed 12 at a time by a histogram of the entries that agree so far. The histogram
// counts entries for top-k, from the top, and adds up their weights for top-p, from the bottom.
// Weights are integers: sums do not depend on the order, so that comparisons are exact and repeat.
#pragma once

#include "draw.cuh"

namespace specdec::blocks {

struct Filter {
  int32_t top_k = 0;
  float top_p = 1.0f;
  float min_p = 0.0f;

  SPECDEC_HOST_DEVICE bool any() const { return top_k > 0 || top_p < 1.0f || min_p > 0.0f; }
};

// Integers in the order of the floats; both zeros get one.
SPECDEC_HOST_DEVICE uint32_t ordered(float score) {
  const uint32_t bits = float_bits(score + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

SPECDEC_HOST_DEVICE float score_of(uint32_t key) {
  return from_word<float>(key >> 31 ? key & 0x7fffffffu : ~key);
}

// Calls body(tile, score) for a block's share of the entries kept so far, tiles whose peak has a
// key below `least` left out.
template <typename Body>
SPECDEC_HOST_DEVICE void each_kept(const Row& row, const PerTile<Tile>& tiles, uint32_t least,
                                   const Team& team, const Body& body) {
  const int end = team.end(row.tiles());
  for (int tile = team.begin(row.tiles()); tile < end; ++tile) {
    if (ordered(tiles.read(tile).peak) < least) continue;
    threads([&](int t) {
      float scores[kEach];
      row.load<false>(tile, t, scores);
      for (const float score : scores) {
        if (score != -kInfinity) body(tile, score);
      }
    });
  }
}

constexpr int bits_of(int n) { return n > 1 ? 1 + bits_of(n / 2) : 0; }
constexpr int kDigitBits = bits_of(kTile);  // a bin is an entry of Weights
static_assert(1 << kDigitBits == kTile, "every digit has its bin");

// Where the entries of a row, taken in the order of their scores, pass a limit.
struct Split {
  bool inside;  // false: all of them stay below it
  float score;
  uint64_t level;  // what is left of the limit for the entries of that score
};

// The first score at which the sum of weigh(score) exceeds limit(sum of all). Reads a row once a
// digit, of later digits only the tiles that can matter.
template <typename Weigh, typename Limit>
SPECDEC_HOST_DEVICE Split split(const Row& row, const PerTile<Tile>& tiles, bool upwards,
                                const Weigh& weigh, const Limit& limit, Desk& desk) {
  uint32_t prefix = 0;
  uint64_t level = 0;
  bool inside = true;
  for (int shift = 32; shift > 0;) {
    const int next = shift > kDigitBits ? shift - kDigitBits : 0;
    const uint32_t last = (uint32_t{1} << (shift - next)) - 1;
    threads([&](int t) {
      for (int j = t; j < kTile; j += kThreads) desk.weights.at(j) = 0;
    });
    sync();
    const uint32_t least = ordered(row.cut.threshold);
    each_kept(row, tiles, prefix > least ? prefix : least, desk.team, [&](int, float score) {
      const uint32_t key = ordered(score);
      if (shift < 32 && (key ^ prefix) >> shift != 0) return;
      const uint32_t digit = key >> next & last;
      add_shared(&desk.weights.at(upwards ? digit : last - digit), weigh(score));
    });
    desk.weights.add_up();
    desk.team.meet();
    if (shift == 32) {
      const uint64_t total = total_of(desk.team.size, desk);
      level = limit(total);
      inside = level < total;
    }
    const Found bin = inside ? found(level, desk.team.size, desk) : Found{0, 0};
    desk.team.meet();  // all have looked: the weights may change
    if (!inside) return {false, 0.0f, 0};
    const uint32_t digit = static_cast<uint32_t>(bin.index);
    prefix |= (upwards ? digit : last - digit) << next;
    level -= bin.below;
    shift = next;
  }
  return {true, score_of(prefix), level};
}

// The id of the entry behind the first `passed` of those with a score, in the order of the ids.
SPECDEC_COLD int64_t id_behind(const Row& row, const PerTile<Tile>& tiles, float score,
                               uint64_t passed, Desk& desk) {
  threads([&](int t) {
    for (int j = t; j < kTile; j += kThreads) desk.weights.at(j) = 0;
  });
  sync();
  each_kept(row, tiles, ordered(score), desk.team, [&](int tile, float other) {
    if (other == score) add_shared(&desk.weights.at(tile), 1);
  });
  desk.weights.add_up();
  desk.team.meet();
  const Found tile = found(passed, desk.team.size, desk);
  desk.team.meet();
  const int at = static_cast<int>(tile.index);
  const int64_t first = static_cast<int64_t>(at) * kTile;
  const char* from = row.at(at);
  threads([&](int t) {
    for (int j = t; j < kTile; j += kThreads) {
      const bool inside = j < row.tile_size(at) && row.score(from, j, first + j) == score;
      desk.weights.at(j) = inside;
    }
  });
  desk.weights.add_up();
  return first + found(passed - tile.below, 1, desk).index;
}

SPECDEC_HOST_DEVICE void keep_top_k(Row& row, const PerTile<Tile>& tiles, int32_t k, Desk& desk) {
  const Split at = split(
      row, tiles, false, [](float) { return uint64_t{1}; },
      [&](uint64_t) { return static_cast<uint64_t>(k) - 1; }, desk);
  if (at.inside) row.cut = {at.score, 0};
}

SPECDEC_HOST_DEVICE void keep_top_p(Row& row, const PerTile<Tile>& tiles, const Law& law,
                                    float top_p, Desk& desk) {
  TileWeight weight(false, law.peak);
  weight.unit.exponent += law.spread;  // the row's weights sum to less than 2^64
  const auto weigh = [&](float score) { return weight(score, desk.powers); };
  // Entries are dropped while the sum is at most this share; the last one always stays
  const double share = 1.0 - static_cast<double>(top_p);
  const auto limit = [&](uint64_t total) {
    const uint64_t part =
        share < 1.0 ? high_product(total, static_cast<uint64_t>(share * 0x1p64)) : total;
    return part < total ? part : total - 1;
  };
  const Split at = split(row, tiles, true, weigh, limit, desk);
  const uint64_t dropped = at.level / weigh(at.score);
  const int64_t first = dropped > 0 ? id_behind(row, tiles, at.score, dropped, desk) : 0;
  row.cut = {at.score, static_cast<int32_t>(first)};
}

SPECDEC_HOST_DEVICE void keep_min_p(Row& row, float peak, float min_p) {
  const double least = peak + log(min_p < 1.0f ? static_cast<double>(min_p) : 1.0);
  float threshold = static_cast<float>(least);
  if (threshold < least) threshold = nextafterf(threshold, kInfinity);
  if (threshold > row.cut.threshold) row.cut = {threshold, 0};
}

// A measured row's law once its filters are applied: sets its cut and measures its tiles again.
SPECDEC_COLD Law filtered(Row& row, const PerTile<Tile>& tiles, const Filter& filter, Desk& desk) {
  const Law whole = merged(tiles, row.tiles(), row.greedy, desk.agreement);
  if (whole.undefined || row.greedy || !filter.any()) return whole;
  if (filter.top_k > 0 && filter.top_k < row.width) keep_top_k(row, tiles, filter.top_k, desk);
  if (filter.top_p < 1.0f) keep_top_p(row, tiles, whole, filter.top_p, desk);
  if (filter.min_p > 0.0f) keep_min_p(row, whole.peak, filter.min_p);
  if (!row.cut.any()) return whole;
  desk.team.meet();  // all have merged: the tiles may change, and min-p alone met nobody
  const int end = desk.team.end(row.tiles());
  for (int tile = desk.team.begin(row.tiles()); tile < end; ++tile) {
    const bool dropped = tiles.read(tile).peak < row.cut.threshold;
    const Tile kept = dropped ? Tile{0, -kInfinity, 0.0f}
                              : measured<false>(row, tile, desk.agreement, desk.powers);
    threads([&](int t) {
      if (t == 0) tiles.write(tile, kept);
    });
  }
  desk.team.meet();
  return merged(tiles, row.tiles(), row.greedy, desk.agreement);
}

}  // namespace specdec::blocks
