// Attention of pass.h; part of pass_vector.h.
//
// Where the machine multiplies bfloat16 itself, the lanes of a piece share what is read: keys are
// turned once, so that a vector holds one pair of entries of sixteen columns, and a vector of
// values meets the weights of several queries. Every sum runs in the order of entries, or of
// columns from the span's first on, whoever shares the piece.

namespace {

#ifdef SPECDEC_DOT
constexpr int kQueries = 6;  // that share what is read

inline __mmask16 lanes_between(int64_t low, int64_t high) {
  const auto below = [](int64_t n) { return n >= 16 ? 0xffffu : n <= 0 ? 0u : (1u << n) - 1; };
  return static_cast<__mmask16>(below(high) & ~below(low));
}

// The pairs of entries of 16 columns: turned[pair, column]; what is null is zero
inline void turn(const uint16_t* const* column, int64_t dim, __m512i* turned) {
  for (int64_t d = 0; d < dim; d += 32) {
    __m512i row[16], half[16];
#pragma GCC unroll 16
    for (int c = 0; c < 16; ++c)
      row[c] = column[c] ? _mm512_loadu_si512(column[c] + d) : _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int c = 0; c < 16; c += 2) {
      half[c] = _mm512_unpacklo_epi32(row[c], row[c + 1]);
      half[c + 1] = _mm512_unpackhi_epi32(row[c], row[c + 1]);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 16; c += 4) {  // row[c + i]: pairs i, 4 + i, 8 + i, 12 + i of four columns
      row[c] = _mm512_unpacklo_epi64(half[c], half[c + 2]);
      row[c + 1] = _mm512_unpackhi_epi64(half[c], half[c + 2]);
      row[c + 2] = _mm512_unpacklo_epi64(half[c + 1], half[c + 3]);
      row[c + 3] = _mm512_unpackhi_epi64(half[c + 1], half[c + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512i a = _mm512_shuffle_i32x4(row[i], row[4 + i], 0x88),
                    b = _mm512_shuffle_i32x4(row[8 + i], row[12 + i], 0x88),
                    c = _mm512_shuffle_i32x4(row[i], row[4 + i], 0xdd),
                    e = _mm512_shuffle_i32x4(row[8 + i], row[12 + i], 0xdd);
      turned[d / 2 + i] = _mm512_shuffle_i32x4(a, b, 0x88);
      turned[d / 2 + 4 + i] = _mm512_shuffle_i32x4(c, e, 0x88);
      turned[d / 2 + 8 + i] = _mm512_shuffle_i32x4(a, b, 0xdd);
      turned[d / 2 + 12 + i] = _mm512_shuffle_i32x4(c, e, 0xdd);
    }
  }
}

inline __m512bh pair_at(const uint16_t* p) {
  int32_t two;
  __builtin_memcpy(&two, p, sizeof two);
  return (__m512bh)_mm512_set1_epi32(two);
}

// score[q, 16 b + c] of kQ queries [dim] and kB times 16 turned columns, `apart` scores apart
template <int kQ, int kB>
inline void meet(const uint16_t* query, const __m512i* turned, int64_t dim, int64_t apart,
                 float* score) {
  const int64_t pairs = dim / 2;
  __m512 total[kQ][kB] = {};
  for (int64_t p = 0; p < pairs; ++p) {
    __m512bh key[kB];
#pragma GCC unroll 4
    for (int b = 0; b < kB; ++b) key[b] = (__m512bh)_mm512_load_si512(turned + b * pairs + p);
#pragma GCC unroll 6
    for (int q = 0; q < kQ; ++q) {
      const __m512bh two = pair_at(query + q * dim + 2 * p);
#pragma GCC unroll 4
      for (int b = 0; b < kB; ++b) total[q][b] = _mm512_dpbf16_ps(total[q][b], key[b], two);
    }
  }
#pragma GCC unroll 6
  for (int q = 0; q < kQ; ++q) {
#pragma GCC unroll 4
    for (int b = 0; b < kB; ++b) _mm512_storeu_ps(score + q * apart + 16 * b, total[q][b]);
  }
}

// body(Count<n>(), first) for spans of queries
template <class Body>
inline void by_queries(int64_t count, const Body& body) {
  spans<kQueries, false>(count, body);
}

// Scores of `count` queries and `blocks` times 16 columns
inline void meet_all(const uint16_t* query, int64_t count, const __m512i* turned, int64_t blocks,
                     int64_t dim, float* score) {
  by_queries(count, [&](auto queries, int64_t q) {
    const auto some = [&](auto width, int64_t b) {
      meet<queries.value, width.value>(query + q * dim, turned + b * dim / 2, dim, kSpan,
                                       score + q * kSpan + 16 * b);
    };
    int64_t b = 0;
    for (; b + 4 <= blocks; b += 4) some(Count<4>(), b);
    if (b + 2 <= blocks) some(Count<2>(), b), b += 2;
    if (b < blocks) some(Count<1>(), b);
  });
}

// Scores of the columns [low, high) of a span to weights, relative to the largest; zero elsewhere
inline void weigh(float* score, int64_t low, int64_t high, float scaling, float* peak, float* mass,
                  uint16_t* weights) {
  __m512 peaks = _mm512_set1_ps(-__builtin_inff());
  for (int64_t c = low / 16 * 16; c < high; c += 16)
    peaks = _mm512_mask_max_ps(peaks, lanes_between(low - c, high - c), peaks,
                               _mm512_loadu_ps(score + c));
  const float largest = _mm512_reduce_max_ps(peaks);
  Lanes total = {};
  for (int64_t c = 0; c < kSpan; c += 16) {
    Floats weight = {};
    const __mmask16 seen = lanes_between(low - c, high - c);
    if (seen) {
      weight = exponential((floats(score + c) - largest) * scaling);
      weight = (Floats)_mm512_maskz_mov_ps(seen, (__m512)weight);
      total.part[0] += weight;
    }
    __builtin_memcpy(score + c, &weight, sizeof weight);
  }
  narrow_all(score, weights, kSpan);
  *peak = largest * scaling;
  float sum[16];
  close<1>(&total, sum);
  *mass = sum[0];
}

// Adds pairs of columns [first, end) of values, two behind one another, to sums [kQ, 2, kWidth] of
// kWidth times 32 entries: those of each 128 bits' lower and upper four
template <int kQ, int kWidth, class Column>
inline void gather_pairs(const uint16_t* weights, const Column& column, int64_t first, int64_t end,
                         __m512* sums, int64_t apart) {
  __m512 low[kQ][kWidth], high[kQ][kWidth];
#pragma GCC unroll 6
  for (int q = 0; q < kQ; ++q) {
#pragma GCC unroll 2
    for (int d = 0; d < kWidth; ++d)
      low[q][d] = sums[q * apart + 2 * d], high[q][d] = sums[q * apart + 2 * d + 1];
  }
  for (int64_t p = first; p < end; ++p) {
    const uint16_t *one = column(2 * p), *other = column(2 * p + 1);
    __m512bh lower[kWidth], upper[kWidth];
#pragma GCC unroll 2
    for (int d = 0; d < kWidth; ++d) {
      const __m512i a = one ? _mm512_loadu_si512(one + 32 * d) : _mm512_setzero_si512();
      const __m512i b = other ? _mm512_loadu_si512(other + 32 * d) : _mm512_setzero_si512();
      lower[d] = (__m512bh)_mm512_unpacklo_epi16(a, b);
      upper[d] = (__m512bh)_mm512_unpackhi_epi16(a, b);
    }
#pragma GCC unroll 6
    for (int q = 0; q < kQ; ++q) {
      const __m512bh weight = pair_at(weights + q * kSpan + 2 * p);
#pragma GCC unroll 2
      for (int d = 0; d < kWidth; ++d) {
        low[q][d] = _mm512_dpbf16_ps(low[q][d], lower[d], weight);
        high[q][d] = _mm512_dpbf16_ps(high[q][d], upper[d], weight);
      }
    }
  }
#pragma GCC unroll 6
  for (int q = 0; q < kQ; ++q) {
#pragma GCC unroll 2
    for (int d = 0; d < kWidth; ++d)
      sums[q * apart + 2 * d] = low[q][d], sums[q * apart + 2 * d + 1] = high[q][d];
  }
}

// The same for `count` queries and all entries: sums [count, dim / 32, 2]
template <class Column>
inline void gather_all(const uint16_t* weights, int64_t count, const Column& column, int64_t first,
                       int64_t end, int64_t dim, __m512* sums) {
  if (first >= end) return;
  const int64_t apart = dim / 16;
  by_queries(count, [&](auto queries, int64_t q) {
    const auto some = [&](auto width, int64_t d) {
      const auto at = [&](int64_t c) {
        const uint16_t* value = column(c);
        return value ? value + d : nullptr;
      };
      gather_pairs<queries.value, width.value>(weights + q * kSpan, at, first, end,
                                               sums + q * apart + d / 16, apart);
    };
    int64_t d = 0;
    for (; d + 64 <= dim; d += 64) some(Count<2>(), d);
    if (d < dim) some(Count<1>(), d);
  });
}

// A span that several lanes of one row see. Scratch is as attend_room says.
inline void attend_jointly(const uint16_t* keys, const uint16_t* values, int64_t begin,
                           const Sight* sights, int64_t lane_count, int64_t group, int64_t dim,
                           float scaling, float* scratch) {
  const int64_t count = lane_count * group, pairs = dim / 2;
  __m512i* turned = reinterpret_cast<__m512i*>(scratch);
  __m512* sums = reinterpret_cast<__m512*>(turned + kSpan / 16 * pairs);
  float* scores = reinterpret_cast<float*>(sums + count * dim / 16);
  uint16_t* weights = reinterpret_cast<uint16_t*>(scores + count * kSpan);
  uint16_t* queries = weights + count * kSpan;
  // Columns from the span's first on: of one lane, before its fork, and of all lanes
  const auto low = [&](int64_t l) { return most(sights[l].first - begin, 0); };
  const auto high = [&](int64_t l) { return least(sights[l].last + 1 - begin, kSpan); };
  const auto level = [&](int64_t l) { return most(least(sights[l].fork - begin, high(l)), 0); };
  int64_t lowest = kSpan, levelest = 0;
  int64_t joint = 0, common = kSpan;  // pairs of columns that every lane sees, before its fork
  for (int64_t l = 0; l < lane_count; ++l) {
    lowest = least(lowest, low(l));
    levelest = most(levelest, level(l));
    joint = most(joint, (low(l) + 1) / 2);
    common = least(common, level(l) / 2);
    for (int64_t g = 0; g < group; ++g)
      to_half(sights[l].query + g * dim, dim, queries + (l * group + g) * dim);
  }
  const uint16_t* column[16];
  const int64_t first = lowest / 16, blocks = (levelest + 15) / 16;
  for (int64_t b = first; b < blocks; ++b) {
    for (int64_t c = 0; c < 16; ++c) {
      const int64_t at = 16 * b + c;
      column[c] = at >= lowest && at < levelest ? keys + (begin + at) * dim : nullptr;
    }
    turn(column, dim, turned + b * pairs);
  }
  if (first < blocks)
    meet_all(queries, count, turned + first * pairs, blocks - first, dim, scores + 16 * first);
  for (int64_t l = 0; l < lane_count; ++l) {
    const Sight& sight = sights[l];
    const uint16_t* own = queries + l * group * dim;
    float* score = scores + l * group * kSpan;
    // Behind the fork, from as many columns of the path as lie before this span on
    const int64_t* path = sight.path + most(begin - sight.fork, 0);
    for (int64_t at = level(l); at < high(l); at += 16) {
      for (int64_t c = 0; c < 16; ++c)
        column[c] = at + c < high(l) ? keys + path[at + c - level(l)] * dim : nullptr;
      turn(column, dim, turned);
      alignas(64) float some[16];
      for (int64_t g = 0; g < group; ++g) {
        meet<1, 1>(own + g * dim, turned, dim, 16, some);
        for (int64_t c = at; c < least(at + 16, high(l)); ++c) score[g * kSpan + c] = some[c - at];
      }
    }
    for (int64_t g = 0; g < group; ++g)
      weigh(score + g * kSpan, low(l), high(l), scaling, sight.peak + g, sight.mass + g,
            weights + (l * group + g) * kSpan);
  }
  for (int64_t i = 0; i < count * dim / 16; ++i) sums[i] = _mm512_setzero_ps();
  const auto behind = [&](int64_t c) { return values + (begin + c) * dim; };
  const auto alone = [&](int64_t l, int64_t from, int64_t to) {
    const int64_t* path = sights[l].path + most(begin - sights[l].fork, 0);
    const auto at = [&](int64_t c) -> const uint16_t* {
      if (c < low(l) || c >= high(l)) return nullptr;
      return c < level(l) ? behind(c) : values + path[c - level(l)] * dim;
    };
    gather_all(weights + l * group * kSpan, group, at, from, to, dim, sums + l * group * dim / 16);
  };
  // A column that some lane does not see may hold anything: those are left to the others
  const bool together = joint < common;
  for (int64_t l = 0; l < lane_count && together; ++l) alone(l, low(l) / 2, joint);
  if (together) gather_all(weights, count, behind, joint, common, dim, sums);
  for (int64_t l = 0; l < lane_count; ++l)
    alone(l, together ? common : low(l) / 2, (high(l) + 1) / 2);
  const __m512i front = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i back =
      _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  for (int64_t q = 0; q < count; ++q) {
    float* out = sights[q / group].out + q % group * dim;
    for (int64_t d = 0; d < dim; d += 32) {
      const __m512* sum = sums + (q * dim + d) / 16;
      _mm512_storeu_ps(out + d, _mm512_permutex2var_ps(sum[0], front, sum[1]));
      _mm512_storeu_ps(out + d + 16, _mm512_permutex2var_ps(sum[0], back, sum[1]));
    }
  }
}
#endif

// Floats of scratch for so many lanes of a piece
int64_t attend_room(int64_t lane_count, int64_t group, int64_t dim) {
  const int64_t count = lane_count * group, wide = up(dim, 32);
  return kSpan * wide / 2 + count * wide + count * kSpan * 2 + count * wide;
}

void attend(bool half, const void* keys, const void* values, int64_t begin, const Sight* sights,
            int64_t lane_count, int64_t group, int64_t dim, float scaling, float* scratch) {
#ifdef SPECDEC_DOT
  if (half && dim % 32 == 0)
    return attend_jointly(static_cast<const uint16_t*>(keys), static_cast<const uint16_t*>(values),
                          begin, sights, lane_count, group, dim, scaling, scratch);
#endif
  if (half) {
    attend_to(static_cast<const uint16_t*>(keys), static_cast<const uint16_t*>(values), begin,
              sights, lane_count, group, dim, scaling, scratch);
  } else {
    attend_to(static_cast<const float*>(keys), static_cast<const float*>(values), begin, sights,
              lane_count, group, dim, scaling, scratch);
  }
}

}  // namespace
