// Products of pass.h: weights as rows of numbers; part of pass_vector.h, behind pass_packed.h.
//
// At a few inputs a product is bound by reading the weights. So a tile of weights is used for every
// input while it is in the registers, and what comes some kilobytes later is on its way from memory
// meanwhile, in the order of memory: tiles follow each other there.

namespace {

using specdec::Form;

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

// Adds the products of `whole` columns of rows `k` apart
template <class Scheme, int kRows, int kInputs, int kAhead>
[[gnu::always_inline]] inline void along(const typename Scheme::Entry* w,
                                         const typename Scheme::Input* x, int64_t whole, int64_t k,
                                         int64_t apart, [[maybe_unused]] const char* next,
                                         Lanes* total) {
  constexpr int64_t kStride = Scheme::kStep * sizeof(*w);
  for (int64_t j = 0; j < whole; j += Scheme::kStep) {
    decltype(Scheme::weight(w)) weight[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      weight[r] = Scheme::weight(w + r * k + j);
      // Into the second cache: the first is too small for what is on its way beside the inputs,
      // and what is pushed out of it before its use is fetched from memory again
      if (kAhead >> r & 1) __builtin_prefetch(next + r * kStride, 0, 2);
    }
    if constexpr (kAhead) next += kRows * kStride;
#pragma GCC unroll 8
    for (int i = 0; i < kInputs; ++i) {
      const auto in = Scheme::input(x + i * apart + j);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) Scheme::fold(total[i * kRows + r], weight[r], in);
    }
  }
}

// Those of the last columns, fewer than a step
template <class Scheme, int kRows, int kInputs>
[[gnu::always_inline]] inline void rest(const typename Scheme::Entry* w,
                                        const typename Scheme::Input* x, int64_t left, int64_t k,
                                        int64_t apart, Lanes* total) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const auto weight = Scheme::weight(w + r * k, left);
#pragma GCC unroll 8
    for (int i = 0; i < kInputs; ++i)
      Scheme::fold(total[i * kRows + r], weight, Scheme::input(x + i * apart));
  }
}

template <int kCount>
[[gnu::always_inline]] inline void close_all(const Lanes* total, float* sum) {
  constexpr int kRest = kCount % 16;
#pragma GCC unroll 8
  for (int i = 0; i + 16 <= kCount; i += 16) close<16>(total + i, sum + i);
  if constexpr (kRest > 0) close<kRest>(total + kCount - kRest, sum + kCount - kRest);
}

// sum[i * kRows + r] of kRows rows and kInputs inputs, `apart` entries apart; meanwhile as much is
// fetched from `next` on, or of every kRows vectors of it those that `kAhead` has a bit for
template <class Scheme, int kRows, int kInputs, int kAhead>
[[gnu::noinline]] void tile(const typename Scheme::Entry* w, const typename Scheme::Input* x,
                            int64_t k, int64_t apart, [[maybe_unused]] const char* next,
                            float* sum) {
  Lanes total[kInputs * kRows] = {};
  const int64_t whole = k / Scheme::kStep * Scheme::kStep;
  along<Scheme, kRows, kInputs, kAhead>(w, x, whole, k, apart, next, total);
  if (whole < k) rest<Scheme, kRows, kInputs>(w + whole, x + whole, k - whole, k, apart, total);
  close_all<kInputs * kRows>(total, sum);
}

// The same for `some` of the columns: sums begin where `first`, go on from `kept` otherwise, and
// are left there unless they are the `last`
template <class Scheme, int kRows, int kInputs, int kAhead>
[[gnu::noinline]] void part_of_tile(const typename Scheme::Entry* w,
                                    const typename Scheme::Input* x, int64_t some, int64_t k,
                                    int64_t apart, const char* next, bool first, bool last,
                                    Lanes* kept, float* sum) {
  constexpr int kCount = kInputs * kRows;
  Lanes total[kCount] = {};
  if (!first) {
#pragma GCC unroll 32
    for (int i = 0; i < kCount; ++i) total[i] = kept[i];
  }
  const int64_t whole = some / Scheme::kStep * Scheme::kStep;
  along<Scheme, kRows, kInputs, kAhead>(w, x, whole, k, apart, next, total);
  if (whole < some)
    rest<Scheme, kRows, kInputs>(w + whole, x + whole, some - whole, k, apart, total);
  if (last) return close_all<kCount>(total, sum);
#pragma GCC unroll 32
  for (int i = 0; i < kCount; ++i) kept[i] = total[i];
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

// Bytes of inputs and a strip of weights up to which all columns are taken at once, and at most
// where they are not; bytes of weights that share what is in the first cache of the inputs
constexpr int64_t kBoth = 33792, kPart = 28672, kBlock = 73728;
// Strips of rows that share a part: as few, and as many where there are several parts
constexpr int64_t kFewStrips = 4, kMostStrips = 8;
constexpr int kAll = 255;  // of a tile's vectors that come next, those that it fetches

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
    spans<kInputs, kLong>(m, [&](auto inputs, int64_t i) {
      if constexpr (rows.value <= kLow || inputs.value <= kFew) {
        if (i == 0) {
          some(rows, inputs, Count<kAll>(), i);
        } else {
          some(rows, inputs, Count<0>(), i);
        }
      }
    });
  };
  const int64_t parts = (m + kInputs - 1) / kInputs;
  if (m == 1) {
    for (; n + kAlone <= end; n += kAlone) some(Count<kAlone>(), Count<1>(), Count<kAll>(), 0);
  }
  // Three inputs by four rows were found slow where weights come from memory, and only there
  if (m > (kLong && kFew > 2 ? 2 : kFew) * parts) {
    for (; n + kLow <= end; n += kLow) strip(Count<kLow>());
  } else {
    for (; n + kRows <= end; n += kRows) strip(Count<kRows>());
  }
  for (; n < end; ++n) strip(Count<1>());
}

// The same for inputs that the first cache is too small for: strips of rows share each span of
// inputs, some columns at a time. What the next block needs is fetched by the first spans of this
// one. Every sum is made as above. Returns the first row that is left.
template <class Scheme>
[[gnu::noinline]] int64_t blocks_by_inputs(const typename Scheme::Entry* w,
                                           const typename Scheme::Input* x, int64_t m, int64_t k,
                                           int64_t apart, int64_t begin, int64_t end, float* y,
                                           int64_t stride, const void* after) {
  constexpr int64_t kEntry = sizeof(*w);
  const int64_t row = k * kEntry;
  const int64_t strips = least(most(kBlock / (kLow * row), kFewStrips), (end - begin) / kLow);
  const int64_t block = strips * kLow;
  int64_t first = begin;
  if (!block) return first;
  alignas(64) Lanes kept[kMostStrips * kLow * kInputs];
  for (; first + block <= end; first += block) {
    int64_t count = 0;
    spans<kInputs, true>(m, [&](auto inputs, int64_t i) {
      constexpr int kI = inputs.value;
      // Sums of parts cost some time in between; less of it than is won where there are few spans
      const int64_t both = (kI + kLow) * row;
      const int64_t parts =
          both > kBoth && m < 3 * kInputs && strips <= kMostStrips ? (both + kPart - 1) / kPart : 1;
      const int64_t part = up((k + parts - 1) / parts, Scheme::kStep);
      const auto through = [&](auto ahead) {
        alignas(64) float sum[(kLow * kI + 15) / 16 * 16];
        for (int64_t j = 0; j < k; j += part) {
          const int64_t some = least(part, k - j);
          const bool last = j + some == k;
          for (int64_t s = 0; s < strips; ++s) {
            const int64_t n = first + s * kLow;
            const char* next =
                reinterpret_cast<const char*>(w) + (n + block) * row + kLow * j * kEntry;
            const int64_t beyond = next - reinterpret_cast<const char*>(w) - end * row;
            if (beyond >= 0) next = static_cast<const char*>(after) + beyond;
            part_of_tile<Scheme, kLow, kI, ahead.value>(
                w + n * k + j, x + i * apart + j, some, k, apart, next, j == 0, last,
                kept + (parts > 1 ? s * kLow * kI : 0), sum);
            if (!last) continue;
#pragma GCC unroll 8
            for (int l = 0; l < kI; ++l)
              __builtin_memcpy(y + (i + l) * stride + n, sum + l * kLow, sizeof(float) * kLow);
          }
        }
      };
      // A third of it with each of the first three spans, or where there are two, more at first
      const int64_t nth = count++;
      if (m <= kInputs) return through(Count<7>());
      if (m <= 2 * kInputs) return nth ? through(Count<4>()) : through(Count<3>());
      if (nth == 0) return through(Count<1>());
      if (nth == 1) return through(Count<2>());
      return nth == 2 ? through(Count<4>()) : through(Count<0>());
    });
  }
  return first;
}

// Products --------------------------------------------------------------------------------------

#ifdef SPECDEC_DOT
constexpr bool kDot = true;
#else
constexpr bool kDot = false;
#endif

// Inputs whose entries of one column would share few sets of the first cache lie further apart, by
// so many lines that eight inputs begin at sets of their own
int64_t spread(int64_t bytes) { return bytes % 2048 ? bytes : bytes + 512; }

int64_t room([[maybe_unused]] Form form, int64_t k) {
#ifdef SPECDEC_DOT
  if (form == specdec::kPacked) return kHead + 2 * up(k, 64);
  if (form == specdec::kHalf) return spread(up(2 * k, 64));
#endif
  return spread(up(4 * k, 64));
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
    if (m > 2 && (m + kLow) * 2 * k > kBoth)
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
