// Philox4x32-10 (Salmon et al., SC 2011) and the keyed uniforms drawn from it.
//
// Free of torch, so that host (csrc/ops.cpp) and device code draw the same number from the same
// key, bit for bit. specdec_fast/randomness.py holds the reference and the meaning of the key.
#pragma once

#include <cstdint>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define SPECDEC_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SPECDEC_HOST_DEVICE inline
#endif

namespace specdec {

struct PhiloxBlock {
  uint32_t word[4];
};

SPECDEC_HOST_DEVICE PhiloxBlock philox4x32_10(PhiloxBlock counter, uint32_t key0, uint32_t key1) {
  constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
  constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{kMultiplier0} * counter.word[0];
    const uint64_t product1 = uint64_t{kMultiplier1} * counter.word[2];
    counter = {{static_cast<uint32_t>(product1 >> 32) ^ counter.word[1] ^ key0,
                static_cast<uint32_t>(product1),
                static_cast<uint32_t>(product0 >> 32) ^ counter.word[3] ^ key1,
                static_cast<uint32_t>(product0)}};
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  return counter;
}

// The counter that belongs to a key; offset counts modulo 2^24.
SPECDEC_HOST_DEVICE PhiloxBlock philox_counter(int64_t position, int64_t offset, uint32_t purpose,
                                               uint32_t trial) {
  return {{static_cast<uint32_t>(position),
           static_cast<uint32_t>(static_cast<uint64_t>(position) >> 32),
           (static_cast<uint32_t>(offset) & 0xFFFFFFu) | (purpose << 24), trial}};
}

// A multiple of 2^-53, or 2^-54 in place of zero: strictly inside (0, 1).
SPECDEC_HOST_DEVICE double philox_to_uniform(PhiloxBlock block) {
  const uint64_t bits = (uint64_t{block.word[0] >> 5} << 26) | (block.word[1] >> 6);
  const double numerator = bits == 0 ? 0.5 : static_cast<double>(bits);
  return numerator * (1.0 / 9007199254740992.0);
}

SPECDEC_HOST_DEVICE double philox_uniform(int64_t seed, int64_t position, int64_t offset,
                                          uint32_t purpose, uint32_t trial) {
  const uint64_t key = static_cast<uint64_t>(seed);
  return philox_to_uniform(philox4x32_10(philox_counter(position, offset, purpose, trial),
                                         static_cast<uint32_t>(key),
                                         static_cast<uint32_t>(key >> 32)));
}

}  // namespace specdec
