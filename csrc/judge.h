// What the rules are given and say: the op `verify`, and a pass of the target that judges a draft.
#pragma once

#include <cstdint>

#include "arguments.h"
#include "residual.h"
#include "rows.h"

namespace specdec {

enum Rule : int64_t { kMatch = 0, kToken = 1, kBlock = 2 };
enum Status : int32_t { kTargetUndefined = 1, kDraftUndefined = 2 };

struct Call {
  const Logits& logits;
  FilterReader filters;
  Reader<int64_t> tokens, count;
  Reader<int32_t> kind;
  const Logits* draft_logits;
  FilterReader draft_filters;
  IndexMap map;
  Reader<int64_t> drawn;
  Reader<double> draft_logsumexp;
  Reader<int64_t> sparse_ids;
  Reader<double> sparse_log_q;
  Reader<int64_t> seed, start;
  int64_t rows, positions, drafted, listed, base;
  Rule rule;
};

struct Output {
  int64_t* accepted;
  int64_t* token;
  double* log_prob;  // [rows, positions], or null
  int32_t* status;
};

// What is read at once, in chunks of rows: one position of a row that goes forward, and the whole
// draft of a block; where only the peak of a row is wanted, that takes a quarter of the time
int64_t pieces_of(const Call& call);

// Judges every row of the batch.
void judge(const Call& call, const Output& output, const Share& share);

}  // namespace specdec
