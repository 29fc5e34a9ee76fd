// pass.h for AVX2; used only where the machine has it.
#include "pass.h"

#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 on its own header
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define SPECDEC_BYTES 32
#include "pass_vector.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace specdec {
const PassKernels* avx2_pass() {
  static constexpr PassKernels kernels = pass_named("avx2");
  return &kernels;
}
}  // namespace specdec
#else
namespace specdec {
const PassKernels* avx2_pass() { return nullptr; }
}  // namespace specdec
#endif
