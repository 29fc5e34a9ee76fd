// Matrix times a few vectors: weights of 8, 16 or 32 bits, sums in float32.
//
// At a few inputs the product is bound by reading the weights, so a weight is widened once and used
// for every input. What an input gets does not depend on the others. One build serves every x86-64:
// AVX-512 by hand, because compilers widen 16 bits badly, anything else as the loader finds it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 on its own header
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#define SPECDEC_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#define SPECDEC_BFLOAT16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#endif
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SPECDEC_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SPECDEC_CLONES
#endif
#define SPECDEC_INLINE inline __attribute__((always_inline))

namespace specdec {

SPECDEC_INLINE float widen(float value) { return value; }
SPECDEC_INLINE float widen(int8_t value) { return value; }

// bfloat16, by its bits
SPECDEC_INLINE float widen(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

SPECDEC_INLINE void narrow(float value, float* out) { *out = value; }

SPECDEC_INLINE void narrow(float value, uint16_t* out) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  *out = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#ifdef SPECDEC_AVX512
SPECDEC_AVX512 inline __m512 load(const float* p, __mmask16 mask) {
  return _mm512_maskz_loadu_ps(mask, p);
}

SPECDEC_AVX512 inline __m512 load(const int8_t* p, __mmask16 mask) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, p)));
}

SPECDEC_AVX512 inline __m512 load(const uint16_t* p, __mmask16 mask) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16));
}

// sum[r][i] = sum_j w[r, j] * x[i, j]; rows and inputs are chosen so that the sums fit the
// registers
template <int kRows, int kInputs, class Weight>
SPECDEC_AVX512 void tile(const Weight* w, const float* x, int64_t k, float (&sum)[kRows][kInputs]) {
  __m512 total[kRows][kInputs];
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kInputs; ++i) total[r][i] = _mm512_setzero_ps();
  }
  for (int64_t j = 0; j < k; j += 16) {
    const __mmask16 mask = j + 16 <= k ? 0xffff : static_cast<__mmask16>((1 << (k - j)) - 1);
    __m512 in[kInputs];
    for (int i = 0; i < kInputs; ++i) in[i] = load(x + i * k + j, mask);
    for (int r = 0; r < kRows; ++r) {
      const __m512 weight = load(w + r * k + j, mask);
      for (int i = 0; i < kInputs; ++i) total[r][i] = _mm512_fmadd_ps(weight, in[i], total[r][i]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kInputs; ++i) sum[r][i] = _mm512_reduce_add_ps(total[r][i]);
  }
}

inline bool has_avx512() {
  static const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return has;
}

// Both sides in bfloat16, two products an instruction, sums in float32
template <int kRows, int kInputs>
SPECDEC_BFLOAT16 void tile(const uint16_t* w, const uint16_t* x, int64_t k,
                           float (&sum)[kRows][kInputs]) {
  __m512 total[kRows][kInputs];
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kInputs; ++i) total[r][i] = _mm512_setzero_ps();
  }
  for (int64_t j = 0; j < k; j += 32) {
    const __mmask32 mask =
        j + 32 <= k ? 0xffffffff : static_cast<__mmask32>((uint64_t{1} << (k - j)) - 1);
    __m512bh in[kInputs];
    for (int i = 0; i < kInputs; ++i)
      in[i] = (__m512bh)_mm512_maskz_loadu_epi16(mask, x + i * k + j);
    for (int r = 0; r < kRows; ++r) {
      const __m512bh weight = (__m512bh)_mm512_maskz_loadu_epi16(mask, w + r * k + j);
      for (int i = 0; i < kInputs; ++i) total[r][i] = _mm512_dpbf16_ps(total[r][i], weight, in[i]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kInputs; ++i) sum[r][i] = _mm512_reduce_add_ps(total[r][i]);
  }
}

inline bool has_bfloat16() {
  static const bool has = has_avx512() && __builtin_cpu_supports("avx512bf16");
  return has;
}

// y[i, n] = sum_j w[n, j] * x[i, j] for n in [begin, end) and each of m inputs
template <class Weight, class Input>
void multiply_avx512(const Weight* w, const Input* x, float* y, int64_t begin, int64_t end,
                     int64_t k, int64_t m, int64_t stride) {
  int64_t n = begin;
  const auto some = [&](auto rows, auto inputs, int64_t i) {
    float sum[rows.value][inputs.value];
    tile(w + n * k, x + i * k, k, sum);
    for (int r = 0; r < rows.value; ++r) {
      for (int l = 0; l < inputs.value; ++l) y[(i + l) * stride + n + r] = sum[r][l];
    }
  };
  const auto strip = [&](auto rows) {
    for (int64_t i = 0; i < m;) {  // as many inputs a weight as there are registers for their sums
      const int64_t left = m - i, count = left <= 6 ? left : left <= 8 ? 4 : 6;
      switch (count) {
        case 1:
          some(rows, std::integral_constant<int, 1>(), i);
          break;
        case 2:
          some(rows, std::integral_constant<int, 2>(), i);
          break;
        case 3:
          some(rows, std::integral_constant<int, 3>(), i);
          break;
        case 4:
          some(rows, std::integral_constant<int, 4>(), i);
          break;
        case 5:
          some(rows, std::integral_constant<int, 5>(), i);
          break;
        default:
          some(rows, std::integral_constant<int, 6>(), i);
      }
      i += count;
    }
  };
  // Eight sums hide the latency of an addition where there is one input; with more inputs four rows
  // are enough
  if (m == 1) {
    for (; n + 8 <= end; n += 8)
      some(std::integral_constant<int, 8>(), std::integral_constant<int, 1>(), 0);
  }
  for (; n + 4 <= end; n += 4) strip(std::integral_constant<int, 4>());
  for (; n < end; ++n) strip(std::integral_constant<int, 1>());
}
#endif

// The same in plain loops, which a compiler may turn into vectors
template <class Weight>
SPECDEC_INLINE void multiply_plain(const Weight* w, const float* x, float* y, int64_t begin,
                                   int64_t end, int64_t k, int64_t m, int64_t stride) {
  for (int64_t n = begin; n < end; ++n) {
    for (int64_t i = 0; i < m; ++i) {
      float sum = 0;
      for (int64_t j = 0; j < k; ++j) sum += widen(w[n * k + j]) * x[i * k + j];
      y[i * stride + n] = sum;
    }
  }
}

#define SPECDEC_MULTIPLY(Weight)                                                              \
  SPECDEC_CLONES inline void multiply_clone(const Weight* w, const float* x, float* y,        \
                                            int64_t begin, int64_t end, int64_t k, int64_t m, \
                                            int64_t stride) {                                 \
    multiply_plain(w, x, y, begin, end, k, m, stride);                                        \
  }
SPECDEC_MULTIPLY(int8_t)
SPECDEC_MULTIPLY(uint16_t)
SPECDEC_MULTIPLY(float)
#undef SPECDEC_MULTIPLY

// The best of these for the machine. Where it multiplies bfloat16 itself, inputs are rounded to it
// beside such weights, as a model in that type rounds them at every step.
template <class Weight>
void multiply(const Weight* w, const float* x, float* y, int64_t begin, int64_t end, int64_t k,
              int64_t m, int64_t stride) {
#ifdef SPECDEC_AVX512
  if constexpr (std::is_same_v<Weight, uint16_t>) {
    if (has_bfloat16()) {
      thread_local std::vector<uint16_t> rounded;
      rounded.resize(m * k);
      for (int64_t i = 0; i < m * k; ++i) narrow(x[i], &rounded[i]);
      return multiply_avx512(w, rounded.data(), y, begin, end, k, m, stride);
    }
  }
  if (has_avx512()) return multiply_avx512(w, x, y, begin, end, k, m, stride);
#endif
  multiply_clone(w, x, y, begin, end, k, m, stride);
}

}  // namespace specdec
