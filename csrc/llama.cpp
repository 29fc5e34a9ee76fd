// One forward pass of a Llama-like model at a few positions on the CPU.
//
// A pass at a few positions is bound by the bytes of its weights and by what it costs to launch its
// operations, so the whole pass is one call: over a target's weights as they lie in memory, over a
// drafter's as bytes (pass.h). What lies between products is float32: the residual stream, softmax,
// sums. What a position gets does not depend on which others share its pass.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <vector>

#include "pass.h"
#include "team.h"

namespace {

using specdec::Form;
using specdec::kSide;
using specdec::kSpan;
using specdec::PassKernels;
using specdec::Sight;
using specdec::Team;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kPiece =
    1 << 15;  // bytes of weights a thread takes at once: a microsecond or two

// A buffer whose start suits vectors; what it holds at first does not matter
template <class Entry>
class Buffer {
 public:
  explicit Buffer(int64_t n) : held_(n * sizeof(Entry) + 64) {}
  Entry* data() {
    const uintptr_t at = reinterpret_cast<uintptr_t>(held_.data());
    return reinterpret_cast<Entry*>((at + 63) / 64 * 64);
  }
  Entry* operator+(int64_t n) { return data() + n; }

 private:
  std::vector<char> held_;
};

struct Matrix {
  const void* weight;
  Form form;
  const float* scale;   // null: 1
  const float* offset;  // null: 0
  int64_t rows, columns;

  int64_t row_bytes() const {
    return columns * (form == specdec::kPacked ? 1 : form == specdec::kHalf ? 2 : 4);
  }
};

// Inputs of one product, converted as the weights ask for
class Inputs {
 public:
  Inputs(const PassKernels& kernels, int64_t bytes) : kernels_(kernels), held_(bytes) {}

  const void* of(Form form, const float* x, int64_t m, int64_t k) {
    const int64_t apart = kernels_.room(form, k);
    for (int64_t i = 0; i < m; ++i) kernels_.prepare(form, x + i * k, k, held_ + i * apart);
    return held_.data();
  }

 private:
  const PassKernels& kernels_;
  Buffer<char> held_;
};

struct Shape {
  int64_t heads, kv_heads, dim;
  float scaling, epsilon;
};

// Where the lanes of a pass stand: row of the cache, column, and columns of that row that are
// hidden padding
struct Lanes {
  int64_t count;
  const int64_t *row, *column, *hidden;
};

struct Stored {
  void *keys, *values;
  bool half;
  int64_t capacity, window;
};

class Pass {
 public:
  Pass(Team& team, const PassKernels& kernels, const Shape& shape, const Lanes& lanes)
      : team_(team), kernels_(kernels), shape_(shape), lanes_(lanes) {}

  void normalise(const float* x, const float* weight, float* y, int64_t m, int64_t n) const {
    for (int64_t i = 0; i < m; ++i)
      kernels_.normalise(x + i * n, weight, y + i * n, n, shape_.epsilon);
  }

  // y [m, sum of rows] of m prepared inputs by matrices that read the same ones, outputs side by
  // side
  void apply(std::initializer_list<const Matrix*> matrices, const void* x, float* y,
             int64_t m) const {
    int64_t rows = 0, pieces = 0;
    for (const Matrix* matrix : matrices) rows += matrix->rows, pieces += count(*matrix);
    team_.share(pieces, [&](int64_t piece) {
      float* out = y;
      for (const Matrix* matrix : matrices) {
        if (piece < count(*matrix)) return part(*matrix, piece, x, out, m, rows);
        piece -= count(*matrix);
        out += matrix->rows;
      }
    });
  }

  // y [m, rows] = silu(opening x) * (raising x); scratch [m, 2 rows]
  void gated(const Matrix& opening, const Matrix& raising, const void* x, float* scratch, float* y,
             int64_t m) const {
    const int64_t rows = opening.rows, wide = 2 * rows, step = rows_of(opening);
    team_.share(count(opening), [&](int64_t piece) {
      const int64_t begin = piece * step, end = std::min(begin + step, rows);
      part(opening, piece, x, scratch, m, wide);
      part(raising, piece, x, scratch + rows, m, wide);
      for (int64_t i = 0; i < m; ++i) {
        const float* opened = scratch + i * wide + begin;
        kernels_.gate(opened, opened + rows, y + i * rows + begin, end - begin);
      }
    });
  }

  // Turns queries and keys of `fused [m, queries | keys | values]`, writes keys and values into the
  // cache, and attends: out [m, heads * dim]
  void attend(float* fused, const Stored& stored, const float* rotations, const float* norms,
              float* out) const {
    const Shape& s = shape_;
    const int64_t width = (s.heads + 2 * s.kv_heads) * s.dim, group = s.heads / s.kv_heads;
    const auto place = [&](int64_t row, int64_t head) {
      return (row * s.kv_heads + head) * stored.capacity * s.dim;
    };
    for (int64_t i = 0; i < lanes_.count; ++i) {
      float* lane = fused + i * width;
      for (int64_t h = 0; norms && h < s.heads + s.kv_heads; ++h) {
        const float* weight = norms + (h < s.heads ? 0 : s.dim);
        kernels_.normalise(lane + h * s.dim, weight, lane + h * s.dim, s.dim, s.epsilon);
      }
      const float* turn =
          rotations + std::max<int64_t>(lanes_.column[i] - lanes_.hidden[i], 0) * 2 * s.dim;
      kernels_.rotate(lane, s.heads + s.kv_heads, turn, turn + s.dim, s.dim);
      for (int64_t h = 0; h < s.kv_heads; ++h) {
        const int64_t at = place(lanes_.row[i], h) + lanes_.column[i] * s.dim;
        write(lane + (s.heads + h) * s.dim, stored, stored.keys, at);
        write(lane + (s.heads + s.kv_heads + h) * s.dim, stored, stored.values, at);
      }
    }
    std::vector<Reading> readings = plan(stored.window);
    const int64_t scratch = group * (kSpan + (s.dim + 15) / 16 * 16);
    int64_t sums = 0;
    for (Reading& reading : readings) {
      reading.sums = sums;
      sums += (reading.end - reading.begin) * group * (s.dim + 2);
    }
    Buffer<float> partial(sums * s.kv_heads);
    team_.share(static_cast<int64_t>(readings.size()) * s.kv_heads, [&](int64_t piece) {
      const Reading& reading = readings[piece / s.kv_heads];
      const int64_t head = piece % s.kv_heads, lanes = reading.end - reading.begin;
      float* found = partial + head * sums + reading.sums;
      thread_local std::vector<float> scores;
      thread_local std::vector<Sight> sights;
      scores.resize(scratch + 16);
      sights.resize(lanes);
      for (int64_t l = 0; l < lanes; ++l) {
        const int64_t i = reading.begin + l;
        float* at = found + l * group * (s.dim + 2);
        sights[l] = {fused + i * width + head * group * s.dim,
                     first(i, stored.window),
                     lanes_.column[i],
                     at,
                     at + group * s.dim,
                     at + group * (s.dim + 1)};
      }
      const int64_t row = place(lanes_.row[reading.begin], head), size = stored.half ? 2 : 4;
      kernels_.attend(stored.half, static_cast<const char*>(stored.keys) + row * size,
                      static_cast<const char*>(stored.values) + row * size, reading.span * kSpan,
                      sights.data(), lanes, group, s.dim, s.scaling, scores.data());
    });
    // Spans of a lane come in order, so a sum over them is the same whatever shares the pass
    team_.share(lanes_.count, [&](int64_t i) {
      thread_local std::vector<const float*> parts;
      thread_local std::vector<float> peaks, masses;
      for (int64_t h = 0; h < s.heads; ++h) {
        parts.clear(), peaks.clear(), masses.clear();
        for (const Reading& reading : readings) {
          if (i < reading.begin || i >= reading.end) continue;
          const int64_t g = h % group;
          const float* at =
              partial + h / group * sums + reading.sums + (i - reading.begin) * group * (s.dim + 2);
          parts.push_back(at + g * s.dim);
          peaks.push_back(at[group * s.dim + g]);
          masses.push_back(at[group * (s.dim + 1) + g]);
        }
        kernels_.merge(parts.data(), peaks.data(), masses.data(),
                       static_cast<int64_t>(parts.size()), s.dim, out + (i * s.heads + h) * s.dim);
      }
    });
  }

 private:
  // Lanes [begin, end) of one row read one span of its columns
  struct Reading {
    int64_t span, begin, end, sums;
  };

  int64_t rows_of(const Matrix& matrix) const {
    const int64_t rows = kPiece / std::max<int64_t>(matrix.row_bytes(), 1);
    return std::max<int64_t>(rows / kSide * kSide, kSide);
  }

  int64_t count(const Matrix& matrix) const {
    return (matrix.rows + rows_of(matrix) - 1) / rows_of(matrix);
  }

  void part(const Matrix& matrix, int64_t piece, const void* x, float* y, int64_t m,
            int64_t stride) const {
    const int64_t begin = piece * rows_of(matrix),
                  end = std::min(begin + rows_of(matrix), matrix.rows);
    kernels_.product(matrix.form, matrix.weight, matrix.scale, x, m, matrix.columns, begin, end, y,
                     stride);
    if (!matrix.offset) return;
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t n = begin; n < end; ++n) y[i * stride + n] += matrix.offset[n];
    }
  }

  void write(const float* x, const Stored& stored, void* to, int64_t at) const {
    if (stored.half) {
      kernels_.narrow(x, static_cast<uint16_t*>(to) + at, shape_.dim);
    } else {
      std::memcpy(static_cast<float*>(to) + at, x, sizeof(float) * shape_.dim);
    }
  }

  // First column that a lane sees
  int64_t first(int64_t i, int64_t window) const {
    // A hidden lane sees itself: nobody reads what it gives, but it must not be NaN
    const int64_t hidden = std::min(lanes_.hidden[i], lanes_.column[i]);
    return window ? std::max(hidden, lanes_.column[i] - window + 1) : hidden;
  }

  // Neighbouring lanes of a row share a reading
  std::vector<Reading> plan(int64_t window) const {
    std::vector<Reading> readings;
    for (int64_t begin = 0, end; begin < lanes_.count; begin = end) {
      int64_t low = first(begin, window), high = lanes_.column[begin];
      for (end = begin + 1; end < lanes_.count && lanes_.row[end] == lanes_.row[begin]; ++end) {
        low = std::min(low, first(end, window));
        high = std::max(high, lanes_.column[end]);
      }
      for (int64_t span = low / kSpan; span <= high / kSpan; ++span) {
        const auto sees = [&](int64_t i) {
          return first(i, window) < (span + 1) * kSpan && lanes_.column[i] >= span * kSpan;
        };
        for (int64_t i = begin; i < end;) {
          if (!sees(i)) {
            ++i;
            continue;
          }
          const int64_t from = i;
          while (i < end && sees(i)) ++i;
          readings.push_back({span, from, i, 0});
        }
      }
    }
    return readings;
  }

  Team& team_;
  const PassKernels& kernels_;
  const Shape& shape_;
  const Lanes& lanes_;
};

float widen(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

void check(const Tensor& tensor, ScalarType type, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == type && tensor.is_contiguous(), "llama_forward: ", name,
                  " has another type, or is not contiguous");
}

const float* floats(const Tensor& tensor, const char* name) {
  if (!tensor.numel()) return nullptr;
  check(tensor, ScalarType::Float, name);
  return tensor.const_data_ptr<float>();
}

// Rows of numbers [n, k], or bytes [n / 16, k / 4, 16, 4] with a scale for each of n rows
Matrix matrix_of(const Tensor& weight, const Tensor& scale, const Tensor& offset) {
  const ScalarType type = weight.scalar_type();
  check(weight, type, "a matrix");
  const float *factor = floats(scale, "a scale"), *added = floats(offset, "an offset");
  Matrix matrix{weight.const_data_ptr(), specdec::kPacked, factor, added, 0, 0};
  if (type == ScalarType::Byte) {
    STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) == kSide &&
                        weight.size(3) == specdec::kDeep && factor && scale.numel() > 0 &&
                        (scale.numel() + kSide - 1) / kSide == weight.size(0),
                    "llama_forward: bytes are [n / 16, k / 4, 16, 4], with a scale a row");
    matrix.rows = scale.numel();
    matrix.columns = weight.size(1) * specdec::kDeep;
  } else {
    STD_TORCH_CHECK(
        (type == ScalarType::BFloat16 || type == ScalarType::Float) && weight.dim() == 2 && !factor,
        "llama_forward: weights are bytes, bfloat16 or float32");
    matrix.form = type == ScalarType::Float ? specdec::kSingle : specdec::kHalf;
    matrix.rows = weight.size(0);
    matrix.columns = weight.size(1);
  }
  STD_TORCH_CHECK(!added || offset.numel() == matrix.rows,
                  "llama_forward: a matrix has an offset for each row, or none");
  return matrix;
}

Tensor llama_forward(const Tensor& tokens, const Tensor& rows, const Tensor& columns,
                     const Tensor& hidden_columns, const Tensor& wanted, const Tensor& embedding,
                     std::vector<Tensor> weights, std::vector<Tensor> scales,
                     std::vector<Tensor> offsets, const Tensor& norms, const Tensor& head_norms,
                     const Tensor& rotations, std::vector<Tensor> keys, std::vector<Tensor> values,
                     std::vector<int64_t> windows, int64_t heads, int64_t kv_heads, double scaling,
                     double epsilon, int64_t capability) {
  const int64_t hidden = embedding.size(1), layers = static_cast<int64_t>(keys.size());
  for (const Tensor* index : {&tokens, &rows, &columns, &hidden_columns, &wanted}) {
    check(*index, ScalarType::Long, "an index");
  }
  const Lanes lanes{tokens.size(0), rows.const_data_ptr<int64_t>(),
                    columns.const_data_ptr<int64_t>(), hidden_columns.const_data_ptr<int64_t>()};
  const int64_t m = lanes.count, asked = wanted.size(0);
  const int64_t* token = tokens.const_data_ptr<int64_t>();
  const int64_t* lane = wanted.const_data_ptr<int64_t>();
  STD_TORCH_CHECK(
      static_cast<int64_t>(weights.size()) == 7 * layers + 1 && scales.size() == weights.size() &&
          offsets.size() == weights.size() && values.size() == keys.size() &&
          windows.size() == keys.size() && rows.size(0) == m && columns.size(0) == m &&
          hidden_columns.size(0) == m && norms.numel() == (2 * layers + 1) * hidden,
      "llama_forward: seven matrices a layer and the head, a norm before each half and the head");
  std::vector<Matrix> matrices;
  for (size_t i = 0; i < weights.size(); ++i)
    matrices.push_back(matrix_of(weights[i], scales[i], offsets[i]));
  const Shape shape{heads, kv_heads, rotations.size(2), static_cast<float>(scaling),
                    static_cast<float>(epsilon)};
  const float *norm = floats(norms, "norms"), *head_norm = floats(head_norms, "norms of heads");
  const float* turns = floats(rotations, "rotations");
  const bool half = embedding.scalar_type() == ScalarType::BFloat16;
  check(embedding, half ? ScalarType::BFloat16 : ScalarType::Float, "embedding");
  for (int64_t i = 0; i < m; ++i) {
    STD_TORCH_CHECK(token[i] >= 0 && token[i] < embedding.size(0) && lanes.column[i] >= 0 &&
                        lanes.row[i] >= 0 && lanes.hidden[i] >= 0 &&
                        lanes.column[i] < rotations.size(0),
                    "llama_forward: a token, row or column is out of range");
  }
  for (int64_t l = 0; l < layers; ++l) {
    const ScalarType stored = keys[l].scalar_type();
    STD_TORCH_CHECK(stored == ScalarType::Float || stored == ScalarType::BFloat16,
                    "llama_forward: caches are float32 or bfloat16");
    check(keys[l], stored, "a cache");
    check(values[l], stored, "a cache");
    for (int64_t i = 0; i < m; ++i) {
      STD_TORCH_CHECK(lanes.row[i] < keys[l].size(0) && lanes.column[i] < keys[l].size(2) &&
                          keys[l].size(1) == kv_heads && keys[l].size(3) == shape.dim &&
                          values[l].size(0) == keys[l].size(0) && values[l].size(1) == kv_heads &&
                          values[l].size(2) == keys[l].size(2) && values[l].size(3) == shape.dim,
                      "llama_forward: a row or column is out of range of the cache");
    }
  }
  for (int64_t i = 0; i < asked; ++i) {
    STD_TORCH_CHECK(lane[i] >= 0 && lane[i] < m, "llama_forward: a wanted lane is out of range");
  }

  const int64_t inner = layers ? matrices[4].rows : 0, dim = shape.dim;
  const std::array<std::array<int64_t, 2>, 7> sizes{{{heads * dim, hidden},
                                                     {kv_heads * dim, hidden},
                                                     {kv_heads * dim, hidden},
                                                     {hidden, heads * dim},
                                                     {inner, hidden},
                                                     {inner, hidden},
                                                     {hidden, inner}}};
  for (int64_t i = 0; i <= 7 * layers; ++i) {
    Matrix& matrix = matrices[i];
    const bool last = i == 7 * layers;
    const int64_t columns = last ? hidden : sizes[i % 7][1];
    if (matrix.form == specdec::kPacked && matrix.columns - columns < specdec::kDeep)
      matrix.columns = std::min(matrix.columns, columns);
    STD_TORCH_CHECK((last || matrix.rows == sizes[i % 7][0]) && matrix.columns == columns &&
                        matrix.form == matrices[0].form,
                    "llama_forward: matrix ", i, " has another shape or type");
  }
  STD_TORCH_CHECK(rotations.dim() == 3 && rotations.size(1) == 2,
                  "llama_forward: rotations are [positions, 2, dim]");
  STD_TORCH_CHECK(heads % kv_heads == 0 && (!head_norm || head_norms.numel() == 2 * layers * dim),
                  "llama_forward: heads that share no keys evenly, or a norm of another shape");
  const std::array<int64_t, 2> size{asked, matrices.back().rows};
  Tensor logits = torch::stable::new_empty(norms, {size.data(), 2}, ScalarType::Float);
  float* scores = logits.mutable_data_ptr<float>();
  std::vector<Stored> caches;
  for (int64_t l = 0; l < layers; ++l) {
    caches.push_back({keys[l].mutable_data_ptr(), values[l].mutable_data_ptr(),
                      keys[l].scalar_type() == ScalarType::BFloat16, keys[l].size(2), windows[l]});
  }
  static constexpr const char* kNames[] = {"plain", "avx2", "avx512", "dot"};
  STD_TORCH_CHECK(capability >= -1 && capability < 4, "llama_forward: no such instruction set");
  const PassKernels* named =
      capability < 0 ? &specdec::pass_kernels() : specdec::pass_kernels(kNames[capability]);
  STD_TORCH_CHECK(named, "llama_forward: this machine cannot run ", kNames[capability]);
  const PassKernels& kernels = *named;
  Team::gather([&](Team& team) {
    const Pass pass(team, kernels, shape, lanes);
    const int64_t width = (heads + 2 * kv_heads) * dim,
                  widest = std::max({hidden, heads * dim, inner});
    int64_t room = 0;
    for (Form form : {specdec::kSingle, specdec::kHalf, specdec::kPacked})
      room = std::max(room, kernels.room(form, widest));
    Inputs inputs(kernels, std::max(m, asked) * room);
    Buffer<float> x(m * hidden), normal(std::max(m, asked) * hidden), added(m * hidden);
    Buffer<float> fused(m * width), seen(m * heads * dim), opened(m * 2 * inner), gated(m * inner);
    for (int64_t i = 0; i < m; ++i) {
      const int64_t at = token[i] * hidden;
      for (int64_t h = 0; h < hidden; ++h) {
        x.data()[i * hidden + h] =
            half ? widen(static_cast<const uint16_t*>(embedding.const_data_ptr())[at + h])
                 : embedding.const_data_ptr<float>()[at + h];
      }
    }
    const auto add = [&] {
      float* sum = x.data();
      const float* more = added.data();
      for (int64_t i = 0; i < m * hidden; ++i) sum[i] += more[i];
    };
    for (int64_t l = 0; l < layers; ++l) {
      const Matrix* matrix = &matrices[7 * l];
      pass.normalise(x.data(), norm + 2 * l * hidden, normal.data(), m, hidden);
      pass.apply({matrix, matrix + 1, matrix + 2},
                 inputs.of(matrix->form, normal.data(), m, hidden), fused.data(), m);
      pass.attend(fused.data(), caches[l], turns, head_norm ? head_norm + 2 * l * dim : nullptr,
                  seen.data());
      pass.apply({matrix + 3}, inputs.of(matrix[3].form, seen.data(), m, heads * dim), added.data(),
                 m);
      add();
      pass.normalise(x.data(), norm + (2 * l + 1) * hidden, normal.data(), m, hidden);
      pass.gated(matrix[4], matrix[5], inputs.of(matrix[4].form, normal.data(), m, hidden),
                 opened.data(), gated.data(), m);
      pass.apply({matrix + 6}, inputs.of(matrix[6].form, gated.data(), m, inner), added.data(), m);
      add();
    }
    for (int64_t i = 0; i < asked; ++i) {
      pass.normalise(x + lane[i] * hidden, norm + 2 * layers * hidden, normal + i * hidden, 1,
                     hidden);
    }
    const Matrix& last = matrices.back();
    pass.apply({&last}, inputs.of(last.form, normal.data(), asked, hidden), scores, asked);
  });
  return logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(specdec_fast, CPU, library) {
  library.impl("llama_forward", TORCH_BOX(&llama_forward));
}
