// The arguments of the ops as plain pointers, and the memory blocks share.
#pragma once

#include "proposal.cuh"

namespace specdec::blocks {

enum Rule : int32_t { kMatch = 0, kToken = 1, kBlockwise = 2 };
enum Purpose : uint32_t { kAccept = 1, kResidual = 2, kTarget = 3 };  // randomness.Purpose
enum Status : int32_t { kTargetUndefined = 1, kDraftUndefined = 2 };

// A tensor of up to three dimensions of any strides; one that is not given reads as a constant.
template <typename T>
struct View {
  const T* data = nullptr;
  int64_t stride[3]{};
  T constant{};

  SPECDEC_HOST_DEVICE T operator()(int64_t i, int64_t j = 0, int64_t k = 0) const {
    return data ? data[i * stride[0] + j * stride[1] + k * stride[2]] : constant;
  }
};

// Rows of logits, [rows, positions, width]; strides count entries.
struct Logits {
  const void* data = nullptr;
  LogitType type = kFloats;
  int64_t width = 0;
  int64_t stride[2]{};

  SPECDEC_HOST_DEVICE Row row(int64_t i, int64_t j, float temperature) const {
    const int64_t size = type == kFloats ? 4 : 2;
    const char* at = static_cast<const char*>(data) + (i * stride[0] + j * stride[1]) * size;
    return {at, type, width, temperature};
  }
  int tiles() const { return static_cast<int>((width + kTile - 1) / kTile); }
};

// Filters, one of each a row.
struct Filters {
  View<int32_t> top_k;
  View<float> top_p{nullptr, {}, 1.0f};
  View<float> min_p;

  bool given() const { return top_k.data || top_p.data || min_p.data; }
  SPECDEC_HOST_DEVICE Filter operator()(int64_t b) const { return {top_k(b), top_p(b), min_p(b)}; }
};

constexpr int kMostPositions = 32;     // a row's state is one word
constexpr int64_t kMostTiles = kTile;  // a row's tiles are drawn from like a tile's entries

// What deciding a position leaves for the end of its row.
struct Decision {
  double log_p, log_q;  // of the draft token
  int64_t own;          // rule match: the target's own token
  int64_t undefined;    // whether the target's row is
};

// What a row's outcome is if its draft ends at a position.
struct Outcome {
  int64_t token, status;
  double log_prob;
};

struct VerifyCall {
  Logits logits;
  View<float> temperature;
  Filters filters;
  View<int64_t> tokens, count;
  View<int32_t> kind;
  Logits draft_logits;
  View<float> draft_temperature;
  Filters draft_filters;
  IndexMap map;
  View<int64_t> drawn;
  View<double> draft_logsumexp;
  View<int64_t> sparse_ids;
  View<double> sparse_log_q;
  View<int64_t> seed, start;
  int64_t rows, positions, drafted, listed, base;
  Rule rule;

  int64_t *accepted, *token;  // [rows]
  double* log_prob;           // [rows, positions], or null
  int32_t* status;            // [rows]

  int tiles, draft_tiles;  // of a row; the latter 0 where no drafter's row is read
  int run;                 // tiles a block takes at once
  // Zero at the start
  uint32_t* queue;    // [1]
  uint64_t* state;    // [rows]: bit i, position i is decided; bit 32 + i, the draft stops there
  uint32_t* arrived;  // [rows, positions]: tiles measured; by clusters, whether it is judged
  // Written before it is read
  Decision* decided;  // [rows, positions]
  // The same, of the persistent blocks
  Tile* measured;        // [rows, positions, tiles]
  Tile* draft_measured;  // [rows, drafted, draft_tiles]
  Cut* cut;              // [rows, positions]
  Cut* draft_cut;        // [rows, drafted]
  Rest* rest;            // [rows, tiles]
  // And of clusters
  Outcome* outcome;  // [rows, positions]
};

struct SampleCall {
  Logits logits;
  View<float> temperature;
  Filters filters;
  View<int64_t> seed, position, offset;
  uint32_t purpose;
  int64_t rows;

  int64_t* token;
  double *log_prob, *logsumexp;
  int32_t* status;
  Cut* cut;  // [rows], or null

  int tiles, run;
  uint32_t* queue;    // [1], zero at the start
  uint32_t* arrived;  // [rows], zero at the start
  Tile* measured;     // [rows, tiles]
};

// A run of tiles of one row, and whether theirs was the last measurement the row waited for.
SPECDEC_HOST_DEVICE bool measure_run(const Row& row, int run, int tiles_a_run, Tile* to,
                                     uint32_t* arrived, int expected, Desk& desk) {
  const int first = run * tiles_a_run;
  const int end = first + tiles_a_run < row.tiles() ? first + tiles_a_run : row.tiles();
  for (int i = first; i < end; ++i) {
    const Tile tile = measured<true>(row, i, desk.agreement, desk.powers);
    threads([&](int t) {
      if (t == 0) to[i] = tile;
    });
  }
  return single(desk.agreement, [&] {
    const uint32_t mine = static_cast<uint32_t>(end - first);
    publish();
    const bool last = atomic_add(arrived, mine) + mine == static_cast<uint32_t>(expected);
    publish();
    return last;
  });
}

}  // namespace specdec::blocks
