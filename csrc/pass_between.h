// What lies between the products of pass.h: norms, the gate, rotary positions, attention of one
// lane after another; part of pass_vector.h.

namespace {

using specdec::kSpan;
using specdec::Sight;

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
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide) {
    const Floats value = floats(x + i) * factor * floats(weight + i);
    __builtin_memcpy(y + i, &value, sizeof value);
  }
  for (; i < n; ++i) y[i] = x[i] * factor * weight[i];
}

void add_to(float* x, const float* more, int64_t n) {
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide) {
    const Floats sum = floats(x + i) + floats(more + i);
    __builtin_memcpy(x + i, &sum, sizeof sum);
  }
  for (; i < n; ++i) x[i] += more[i];
}

void mix(float* y, const uint16_t* const* parts, const float* weights, int64_t count, int64_t begin,
         int64_t n) {
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide) {
    Floats sum = floats(y + i);
    for (int64_t j = 0; j < count; ++j) sum += load(parts[j] + begin + i) * weights[j];
    __builtin_memcpy(y + i, &sum, sizeof sum);
  }
  for (; i < n; ++i) {
    for (int64_t j = 0; j < count; ++j) y[i] += widen(parts[j][begin + i]) * weights[j];
  }
}

// x / (1 + exp(-slope)): SiLU where the slope is x, GELU by tanh where it is the curve's
template <bool kCurved>
inline Floats gated(Floats opened, Floats up) {
  Floats slope = opened;
  if (kCurved) slope = (opened + opened * opened * opened * 0.044715f) * 1.5957691216f;
  return opened / (exponential(-slope) + 1.0f) * up;
}

template <bool kCurved>
inline void gate_all(const float* opened, const float* up, float* y, int64_t n) {
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide) {
    const Floats value = gated<kCurved>(floats(opened + i), floats(up + i));
    __builtin_memcpy(y + i, &value, sizeof value);
  }
  if (i < n) {  // one vector for what is left, however few that are
    alignas(64) float some[2][kWide] = {};
    for (int64_t j = i; j < n; ++j) some[0][j - i] = opened[j], some[1][j - i] = up[j];
    const Floats value = gated<kCurved>(floats(some[0]), floats(some[1]));
    for (int64_t j = i; j < n; ++j) y[j] = value[j - i];
  }
}

void gate(const float* opened, const float* up, float* y, int64_t n) {
  gate_all<false>(opened, up, y, n);
}

void curve(const float* opened, const float* up, float* y, int64_t n) {
  gate_all<true>(opened, up, y, n);
}

// Columns of values: so many behind one another, then single ones
template <class Stored>
struct Columns {
  const Stored* values;
  int64_t level, count;
  const Stored* base;
  const int64_t* path;
};

// out[g, d] = sum over columns of weights[g, column] * values[column, d] for d in [begin, end)
template <int kGroup, int kWidth, class Stored>
inline void gather_some(const float* weights, const Columns<Stored>& columns, int64_t dim,
                        int64_t begin, int64_t end, float* out) {
  Lanes total[kGroup][kWidth] = {};
  const bool whole = end - begin == kWidth * kLanes;
  const auto take = [&](const Stored* column, int64_t c) {
    Lanes value[kWidth];
#pragma GCC unroll 4
    for (int d = 0; d < kWidth; ++d) {
      const Stored* p = column + begin + d * kLanes;
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
  };
  for (int64_t c = 0; c < columns.level; ++c) take(columns.values + c * dim, c);
  for (int64_t c = columns.level; c < columns.count; ++c)
    take(columns.base + columns.path[c - columns.level] * dim, c);
#pragma GCC unroll 4
  for (int g = 0; g < kGroup; ++g) {
    if (whole) {
#pragma GCC unroll 4
      for (int d = 0; d < kWidth; ++d)
        __builtin_memcpy(out + g * dim + begin + d * kLanes, &total[g][d], sizeof(Lanes));
    } else {  // by way of a copy: sums whose number is not known do not stay in registers
      float some[kWidth * kLanes];
#pragma GCC unroll 4
      for (int d = 0; d < kWidth; ++d)
        __builtin_memcpy(some + d * kLanes, &total[g][d], sizeof(Lanes));
      for (int64_t d = 0; d < end - begin; ++d) out[g * dim + begin + d] = some[d];
    }
  }
}

template <int kGroup, class Stored>
inline void gather(const float* weights, const Columns<Stored>& columns, int64_t dim, float* out) {
  constexpr int kWidth = kParts == 1 ? 4 : 1;
  int64_t d = 0;
  for (; d + kWidth * kLanes <= dim; d += kWidth * kLanes)
    gather_some<kGroup, kWidth>(weights, columns, dim, d, d + kWidth * kLanes, out);
  for (; d < dim; d += kLanes)
    gather_some<kGroup, 1>(weights, columns, dim, d, least(d + kLanes, dim), out);
}

// How queries meet keys. Where the machine multiplies bfloat16 itself, those stored in it meet
// queries rounded to it, as they do in a model of that type.
template <class Stored>
struct Meeting {
  using Scheme = Plain<Stored>;
  static void prepare(const float* query, int64_t dim, float* out) { to_single(query, dim, out); }
};

#ifdef SPECDEC_DOT
template <>
struct Meeting<uint16_t> {
  using Scheme = Dot;
  static void prepare(const float* query, int64_t dim, uint16_t* out) { to_half(query, dim, out); }
};
#endif

template <class Stored>
void attend_to(const Stored* keys, const Stored* values, int64_t begin, const Sight* sights,
               int64_t lane_count, int64_t group, int64_t dim, float scaling, float* scratch) {
  using Scheme = typename Meeting<Stored>::Scheme;
  using Query = typename Scheme::Input;
  float* scores = scratch;
  const int64_t apart = up(dim, Scheme::kStep);
  Query* query = reinterpret_cast<Query*>(scratch + group * kSpan);
  for (int64_t l = 0; l < lane_count; ++l) {
    const Sight& sight = sights[l];
    const int64_t low = most(sight.first, begin), high = least(sight.last + 1, begin + kSpan);
    const int64_t columns = high - low;
    for (int64_t g = 0; g < group; ++g)
      Meeting<Stored>::prepare(sight.query + g * dim, dim, query + g * apart);
    const int64_t level = most(least(sight.fork, high) - low, 0);
    const int64_t* path = sight.path + most(low - sight.fork, 0);
    if (level)
      rows_by_inputs<Scheme, false>(keys + low * dim, query, group, dim, apart, 0, level, scores,
                                    kSpan, nullptr);
    for (int64_t c = level; c < columns; ++c)
      rows_by_inputs<Scheme, false>(keys + path[c - level] * dim, query, group, dim, apart, 0, 1,
                                    scores + c, kSpan, nullptr);
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
    const Columns<Stored> seen{values + low * dim, level, columns, values, path};
    for (; g + 4 <= group; g += 4) gather<4>(scores + g * kSpan, seen, dim, sight.out + g * dim);
    if (group - g == 3) gather<3>(scores + g * kSpan, seen, dim, sight.out + g * dim);
    if (group - g == 2) gather<2>(scores + g * kSpan, seen, dim, sight.out + g * dim);
    if (group - g == 1) gather<1>(scores + g * kSpan, seen, dim, sight.out + g * dim);
  }
}

// Turns heads to their position: x * cos + rotate_half(x) * sin
void rotate(float* x, int64_t heads, const float* cosine, const float* sine, int64_t dim) {
  const int64_t half = dim / 2;
  for (int64_t h = 0; h < heads; ++h, x += dim) {
    int64_t d = 0;
    for (; d + kWide <= half; d += kWide) {
      const Floats a = floats(x + d), b = floats(x + d + half);
      const Floats low = a * floats(cosine + d) - b * floats(sine + d),
                   high = b * floats(cosine + d + half) + a * floats(sine + d + half);
      __builtin_memcpy(x + d, &low, sizeof low);
      __builtin_memcpy(x + d + half, &high, sizeof high);
    }
    for (; d < half; ++d) {
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
  for (int64_t p = 0; p < n; ++p) mass += exponential(splat(peaks[p] - peak))[0] * masses[p];
  const auto some = [&](auto width, int64_t d) {
    Floats total[width.value] = {};
    for (int64_t p = 0; p < n; ++p) {
      const Floats factor = exponential(splat(peaks[p] - peak));
#pragma GCC unroll 4
      for (int i = 0; i < width.value; ++i) total[i] += factor * floats(parts[p] + d + i * kWide);
    }
#pragma GCC unroll 4
    for (int i = 0; i < width.value; ++i) {
      total[i] /= mass;
      __builtin_memcpy(out + d + i * kWide, &total[i], sizeof(Floats));
    }
  };
  int64_t d = 0;
  for (; d + 4 * kWide <= dim; d += 4 * kWide) some(Count<4>(), d);
  for (; d + kWide <= dim; d += kWide) some(Count<1>(), d);
  for (; d < dim; ++d) {
    float total = 0;
    for (int64_t p = 0; p < n; ++p) total += exponential(splat(peaks[p] - peak))[0] * parts[p][d];
    out[d] = total / mass;
  }
}

}  // namespace
