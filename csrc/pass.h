// What a forward pass does to numbers, for one instruction set.
//
// pass_vector.h is compiled for several, and the best that the machine has is taken at run time.
// Sums run over 16 interleaved lanes and are closed in a fixed order, whatever the width of a
// vector and however many inputs share a weight: what an input gets does not depend on the others
// (with float32 weights, but for rounding).
#pragma once

#include <cstdint>

namespace specdec {

// How a matrix [n, k] lies in memory: rows of numbers, or bytes as `packed` says
enum Form : int { kSingle = 0, kHalf = 1, kPacked = 2 };

// Packed: 16 rows side by side, four columns at a time: [n / 16, k / 4, 16, 4], what is missing at
// an edge being 128. A byte is its weight plus 128.
constexpr int64_t kSide = 16, kDeep = 4;

// Columns of the cache that one piece of attention reads
constexpr int64_t kSpan = 128;

// The queries of one lane that share a head of keys, and the columns they see
struct Sight {
  const float* query;  // [group, dim]
  int64_t first, last;
  float* out;   // [group, dim], relative to peak
  float* peak;  // [group] largest score
  float* mass;  // [group] sum of exp(score - peak)
  // Columns from `fork` on lie elsewhere: the k-th of them at column path[k]
  int64_t fork;
  const int64_t* path;
};

struct PassKernels {
  const char* name;
  // An input as a product wants it: bytes for k entries, a multiple of 64, and the conversion
  int64_t (*room)(Form form, int64_t k);
  void (*prepare)(Form form, const float* x, int64_t k, void* out);
  // y[i * stride + n] = scale[n] * sum_j w[n, j] * x[i, j] for n in [begin, end), i below m; scale
  // may be null, begin is a multiple of kSide beside packed weights. `after` is where the caller
  // reads on
  void (*product)(Form form, const void* w, const float* scale, const void* x, int64_t m, int64_t k,
                  int64_t begin, int64_t end, float* y, int64_t stride, const void* after);
  // y = x / sqrt(mean(x^2) + epsilon) * weight
  void (*normalise)(const float* x, const float* weight, float* y, int64_t n, float epsilon);
  // x += more
  void (*add)(float* x, const float* more, int64_t n);
  // y = silu(opened) * up
  void (*gate)(const float* opened, const float* up, float* y, int64_t n);
  // y = gelu(opened) * up, by tanh
  void (*curve)(const float* opened, const float* up, float* y, int64_t n);
  // Turns heads [heads, dim] to a position: x * cosine + rotate_half(x) * sine
  void (*rotate)(float* x, int64_t heads, const float* cosine, const float* sine, int64_t dim);
  // Attention to the columns in [begin, begin + kSpan) that each lane sees, at least one; keys and
  // values [columns, dim] in float32 or bfloat16 (queries and weights are rounded to it beside
  // these where the machine multiplies them, and lanes of one row may share what is read).
  // Scratch is as many floats as attend_room says, at an address that suits vectors.
  int64_t (*attend_room)(int64_t lanes, int64_t group, int64_t dim);
  void (*attend)(bool half, const void* keys, const void* values, int64_t begin,
                 const Sight* sights, int64_t lanes, int64_t group, int64_t dim, float scaling,
                 float* scratch);
  // out [dim] of n parts of one query's attention, each relative to its own peak
  void (*merge)(const float* const* parts, const float* peaks, const float* masses, int64_t n,
                int64_t dim, float* out);
  // y[i] += sum_j weights[j] * parts[j][begin + i] for i below n, parts in bfloat16
  void (*mix)(float* y, const uint16_t* const* parts, const float* weights, int64_t count,
              int64_t begin, int64_t n);
  // To bfloat16, to nearest, ties to even
  void (*narrow)(const float* x, uint16_t* y, int64_t n);
};

// The kernels for this machine, or for what SPECDEC_FAST_CPU_CAPABILITY (plain, avx2, avx512, dot)
// names.
const PassKernels& pass_kernels();

// Those of a name, null where the machine cannot run them
const PassKernels* pass_kernels(const char* name);

const PassKernels* plain_pass();
const PassKernels* avx2_pass();  // these are null where the compiler's target has no such set
const PassKernels* avx512_pass();
const PassKernels* dot_pass();  // AVX-512 with products of bfloat16 and of bytes

}  // namespace specdec
