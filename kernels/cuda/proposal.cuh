// The law q of a drafted position, and what is left of the target's law once it is subtracted.
#pragma once

#include "draw.cuh"

namespace specdec::blocks {

enum LawKind : int32_t { kPoint = 0, kCompact = 1, kSparse = 2 };

// The target id of each compact entry, ascending; none: entry k is id k.
struct IndexMap {
  const int32_t* id;
  int64_t size;

  // The entry that stands for a target id; kNone where none does.
  SPECDEC_HOST_DEVICE int64_t entry_of(int64_t target) const {
    if (id == nullptr) return target >= 0 && target < size ? target : kNone;
    int64_t low = 0, high = size;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (id[middle] < target) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low < size && id[low] == target ? low : kNone;
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

SPECDEC_HOST_DEVICE uint64_t high_product(uint64_t a, uint64_t b) {
#ifdef __CUDA_ARCH__
  return __umul64hi(a, b);
#else
  return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
#endif
}

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
  Row row;  // compact
  Law law;
  IndexMap map;
  SparseLaw sparse;
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
  threads([&](int t) {
#pragma unroll 4
    for (int j = t; j < kTile; j += kThreads) {
      desk.weights.at(j) = j < size ? p(row.score(first + j), desk.powers) : 0;
    }
  });
  sync();
  // Each target id is met once, so that no two threads write to one weight
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
    threads([&](int t) {
#pragma unroll 4
      for (int j = t; j < size; j += kThreads) {
        const int64_t k = first + j;
        if (k < drafted.row.width) subtract(k, q(drafted.row.score(k), desk.powers));
      }
    });
  } else {
    // Entries of a tile lie side by side, at most kTile of them but for ids below 0 in front
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
          if (id >= first) subtract(id, q(drafted.row.score(k), desk.powers));
        }
      });
      passed = sum(below, desk.agreement);
      entry += static_cast<int64_t>(passed);
    }
  }
  return desk.weights.add_up();
}

}  // namespace specdec::blocks
