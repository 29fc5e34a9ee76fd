// The law q of a drafted position, and what is left of the target's law once it is subtracted.
#pragma once

#include "filter.cuh"

namespace specdec::blocks {

enum LawKind : int32_t { kPoint = 0, kCompact = 1, kSparse = 2 };

// The target id of each compact entry, ascending, several in a row of one id where they stand for
// it together; none: entry k is id k.
struct IndexMap {
  const int32_t* id;
  int64_t size;

  // The first entry whose id is not below a target id, found by all threads: each step leaves one
  // of kThreads shares.
  SPECDEC_COLD int64_t first_from(int64_t target, Agreement& agreement) const {
    if (id == nullptr) return target < 0 ? 0 : target < size ? target : size;
    int64_t low = 0, high = size;
    while (low < high) {
      const int64_t share = (high - low + kThreads - 1) / kThreads;
      PerThread<uint64_t> below;
      threads([&](int t) {
        const int64_t end = low + (t + 1) * share;
        const int64_t last = (end < high ? end : high) - 1;
        below[t] = low + t * share < high && id[last] < target;
      });
      low += static_cast<int64_t>(sum(below, agreement)) * share;
      low = low < high ? low : high;
      const int64_t end = low + share - 1;  // the share's last entry is known not to be below
      high = end < high ? end : high;
    }
    return low;
  }
};

// Log masses of listed target ids at one position.
struct SparseLaw {
  const int64_t* id;
  const double* log_mass;
  int64_t size, id_stride, mass_stride;

  SPECDEC_HOST_DEVICE int64_t id_at(int64_t s) const { return id[s * id_stride]; }
  SPECDEC_HOST_DEVICE double log_mass_at(int64_t s) const { return log_mass[s * mass_stride]; }

  SPECDEC_HOST_DEVICE bool undefined(int64_t width) const {
    for (int64_t s = 0; s < size; ++s) {
      const double mass = log_mass_at(s);
      if (id_at(s) >= 0 && id_at(s) < width && mass != mass) return true;
    }
    return false;
  }
  SPECDEC_HOST_DEVICE double log_q(int64_t token) const {
    for (int64_t s = 0; s < size; ++s) {
      if (token >= 0 && id_at(s) == token) return log_mass_at(s);
    }
    return -__builtin_huge_val();
  }
};

// Probabilities as integers: multiples of 2^-60, whose sums do not depend on their order.
constexpr double kCertain = 0x1p60;

SPECDEC_HOST_DEVICE uint64_t to_integer(double x) {
  return x > 0.0 ? static_cast<uint64_t>(x < 0x1.fffffp63 ? x : 0x1.fffffp63) : 0;
}

// scale * p of a score under a law.
struct Probability {
  bool counting;
  uint64_t share;  // of each entry that is counted
  Unit unit;
  uint64_t factor;

  SPECDEC_HOST_DEVICE Probability(const Law& law, double scale)
      : counting(law.counting), share(to_integer(scale * kCertain / law.total)), unit(law.unit) {
    unit.exponent -= kHeadroom;  // single entries need no room to add up
    factor = to_integer(ldexp(scale / law.total, 123 - kHeadroom - law.spread));
  }
  SPECDEC_HOST_DEVICE uint64_t operator()(float score, const Powers& powers) const {
    if (counting) return score == kInfinity ? share : 0;
    return high_product(unit.weight(score, powers) << 1, factor);
  }
};

// The law of one drafted position.
struct Proposed {
  LawKind kind;
  bool undefined;
  int64_t token;
  int64_t drawn;  // the compact entry it was drawn as; kNone: any that stands for it
  Row row;        // compact
  Law law;
  IndexMap map;
  SparseLaw sparse;

  // Where there is no draft token, or its law does not matter.
  SPECDEC_HOST_DEVICE static Proposed nothing(const Row& any) {
    return {kPoint, false, kNone, kNone, any, Law(), {nullptr, 0}, {}};
  }

  SPECDEC_COLD double log_q(Agreement& agreement) const {
    if (kind == kPoint) return 0.0;
    if (kind == kSparse) return sparse.log_q(token);
    if (undefined) return __builtin_nan("");
    if (drawn != kNone) return log_prob(drawn);
    const int64_t begin = map.first_from(token, agreement);
    const int64_t end = map.first_from(token + 1, agreement);
    if (end - begin <= 1) return log_prob(begin < end ? begin : kNone);
    PerThread<double> sums;
    threads([&](int t) {
      double sum = 0.0;
      for (int64_t k = begin + t; k < end; k += kThreads) sum += exp(log_prob(k));
      sums[t] = sum;
    });
    return log(combined(sums, agreement, [](double a, double b) { return a + b; }));
  }

 private:
  SPECDEC_HOST_DEVICE double log_prob(int64_t k) const {
    return k >= 0 && k < row.width ? law.log_prob(row.score(k)) : -__builtin_huge_val();
  }
};

// A tile of a residual: its mass, and the first compact entry that is not below the tile.
struct alignas(16) Rest {
  uint64_t mass;
  int64_t entry;
};

// weight * p - q over one tile, its positive part into desk.weights; returns their sum. Moves
// `entry` to the first compact entry behind the tile.
SPECDEC_COLD uint64_t subtracted(const Row& row, const Probability& p, const Proposed& drafted,
                                 const Probability& q, int tile, int64_t& entry, Desk& desk) {
  const int64_t first = static_cast<int64_t>(tile) * kTile;
  const int size = row.tile_size(tile);
  const char* from = row.at(tile);
  threads([&](int t) {
#pragma unroll 4
    for (int j = t; j < kTile; j += kThreads) {
      desk.weights.at(j) = j < size ? p(row.score(from, j, first + j), desk.powers) : 0;
    }
  });
  sync();
  // Ids of these laws are met once each, so that no two threads write to one weight
  const auto subtract = [&](int64_t id, uint64_t mass) {
    if (id < first || id >= first + size) return;
    uint64_t& weight = desk.weights.at(static_cast<int>(id - first));
    weight = weight > mass ? weight - mass : 0;
  };
  if (drafted.kind == kSparse) {
    threads([&](int t) {
      for (int64_t s = t; s < drafted.sparse.size; s += kThreads) {
        subtract(drafted.sparse.id_at(s),
                 to_integer(exp(drafted.sparse.log_mass_at(s)) * kCertain));
      }
    });
  } else if (drafted.map.id == nullptr) {
    if (first >= drafted.row.width) return desk.weights.add_up();
    const char* draft_from = drafted.row.at(tile);
    threads([&](int t) {
#pragma unroll 4
      for (int j = t; j < size; j += kThreads) {
        const int64_t k = first + j;
        if (k < drafted.row.width) {
          subtract(k, q(drafted.row.score(draft_from, j, k), desk.powers));
        }
      }
    });
  } else {
    // Entries of a tile lie side by side, at most kTile of them but for ids below 0 in front and
    // ids that have several. Masses are below 2^62, so that a difference has a sign.
    uint64_t passed = kTile;
    while (passed == kTile) {
      PerThread<uint64_t> below;
      threads([&](int t) {
        below[t] = 0;
#pragma unroll 4
        for (int e = 0; e < kEach; ++e) {
          const int64_t k = entry + e * kThreads + t;
          const int64_t id = k < drafted.map.size ? drafted.map.id[k] : first + kTile;
          if (id >= first + kTile) continue;
          ++below[t];
          if (id < first || id >= first + size) continue;
          const uint64_t mass = q(drafted.row.score(k), desk.powers);
          add_shared(&desk.weights.at(static_cast<int>(id - first)), ~mass + 1);
        }
      });
      passed = sum(below, desk.agreement);
      entry += static_cast<int64_t>(passed);
    }
    sync();
    threads([&](int t) {
      for (int j = t; j < kTile; j += kThreads) {
        uint64_t& weight = desk.weights.at(j);
        if (static_cast<int64_t>(weight) < 0) weight = 0;
      }
    });
  }
  return desk.weights.add_up();
}

}  // namespace specdec::blocks
