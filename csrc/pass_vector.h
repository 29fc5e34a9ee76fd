// The kernels of pass.h in the compiler's vector types, for the instruction set of the including
// file: SPECDEC_BYTES is the width of a vector register, SPECDEC_DOT is defined where the machine
// multiplies bfloat16 and bytes itself.
//
// At a few inputs a product is bound by reading the weights. So a tile of weights is used for every
// input while it is in the registers, and the next tile is on its way from memory meanwhile.
//
// Nothing of the standard library is called here: a function template instantiated under a wider
// instruction set could be the copy the linker keeps for every file.

namespace {

using specdec::Form;
using specdec::kDeep;
using specdec::kSide;
using specdec::kSpan;
using specdec::PassKernels;
using specdec::Sight;

constexpr int64_t kLanes = 16;
constexpr int kWide = SPECDEC_BYTES / 4;  // floats a vector
constexpr int kParts = kLanes / kWide;    // vectors that hold kLanes sums

typedef float Floats __attribute__((vector_size(SPECDEC_BYTES)));
typedef uint32_t Words __attribute__((vector_size(SPECDEC_BYTES)));

struct Lanes {
  Floats part[kParts];
};

inline int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline Floats splat(float value) { return Floats{} + value; }

template <class Entry>
inline Floats floats(const Entry* p) {
  Floats value;
  __builtin_memcpy(&value, p, sizeof value);
  return value;
}

inline float widen(float value) { return value; }

inline float widen(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint16_t narrow(float value) {  // to nearest, ties to even
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// kWide entries as floats
inline Floats load(const float* p) { return floats(p); }

#if SPECDEC_BYTES == 64
inline Floats load(const uint16_t* p) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
}
inline Floats load_packed(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (Floats)_mm512_cvtepi32_ps(
      _mm512_sub_epi32(_mm512_cvtepu8_epi32(bytes), _mm512_set1_epi32(128)));
}
#elif SPECDEC_BYTES == 32
inline Floats load(const uint16_t* p) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
}
inline Floats load_packed(const uint8_t* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return (Floats)_mm256_cvtepi32_ps(
      _mm256_sub_epi32(_mm256_cvtepu8_epi32(bytes), _mm256_set1_epi32(128)));
}
#else
inline Floats load(const uint16_t* p) {
  Floats value;
  for (int i = 0; i < kWide; ++i) value[i] = widen(p[i]);
  return value;
}
inline Floats load_packed(const uint8_t* p) {
  Floats value;
  for (int i = 0; i < kWide; ++i) value[i] = static_cast<float>(p[i] - 128);
  return value;
}
#endif

template <class Entry>
inline Lanes lanes(const Entry* p) {
  Lanes value;
  for (int i = 0; i < kParts; ++i) value.part[i] = load(p + i * kWide);
  return value;
}

// The first n < kLanes entries, zeros behind them
template <class Entry>
inline Lanes lanes(const Entry* p, int64_t n) {
  Entry some[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) some[i] = p[i];
  return lanes(some);
}

inline void add(Lanes& total, const Lanes& a, const Lanes& b) {
  for (int i = 0; i < kParts; ++i) total.part[i] += a.part[i] * b.part[i];
}

// sum[i] = the sum of lanes of total[i]: within each four lane 0 + 2 and 1 + 3, then the fours in
// the same manner. Room for 16 sums is written.
#if SPECDEC_BYTES == 64
template <int kCount>
inline void close(const Lanes* total, float* sum) {
  constexpr int kLast = kCount - 1;
  const auto at = [&](int i) { return (__m512)total[i < kLast ? i : kLast].part[0]; };
  const auto two = [&](int i) {  // lanes 0 + 2 and 1 + 3 of the fours of i and i + 1, in turn
    return _mm512_add_ps(_mm512_unpacklo_ps(at(i), at(i + 1)),
                         _mm512_unpackhi_ps(at(i), at(i + 1)));
  };
  const auto four = [&](int i) {
    const __m512d a = _mm512_castps_pd(two(i)),
                  b = _mm512_castps_pd(kCount > i + 2 ? two(i + 2) : two(i));
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  };
  const auto pairs = [&](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  const __m512 first = four(0), second = kCount > 4 ? four(4) : first;
  const __m512 low = pairs(first, second);
  __m512 high = low;
  if constexpr (kCount > 8) {
    const __m512 third = four(8);
    high = pairs(third, kCount > 12 ? four(12) : third);
  }
  const __m512 all = pairs(low, high);
  _mm512_storeu_ps(sum, all);
}
#else
template <int kCount>
inline void close(const Lanes* total, float* sum) {
  for (int i = 0; i < kCount; ++i) {
    float s[kLanes], four[4];
    __builtin_memcpy(s, &total[i], sizeof s);
    for (int j = 0; j < 4; ++j) four[j] = (s[4 * j] + s[4 * j + 2]) + (s[4 * j + 1] + s[4 * j + 3]);
    sum[i] = (four[0] + four[1]) + (four[2] + four[3]);
  }
}
#endif

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

// sum[i * kRows + r] of kRows rows and kInputs inputs, `apart` entries apart
template <class Scheme, int kRows, int kInputs, bool kAhead>
inline void tile(const typename Scheme::Entry* w, const typename Scheme::Input* x, int64_t k,
                 int64_t apart, float* sum) {
  Lanes total[kInputs * kRows] = {};
  const int64_t whole = k / Scheme::kStep * Scheme::kStep;
  for (int64_t j = 0; j < whole; j += Scheme::kStep) {
    decltype(Scheme::weight(w)) weight[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      weight[r] = Scheme::weight(w + r * k + j);
      if constexpr (kAhead) __builtin_prefetch(w + (kRows + r) * k + j);
    }
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

// How many sums the registers hold: rows for one input, rows for more, inputs
#if SPECDEC_BYTES == 64
constexpr int kAlone = 8, kRows = 4, kInputs = 6;
#elif SPECDEC_BYTES == 32
constexpr int kAlone = 4, kRows = 2, kInputs = 2;
#else
constexpr int kAlone = 2, kRows = 2, kInputs = 1;
#endif

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
    i += n;
  }
}

template <class Scheme>
inline void rows_by_inputs(const typename Scheme::Entry* w, const typename Scheme::Input* x,
                           int64_t m, int64_t k, int64_t apart, int64_t begin, int64_t end,
                           float* y, int64_t stride) {
  int64_t n = begin;
  const auto some = [&](auto rows, auto inputs, auto ahead, int64_t i) {
    constexpr int kR = rows.value, kI = inputs.value;
    alignas(64) float sum[(kR * kI + 15) / 16 * 16];
    tile<Scheme, kR, kI, ahead.value>(w + n * k, x + i * apart, k, apart, sum);
#pragma GCC unroll 8
    for (int l = 0; l < kI; ++l)
      __builtin_memcpy(y + (i + l) * stride + n, sum + l * kR, sizeof(float) * kR);
  };
  const auto strip = [&](auto rows) {
    spans<kInputs>(m, [&](auto inputs, int64_t i) {
      if (i == 0) {
        some(rows, inputs, Count<true>(), i);
      } else {
        some(rows, inputs, Count<false>(), i);
      }
    });
  };
  if (m == 1) {
    for (; n + kAlone <= end; n += kAlone) some(Count<kAlone>(), Count<1>(), Count<true>(), 0);
  }
  for (; n + kRows <= end; n += kRows) strip(Count<kRows>());
  for (; n < end; ++n) strip(Count<1>());
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
  float peak = 0;
  for (int64_t j = 0; j < k; ++j) {
    const float size = __builtin_fabsf(x[j]);
    peak = size > peak ? size : peak;
  }
  Digits digits = {};
  // A NaN or an infinity comes out of the product as a NaN
  digits.scale = peak > 0 && peak <= 3.4028235e38f ? peak / 32512 : peak * 0.0f;
  float whole = 0;
  for (int64_t j = 0; j < k; ++j) whole += x[j] * 0.0f;
  if (whole != whole) digits.scale = whole;
  const float factor = digits.scale > 0 ? 1.0f / digits.scale : 0.0f;
  for (int64_t j = 0; j < k; ++j) {
    // 1.5 * 2^23 rounds to an integer, which is left in the low bits
    const float shifted = x[j] * factor + 12582912.0f;
    int32_t bits;
    __builtin_memcpy(&bits, &shifted, sizeof bits);
    const int32_t value = digits.scale > 0 ? bits - 0x4b400000 : 0;
    const int32_t upper = (value + 128) >> 8;
    high[j] = static_cast<int8_t>(upper);
    low[j] = static_cast<int8_t>(value - upper * 256);
    digits.high += high[j];
    digits.low += low[j];
  }
  for (int64_t j = k; j < up(k, kDeep); ++j) high[j] = low[j] = 0;
  __builtin_memcpy(out, &digits, sizeof digits);
}

// kBlocks times 16 rows, kInputs inputs
template <int kBlocks, int kInputs, bool kAhead>
inline void packed_tile(const uint8_t* w, const float* scale, const char* x, int64_t k,
                        int64_t apart, int64_t n, int64_t end, float* y, int64_t stride) {
  const int64_t deep = up(k, kDeep), block = deep * kSide, second = up(k, 64);
  __m512i high[kInputs][kBlocks], low[kInputs][kBlocks];
#pragma GCC unroll 8
  for (int i = 0; i < kInputs; ++i) {
#pragma GCC unroll 8
    for (int b = 0; b < kBlocks; ++b) high[i][b] = low[i][b] = _mm512_setzero_si512();
  }
  for (int64_t j = 0; j < deep; j += kDeep) {
    __m512i weight[kBlocks];
#pragma GCC unroll 8
    for (int b = 0; b < kBlocks; ++b) {
      weight[b] = _mm512_loadu_si512(w + b * block + j * kSide);
      if constexpr (kAhead) __builtin_prefetch(w + (kBlocks + b) * block + j * kSide);
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
        high[i][b] = _mm512_dpbusd_epi32(high[i][b], weight[b], upper);
        low[i][b] = _mm512_dpbusd_epi32(low[i][b], weight[b], lower);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kInputs; ++i) {
    Digits digits;
    __builtin_memcpy(&digits, x + i * apart, sizeof digits);
    const __m512i off_high = _mm512_set1_epi32(128 * digits.high),
                  off_low = _mm512_set1_epi32(128 * digits.low);
    const __m512 factor = _mm512_set1_ps(digits.scale);
#pragma GCC unroll 8
    for (int b = 0; b < kBlocks; ++b) {
      const int64_t left = end - n - b * kSide;
      const __mmask16 mask = left >= kSide ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
      const __m512 upper = _mm512_cvtepi32_ps(_mm512_sub_epi32(high[i][b], off_high)),
                   lower = _mm512_cvtepi32_ps(_mm512_sub_epi32(low[i][b], off_low));
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
  const auto strip = [&](auto blocks, auto widest) {
    constexpr int kB = blocks.value;
    spans<widest.value>(m, [&](auto inputs, int64_t i) {
      const auto some = [&](auto ahead) {
        packed_tile<kB, inputs.value, ahead.value>(w + n / kSide * block, scale, x + i * apart, k,
                                                   apart, n, end, y + i * stride, stride);
      };
      if (i == 0) {
        some(Count<true>());
      } else {
        some(Count<false>());
      }
    });
    n += kB * kSide;
  };
  while (m <= 2 && n + 3 * kSide < end) strip(Count<4>(), Count<2>());
  while (n + kSide < end) strip(Count<2>(), Count<6>());
  if (n < end) strip(Count<1>(), Count<6>());
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
  for (int64_t i = 0; i < n; ++i) y[i] = narrow(x[i]);
}

void to_single(const float* x, int64_t k, float* out) {
  __builtin_memcpy(out, x, sizeof(float) * k);
  for (int64_t j = k; j < up(k, 16); ++j) out[j] = 0;
}

void prepare([[maybe_unused]] Form form, const float* x, int64_t k, void* out) {
#ifdef SPECDEC_DOT
  if (form == specdec::kPacked) return to_digits(x, k, out);
  if (form == specdec::kHalf) {
    uint16_t* half = static_cast<uint16_t*>(out);
    narrow_all(x, half, k);
    for (int64_t j = k; j < up(k, 32); ++j) half[j] = 0;
    return;
  }
#endif
  to_single(x, k, static_cast<float*>(out));
}

void product(Form form, const void* w, const float* scale, const void* x, int64_t m, int64_t k,
             int64_t begin, int64_t end, float* y, int64_t stride) {
  const int64_t bytes = room(form, k);
  if (form == specdec::kPacked) {
    packed_by_inputs(static_cast<const uint8_t*>(w), scale, static_cast<const char*>(x), m, k,
                     bytes, begin, end, y, stride);
    return;
  }
  if (form == specdec::kSingle) {
    rows_by_inputs<Plain<float>>(static_cast<const float*>(w), static_cast<const float*>(x), m, k,
                                 bytes / 4, begin, end, y, stride);
  } else {
#ifdef SPECDEC_DOT
    rows_by_inputs<Dot>(static_cast<const uint16_t*>(w), static_cast<const uint16_t*>(x), m, k,
                        bytes / 2, begin, end, y, stride);
#else
    rows_by_inputs<Plain<uint16_t>>(static_cast<const uint16_t*>(w), static_cast<const float*>(x),
                                    m, k, bytes / 4, begin, end, y, stride);
#endif
  }
}

// What lies between products --------------------------------------------------------------------

// exp(x), relative error below 2e-7; 0 below -87, largest at 88
inline Floats exponential(Floats x) {
  x = x > 88.0f ? splat(88.0f) : x;
  const Floats shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
  const Floats r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Floats y = splat(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  const Floats scaled = (Floats)((Words)y + ((Words)shifted << 23));
  return x < -87.0f ? splat(0.0f) : scaled;
}

void normalise(const float* x, const float* weight, float* y, int64_t n, float epsilon) {
  Lanes total = {};
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) add(total, lanes(x + i), lanes(x + i));
  if (whole < n) add(total, lanes(x + whole, n - whole), lanes(x + whole, n - whole));
  float squares[16];
  close<1>(&total, squares);
  const float factor = 1.0f / __builtin_sqrtf(squares[0] / static_cast<float>(n) + epsilon);
  for (int64_t i = 0; i < n; ++i) y[i] = x[i] * factor * weight[i];
}

inline Floats gated(Floats opened, Floats up) {
  return opened / (exponential(-opened) + 1.0f) * up;
}

void gate(const float* opened, const float* up, float* y, int64_t n) {
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide) {
    const Floats value = gated(floats(opened + i), floats(up + i));
    __builtin_memcpy(y + i, &value, sizeof value);
  }
  for (; i < n; ++i) y[i] = gated(splat(opened[i]), splat(up[i]))[0];
}

// out[g, d] = sum over columns of weights[g, column] * values[column, d] for d in [begin, end)
template <int kGroup, int kWidth, class Stored>
inline void gather(const float* weights, const Stored* values, int64_t columns, int64_t dim,
                   int64_t begin, int64_t end, float* out) {
  Lanes total[kGroup][kWidth] = {};
  const bool whole = end - begin == kWidth * kLanes;
  for (int64_t c = 0; c < columns; ++c) {
    Lanes value[kWidth];
#pragma GCC unroll 4
    for (int d = 0; d < kWidth; ++d) {
      const Stored* p = values + c * dim + begin + d * kLanes;
      value[d] = whole ? lanes(p) : lanes(p, end - begin);
    }
#pragma GCC unroll 4
    for (int g = 0; g < kGroup; ++g) {
      const Floats weight = splat(weights[g * kSpan + c]);
#pragma GCC unroll 4
      for (int d = 0; d < kWidth; ++d) {
#pragma GCC unroll 4
        for (int i = 0; i < kParts; ++i) total[g][d].part[i] += value[d].part[i] * weight;
      }
    }
  }
  for (int g = 0; g < kGroup; ++g)
    __builtin_memcpy(out + g * dim + begin, &total[g], sizeof(float) * (end - begin));
}

template <int kGroup, class Stored>
inline void gather(const float* weights, const Stored* values, int64_t columns, int64_t dim,
                   float* out) {
  constexpr int kWidth = kParts == 1 ? 4 : 1;
  int64_t d = 0;
  for (; d + kWidth * kLanes <= dim; d += kWidth * kLanes)
    gather<kGroup, kWidth>(weights, values, columns, dim, d, d + kWidth * kLanes, out);
  for (; d < dim; d += kLanes)
    gather<kGroup, 1>(weights, values, columns, dim, d, least(d + kLanes, dim), out);
}

template <class Stored>
void attend_to(const Stored* keys, const Stored* values, int64_t begin, const Sight* sights,
               int64_t lane_count, int64_t group, int64_t dim, float scaling, float* scratch) {
  float* scores = scratch;
  const int64_t apart = up(dim, kLanes);
  float* query = scratch + group * kSpan;
  for (int64_t l = 0; l < lane_count; ++l) {
    const Sight& sight = sights[l];
    const int64_t low = most(sight.first, begin), high = least(sight.last + 1, begin + kSpan);
    const int64_t columns = high - low;
    for (int64_t g = 0; g < group; ++g) to_single(sight.query + g * dim, dim, query + g * apart);
    rows_by_inputs<Plain<Stored>>(keys + low * dim, query, group, dim, apart, 0, columns, scores,
                                  kSpan);
    for (int64_t g = 0; g < group; ++g) {
      float* score = scores + g * kSpan;
      for (int64_t c = columns; c < up(columns, kLanes); ++c) score[c] = score[0];
      Floats peaks = splat(score[0]);
      for (int64_t c = 0; c < columns; c += kWide) {
        const Floats some = floats(score + c);
        peaks = some > peaks ? some : peaks;
      }
      float peak = peaks[0];
      for (int i = 1; i < kWide; ++i) peak = peaks[i] > peak ? peaks[i] : peak;
      // The factor is positive, so the largest score stays the largest
      Lanes total = {};
      for (int64_t c = 0; c < columns; c += kLanes) {
        for (int i = 0; i < kParts; ++i) {
          float* at = score + c + i * kWide;
          Floats weight = exponential((floats(at) - peak) * scaling);
          if (c + (i + 1) * kWide > columns) {
            for (int j = 0; j < kWide; ++j)
              if (c + i * kWide + j >= columns) weight[j] = 0;
          }
          __builtin_memcpy(at, &weight, sizeof weight);
          total.part[i] += weight;
        }
      }
      sight.peak[g] = peak * scaling;
      float mass[16];
      close<1>(&total, mass);
      sight.mass[g] = mass[0];
    }
    int64_t g = 0;
    const Stored* seen = values + low * dim;
    for (; g + 4 <= group; g += 4)
      gather<4>(scores + g * kSpan, seen, columns, dim, sight.out + g * dim);
    if (group - g == 3) gather<3>(scores + g * kSpan, seen, columns, dim, sight.out + g * dim);
    if (group - g == 2) gather<2>(scores + g * kSpan, seen, columns, dim, sight.out + g * dim);
    if (group - g == 1) gather<1>(scores + g * kSpan, seen, columns, dim, sight.out + g * dim);
  }
}

// Turns heads to their position: x * cos + rotate_half(x) * sin
void rotate(float* x, int64_t heads, const float* cosine, const float* sine, int64_t dim) {
  const int64_t half = dim / 2;
  for (int64_t h = 0; h < heads; ++h, x += dim) {
    for (int64_t d = 0; d < half; ++d) {
      const float a = x[d], b = x[d + half];
      x[d] = a * cosine[d] - b * sine[d];
      x[d + half] = b * cosine[d + half] + a * sine[d + half];
    }
  }
}

// Sums over parts, each relative to its own peak, to one relative to the largest: out [dim]
void merge(const float* const* parts, const float* peaks, const float* masses, int64_t n,
           int64_t dim, float* out) {
  float peak = peaks[0], mass = 0;
  for (int64_t p = 1; p < n; ++p) peak = peaks[p] > peak ? peaks[p] : peak;
  for (int64_t d = 0; d < dim; ++d) out[d] = 0;
  for (int64_t p = 0; p < n; ++p) {
    const float factor = exponential(splat(peaks[p] - peak))[0];
    mass += factor * masses[p];
    for (int64_t d = 0; d < dim; ++d) out[d] += factor * parts[p][d];
  }
  for (int64_t d = 0; d < dim; ++d) out[d] /= mass;
}

void attend(bool half, const void* keys, const void* values, int64_t begin, const Sight* sights,
            int64_t lane_count, int64_t group, int64_t dim, float scaling, float* scratch) {
  if (half) {
    attend_to(static_cast<const uint16_t*>(keys), static_cast<const uint16_t*>(values), begin,
              sights, lane_count, group, dim, scaling, scratch);
  } else {
    attend_to(static_cast<const float*>(keys), static_cast<const float*>(values), begin, sights,
              lane_count, group, dim, scaling, scratch);
  }
}

constexpr PassKernels pass_named(const char* name) {
  return {name, room, prepare, product, normalise, gate, rotate, attend, merge, narrow_all};
}

}  // namespace
