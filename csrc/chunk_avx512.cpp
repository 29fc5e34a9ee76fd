// chunk.h for AVX-512; used only where the machine has it.
#include "chunk.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#endif
#define SPECDEC_BYTES 64
#include "chunk_vector.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace specdec {
const ChunkKernels* avx512_kernels() {
  static constexpr ChunkKernels kernels = kernels_named("avx512");
  return &kernels;
}
}  // namespace specdec
#else
namespace specdec {
const ChunkKernels* avx512_kernels() { return nullptr; }
}  // namespace specdec
#endif
