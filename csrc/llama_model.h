// A Llama-like model as the native passes hold it: its weights and one pass; and the caches of a
// call, by number.
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
  std::vector<Matrix> matrices;          // seven a layer, and the head
  std::vector<int64_t> windows, tables;  // of turns, by layer
  const void* embedding;
  bool half;  // the embedding's type
  int64_t vocabulary, hidden, inner, layers;
  const float *norms, *head_norms;
  int64_t norms_a_layer;  // before each half; four: behind each as well
  bool curved;            // the gate is GELU by tanh, not SiLU
  float scale;            // of what is embedded
  Shape shape;

  // Entries of a row of logits
  int64_t width() const { return matrices.back().rows; }

  // Logits of the asked lanes: [asked, width]; and their final hidden states [asked, hidden], where
  // these are wanted
  void run(Team& team, const PassKernels& kernels, const Lanes& lanes, const int64_t* token,
           const std::vector<Stored>& caches, const float* turns, int64_t apart,
           const std::vector<int64_t>& asked, float* logits, float* ends) const;

 private:
  void embed(int64_t token, float* out) const;
};

// A model beside the caches that the passes of one call write into
struct Session {
  std::shared_ptr<const Llama> model;
  const PassKernels* kernels;
  std::vector<torch::stable::Tensor> kept;
  std::vector<Stored> caches;    // [rows, heads, columns, dim] of every layer
  int64_t rows, columns;         // there is room for
  const float* turns;            // cosine and sine [tables, positions, 2, dim]
  int64_t apart;                 // floats from one table to the next
  mutable Buffer<float> scores;  // logits that nobody but the rule of a pass wants
  mutable Buffer<float> ends;    // hidden states that nobody but a memory wants

  // Whether a row and column are inside.
  bool holds(int64_t row, int64_t column) const {
    return row >= 0 && row < rows && column >= 0 && column < columns;
  }

  // Logits of the asked lanes: [asked, width], and their hidden states as above
  void run(Team& team, const Lanes& lanes, const int64_t* token, const std::vector<int64_t>& asked,
           float* logits, float* ends = nullptr) const {
    model->run(team, *kernels, lanes, token, caches, turns, apart, asked, logits, ends);
  }
};

// The session of a number
std::shared_ptr<const Session> llama_session(int64_t number);

}  // namespace specdec
