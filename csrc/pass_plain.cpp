// pass.h for what every machine of the architecture has, and the choice between the instruction
// sets.
#include <cstdlib>
#include <cstring>

#include "pass.h"

#define SPECDEC_BYTES 16
#include "pass_vector.h"

namespace specdec {

const PassKernels* plain_pass() {
  static constexpr PassKernels kernels = pass_named("plain");
  return &kernels;
}

const PassKernels* pass_kernels(const char* name) {
#if defined(__x86_64__) && defined(__GNUC__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl");
  const bool dot =
      avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  if (dot && !std::strcmp(name, "dot")) return dot_pass();
  if (avx512 && !std::strcmp(name, "avx512")) return avx512_pass();
  if (avx2 && !std::strcmp(name, "avx2")) return avx2_pass();
#endif
  return std::strcmp(name, "plain") ? nullptr : plain_pass();
}

const PassKernels& pass_kernels() {
  static const PassKernels* const chosen = [] {
    const char* asked = std::getenv("SPECDEC_FAST_CPU_CAPABILITY");
    const PassKernels* best = nullptr;
    if (asked && *asked) {
      best = pass_kernels(asked);
    } else {
      static constexpr const char* kNames[] = {"dot", "avx512", "avx2"};
      for (int i = 0; i < 3 && !best; ++i) best = pass_kernels(kNames[i]);
    }
    return best ? best : plain_pass();
  }();
  return *chosen;
}

}  // namespace specdec
