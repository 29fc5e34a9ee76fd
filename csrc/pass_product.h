// Products of pass.h: weights as rows of numbers and as packed bytes; part of pass_vector.h.
//
// At a few inputs a product is bound by reading the weights. So a tile of weights is used for every
// input while it is in the registers, and what comes some kilobytes later is on its way from memory
// meanwhile, in the order of memory: tiles follow each other there.

namespace {

using specdec::Form;
using specdec::kDeep;
using specdec::kSide;

// Rows of numbers times inputs in float32
template <class Weight>
struct Plain {
  using Entry = Weight;
  using Input = float;
  using Sum = Lanes;
  static constexpr int64_t kStep = kLanes;
  static Lanes weight(const Weight* p) { return lanes(p); }
  static Lanes weight(const Weight* p, int64_t n) { return lanes(p, n); }
  static Lanes input(const float* p) { return lanes(p); }
  static void fold(Lanes& total, const Lanes& w, const Lanes& x) { add(total, w, x); }
};

#ifdef SPECDEC_DOT
// Rows of bfloat16 times inputs rounded to it, as a model in that type rounds them at every step:
// two products an instruction, sums in float32
struct Dot {
  using Entry = uint16_t;
  using Input = uint16_t;
  static constexpr int64_t kStep = 32;
  static __m512bh weight(const uint16_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static __m512bh weight(const uint16_t* p, int64_t n) {
    return (__m512bh)_mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << n) - 1), p);
  }
  static __m512bh input(const uint16_t* p) { return weight(p); }
  static void fold(Lanes& total, __m512bh w, __m512bh x) {
    total.part[0] = (Floats)_mm512_dpbf16_ps((__m512)total.part[0], w, x);
  }
};
#endif

// sum[i * kRows + r] of kRows rows and kInputs inputs, `apart` entries apart; with kAhead, as much
// is fetched from `next` on
template <class Scheme, int kRows, int kInputs, bool kAhead>
[[gnu::noinline]] void tile(const typename Scheme::Entry* w, const typename Scheme::Input* x,
                            int64_t k, int64_t apart, [[maybe_unused]] const char* next,
                            float* sum) {
  Lanes total[kInputs * kRows] = {};
  constexpr int64_t kStride = Scheme::kStep * sizeof(*w);
  const int64_t whole = k / Scheme::kStep * Scheme::kStep;
  for (int64_t j = 0; j < whole; j += Scheme::kStep) {
    decltype(Scheme::weight(w)) weight[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      weight[r] = Scheme::weight(w + r * k + j);
      // Into the second cache: the first is too small for what is on its way beside the inputs,
      // and what is pushed out of it before its use is fetched from memory again
      if constexpr (kAhead) __builtin_prefetch(next + r * kStride, 0, 2);
    }
    if constexpr (kAhead) next += kRows * kStride;
#pragma GCC unroll 8
    for (int i = 0; i < kInputs; ++i) {
      const auto in = Scheme::input(x + i * apart + j);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) Scheme::fold(total[i * kRows + r], weight[r], in);
    }
  }
  if (whole < k) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const auto weight = Scheme::weight(w + r * k + whole, k - whole);
#pragma GCC unroll 8
      for (int i = 0; i < kInputs; ++i)
        Scheme::fold(total[i * kRows + r], weight, Scheme::input(x + i * apart + whole));
    }
  }
  constexpr int kCount = kInputs * kRows, kRest = kCount % 16;
#pragma GCC unroll 8
  for (int i = 0; i + 16 <= kCount; i += 16) close<16>(total + i, sum + i);
  if constexpr (kRest > 0) close<kRest>(total + kCount - kRest, sum + kCount - kRest);
}

// How many sums the registers hold: rows for one input, rows for more, inputs, and rows for more
// than kFew inputs
#if SPECDEC_BYTES == 64
constexpr int kAlone = 8, kRows = 4, kInputs = 8, kFew = 6, kLow = 3;
#elif SPECDEC_BYTES == 32
constexpr int kAlone = 4, kRows = 2, kInputs = 2, kFew = 2, kLow = 2;
#else
constexpr int kAlone = 2, kRows = 2, kInputs = 1, kFew = 1, kLow = 2;
#endif

// Bytes from an entry to those that are fetched while it is used, at least, and how many of them
// the last row of a tile is behind
constexpr int64_t kFarLeast = 16384, kFarBehind = 2048;

// Bytes of inputs that the first cache holds beside weights; and of weights that share a span of
// inputs where there are more
constexpr int64_t kShared = 24576;

template <int kCount>
struct Count {
  static constexpr int value = kCount;
};

// body(Count<n>(), first) for spans of n <= kMost that cover [0, m), as equal as may be
template <int kMost, class Body>
inline void spans(int64_t m, const Body& body) {
  for (int64_t i = 0; i < m;) {
    const int64_t left = m - i, parts = (left + kMost - 1) / kMost, n = (left + parts - 1) / parts;
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

// With kLong, what comes is fetched early: the rows that follow each other in memory, and at their
// end what lies `after`
template <class Scheme, bool kLong>
inline void rows_by_inputs(const typename Scheme::Entry* w, const typename Scheme::Input* x,
                           int64_t m, int64_t k, int64_t apart, int64_t begin, int64_t end,
                           float* y, int64_t stride, [[maybe_unused]] const void* after) {
  int64_t n = begin;
  const int64_t row = k * static_cast<int64_t>(sizeof(*w));
  const auto some = [&](auto rows, auto inputs, auto ahead, int64_t i) {
    constexpr int kR = rows.value, kI = inputs.value;
    alignas(64) float sum[(kR * kI + 15) / 16 * 16];
    const char* next = reinterpret_cast<const char*>(w) + (n + kR) * row;
    if constexpr (kLong) {
      next += most(kFarLeast - kR * row, kFarBehind - row);
      const int64_t beyond = next - reinterpret_cast<const char*>(w) - end * row;
      if (beyond >= 0) next = static_cast<const char*>(after) + beyond;
    }
    tile<Scheme, kR, kI, ahead.value>(w + n * k, x + i * apart, k, apart, next, sum);
#pragma GCC unroll 8
    for (int l = 0; l < kI; ++l)
      __builtin_memcpy(y + (i + l) * stride + n, sum + l * kR, sizeof(float) * kR);
  };
  const auto strip = [&](auto rows) {
    spans<kInputs>(m, [&](auto inputs, int64_t i) {
      if constexpr (rows.value <= kLow || inputs.value <= kFew) {
        if (i == 0) {
          some(rows, inputs, Count<true>(), i);
        } else {
          some(rows, inputs, Count<false>(), i);
        }
      }
    });
  };
  const int64_t parts = (m + kInputs - 1) / kInputs;
  if (m == 1) {
    for (; n + kAlone <= end; n += kAlone) some(Count<kAlone>(), Count<1>(), Count<true>(), 0);
  }
  // Three inputs by four rows were found slow where weights come from memory, and only there
  if (m > (kLong && kFew > 2 ? 2 : kFew) * parts) {
    for (; n + kLow <= end; n += kLow) strip(Count<kLow>());
  } else {
    for (; n + kRows <= end; n += kRows) strip(Count<kRows>());
  }
  for (; n < end; ++n) strip(Count<1>());
}

// The same for many inputs: some strips of rows share each span of inputs while that is in the
// first cache. Every sum is made as above. Returns the first row that is left.
template <class Scheme>
[[gnu::noinline]] int64_t blocks_by_inputs(const typename Scheme::Entry* w,
                                           const typename Scheme::Input* x, int64_t m, int64_t k,
                                           int64_t apart, int64_t begin, int64_t end, float* y,
                                           int64_t stride, const void* after) {
  const int64_t row = k * static_cast<int64_t>(sizeof(*w));
  const int64_t block = most(kShared / (kLow * row), 1) * kLow;
  int64_t first = begin;
  for (; first + block <= end; first += block) {
    spans<kInputs>(m, [&](auto inputs, int64_t i) {
      constexpr int kI = inputs.value;
      alignas(64) float sum[(kLow * kI + 15) / 16 * 16];
      for (int64_t n = first; n < first + block; n += kLow) {
        if (i == 0) {
          const char* next = reinterpret_cast<const char*>(w) + (n + kLow) * row;
          next += most(kFarLeast - kLow * row, kFarBehind - row);
          const int64_t beyond = next - reinterpret_cast<const char*>(w) - end * row;
          if (beyond >= 0) next = static_cast<const char*>(after) + beyond;
          tile<Scheme, kLow, kI, true>(w + n * k, x + i * apart, k, apart, next, sum);
        } else {
          tile<Scheme, kLow, kI, false>(w + n * k, x + i * apart, k, apart, nullptr, sum);
        }
#pragma GCC unroll 8
        for (int l = 0; l < kI; ++l)
          __builtin_memcpy(y + (i + l) * stride + n, sum + l * kLow, sizeof(float) * kLow);
      }
    });
  }
  return first;
}

// Packed weights ------------------------------------------------------------------------------

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
    spans<6>(m, [&](auto inputs, int64_t i) { some(Count<2>(), inputs, Count<1>(), i); });
  if (n < end)
    spans<6>(m, [&](auto inputs, int64_t i) { some(Count<1>(), inputs, Count<1>(), i); });
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

// Products --------------------------------------------------------------------------------------

#ifdef SPECDEC_DOT
constexpr bool kDot = true;
#else
constexpr bool kDot = false;
#endif

int64_t room([[maybe_unused]] Form form, int64_t k) {
#ifdef SPECDEC_DOT
  if (form == specdec::kPacked) return kHead + 2 * up(k, 64);
  if (form == specdec::kHalf) return up(2 * k, 64);
#endif
  return up(4 * k, 64);
}

void narrow_all(const float* x, uint16_t* y, int64_t n) {
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide) {
    const Words bits = (Words)floats(x + i);
    const HalfWords half =
        __builtin_convertvector((bits + 0x7fff + (bits >> 16 & 1)) >> 16, HalfWords);
    __builtin_memcpy(y + i, &half, sizeof half);
  }
  for (; i < n; ++i) y[i] = narrow(x[i]);
}

void to_single(const float* x, int64_t k, float* out) {
  __builtin_memcpy(out, x, sizeof(float) * k);
  for (int64_t j = k; j < up(k, 16); ++j) out[j] = 0;
}

#ifdef SPECDEC_DOT
void to_half(const float* x, int64_t k, uint16_t* out) {
  narrow_all(x, out, k);
  for (int64_t j = k; j < up(k, 32); ++j) out[j] = 0;
}
#endif

void prepare([[maybe_unused]] Form form, const float* x, int64_t k, void* out) {
#ifdef SPECDEC_DOT
  if (form == specdec::kPacked) return to_digits(x, k, out);
  if (form == specdec::kHalf) return to_half(x, k, static_cast<uint16_t*>(out));
#endif
  to_single(x, k, static_cast<float*>(out));
}

void product(Form form, const void* w, const float* scale, const void* x, int64_t m, int64_t k,
             int64_t begin, int64_t end, float* y, int64_t stride, const void* after) {
  const int64_t bytes = room(form, k);
  if (form == specdec::kPacked) {
    packed_by_inputs(static_cast<const uint8_t*>(w), scale, static_cast<const char*>(x), m, k,
                     bytes, begin, end, y, stride);
    return;
  }
  if (form == specdec::kSingle) {
    rows_by_inputs<Plain<float>, true>(static_cast<const float*>(w), static_cast<const float*>(x),
                                       m, k, bytes / 4, begin, end, y, stride, after);
  } else {
#ifdef SPECDEC_DOT
    if (m > kInputs && m * bytes > kShared)
      begin =
          blocks_by_inputs<Dot>(static_cast<const uint16_t*>(w), static_cast<const uint16_t*>(x), m,
                                k, bytes / 2, begin, end, y, stride, after);
    rows_by_inputs<Dot, true>(static_cast<const uint16_t*>(w), static_cast<const uint16_t*>(x), m,
                              k, bytes / 2, begin, end, y, stride, after);
#else
    rows_by_inputs<Plain<uint16_t>, true>(static_cast<const uint16_t*>(w),
                                          static_cast<const float*>(x), m, k, bytes / 4, begin, end,
                                          y, stride, after);
#endif
  }
}

}  // namespace
