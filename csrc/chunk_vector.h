// The kernels of chunk.h in the compiler's vector types, for the instruction set of the including
// file. SPECDEC_BYTES is the width of a vector register.
//
// Nothing of the standard library is called here: a function template instantiated under a wider
// instruction set could be the copy the linker keeps for every file.

namespace {

using specdec::ChunkKernels;
using specdec::kLanes;
using specdec::padded;

constexpr int64_t kWidth = SPECDEC_BYTES / 8;       // doubles a vector
constexpr int64_t kParts = kLanes / kWidth;         // vectors that hold kLanes sums
constexpr int64_t kFloatWidth = SPECDEC_BYTES / 4;  // floats a vector

typedef double Doubles __attribute__((vector_size(SPECDEC_BYTES)));
typedef uint64_t Longs __attribute__((vector_size(SPECDEC_BYTES)));
typedef float Floats __attribute__((vector_size(SPECDEC_BYTES)));
typedef uint32_t Words __attribute__((vector_size(SPECDEC_BYTES)));
typedef float HalfFloats __attribute__((vector_size(SPECDEC_BYTES / 2)));
typedef int32_t HalfInts __attribute__((vector_size(SPECDEC_BYTES / 2)));
typedef uint16_t HalfWords __attribute__((vector_size(SPECDEC_BYTES / 2)));

template <typename Vector, typename Entry>
inline Vector get(const Entry* source) {
  Vector result;
  __builtin_memcpy(&result, source, sizeof(Vector));
  return result;
}

template <typename Vector, typename Entry>
inline void put(Entry* target, Vector value) {
  __builtin_memcpy(target, &value, sizeof(Vector));
}

inline Doubles splat(double value) { return Doubles{} + value; }

// exp(x) for x <= 0; 0 below -708. x = n ln 2 + r, |r| <= ln(2)/2; the polynomial is the minimax
// one of degree 10 for the relative error, 2.2e-16. n is rounded by the addition of 1.5 * 2^52,
// which leaves it in the low bits, and enters through the exponent.
inline Doubles exponential(Doubles x) {
  constexpr double kRound = 6755399441055744.0;
  const Doubles shifted = x * 1.4426950408889634 + kRound;
  const Doubles n = shifted - kRound;
  const Doubles r = (x - n * 0x1.62e42fefa39efp-1) - n * 0x1.abc9e3b39803fp-56;
  Doubles y = splat(2.748844618035579e-07);
  y = y * r + 2.763976819981133e-06;
  y = y * r + 2.4801917680289918e-05;
  y = y * r + 0.00019841171384383515;
  y = y * r + 0.0013888888499146064;
  y = y * r + 0.008333333384665643;
  y = y * r + 0.04166666666842598;
  y = y * r + 0.16666666666557742;
  y = y * r + 0.49999999999997286;
  y = y * r + 1.0000000000000064;
  y = y * r + 1.0;
  const Doubles scaled = (Doubles)((Longs)y + ((Longs)shifted << 52));
  return x < -708.0 ? splat(0.0) : scaled;
}

inline Doubles widened(const float* scores) {
  return __builtin_convertvector(get<HalfFloats>(scores), Doubles);
}

inline Floats as_floats(const float* source) { return get<Floats>(source); }

inline Words widened_words(const uint16_t* source) {
  return __builtin_convertvector(get<HalfWords>(source), Words);
}

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline Floats as_floats(const BFloat16* source) {
  return (Floats)(widened_words(&source->bits) << 16);
}

// The exponent is moved by a multiplication with 2^112, which makes subnormal numbers right as
// well; infinities and NaN get the widest exponent afterwards.
inline Floats as_floats(const Float16* source) {
  const Words h = widened_words(&source->bits);
  const Words magnitude = (h & 0x7fffu) << 13;
  const Words moved = (Words)((Floats)magnitude * 0x1p112f);
  const Words special = (Words)(magnitude >= 0x0f800000u) & 0x7f800000u;
  return (Floats)(moved | special | ((h & 0x8000u) << 16));
}

template <typename Entry>
float load(const void* data, int64_t n, float temperature, float* scores) {
  const Entry* source = static_cast<const Entry*>(data);
  const float lowest = -__builtin_inff();
  Floats peak = Floats{} + lowest;
  Words bad{};
  const auto take = [&](const Entry* from, float* to) {
    Floats s = as_floats(from);
    if (temperature != 1.0f) s = s / temperature;
    put(to, s);
    peak = s > peak ? s : peak;
    bad |= (Words)(s != s);
  };
  const int64_t whole = n / kFloatWidth * kFloatWidth;
  for (int64_t i = 0; i < whole; i += kFloatWidth) take(source + i, scores + i);
  for (int64_t i = whole; i < padded(n); ++i) scores[i] = lowest;
  if (whole < n) {
    alignas(64) Entry rest[kFloatWidth]{};
    alignas(64) float converted[kFloatWidth];
    __builtin_memcpy(rest, source + whole, (n - whole) * sizeof(Entry));
    Floats s = as_floats(rest);
    if (temperature != 1.0f) s = s / temperature;
    put(converted, s);
    for (int64_t i = 0; i < n - whole; ++i) {
      const float value = converted[i];
      scores[whole + i] = value;
      peak[0] = value > peak[0] ? value : peak[0];
      bad[0] |= value != value;
    }
  }
  float result = lowest;
  bool undefined = false;
  for (int64_t k = 0; k < kFloatWidth; ++k) {
    result = peak[k] > result ? peak[k] : result;
    undefined |= bad[k] != 0;
  }
  return undefined ? __builtin_nanf("") : result;
}

// kLanes sums to one, by halves.
inline double folded(const Doubles* sums) {
  double lane[kLanes];
  __builtin_memcpy(lane, sums, sizeof(lane));
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t k = 0; k < width; ++k) lane[k] += lane[k + width];
  }
  return lane[0];
}

double sum_exp(const float* scores, int64_t n, double shift) {
  Doubles sums[kParts]{};
  for (int64_t i = 0; i < n; i += kLanes) {
    for (int64_t k = 0; k < kParts; ++k) {
      sums[k] += exponential(widened(scores + i + k * kWidth) - shift);
    }
  }
  return folded(sums);
}

void exps(const float* scores, int64_t n, double shift, double factor, double* weights) {
  for (int64_t i = 0; i < n; i += kWidth) {
    put(weights + i, exponential(widened(scores + i) - shift) * factor);
  }
}

double positive_sum(double* weights, int64_t n) {
  Doubles sums[kParts]{};
  for (int64_t i = 0; i < n; i += kLanes) {
    for (int64_t k = 0; k < kParts; ++k) {
      Doubles w = get<Doubles>(weights + i + k * kWidth);
      w = w > 0.0 ? w : splat(0.0);
      put(weights + i + k * kWidth, w);
      sums[k] += w;
    }
  }
  return folded(sums);
}

// Products of the low halves of each entry
inline Longs half_product(Longs a, uint32_t b) {
#if SPECDEC_BYTES == 64 && defined(__GNUC__)
  return (Longs)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif SPECDEC_BYTES == 32 && defined(__GNUC__)
  return (Longs)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#else
  return (a & 0xffffffffu) * b;
#endif
}

// Philox4x32-10 as in kernels/cuda/philox.cuh for kSets vectors of keys at once, since each product
// waits for the one before. A word stands in the low half of each entry; what is in the high halves
// on the way does not matter.
template <int kSets>
inline void some_words(const specdec::NumberKey& key, const int32_t* ids, int64_t first, int64_t at,
                       uint32_t* out) {
  constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
  constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
  const uint64_t seed = static_cast<uint64_t>(key.seed);
  const uint64_t position = static_cast<uint64_t>(key.position);
  Longs counting{};
  for (int64_t j = 0; j < kWidth; ++j) counting[j] = static_cast<uint64_t>(j);
  Longs word[kSets][4];
#pragma GCC unroll 8
  for (int s = 0; s < kSets; ++s) {
    const int64_t place = at + s * kWidth;
    const Longs offset = ids ? __builtin_convertvector(get<HalfInts>(ids + place), Longs)
                             : counting + static_cast<uint64_t>(first + place);
    word[s][0] = Longs{} + (position & 0xffffffffu);
    word[s][1] = Longs{} + (position >> 32);
    word[s][2] = (offset & 0xffffffu) | (key.purpose << 24);
    word[s][3] = Longs{};
  }
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 8
    for (int s = 0; s < kSets; ++s) {
      const Longs product0 = half_product(word[s][0], kMultiplier0);
      const Longs product1 = half_product(word[s][2], kMultiplier1);
      word[s][0] = (product1 >> 32) ^ word[s][1] ^ key0;
      word[s][1] = product1;
      word[s][2] = (product0 >> 32) ^ word[s][3] ^ key1;
      word[s][3] = product0;
    }
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
#pragma GCC unroll 8
  for (int s = 0; s < kSets; ++s) {
    const Longs low = (word[s][0] & 0xffffffffu) >> 5;
    put(out + at + s * kWidth, __builtin_convertvector(low, HalfInts));
  }
}

void words(const specdec::NumberKey& key, const int32_t* ids, int64_t first, int64_t n,
           uint32_t* out) {
  constexpr int kSets = SPECDEC_BYTES == 64 ? 4 : 2;
  int64_t i = 0;
  for (; i + kSets * kWidth <= n; i += kSets * kWidth) some_words<kSets>(key, ids, first, i, out);
  for (; i < n; i += kWidth) some_words<1>(key, ids, first, i, out);
}

int64_t sift(const uint32_t* words, const double* weights, int64_t n, double bound, int32_t* out) {
  int64_t found = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    Longs hit{};
    for (int64_t k = 0; k < kParts; ++k) {
      const int64_t at = i + k * kWidth;
      const Doubles number = __builtin_convertvector(get<HalfInts>(words + at), Doubles);
      hit |= (Longs)(number * 0x1p-27 < get<Doubles>(weights + at) * bound);
    }
    uint64_t any = 0;
    for (int64_t j = 0; j < kWidth; ++j) any |= hit[j];
    for (int64_t j = i; any && j < i + kLanes; ++j) {
      if (words[j] * 0x1p-27 < weights[j] * bound) out[found++] = static_cast<int32_t>(j);
    }
  }
  return found;
}

int64_t above(const float* scores, int64_t n, float least, int32_t* out) {
  int64_t found = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    Words hit{};
    for (int64_t k = 0; k < kLanes / kFloatWidth; ++k)
      hit |= (Words)(get<Floats>(scores + i + k * kFloatWidth) >= least);
    uint32_t any = 0;
    for (int64_t j = 0; j < kFloatWidth; ++j) any |= hit[j];
    for (int64_t j = i; any && j < i + kLanes; ++j) {
      if (scores[j] >= least) out[found++] = static_cast<int32_t>(j);
    }
  }
  return found;
}

constexpr ChunkKernels kernels_named(const char* name) {
  return {
      name, {load<float>, load<BFloat16>, load<Float16>}, sum_exp, exps, positive_sum, words, sift,
      above};
}

}  // namespace
