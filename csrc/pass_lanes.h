// Sums over 16 interleaved lanes in the compiler's vector types; part of pass_vector.h.

namespace {

constexpr int64_t kLanes = 16;
constexpr int kWide = SPECDEC_BYTES / 4;  // floats a vector
constexpr int kParts = kLanes / kWide;    // vectors that hold kLanes sums

typedef float Floats __attribute__((vector_size(SPECDEC_BYTES)));
typedef uint32_t Words __attribute__((vector_size(SPECDEC_BYTES)));
typedef uint16_t HalfWords __attribute__((vector_size(SPECDEC_BYTES / 2)));

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

}  // namespace
