// exp in fixed point: exact sums in any order, the same bits on host and device.
//
// A weight is an unsigned 64-bit multiple of a power of two. Integers add up to the same sum
// whatever the order, so that no reduction has to be kept in shape, and single precision plus one
// 64-bit product gives a relative error below 3e-11, where a float32 exp has 1e-7 and a double one
// needs units that many GPUs lack. Compile without contraction (-fmad=false): the fused operations
// are written out.
#pragma once

#include "block.cuh"

namespace specdec::blocks {

constexpr int kTableBits = 5;
constexpr int kTable = 1 << kTableBits;  // one 64-bit word a lane: reads never conflict
constexpr int kOneBits = 61;             // exp(0), not shifted
constexpr int kHeadroom = 11;            // 2^12 weights below 2^62.02 then sum to less than 2^64

// Scores from here on are shifted by their peak, which is exact for all that have weight: a float32
// x with peak / 2 <= x <= peak. Below, exp's argument reduction is exact.
constexpr float kShiftFrom = 2048.0f;
constexpr float kLowest = -2200.0f;  // without weight, relative to a peak above -2048

// 2^(j / 32) * 2^61, rounded.
SPECDEC_HOST_DEVICE uint64_t power(int j) {
  static constexpr uint64_t powers[kTable] = {
      0x2000000000000000, 0x20b361a62b0ae876, 0x216ab0d9f3121ec5, 0x222603a024b6a14a,
      0x22e57078faa2f5ba, 0x23a90e62d17354f0, 0x2470f4dceac470ce, 0x253d3bea3fbdc258,
      0x260dfc14636e2a5c, 0x26e34e6e7553954e, 0x27bd4c982468446b, 0x289c10c0c3125a06,
      0x297fb5aa6c544e3b, 0x2a6856ad3a9f03be, 0x2b560fba90a852b2, 0x2c48fd6074ab0964,
      0x2d413cccfe779921, 0x2e3eebd1d8bee7ba, 0x2f4228e7d6030db0, 0x304b1332999c2516,
      0x3159ca845541b6b7, 0x326e6f619b8bc9e9, 0x3389230547e12039, 0x34aa07647c4ab917,
      0x35d13f32b5a75abd, 0x36feede5f6bc8dd5, 0x383337bb0aa53844, 0x396e41b9df20d22a,
      0x3ab031b9f7490e4c, 0x3bf92e66f736bd73, 0x3d495f454921b30b, 0x3ea0ecb6dc8a80cf};
  return powers[j];
}

// The table in shared memory.
struct Powers {
  uint64_t at[kTable];

  SPECDEC_HOST_DEVICE void fill() {
    threads([&](int t) {
      for (int j = t; j < kTable; j += kThreads) at[j] = power(j);
    });
    sync();
  }
};

SPECDEC_HOST_DEVICE uint64_t high_product(uint64_t a, uint64_t b) {
#ifdef __CUDA_ARCH__
  return __umul64hi(a, b);
#else
  return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
#endif
}

SPECDEC_HOST_DEVICE uint32_t float_bits(float x) { return static_cast<uint32_t>(to_word(x)); }

SPECDEC_HOST_DEVICE float fused(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return fmaf(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

// x = k ln(2) / 32 + r with an integer k. Adding 1.5 * 2^23 rounds to an integer and leaves it in
// the low bits.
constexpr float kRound = 12582912.0f;
constexpr float kPerLog = 0x1.715476p+5f;  // 32 / ln 2

SPECDEC_HOST_DEVICE int step_of(float x) {
  return static_cast<int>(float_bits(fused(x, kPerLog, kRound)) - float_bits(kRound));
}

// floor of the binary exponent of exp(x), up to the rounding of k; monotone in x.
SPECDEC_HOST_DEVICE int exponent_of(float x) { return step_of(x) >> kTableBits; }

// exp(x) * 2^(61 - exponent), rounded down; below 2^62.02 if exponent >= exponent_of(x), and 0
// where less than 2^-1 is left of it. x is at most 2200 in magnitude.
SPECDEC_HOST_DEVICE uint64_t exponential(float x, int exponent, const Powers& powers) {
  constexpr float kHead = 0x1.62e43p-6f, kTail = -0x1.05c61p-34f;  // ln(2) / 32
  const float rounded = fused(x, kPerLog, kRound);
  const int k = static_cast<int>(float_bits(rounded) - float_bits(kRound));
  const float steps = rounded - kRound;
  // Exact: a multiple of 2^-30 below 2^-6 (for k = 0 it is x)
  const float head = fused(-steps, kHead, x);
  const float tail = -steps * kTail;
  const float r = head + tail;
  // exp(r) - 1 - r + tail, about 6e-5
  const float curve = fused(fused(fused(r, 1.0f / 24, 1.0f / 6), r, 0.5f), r * r, tail);
  constexpr float kUnit = 0x1p37f;
  const int64_t rise = static_cast<int32_t>(head * kUnit) + static_cast<int32_t>(curve * kUnit);
  const uint64_t base = powers.at[k & (kTable - 1)];
  const uint64_t value = base + ((static_cast<int64_t>(base >> 32) * rise) >> 5);
  const int down = exponent - (k >> kTableBits);
  return value >> (down < 0 ? 0 : down > 63 ? 63 : down);
}

}  // namespace specdec::blocks
