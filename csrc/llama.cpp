// One forward pass of a Llama-like model at a few positions on the CPU.
//
// A pass at a few positions is bound by the bytes of its weights and by what it costs to launch its
// operations, so the whole pass is one call: over a target's weights as they lie in memory, over a
// drafter's as bytes (pass.h). What lies between products is float32: the residual stream, softmax,
// sums; what goes into one over bfloat16, weights of attention too, may be rounded to it. What a
// position gets does not depend on which others share its pass; where the weights are float32, but
// for rounding.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "llama_model.h"
#include "shelf.h"

namespace {

using specdec::Buffer;
using specdec::Form;
using specdec::Inputs;
using specdec::kSide;
using specdec::Lanes;
using specdec::Llama;
using specdec::Matrix;
using specdec::Pass;
using specdec::PassKernels;
using specdec::Session;
using specdec::Shape;
using specdec::Stored;
using specdec::Team;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

float widen(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

void check(const Tensor& tensor, ScalarType type, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == type && tensor.is_contiguous(), "llama: ", name,
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
                    "llama: bytes are [n / 16, k / 4, 16, 4], with a scale a row");
    matrix.rows = scale.numel();
    matrix.columns = weight.size(1) * specdec::kDeep;
  } else {
    STD_TORCH_CHECK(
        (type == ScalarType::BFloat16 || type == ScalarType::Float) && weight.dim() == 2 && !factor,
        "llama: weights are bytes, bfloat16 or float32");
    matrix.form = type == ScalarType::Float ? specdec::kSingle : specdec::kHalf;
    matrix.rows = weight.size(0);
    matrix.columns = weight.size(1);
  }
  STD_TORCH_CHECK(!added || offset.numel() == matrix.rows,
                  "llama: a matrix has an offset for each row, or none");
  return matrix;
}

}  // namespace

namespace specdec {

void Llama::embed(int64_t token, float* out) const {
  const int64_t at = token * hidden;
  for (int64_t h = 0; h < hidden; ++h) {
    out[h] = scale * (half ? widen(static_cast<const uint16_t*>(embedding)[at + h])
                           : static_cast<const float*>(embedding)[at + h]);
  }
}

void Llama::run(Team& team, const PassKernels& kernels, const Lanes& lanes, const int64_t* token,
                const std::vector<Stored>& caches, const float* turns, int64_t apart,
                const std::vector<int64_t>& asked, float* logits, float* ends) const {
  const int64_t m = lanes.count, last = static_cast<int64_t>(asked.size()), dim = shape.dim;
  const int64_t mixed = shape.heads * dim, width = mixed + 2 * shape.kv_heads * dim;
  const Form form = matrices[0].form;
  thread_local Desk desk;
  Buffer<float>&x = desk.x, &normal = desk.normal, &added = desk.added, &fused = desk.fused;
  Buffer<float>&seen = desk.seen, &opened = desk.opened, &gated = desk.gated;
  const Pass pass(team, kernels, shape, lanes, desk.partial);
  const auto room = [&](int64_t k) { return kernels.room(form, k); };
  Inputs inputs(kernels, desk.inputs,
                std::max(m, last) * std::max({room(hidden), room(mixed), room(inner)}));
  x.reserve(m * hidden), normal.reserve(std::max(m, last) * hidden), added.reserve(m * hidden);
  fused.reserve(m * width), seen.reserve(m * mixed), opened.reserve(m * 2 * inner);
  gated.reserve(m * inner);
  // To the next product's input, a lane at a time
  const auto normalised = [&](int64_t i, int64_t lane, const float* weight) {
    pass.normalise(x + lane * hidden, weight, normal + i * hidden, hidden);
    inputs.take(form, i, normal + i * hidden, hidden);
  };
  // What a half has made joins its lane, behind a norm of its own where the model has one
  const auto more = [&](int64_t i, int64_t l, int64_t half_of) {
    float* made = added + i * hidden;
    if (norms_a_layer == 4)
      pass.normalise(made, norms + (4 * l + 2 + half_of) * hidden, made, hidden);
    pass.add(x + i * hidden, made, hidden);
  };
  pass.each(m, [&](int64_t i) { embed(token[i], x + i * hidden); });
  for (int64_t l = 0; l < layers; ++l) {
    const Matrix* matrix = &matrices[7 * l];
    const float* norm = norms + norms_a_layer * l * hidden;
    pass.each(m, [&](int64_t i) {
      if (l) more(i, l - 1, 1);
      normalised(i, i, norm);
    });
    pass.apply({matrix, matrix + 1, matrix + 2}, inputs.data(), fused.data(), m);
    pass.attend(fused.data(), caches[l], turns + tables[l] * apart,
                head_norms ? head_norms + 2 * l * dim : nullptr, seen.data(),
                [&](int64_t i) { inputs.take(form, i, seen + i * mixed, mixed); });
    pass.apply({matrix + 3}, inputs.data(), added.data(), m);
    pass.each(m, [&](int64_t i) {
      more(i, l, 0);
      normalised(i, i, norm + hidden);
    });
    pass.apply({matrix + 4, matrix + 5}, inputs.data(), opened.data(), m);
    pass.gate(curved, opened.data(), gated.data(), m, inner,
              [&](int64_t i) { inputs.take(form, i, gated + i * inner, inner); });
    pass.apply({matrix + 6}, inputs.data(), added.data(), m);
  }
  if (layers) pass.each(m, [&](int64_t i) { more(i, layers - 1, 1); });
  const float* norm = norms + norms_a_layer * layers * hidden;
  pass.each(last, [&](int64_t i) { normalised(i, asked[i], norm); });
  if (ends) std::memcpy(ends, normal.data(), last * hidden * sizeof(float));
  pass.apply({&matrices.back()}, inputs.data(), logits, last);
}

}  // namespace specdec

namespace {

using Models = specdec::Shelf<const Llama>;
using Sessions = specdec::Shelf<const Session>;

int64_t llama_hold(const Tensor& embedding, std::vector<Tensor> weights, std::vector<Tensor> scales,
                   std::vector<Tensor> offsets, const Tensor& norms, const Tensor& head_norms,
                   std::vector<int64_t> windows, std::vector<int64_t> tables, int64_t heads,
                   int64_t kv_heads, int64_t dim, double scaling, double epsilon, double scale,
                   bool curved) {
  auto model = std::make_shared<Llama>();
  const int64_t layers = static_cast<int64_t>(windows.size()), hidden = embedding.size(1);
  const int64_t more = norms.numel() == (4 * layers + 1) * hidden ? 4 : 2;
  STD_TORCH_CHECK(
      static_cast<int64_t>(weights.size()) == 7 * layers + 1 && scales.size() == weights.size() &&
          offsets.size() == weights.size() && norms.numel() == (more * layers + 1) * hidden &&
          tables.size() == windows.size(),
      "llama: seven matrices a layer and the head, a norm before each half and the head, or behind "
      "each half as well");
  STD_TORCH_CHECK(heads > 0 && kv_heads > 0 && heads % kv_heads == 0 &&
                      (!head_norms.numel() || head_norms.numel() == 2 * layers * dim),
                  "llama: heads that share no keys evenly, or a norm of another shape");
  for (size_t i = 0; i < weights.size(); ++i)
    model->matrices.push_back(matrix_of(weights[i], scales[i], offsets[i]));
  model->half = embedding.scalar_type() == ScalarType::BFloat16;
  check(embedding, model->half ? ScalarType::BFloat16 : ScalarType::Float, "embedding");
  model->embedding = embedding.const_data_ptr();
  model->vocabulary = embedding.size(0);
  model->hidden = hidden;
  model->layers = layers;
  model->inner = layers ? model->matrices[4].rows : 0;
  model->norms = floats(norms, "norms");
  model->head_norms = floats(head_norms, "norms of heads");
  model->shape = {heads, kv_heads, dim, static_cast<float>(scaling), static_cast<float>(epsilon)};
  model->windows = std::move(windows);
  model->tables = std::move(tables);
  model->norms_a_layer = more;
  model->curved = curved;
  model->scale = static_cast<float>(scale);
  const int64_t inner = model->inner;
  const std::array<std::array<int64_t, 2>, 7> sizes{{{heads * dim, hidden},
                                                     {kv_heads * dim, hidden},
                                                     {kv_heads * dim, hidden},
                                                     {hidden, heads * dim},
                                                     {inner, hidden},
                                                     {inner, hidden},
                                                     {hidden, inner}}};
  for (int64_t i = 0; i <= 7 * layers; ++i) {
    Matrix& matrix = model->matrices[i];
    const bool last = i == 7 * layers;
    const int64_t columns = last ? hidden : sizes[i % 7][1];
    if (matrix.form == specdec::kPacked && matrix.columns - columns < specdec::kDeep)
      matrix.columns = std::min(matrix.columns, columns);
    STD_TORCH_CHECK((last || matrix.rows == sizes[i % 7][0]) && matrix.columns == columns &&
                        matrix.form == model->matrices[0].form,
                    "llama: matrix ", i, " has another shape or type");
  }
  for (const auto* part : {&weights, &scales, &offsets})
    model->kept.insert(model->kept.end(), part->begin(), part->end());
  model->kept.insert(model->kept.end(), {embedding, norms, head_norms});
  return Models::all().put(std::move(model));
}

void llama_forget(int64_t number) { Models::all().drop(number); }

const PassKernels& kernels_of(int64_t capability);

int64_t llama_open(int64_t number, const Tensor& rotations, std::vector<Tensor> keys,
                   std::vector<Tensor> values, int64_t capability) {
  auto session = std::make_shared<Session>();
  session->model = Models::all().get(number);
  session->kernels = &kernels_of(capability);
  const Llama& model = *session->model;
  const Shape& shape = model.shape;
  STD_TORCH_CHECK(rotations.dim() == 4 && rotations.size(2) == 2 && rotations.size(3) == shape.dim,
                  "llama: rotations are [tables, positions, 2, dim]");
  for (int64_t table : model.tables)
    STD_TORCH_CHECK(table >= 0 && table < rotations.size(0), "llama: a layer turns by no table");
  session->turns = floats(rotations, "rotations");
  session->columns = rotations.size(1);
  session->apart = session->columns * 2 * shape.dim;
  STD_TORCH_CHECK(static_cast<int64_t>(keys.size()) == model.layers && values.size() == keys.size(),
                  "llama: keys and values of every layer");
  for (int64_t l = 0; l < model.layers; ++l) {
    const Tensor &key = keys[l], &value = values[l];
    const ScalarType stored = key.scalar_type();
    STD_TORCH_CHECK(stored == ScalarType::Float || stored == ScalarType::BFloat16,
                    "llama: caches are float32 or bfloat16");
    check(key, stored, "a cache");
    check(value, stored, "a cache");
    STD_TORCH_CHECK(key.size(0) == keys[0].size(0) && key.size(1) == shape.kv_heads &&
                        key.size(3) == shape.dim && value.size(0) == key.size(0) &&
                        value.size(1) == shape.kv_heads && value.size(2) == key.size(2) &&
                        value.size(3) == shape.dim,
                    "llama: caches are [rows, heads, columns, dim]");
    session->caches.push_back({key.mutable_data_ptr(), value.mutable_data_ptr(),
                               stored == ScalarType::BFloat16, key.size(2), model.windows[l]});
    session->rows = key.size(0);
    session->columns = std::min(session->columns, key.size(2));
  }
  session->kept = {rotations};
  for (const auto* part : {&keys, &values})
    session->kept.insert(session->kept.end(), part->begin(), part->end());
  return Sessions::all().put(std::move(session));
}

void llama_close(int64_t number) { Sessions::all().drop(number); }

constexpr const char* kNames[] = {"plain", "avx2", "avx512", "dot"};

int64_t llama_capability() {
  int64_t index = 0;
  while (std::strcmp(kNames[index], specdec::pass_kernels().name)) ++index;
  return index;
}

}  // namespace

namespace specdec {

std::shared_ptr<const Session> llama_session(int64_t number) {
  return Shelf<const Session>::all().get(number);
}

}  // namespace specdec

namespace {

// The kernels of an instruction set by number, the best one's for -1
const PassKernels& kernels_of(int64_t capability) {
  STD_TORCH_CHECK(capability >= -1 && capability < 4, "llama: no such instruction set");
  const PassKernels* kernels =
      capability < 0 ? &specdec::pass_kernels() : specdec::pass_kernels(kNames[capability]);
  STD_TORCH_CHECK(kernels, "llama: this machine cannot run ", kNames[capability]);
  return *kernels;
}

Tensor llama_forward(int64_t number, const Tensor& tokens, const Tensor& columns,
                     std::vector<int64_t> rows, std::vector<int64_t> hidden,
                     std::vector<int64_t> wanted) {
  const std::shared_ptr<const Session> session = Sessions::all().get(number);
  const Llama& model = *session->model;
  const int64_t height = static_cast<int64_t>(rows.size());
  check(tokens, ScalarType::Long, "tokens");
  check(columns, ScalarType::Long, "columns");
  STD_TORCH_CHECK(tokens.dim() == 2 && tokens.size(0) == height && columns.dim() == 2 &&
                      columns.size(0) == height && columns.size(1) == tokens.size(1) &&
                      hidden.size() == rows.size(),
                  "llama: tokens and columns are [rows, lanes]");
  const int64_t n = tokens.size(1), m = height * n;
  const int64_t* token = tokens.const_data_ptr<int64_t>();
  std::vector<int64_t> row, padding, asked;
  for (int64_t r = 0; r < height; ++r) {
    row.insert(row.end(), n, rows[r]);
    padding.insert(padding.end(), n, hidden[r]);
    for (int64_t lane : wanted) {
      STD_TORCH_CHECK(lane >= 0 && lane < n, "llama: a wanted lane is out of range");
      asked.push_back(r * n + lane);
    }
  }
  const Lanes lanes{m, row.data(), columns.const_data_ptr<int64_t>(), padding.data()};
  for (int64_t i = 0; i < m; ++i) {
    STD_TORCH_CHECK(token[i] >= 0 && token[i] < model.vocabulary && lanes.hidden[i] >= 0 &&
                        session->holds(lanes.row[i], lanes.column[i]),
                    "llama: a token, row or column is out of range");
  }
  const std::array<int64_t, 3> size{height, static_cast<int64_t>(wanted.size()), model.width()};
  Tensor logits = torch::stable::new_empty(session->kept[0], {size.data(), 3}, ScalarType::Float);
  float* scores = logits.mutable_data_ptr<float>();
  Team::gather([&](Team& team) { session->run(team, lanes, token, asked, scores); });
  return logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(specdec_fast, CPU, library) {
  library.impl("llama_hold", TORCH_BOX(&llama_hold));
  library.impl("llama_open", TORCH_BOX(&llama_open));
  library.impl("llama_forward", TORCH_BOX(&llama_forward));
}

STABLE_TORCH_LIBRARY_IMPL(specdec_fast, CompositeExplicitAutograd, library) {
  library.impl("llama_forget", TORCH_BOX(&llama_forget));
  library.impl("llama_close", TORCH_BOX(&llama_close));
  library.impl("llama_capability", TORCH_BOX(&llama_capability));
}
