// Rows of logits and their scores s = float32(logit) / temperature.
#pragma once

#include "exponential.cuh"
#include "team.cuh"

namespace specdec::blocks {

enum LogitType : int32_t { kFloats = 0, kBFloats = 1, kHalfs = 2 };

constexpr int kEach = 16;  // entries a thread holds: all its loads are under way at once
constexpr int kTile = kThreads * kEach;
constexpr float kInfinity = __builtin_huge_valf();

SPECDEC_HOST_DEVICE float to_float(float x) { return x; }

struct BFloat {
  uint16_t bits;
};
SPECDEC_HOST_DEVICE float to_float(BFloat x) {
  return from_word<float>(static_cast<uint32_t>(x.bits) << 16);
}

struct HalfFloat {
  uint16_t bits;
};
SPECDEC_HOST_DEVICE float to_float(HalfFloat x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
#else
  // The exponent is moved by a product, which makes subnormal numbers right; infinities and NaN
  // get the widest one afterwards
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  uint32_t bits = float_bits(from_word<float>(magnitude) * 0x1p112f);
  if (magnitude >= 0x0f800000u) bits |= 0x7f800000u;
  return from_word<float>(bits | (x.bits & 0x8000u) << 16);
#endif
}

// Division by one number. Where nothing can over- or underflow on the way, a product and two fused
// corrections give the correctly rounded quotient (Markstein, IBM J. R&D 34, 1990).
struct Temperature {
  float value = 1.0f;
  float inverse = 1.0f;
  bool moderate = true;

  SPECDEC_HOST_DEVICE explicit Temperature(float temperature)
      : value(temperature == 0.0f ? 1.0f : temperature),
        inverse(1.0f / value),
        moderate(value > 0x1p-60f && value < 0x1p60f) {}

  SPECDEC_HOST_DEVICE float divide(float x) const {
    if (value == 1.0f) return x;
    const float quotient = x * inverse;
    const float size = quotient < 0.0f ? -quotient : quotient;
    if (!moderate || !(size > 0x1p-60f && size < 0x1p60f)) return x / value;
    return fused(fused(-value, quotient, x), inverse, quotient);
  }
};

// What filters leave of a row: scores above the threshold, and those equal to it from an id on.
struct Cut {
  float threshold = -kInfinity;
  int32_t first = 0;  // rows have at most 2^24 entries

  SPECDEC_HOST_DEVICE bool any() const { return threshold != -kInfinity; }
  SPECDEC_HOST_DEVICE float keep(float score, int64_t id) const {
    return score > threshold || (score == threshold && id >= first) ? score : -kInfinity;
  }
};

// Tiles that were copied to the shared memory of the blocks that have them.
struct Shelf {
  char* own = nullptr;
  int share = 1;  // tiles of a block
  int held = 0;   // of them on its shelf, the first ones
};

struct Row {
  const char* data;
  LogitType type;
  int64_t width;
  bool greedy;  // temperature 0: the point mass on the largest
  Temperature temperature;
  Cut cut;
  Shelf shelf;

  SPECDEC_HOST_DEVICE Row(const void* data_, LogitType type_, int64_t width_, float temperature_)
      : data(static_cast<const char*>(data_)),
        type(type_),
        width(width_),
        greedy(temperature_ == 0.0f),
        temperature(temperature_) {}

  SPECDEC_HOST_DEVICE int tiles() const { return static_cast<int>((width + kTile - 1) / kTile); }
  SPECDEC_HOST_DEVICE int tile_size(int tile) const {
    const int64_t rest = width - static_cast<int64_t>(tile) * kTile;
    return rest < kTile ? static_cast<int>(rest) : kTile;
  }
  SPECDEC_HOST_DEVICE int entry_bytes() const { return type == kFloats ? 4 : 2; }

  SPECDEC_HOST_DEVICE const char* in_memory(int tile) const {
    return data + static_cast<int64_t>(tile) * kTile * entry_bytes();
  }
  SPECDEC_HOST_DEVICE bool shelved(int tile) const {
    return shelf.held > 0 && tile % shelf.share < shelf.held;
  }
  // Where a tile's entries lie.
  SPECDEC_HOST_DEVICE const char* at(int tile) const {
    if (!shelved(tile)) return in_memory(tile);
    char* own = shelf.own + static_cast<int64_t>(tile % shelf.share) * kTile * entry_bytes();
    return remote(own, tile / shelf.share);
  }

  // The score of entry j of the tile at `from`, whose id in the row is given.
  SPECDEC_HOST_DEVICE float score(const char* from, int j, int64_t id) const {
    const float logit = type == kFloats    ? to_float(reinterpret_cast<const float*>(from)[j])
                        : type == kBFloats ? to_float(reinterpret_cast<const BFloat*>(from)[j])
                                           : to_float(reinterpret_cast<const HalfFloat*>(from)[j]);
    return cut.keep(temperature.divide(logit), id);
  }
  // One entry's score, -inf where it is filtered out; the id must be inside the row.
  SPECDEC_HOST_DEVICE float score(int64_t id) const {
    return score(at(static_cast<int>(id / kTile)), static_cast<int>(id % kTile), id);
  }

  // Thread t's share of a tile, in whatever order loads fastest; -inf behind the row. Of a row that
  // is all in global memory and not filtered, where kPlain.
  template <bool kPlain>
  SPECDEC_HOST_DEVICE void load(int tile, int t, float (&scores)[kEach]) const {
    const char* from = kPlain ? in_memory(tile) : at(tile);
#ifdef __CUDA_ARCH__
    if (kPlain) __builtin_assume(__isGlobal(from));
#endif
    const int size = tile_size(tile);
    const bool filters = !kPlain && cut.any();
    // Rows of an odd width start anywhere: those are read entry by entry, in the order of the ids
    const bool wide = size == kTile && reinterpret_cast<uintptr_t>(from) % 16 == 0 && !filters;
    if (type == kFloats) {
      load_as<float>(from, wide, size, t, scores);
    } else if (type == kBFloats) {
      load_as<BFloat>(from, wide, size, t, scores);
    } else {
      load_as<HalfFloat>(from, wide, size, t, scores);
    }
    if (temperature.value != 1.0f) {
#pragma unroll
      for (int e = 0; e < kEach; ++e) scores[e] = temperature.divide(scores[e]);
    }
    if (!filters) return;
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      scores[e] = cut.keep(scores[e], static_cast<int64_t>(tile) * kTile + e * kThreads + t);
    }
  }

 private:
  template <typename Entry>
  SPECDEC_HOST_DEVICE static void load_as(const char* from_, bool wide, int size, int t,
                                          float (&scores)[kEach]) {
    struct alignas(16) Vector {
      Entry entry[16 / sizeof(Entry)];
    };
    constexpr int kWide = 16 / sizeof(Entry);
    constexpr int kVectors = kEach / kWide;
    const Entry* from = reinterpret_cast<const Entry*>(from_);
    if (wide) {
      Vector vector[kVectors];
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        vector[v] = reinterpret_cast<const Vector*>(from)[v * kThreads + t];
      }
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (int e = 0; e < kWide; ++e) scores[v * kWide + e] = to_float(vector[v].entry[e]);
      }
    } else {
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        const int j = e * kThreads + t;
        scores[e] = j < size ? to_float(from[j]) : -kInfinity;
      }
    }
  }
};

}  // namespace specdec::blocks
