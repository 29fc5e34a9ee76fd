// The op `sample`: one token a row with its log-probability and the row's logsumexp, which
// verification then need not compute again.
#pragma once

#include "call.cuh"

namespace specdec::blocks {

SPECDEC_COLD void finish_sample(const SampleCall& call, int64_t b, const Row& row, Desk& desk) {
  const Tile* tiles = call.measured + b * call.tiles;
  const Law law = merged(tiles, call.tiles, row.greedy, desk.agreement);
  int64_t token = 0;
  if (!law.undefined) {
    const double u =
        philox_uniform(call.seed(b), call.position(b), call.offset(b), call.purpose, 0);
    token = draw(row, law, tiles, u, kNone, desk);
  }
  threads([&](int t) {
    if (t != 0) return;
    call.token[b] = token;
    call.log_prob[b] = row.greedy && !law.undefined ? 0.0 : law.log_prob(row.score(token));
    call.logsumexp[b] = law.logsumexp(row.greedy);
    call.status[b] = law.undefined ? kTargetUndefined : 0;
  });
}

SPECDEC_HOST_DEVICE uint32_t runs(const SampleCall& call) {
  return (call.tiles + call.run - 1) / call.run;
}

SPECDEC_HOST_DEVICE uint32_t items(const SampleCall& call) {
  return static_cast<uint32_t>(call.rows) * runs(call);
}

// Blocks take runs of tiles from a queue; the last to arrive at a row draws.
SPECDEC_HOST_DEVICE void sample_block(const SampleCall& call, Desk& desk) {
  desk.powers.fill();
  const uint32_t all = items(call), each = runs(call);
  for (;;) {
    const uint32_t item =
        single(desk.agreement, [&] { return atomic_add(call.queue, uint32_t{1}); });
    if (item >= all) return;
    const int64_t b = item / each;
    const Row row = call.logits.row(b, 0, call.temperature(b));
    if (measure_run(row, static_cast<int>(item % each), call.run, call.measured + b * call.tiles,
                    call.arrived + b, call.tiles, desk)) {
      finish_sample(call, b, row, desk);
      sync();
    }
  }
}

}  // namespace specdec::blocks
