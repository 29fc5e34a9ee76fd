// chunk.h for what every machine of the architecture has, and the choice between the instruction
// sets.
#include <cstdlib>
#include <cstring>

#include "chunk.h"

#define SPECDEC_BYTES 16
#include "chunk_vector.h"

namespace specdec {

const ChunkKernels* plain_kernels() {
  static constexpr ChunkKernels kernels = kernels_named("plain");
  return &kernels;
}

const ChunkKernels& chunk_kernels() {
  static const ChunkKernels* const chosen = [] {
    const char* asked = std::getenv("SPECDEC_FAST_CPU_CAPABILITY");
    const auto usable = [&](const ChunkKernels* kernels) {
      return kernels && (!asked || !*asked || std::strcmp(asked, kernels->name) == 0);
    };
#if defined(__x86_64__) && defined(__GNUC__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl");
    if (avx512 && usable(avx512_kernels())) return avx512_kernels();
    if (avx2 && usable(avx2_kernels())) return avx2_kernels();
#endif
    return plain_kernels();
  }();
  return *chosen;
}

}  // namespace specdec
