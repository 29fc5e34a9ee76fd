// One forward pass of a Llama-like model at a few positions on the CPU.
//
// A pass at a few positions is bound by the bytes of its weights and by what it costs to launch its
// operations, so the whole pass is one call over weights of 8, 16 or 32 bits as they lie in memory.
// Everything else is float32: the residual stream, softmax, sums. What a position gets does not
// depend on which others share its pass.
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

// Sums may be taken in any order here, which is what lets a compiler use vectors for them
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fast-math")
#endif

#include "multiply.h"

namespace {

using specdec::multiply;
using specdec::narrow;
using specdec::widen;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kParallel =
    1 << 17;  // products below this finish before a second thread has woken up

// Attention of one query head over the keys of its row from column `first` to `last`
template <class Stored>
SPECDEC_INLINE void attend(const float* query, const Stored* keys, const Stored* values,
                           int64_t first, int64_t last, int64_t dim, float scaling, float* weights,
                           float* out) {
  float peak = std::numeric_limits<float>::lowest();
  for (int64_t c = first; c <= last; ++c) {
    float sum = 0;
    for (int64_t d = 0; d < dim; ++d) sum += query[d] * widen(keys[c * dim + d]);
    weights[c] = sum * scaling;
    peak = std::max(peak, weights[c]);
  }
  float mass = 0;
  for (int64_t c = first; c <= last; ++c) {
    weights[c] = std::exp(weights[c] - peak);
    mass += weights[c];
  }
  std::fill_n(out, dim, 0.0f);
  for (int64_t c = first; c <= last; ++c) {
    for (int64_t d = 0; d < dim; ++d) out[d] += weights[c] * widen(values[c * dim + d]);
  }
  for (int64_t d = 0; d < dim; ++d) out[d] /= mass;
}

SPECDEC_CLONES
void attend_one(const float* query, const float* keys, const float* values, int64_t first,
                int64_t last, int64_t dim, float scaling, float* weights, float* out) {
  attend(query, keys, values, first, last, dim, scaling, weights, out);
}

SPECDEC_CLONES
void attend_one(const float* query, const uint16_t* keys, const uint16_t* values, int64_t first,
                int64_t last, int64_t dim, float scaling, float* weights, float* out) {
  attend(query, keys, values, first, last, dim, scaling, weights, out);
}

// y = silu(opened) * up
SPECDEC_CLONES
void gate(const float* opened, const float* up, float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = opened[i] / (1.0f + std::exp(-opened[i])) * up[i];
}

// y = x / sqrt(mean(x^2) + epsilon) * weight
SPECDEC_CLONES
void normalise(const float* x, const float* weight, float* y, int64_t n, float epsilon) {
  float squares = 0;
  for (int64_t i = 0; i < n; ++i) squares += x[i] * x[i];
  const float factor = 1.0f / std::sqrt(squares / n + epsilon);
  for (int64_t i = 0; i < n; ++i) y[i] = x[i] * factor * weight[i];
}

struct Matrix {
  const void* weight;
  ScalarType type;
  const float* scale;   // null: 1
  const float* offset;  // null: 0
  int64_t rows, columns;

  void part(const float* x, float* y, int64_t begin, int64_t end, int64_t m, int64_t stride) const {
    if (type == ScalarType::Char) {
      multiply(static_cast<const int8_t*>(weight), x, y, begin, end, columns, m, stride);
    } else if (type == ScalarType::BFloat16) {
      multiply(static_cast<const uint16_t*>(weight), x, y, begin, end, columns, m, stride);
    } else {
      multiply(static_cast<const float*>(weight), x, y, begin, end, columns, m, stride);
    }
    if (!scale && !offset) return;
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t n = begin; n < end; ++n) {
        float& out = y[i * stride + n];
        out = (scale ? out * scale[n] : out) + (offset ? offset[n] : 0.0f);
      }
    }
  }
};

// y [m, sum of rows] of x [m, columns] by matrices that read the same input, their outputs side by
// side
void apply(std::initializer_list<const Matrix*> matrices, const float* x, float* y, int64_t m) {
  int64_t rows = 0;
  for (const Matrix* matrix : matrices) rows += matrix->rows;
  const auto span = [&](int64_t begin, int64_t end) {
    int64_t first = 0;
    for (const Matrix* matrix : matrices) {
      const int64_t low = std::max<int64_t>(begin - first, 0),
                    high = std::min(end - first, matrix->rows);
      if (low < high) matrix->part(x, y + first, low, high, m, rows);
      first += matrix->rows;
    }
  };
  const int64_t columns = (*matrices.begin())->columns;
  if (rows * columns * m < kParallel) {
    span(0, rows);
  } else {
    torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kParallel / (2 * columns * m)), span);
  }
}

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

// Turns the heads of one lane to their position: x * cos + rotate_half(x) * sin
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

template <class Stored>
void mix(float* fused, float* out, const Lanes& lanes, const Tensor& keys, const Tensor& values,
         const float* rotations, const float* norms, int64_t window, const Shape& s) {
  Stored* key_data = static_cast<Stored*>(keys.mutable_data_ptr());
  Stored* value_data = static_cast<Stored*>(values.mutable_data_ptr());
  const int64_t width = (s.heads + 2 * s.kv_heads) * s.dim, capacity = keys.size(2);
  const auto place = [&](int64_t row, int64_t head) {
    return (row * s.kv_heads + head) * capacity * s.dim;
  };
  int64_t longest = 0;
  for (int64_t i = 0; i < lanes.count; ++i) {
    float* lane = fused + i * width;
    longest = std::max(longest, lanes.column[i] + 1);
    if (norms) {
      for (int64_t h = 0; h < s.heads + s.kv_heads; ++h) {
        const float* weight = norms + (h < s.heads ? 0 : s.dim);
        normalise(lane + h * s.dim, weight, lane + h * s.dim, s.dim, s.epsilon);
      }
    }
    const float* turn =
        rotations + std::max<int64_t>(lanes.column[i] - lanes.hidden[i], 0) * 2 * s.dim;
    rotate(lane, s.heads + s.kv_heads, turn, turn + s.dim, s.dim);
    for (int64_t h = 0; h < s.kv_heads; ++h) {
      const int64_t at = place(lanes.row[i], h) + lanes.column[i] * s.dim;
      for (int64_t d = 0; d < s.dim; ++d) {
        narrow(lane[(s.heads + h) * s.dim + d], key_data + at + d);
        narrow(lane[(s.heads + s.kv_heads + h) * s.dim + d], value_data + at + d);
      }
    }
  }
  const auto part = [&](int64_t begin, int64_t end) {
    std::vector<float> weights(longest);
    for (int64_t j = begin; j < end; ++j) {
      const int64_t i = j / s.heads, h = j % s.heads, last = lanes.column[i];
      const int64_t at = place(lanes.row[i], h * s.kv_heads / s.heads);
      // A hidden lane sees itself: nobody reads what it gives, but it must not be NaN
      int64_t first = std::min(lanes.hidden[i], last);
      if (window) first = std::max(first, last - window + 1);
      attend_one(fused + i * width + h * s.dim, key_data + at, value_data + at, first, last, s.dim,
                 s.scaling, weights.data(), out + (i * s.heads + h) * s.dim);
    }
  };
  if (lanes.count * s.heads * longest * s.dim * 2 < kParallel) {
    part(0, lanes.count * s.heads);
  } else {
    torch::stable::parallel_for(0, lanes.count * s.heads, 1, part);
  }
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

Matrix matrix_of(const Tensor& weight, const Tensor& scale, const Tensor& offset) {
  const ScalarType type = weight.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Char || type == ScalarType::BFloat16 || type == ScalarType::Float,
      "llama_forward: weights are int8, bfloat16 or float32");
  STD_TORCH_CHECK(weight.dim() == 2 && (!scale.numel() || scale.numel() == weight.size(0)) &&
                      (!offset.numel() || offset.numel() == weight.size(0)),
                  "llama_forward: a matrix has a scale and an offset for each row, or none");
  check(weight, type, "a matrix");
  return {weight.const_data_ptr(),     type,           floats(scale, "a scale"),
          floats(offset, "an offset"), weight.size(0), weight.size(1)};
}

Tensor llama_forward(const Tensor& tokens, const Tensor& rows, const Tensor& columns,
                     const Tensor& hidden_columns, const Tensor& wanted, const Tensor& embedding,
                     std::vector<Tensor> weights, std::vector<Tensor> scales,
                     std::vector<Tensor> offsets, const Tensor& norms, const Tensor& head_norms,
                     const Tensor& rotations, std::vector<Tensor> keys, std::vector<Tensor> values,
                     std::vector<int64_t> windows, int64_t heads, int64_t kv_heads, double scaling,
                     double epsilon) {
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
  for (int64_t i = 0; i < 7 * layers; ++i) {
    STD_TORCH_CHECK(matrices[i].rows == sizes[i % 7][0] && matrices[i].columns == sizes[i % 7][1],
                    "llama_forward: matrix ", i, " has another shape");
  }
  STD_TORCH_CHECK(rotations.dim() == 3 && rotations.size(1) == 2,
                  "llama_forward: rotations are [positions, 2, dim]");
  STD_TORCH_CHECK(
      matrices.back().columns == hidden && (!head_norm || head_norms.numel() == 2 * layers * dim),
      "llama_forward: the head or a norm has another shape");
  std::vector<float> x(m * hidden), normal(std::max(m, asked) * hidden), added(m * hidden);
  std::vector<float> fused(m * (heads + 2 * kv_heads) * shape.dim), seen(m * heads * shape.dim);
  std::vector<float> opened(m * 2 * inner), gated(m * inner);
  for (int64_t i = 0; i < m; ++i) {
    const int64_t at = token[i] * hidden;
    for (int64_t h = 0; h < hidden; ++h) {
      x[i * hidden + h] =
          half ? widen(static_cast<const uint16_t*>(embedding.const_data_ptr())[at + h])
               : embedding.const_data_ptr<float>()[at + h];
    }
  }
  const auto add = [&] {
    for (int64_t i = 0; i < m * hidden; ++i) x[i] += added[i];
  };
  for (int64_t l = 0; l < layers; ++l) {
    const Matrix* matrix = &matrices[7 * l];
    for (int64_t i = 0; i < m; ++i) {
      normalise(&x[i * hidden], norm + 2 * l * hidden, &normal[i * hidden], hidden, shape.epsilon);
    }
    apply({matrix, matrix + 1, matrix + 2}, normal.data(), fused.data(), m);
    const float* own = head_norm ? head_norm + l * 2 * shape.dim : nullptr;
    if (keys[l].scalar_type() == ScalarType::BFloat16) {
      mix<uint16_t>(fused.data(), seen.data(), lanes, keys[l], values[l], turns, own, windows[l],
                    shape);
    } else {
      mix<float>(fused.data(), seen.data(), lanes, keys[l], values[l], turns, own, windows[l],
                 shape);
    }
    apply({matrix + 3}, seen.data(), added.data(), m);
    add();
    for (int64_t i = 0; i < m; ++i) {
      normalise(&x[i * hidden], norm + (2 * l + 1) * hidden, &normal[i * hidden], hidden,
                shape.epsilon);
    }
    apply({matrix + 4, matrix + 5}, normal.data(), opened.data(), m);
    for (int64_t i = 0; i < m; ++i) {
      gate(&opened[i * 2 * inner], &opened[(i * 2 + 1) * inner], &gated[i * inner], inner);
    }
    apply({matrix + 6}, gated.data(), added.data(), m);
    add();
  }
  for (int64_t i = 0; i < asked; ++i) {
    normalise(&x[lane[i] * hidden], norm + 2 * layers * hidden, &normal[i * hidden], hidden,
              shape.epsilon);
  }
  const std::array<int64_t, 2> size{asked, matrices.back().rows};
  Tensor logits = torch::stable::new_empty(norms, {size.data(), 2}, ScalarType::Float);
  apply({&matrices.back()}, normal.data(), logits.mutable_data_ptr<float>(), asked);
  return logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(specdec_fast, CPU, library) {
  library.impl("llama_forward", TORCH_BOX(&llama_forward));
}
