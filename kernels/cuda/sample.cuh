// The op `sample`: one token a row with its log-probability and the row's logsumexp, which
// verification then need not compute again.
#pragma once

#include "call.cuh"

namespace specdec::blocks {

template <bool kFilters>
SPECDEC_COLD void finish_sample(const SampleCall& call, int64_t b, Row& row,
                                const PerTile<Tile>& tiles, Desk& desk) {
  const Law law = kFilters ? filtered(row, tiles, call.filters(b), desk)
                           : merged(tiles, row.tiles(), row.greedy, desk.agreement);
  int64_t token = 0;
  if (!law.undefined) {
    const double u =
        philox_uniform(call.seed(b), call.position(b), call.offset(b), call.purpose, 0);
    token = draw({row, law, tiles}, u, kNone, desk);
  }
  threads([&](int t) {
    if (t != 0 || desk.team.rank != 0) return;
    call.token[b] = token;
    call.log_prob[b] = row.greedy && !law.undefined ? 0.0 : law.log_prob(row.score(token));
    call.logsumexp[b] = law.logsumexp(row.greedy);
    call.status[b] = law.undefined ? kTargetUndefined : 0;
    if (call.cut != nullptr) call.cut[b] = row.cut;
  });
}

SPECDEC_HOST_DEVICE uint32_t runs(const SampleCall& call) {
  return (call.tiles + call.run - 1) / call.run;
}

SPECDEC_HOST_DEVICE uint32_t items(const SampleCall& call) {
  return static_cast<uint32_t>(call.rows) * runs(call);
}

// A run of a row's tiles; the last to arrive at a row draws.
template <bool kFilters>
SPECDEC_COLD void sample_item(const SampleCall& call, uint32_t item, Desk& desk) {
  const int64_t b = item / runs(call);
  Row row = call.logits.row(b, 0, call.temperature(b));
  Tile* measured = call.measured + b * call.tiles;
  if (!measure_run(row, static_cast<int>(item % runs(call)), call.run, measured, call.arrived + b,
                   call.tiles, desk)) {
    return;
  }
  finish_sample<kFilters>(call, b, row, {measured, 0}, desk);
  sync();
}

// Many rows: blocks that stay on the device take runs from a queue. Without filters there is less
// to keep in registers.
template <bool kFilters>
SPECDEC_HOST_DEVICE void sample_block(const SampleCall& call, Desk& desk) {
  desk.set_up({0, 1});
  for (;;) {
    const uint32_t item =
        single(desk.agreement, [&] { return atomic_add(call.queue, uint32_t{1}); });
    if (item >= items(call)) return;
    sample_item<kFilters>(call, item, desk);
  }
}

}  // namespace specdec::blocks
