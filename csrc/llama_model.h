// A Llama-like model as the native passes hold it: its weights, one pass, and the shelf of models
// by number.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "llama_pass.h"

namespace specdec {

// What does not change from pass to pass, and the tensors it points into
struct Llama {
  std::vector<torch::stable::Tensor> kept;
  std::vector<Matrix> matrices;  // seven a layer, and the head
  std::vector<int64_t> windows;
  const void* embedding;
  bool half;  // the embedding's type
  int64_t vocabulary, hidden, inner, layers;
  const float *norms, *head_norms;
  Shape shape;

  // Entries of a row of logits
  int64_t width() const { return matrices.back().rows; }

  // Logits of the asked lanes: [asked, width]
  void run(Team& team, const PassKernels& kernels, const Lanes& lanes, const int64_t* token,
           const std::vector<Stored>& caches, const float* turns, const std::vector<int64_t>& asked,
           float* logits) const;

  // The caches [rows, heads, columns, dim] of every layer, once a pass is sure to stay inside: rows
  // and columns up to the highest ones
  std::vector<Stored> caches(const std::vector<torch::stable::Tensor>& keys,
                             const std::vector<torch::stable::Tensor>& values, int64_t highest_row,
                             int64_t highest_column) const;

 private:
  void embed(int64_t token, float* out) const;
};

// The model of a number
std::shared_ptr<const Llama> llama(int64_t number);

// The kernels of an instruction set by number, the best one's for -1
const PassKernels& llama_kernels(int64_t capability);

// Cosine and sine of every position [positions, 2, dim]
const float* llama_turns(const torch::stable::Tensor& rotations, const Shape& shape);

}  // namespace specdec
