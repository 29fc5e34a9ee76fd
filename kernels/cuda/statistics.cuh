// What one reading of a row leaves behind: a peak and a mass a tile, and from them the row's law.
#pragma once

#include "scores.cuh"

namespace specdec::blocks {

constexpr double kLog2 = 0.6931471805599453;

// The unit that a tile's, or a row's, weights are counted in: exp(s) is
// weight * exp(shift) * 2^(exponent - 61).
struct Unit {
  float shift;
  int exponent;

  SPECDEC_HOST_DEVICE static Unit below(float peak) {
    const float shift = peak >= kShiftFrom || peak <= -kShiftFrom ? peak : 0.0f;
    return {shift, exponent_of(peak - shift)};
  }
  SPECDEC_HOST_DEVICE uint64_t weight(float score, const Powers& powers) const {
    const float x = score - shift;
    return exponential(x > kLowest ? x : kLowest, exponent, powers);
  }
};

// Peak is NaN where the tile holds one, and infinite where it holds +inf or nothing but -inf. The
// mass counts weights in the tile's unit, or the entries equal to the peak where that is the law:
// +inf shares all mass, and at temperature 0 the largest logit has it.
struct alignas(16) Tile {
  uint64_t mass;
  float peak;
  float unused;
};

// The weight of an entry in its tile.
struct TileWeight {
  bool counting;
  float peak;
  Unit unit;

  SPECDEC_HOST_DEVICE TileWeight(bool greedy, float tile_peak)
      : counting(greedy || tile_peak == kInfinity),
        peak(tile_peak),
        unit(Unit::below(counting ? 0.0f : tile_peak)) {
    unit.exponent += kHeadroom;
  }
  SPECDEC_HOST_DEVICE uint64_t operator()(float score, const Powers& powers) const {
    return counting ? score == peak : unit.weight(score, powers);
  }
};

// Reads a tile: one pass over memory, the maximum first and every exponential once.
template <bool kPlain>
SPECDEC_COLD Tile measured(const Row& row, int tile, Agreement& agreement, const Powers& powers) {
  struct Held {
    float score[kEach];
  };
  PerThread<Held> held;
  PerThread<float> peaks;
  threads([&](int t) {
    row.load<kPlain>(tile, t, held[t].score);
    float peak = -kInfinity;
#pragma unroll
    for (int e = 0; e < kEach; ++e) peak = larger(held[t].score[e], peak);
    peaks[t] = peak;
  });
  const float peak = largest(peaks, agreement);
  if (peak != peak || peak == -kInfinity) return {0, peak, 0.0f};
  const TileWeight weight(row.greedy, peak);
  PerThread<uint64_t> sums;
  threads([&](int t) {
    uint64_t sum = 0;
#pragma unroll
    for (int e = 0; e < kEach; ++e) sum += weight(held[t].score[e], powers);
    sums[t] = sum;
  });
  return {sum(sums, agreement), peak, 0.0f};
}

// A row's law. exp(s) / total is in the unit of the largest tile, moved up by `spread` bits so that
// the tiles' masses sum to less than 2^64.
struct Law {
  float peak;
  bool undefined;  // a NaN, or nothing but -inf
  bool counting;   // temperature 0, or +inf in the row
  Unit unit;
  int spread;
  double total;

  // The mass of a tile in the row's unit, rounded down.
  SPECDEC_HOST_DEVICE uint64_t mass_of(uint64_t mass, float tile_peak) const {
    if (counting) return tile_peak == peak ? mass : 0;
    if (mass == 0) return 0;
    const Unit own = TileWeight(false, tile_peak).unit;
    if (own.shift == unit.shift) {
      const int down = unit.exponent - own.exponent + spread;
      return down > 63 ? 0 : mass >> down;
    }
    return static_cast<uint64_t>(static_cast<double>(mass) * factor(own));
  }
  // One unit of a tile, in the row's.
  SPECDEC_HOST_DEVICE double factor(Unit own) const {
    const double shift = static_cast<double>(own.shift) - static_cast<double>(unit.shift);
    const int power = own.exponent - unit.exponent - spread;
    return shift == 0.0 ? ldexp(1.0, power) : exp(shift + power * kLog2);
  }

  SPECDEC_HOST_DEVICE double log_total() const {
    return (unit.exponent - kOneBits + spread) * kLog2 + log(total);
  }
  SPECDEC_HOST_DEVICE double logsumexp(bool greedy) const {
    if (undefined) return __builtin_nan("");
    if (counting) return greedy ? peak : static_cast<double>(kInfinity);
    return unit.shift + log_total();
  }
  // Of one entry; at temperature 0 the caller knows which entry has it.
  SPECDEC_HOST_DEVICE double log_prob(float score) const {
    if (undefined) return __builtin_nan("");
    if (counting) return score == kInfinity ? -log(total) : -__builtin_huge_val();
    return (static_cast<double>(score) - unit.shift) - log_total();
  }

  // From a logsumexp that is known and finite.
  SPECDEC_HOST_DEVICE static Law of_logsumexp(double logsumexp) {
    Law law{0.0f, false, false, {0.0f, 0}, 0, 1.0};
    if (logsumexp >= kShiftFrom || logsumexp <= -kShiftFrom) {
      law.unit.shift = static_cast<float>(logsumexp);
    }
    const double rest = logsumexp - law.unit.shift;
    // No score is above its logsumexp, so that none has an exponent above this one
    law.unit.exponent = static_cast<int>(floor(rest / kLog2)) + 1 + kHeadroom;
    law.total = exp(rest - law.unit.exponent * kLog2) * 0x1p61;
    return law;
  }
};

// Merges a row's tiles; their order does not matter.
SPECDEC_COLD Law merged(const PerTile<Tile>& tiles, int count, bool greedy, Agreement& agreement) {
  PerThread<float> peaks;
  threads([&](int t) {
    float peak = -kInfinity;
    for (int i = t; i < count; i += kThreads) peak = larger(tiles.read(i).peak, peak);
    peaks[t] = peak;
  });
  Law law{largest(peaks, agreement), false, false, {0.0f, 0}, 0, 0.0};
  law.undefined = law.peak != law.peak || law.peak == -kInfinity;
  law.counting = greedy || law.peak == kInfinity;
  if (law.undefined) return law;
  while (1 << law.spread < count) ++law.spread;
  law.unit = TileWeight(law.counting, law.peak).unit;
  PerThread<uint64_t> sums;
  threads([&](int t) {
    uint64_t sum = 0;
    for (int i = t; i < count; i += kThreads) {
      const Tile tile = tiles.read(i);
      sum += law.mass_of(tile.mass, tile.peak);
    }
    sums[t] = sum;
  });
  law.total = static_cast<double>(sum(sums, agreement));
  return law;
}

// A row that was read, and its law.
struct Measured {
  Row row;
  Law p;
  PerTile<Tile> tiles;
};

}  // namespace specdec::blocks
