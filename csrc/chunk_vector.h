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

constexpr ChunkKernels kernels_named(const char* name) {
  return {name, {load<float>, load<BFloat16>, load<Float16>}, sum_exp, exps, positive_sum};
}

}  // namespace
