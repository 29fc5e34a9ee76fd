// pass.h for AVX-512 with products of bfloat16 and of bytes; used only where the machine has it.
#include "pass.h"

#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 on its own header
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#if defined(__clang__)
#pragma clang attribute push(                                                                     \
    __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,avx512vnni,avx2,fma"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,avx512vnni,avx2,fma")
#endif
#define SPECDEC_BYTES 64
#define SPECDEC_DOT
#include "pass_vector.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace specdec {
const PassKernels* dot_pass() {
  static constexpr PassKernels kernels = pass_named("dot");
  return &kernels;
}
}  // namespace specdec
#else
namespace specdec {
const PassKernels* dot_pass() { return nullptr; }
}  // namespace specdec
#endif
