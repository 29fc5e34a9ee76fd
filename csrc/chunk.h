// Kernels on one chunk of a row, at most kChunk entries: everything a row op does more than once
// per entry.
//
// The same source (chunk_vector.h) is compiled for several instruction sets, and the widest one the
// machine has is taken at run time. Sums run over kLanes interleaved lanes whatever the vector
// width, so that with fused multiply-add every instruction set returns the same bits.
#pragma once

#include <cstdint>

namespace specdec {

constexpr int64_t kChunk =
    2048;  // 8 KiB of scores and 16 KiB of weights stay in the first-level cache
constexpr int64_t kLanes = 16;

// Entries up to the next multiple of kLanes; buffers are padded with entries of no mass.
constexpr int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

enum Float : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Keys of numbers (kernels/cuda/philox.cuh) but for their offset
struct NumberKey {
  int64_t seed, position;
  uint32_t purpose;
};

struct ChunkKernels {
  const char* name;
  // float32(source) / temperature to scores, padded with -inf; the largest, NaN if there is one.
  // Indexed by Float.
  float (*load[3])(const void* source, int64_t n, float temperature, float* scores);
  // Sum of exp(score - shift); n padded.
  double (*sum_exp)(const float* scores, int64_t n, double shift);
  // factor * exp(score - shift) to weights; n padded. Relative error below 1e-15 for scores within
  // 708 of the shift; below that the weight is 0.
  void (*exps)(const float* scores, int64_t n, double shift, double factor, double* weights);
  // weights = max(0, weights), and their sum; n padded.
  double (*positive_sum)(double* weights, int64_t n);
  // The first 27 bits of the numbers of n keys that differ in their offset: ids, or first, first +
  // 1, .. where these are null; n padded, and ids too.
  void (*words)(const NumberKey& key, const int32_t* ids, int64_t first, int64_t n, uint32_t* out);
  // The entries whose number, of which these are the first bits, may lie below bound * weight; n
  // padded. Returns how many.
  int64_t (*sift)(const uint32_t* words, const double* weights, int64_t n, double bound,
                  int32_t* out);
  // The entries with a score of at least `least`; n padded. Returns how many.
  int64_t (*above)(const float* scores, int64_t n, float least, int32_t* out);
};

// The kernels for this machine, or for what SPECDEC_FAST_CPU_CAPABILITY (plain, avx2, avx512)
// names.
const ChunkKernels& chunk_kernels();

const ChunkKernels* plain_kernels();
const ChunkKernels* avx2_kernels();    // null where the compiler's target has no AVX2
const ChunkKernels* avx512_kernels();  // null where the compiler's target has no AVX-512

}  // namespace specdec
