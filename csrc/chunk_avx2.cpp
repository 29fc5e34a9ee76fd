// chunk.h for AVX2; used only where the machine has it.
#include "chunk.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define SPECDEC_BYTES 32
#include "chunk_vector.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace specdec {
const ChunkKernels* avx2_kernels() {
  static constexpr ChunkKernels kernels = kernels_named("avx2");
  return &kernels;
}
}  // namespace specdec
#else
namespace specdec {
const ChunkKernels* avx2_kernels() { return nullptr; }
}  // namespace specdec
#endif
