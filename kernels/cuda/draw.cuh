// Inverting a cumulative sum: first over a row's tiles, then inside of one.
#pragma once

#include "statistics.cuh"

namespace specdec::blocks {

// Up to kTile weights in shared memory, in the order of their ids. A padding word after every 16
// keeps threads that read 16 neighbours each off each other's banks.
struct Weights {
  static constexpr int kGroups = kThreads / kEach;
  static_assert(kThreads % kEach == 0, "groups of threads");

  uint64_t entry[kTile + kThreads];
  uint64_t share[kThreads];  // of 16 entries
  uint64_t group[kGroups];   // of 16 shares

  SPECDEC_HOST_DEVICE uint64_t& at(int j) { return entry[j + j / kEach]; }

  // Fills share and group; returns the total.
  SPECDEC_COLD uint64_t add_up() {
    sync();
    threads([&](int t) {
      uint64_t sum = 0;
      for (int e = 0; e < kEach; ++e) sum += at(t * kEach + e);
      share[t] = sum;
    });
    sync();
    threads([&](int t) {
      if (t >= kGroups) return;
      uint64_t sum = 0;
      for (int e = 0; e < kEach; ++e) sum += share[t * kEach + e];
      group[t] = sum;
    });
    sync();
    uint64_t total = 0;
    for (int g = 0; g < kGroups; ++g) total += group[g];
    return total;
  }
};

struct Found {
  int64_t index;
  uint64_t below;  // the sum of what lies before
};

// What a draw works with: shared memory of a block.
struct Desk {
  Team team;
  Agreement agreement;
  Powers powers;
  Weights weights;
  uint64_t column[kEach];
  uint32_t item;  // of a queue: what the block is at

  // Before anything else.
  SPECDEC_HOST_DEVICE void set_up(const Team& own) {
    threads([&](int t) {
      if (t == 0) team = own;
    });
    powers.fill();
  }
};

// The first of up to 16 words whose cumulative sum exceeds a level, each word summed over the
// blocks of a team; all of them where none does, and the total below.
SPECDEC_COLD Found first_above(uint64_t* words, int count, uint64_t level, int blocks, Desk& desk) {
  threads([&](int t) {
    if (t >= count) return;
    uint64_t sum = blocks == 1 ? words[t] : 0;
    for (int r = 0; blocks > 1 && r < blocks; ++r) sum += *remote(words + t, r);
    desk.column[t] = sum;
  });
  sync();
  const int64_t index = single(desk.agreement, [&] {
    uint64_t below = 0;
    int i = 0;
    for (; i < count && below + desk.column[i] <= level; ++i) below += desk.column[i];
    desk.agreement.extra = below;
    return static_cast<int64_t>(i);
  });
  const uint64_t below = desk.agreement.extra;
  sync();
  return {index, below};
}

// All that the desks' weights add up to.
SPECDEC_COLD uint64_t total_of(int blocks, Desk& desk) {
  return first_above(desk.weights.group, Weights::kGroups, ~uint64_t{0}, blocks, desk).below;
}

// The first entry whose cumulative sum exceeds a level below the total; weights of one desk, or the
// sums over the desks of a team (then they stay as they are until all blocks have looked).
SPECDEC_COLD Found found(uint64_t level, int blocks, Desk& desk) {
  Weights& weights = desk.weights;
  const Found group = first_above(weights.group, Weights::kGroups, level, blocks, desk);
  uint64_t below = group.below;
  const int g = static_cast<int>(group.index) * kEach;
  const Found share = first_above(weights.share + g, kEach, level - below, blocks, desk);
  below += share.below;
  const int j = (g + static_cast<int>(share.index)) * kEach;
  const Found entry = first_above(&weights.at(j), kEach, level - below, blocks, desk);
  return {j + entry.index, below + entry.below};
}

// A level u of the way up, below the total.
SPECDEC_HOST_DEVICE uint64_t level_of(double u, uint64_t total) {
  const double level = u * static_cast<double>(total);
  const double last = static_cast<double>(total);
  if (!(level < last)) return total - 1;
  const uint64_t floored = static_cast<uint64_t>(level);
  return floored < total ? floored : total - 1;
}

constexpr int64_t kNone = -1;

// The masses of a row's tiles, in the row's unit, with one entry left out.
SPECDEC_COLD uint64_t weigh_tiles(const Measured& at, int64_t without, Desk& desk) {
  threads([&](int t) {
    for (int i = t; i < kTile; i += kThreads) {
      uint64_t mass = 0;
      if (i < at.row.tiles()) {
        const Tile tile = at.tiles.read(i);
        uint64_t own = tile.mass;
        if (without != kNone && without / kTile == i && own > 0) {
          own -= TileWeight(at.row.greedy, tile.peak)(at.row.score(without), desk.powers);
        }
        mass = at.p.mass_of(own, tile.peak);
      }
      desk.weights.at(i) = mass;
    }
  });
  return desk.weights.add_up();
}

// The weights of one tile, in its own unit, with one entry left out.
SPECDEC_HOST_DEVICE uint64_t weigh_entries(const Measured& at, int tile, int64_t without,
                                           Desk& desk) {
  const TileWeight weight(at.row.greedy, at.tiles.read(tile).peak);
  const int64_t first = static_cast<int64_t>(tile) * kTile;
  const char* from = at.row.at(tile);
  threads([&](int t) {
    for (int j = t; j < kTile; j += kThreads) {
      const bool inside = j < at.row.tile_size(tile) && first + j != without;
      desk.weights.at(j) = inside ? weight(at.row.score(from, j, first + j), desk.powers) : 0;
    }
  });
  return desk.weights.add_up();
}

// One draw from a defined law: the smallest entry whose cumulative mass exceeds u of the whole, one
// entry left out; kNone where nothing is left. Reads one tile again.
SPECDEC_COLD int64_t draw(const Measured& at, double u, int64_t without, Desk& desk) {
  const uint64_t total = weigh_tiles(at, without, desk);
  if (total == 0) return kNone;
  // At temperature 0 the lowest id among equals is the first with mass
  const double level = at.row.greedy ? 0.0 : u * static_cast<double>(total);
  const Found tile = found(level_of(at.row.greedy ? 0.0 : u, total), 1, desk);
  const int chosen = static_cast<int>(tile.index);
  const uint64_t mass = weigh_entries(at, chosen, without, desk);
  double scaled = level - static_cast<double>(tile.below);
  if (!at.p.counting) {
    scaled /= at.p.factor(TileWeight(at.row.greedy, at.tiles.read(chosen).peak).unit);
  }
  uint64_t inside = 0;
  if (scaled > 0.0) inside = scaled < 0x1p63 ? static_cast<uint64_t>(scaled) : mass - 1;
  if (inside >= mass) inside = mass - 1;
  return static_cast<int64_t>(chosen) * kTile + found(inside, 1, desk).index;
}

}  // namespace specdec::blocks
