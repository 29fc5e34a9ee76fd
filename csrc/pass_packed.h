// Products of pass.h with weights as packed bytes, and how inputs are shared out; part of
// pass_vector.h.

namespace {

using specdec::kDeep;
using specdec::kSide;

template <int kCount>
struct Count {
  static constexpr int value = kCount;
};

// How many of `left` inputs the next span takes: as equal shares as may be; with kFull as many as a
// span can have (seven of eight were found to take as long as eight), but for the last two spans
// where one input would be left
template <int kMost, bool kFull>
inline int64_t share_of(int64_t left) {
  const int64_t parts = (left + kMost - 1) / kMost;
  if (kFull && left > kMost + 1) return kMost;
  return (left + parts - 1) / parts;
}

// body(Count<n>(), first) for spans of n <= kMost that cover [0, m)
template <int kMost, bool kFull, class Body>
inline void spans(int64_t m, const Body& body) {
  for (int64_t i = 0; i < m;) {
    const int64_t n = share_of<kMost, kFull>(m - i);
    if (n == 1) body(Count<1>(), i);
    if constexpr (kMost > 1) {
      if (n == 2) body(Count<2>(), i);
    }
    if constexpr (kMost > 2) {
      if (n == 3) body(Count<3>(), i);
      if (n == 4) body(Count<4>(), i);
      if (n == 5) body(Count<5>(), i);
      if (n == 6) body(Count<6>(), i);
    }
    if constexpr (kMost > 6) {
      if (n == 7) body(Count<7>(), i);
      if (n == 8) body(Count<8>(), i);
    }
    i += n;
  }
}

#ifdef SPECDEC_DOT
// An input beside packed weights: 16 bits of it, as two bytes: x = scale * (256 high + low), each
// in [-128, 127]. Weights are bytes without a sign, so 128 times the bytes' sums is taken off.
struct Digits {
  float scale;
  int32_t high, low;  // sums of the bytes
  int32_t unused[13];
};
constexpr int64_t kHead = sizeof(Digits);

inline void to_digits(const float* x, int64_t k, void* out) {
  int8_t* high = static_cast<int8_t*>(out) + kHead;
  int8_t* low = high + up(k, 64);
  const auto some = [&](int64_t j) {
    return j + kLanes <= k ? 0xffff : static_cast<__mmask16>((1u << (k - j)) - 1);
  };
  __m512 peaks = _mm512_setzero_ps(), wrong = _mm512_setzero_ps();
  for (int64_t j = 0; j < k; j += kLanes) {
    const __m512 value = _mm512_maskz_loadu_ps(some(j), x + j);
    peaks = _mm512_max_ps(peaks, _mm512_abs_ps(value));
    wrong = _mm512_fmadd_ps(value, _mm512_setzero_ps(), wrong);
  }
  const float peak = _mm512_reduce_max_ps(peaks), not_finite = _mm512_reduce_add_ps(wrong);
  Digits digits = {};
  // An input that is not finite comes out of the product as a NaN
  digits.scale = not_finite != 0.0f ? not_finite : peak > 1e-30f ? peak / 32512 : 0.0f;
  const __m512 factor = _mm512_set1_ps(digits.scale > 0 ? 1.0f / digits.scale : 0.0f);
  __m512i upper_sum = _mm512_setzero_si512(), lower_sum = upper_sum;
  for (int64_t j = 0; j < up(k, kDeep); j += kLanes) {
    const __m512 value = j < k ? _mm512_maskz_loadu_ps(some(j), x + j) : _mm512_setzero_ps();
    const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(value, factor));
    const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
    const __m512i lower = _mm512_sub_epi32(whole, _mm512_slli_epi32(upper, 8));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(high + j), _mm512_cvtepi32_epi8(upper));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(low + j), _mm512_cvtepi32_epi8(lower));
    upper_sum = _mm512_add_epi32(upper_sum, upper);
    lower_sum = _mm512_add_epi32(lower_sum, lower);
  }
  digits.high = _mm512_reduce_add_epi32(upper_sum);
  digits.low = _mm512_reduce_add_epi32(lower_sum);
  __builtin_memcpy(out, &digits, sizeof digits);
}

constexpr int64_t kFar =
    4096;  // bytes ahead that are fetched, on the way along neighbouring blocks

// kBlocks times 16 rows, kInputs inputs. Sums of integers may be split, here over kSplit steps of
// the columns, so that few of them keep the machine busy too.
template <int kBlocks, int kInputs, int kSplit>
inline void packed_tile(const uint8_t* w, const float* scale, const char* x, int64_t k,
                        int64_t apart, int64_t n, int64_t end, float* y, int64_t stride) {
  constexpr int kSums = kInputs * kBlocks;
  const int64_t deep = up(k, kDeep), block = deep * kSide, second = up(k, 64);
  __m512i high[kSplit][kSums], low[kSplit][kSums];
#pragma GCC unroll 4
  for (int s = 0; s < kSplit; ++s) {
#pragma GCC unroll 16
    for (int i = 0; i < kSums; ++i) high[s][i] = low[s][i] = _mm512_setzero_si512();
  }
  const auto step = [&](int s, int64_t j) {
    __m512i weight[kBlocks];
#pragma GCC unroll 8
    for (int b = 0; b < kBlocks; ++b) {
      weight[b] = _mm512_loadu_si512(w + b * block + j * kSide);
      __builtin_prefetch(w + (kBlocks > 1 ? kBlocks * block : kFar) + b * block + j * kSide);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kInputs; ++i) {
      int32_t four;
      __builtin_memcpy(&four, x + i * apart + kHead + j, 4);
      const __m512i upper = _mm512_set1_epi32(four);
      __builtin_memcpy(&four, x + i * apart + kHead + second + j, 4);
      const __m512i lower = _mm512_set1_epi32(four);
#pragma GCC unroll 8
      for (int b = 0; b < kBlocks; ++b) {
        __m512i &up = high[s][i * kBlocks + b], &down = low[s][i * kBlocks + b];
        up = _mm512_dpbusd_epi32(up, weight[b], upper);
        down = _mm512_dpbusd_epi32(down, weight[b], lower);
      }
    }
  };
  int64_t j = 0;
  for (; j + kSplit * kDeep <= deep; j += kSplit * kDeep) {
#pragma GCC unroll 4
    for (int s = 0; s < kSplit; ++s) step(s, j + s * kDeep);
  }
  for (; j < deep; j += kDeep) step(0, j);
#pragma GCC unroll 8
  for (int i = 0; i < kInputs; ++i) {
    Digits digits;
    __builtin_memcpy(&digits, x + i * apart, sizeof digits);
    const __m512i off_high = _mm512_set1_epi32(128 * digits.high),
                  off_low = _mm512_set1_epi32(128 * digits.low);
    const __m512 factor = _mm512_set1_ps(digits.scale);
#pragma GCC unroll 8
    for (int b = 0; b < kBlocks; ++b) {
      __m512i up = high[0][i * kBlocks + b], down = low[0][i * kBlocks + b];
#pragma GCC unroll 4
      for (int s = 1; s < kSplit; ++s) {
        up = _mm512_add_epi32(up, high[s][i * kBlocks + b]);
        down = _mm512_add_epi32(down, low[s][i * kBlocks + b]);
      }
      const int64_t left = end - n - b * kSide;
      const __mmask16 mask = left >= kSide ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
      const __m512 upper = _mm512_cvtepi32_ps(_mm512_sub_epi32(up, off_high)),
                   lower = _mm512_cvtepi32_ps(_mm512_sub_epi32(down, off_low));
      const __m512 whole = _mm512_fmadd_ps(upper, _mm512_set1_ps(256.0f), lower);
      const __m512 row = _mm512_maskz_loadu_ps(mask, scale + n + b * kSide);
      _mm512_mask_storeu_ps(y + i * stride + n + b * kSide, mask,
                            _mm512_mul_ps(_mm512_mul_ps(whole, factor), row));
    }
  }
}

inline void packed_by_inputs(const uint8_t* w, const float* scale, const char* x, int64_t m,
                             int64_t k, int64_t apart, int64_t begin, int64_t end, float* y,
                             int64_t stride) {
  const int64_t block = up(k, kDeep) * kSide;
  int64_t n = begin;
  const auto some = [&](auto blocks, auto inputs, auto split, int64_t i) {
    packed_tile<blocks.value, inputs.value, split.value>(
        w + n / kSide * block, scale, x + i * apart, k, apart, n, end, y + i * stride, stride);
  };
  if (m == 1) {  // one stream of memory
    for (; n < end; n += kSide) some(Count<1>(), Count<1>(), Count<4>(), 0);
  }
  for (; n + kSide < end; n += 2 * kSide)
    spans<6, false>(m, [&](auto inputs, int64_t i) { some(Count<2>(), inputs, Count<1>(), i); });
  if (n < end)
    spans<6, false>(m, [&](auto inputs, int64_t i) { some(Count<1>(), inputs, Count<1>(), i); });
}
#else
// 16 rows, one input
inline void packed_by_inputs(const uint8_t* w, const float* scale, const char* x, int64_t m,
                             int64_t k, int64_t apart, int64_t begin, int64_t end, float* y,
                             int64_t stride) {
  const int64_t deep = up(k, kDeep);
  for (int64_t n = begin; n < end; n += kSide) {
    const uint8_t* block = w + n * deep;
    for (int64_t i = 0; i < m; ++i) {
      const float* in = reinterpret_cast<const float*>(x + i * apart);
      constexpr int kSums = 64 / kWide;
      Floats total[kSums] = {};
      for (int64_t j = 0; j < deep; j += kDeep) {
        Floats pattern;
        float* entries = reinterpret_cast<float*>(&pattern);
#pragma GCC unroll 4
        for (int f = 0; f < kWide; f += 4) __builtin_memcpy(entries + f, in + j, 16);
#pragma GCC unroll 16
        for (int s = 0; s < kSums; ++s)
          total[s] += load_packed(block + j * kSide + s * kWide) * pattern;
      }
      float sum[64];
      __builtin_memcpy(sum, total, sizeof sum);
      for (int64_t r = 0; r < least(kSide, end - n); ++r) {
        const float* four = sum + 4 * r;
        y[i * stride + n + r] = ((four[0] + four[2]) + (four[1] + four[3])) * scale[n + r];
      }
    }
  }
}
#endif

}  // namespace
