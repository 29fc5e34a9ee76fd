// The op `verify` for many rows: blocks that stay on the device take runs of tiles from a queue
// that holds all rows' first positions, then all second ones, and so on. Whoever measures the last
// tile of a position decides it; whoever decides the last position that a row's outcome waits for
// draws its next token. What lies behind a known stop is skipped. No block ever waits for another.
#pragma once

#include "sequence.cuh"

namespace specdec::blocks {

// The places of position i's rows in the call's memory.
struct Place {
  PerTile<Tile> tiles, draft_tiles;
  Cut *cut, *draft_cut;

  SPECDEC_HOST_DEVICE Place(const VerifyCall& call, int64_t b, int i) {
    const int64_t own = b * call.positions + i, drafted = b * call.drafted + i;
    tiles = {call.measured + own * call.tiles, 0};
    draft_tiles = {call.draft_measured + drafted * call.draft_tiles, 0};
    cut = call.cut + own;
    draft_cut = call.draft_cut + drafted;
  }
};

// Filters a measured row of a position; whoever reads it later finds its cut.
SPECDEC_COLD void filter_row(const VerifyCall& call, int64_t b, int i, bool draft, Desk& desk) {
  const Place place(call, b, i);
  Row row = draft ? Sequence(call, b).draft(i) : Sequence(call, b).target(i);
  const Filter filter = draft ? call.draft_filters(b) : call.filters(b);
  filtered(row, draft ? place.draft_tiles : place.tiles, filter, desk);
  threads([&](int t) {
    if (t == 0) *(draft ? place.draft_cut : place.cut) = row.cut;
  });
  sync();
}

SPECDEC_COLD void filter_rows(const VerifyCall& call, int64_t b, int i, Desk& desk) {
  if (call.filters(b).any()) filter_row(call, b, i, false, desk);
  if (call.draft_filters(b).any() && Sequence(call, b).reads_draft(i)) {
    filter_row(call, b, i, true, desk);
  }
}

SPECDEC_HOST_DEVICE Cut read_cut(const Cut* cut) {
  return from_word<Cut>(read_shared(reinterpret_cast<const uint64_t*>(cut)));
}

// A position whose rows are measured and filtered.
SPECDEC_COLD void open(Position& at, const Sequence& sequence, int i, Desk& desk) {
  const VerifyCall& call = sequence.call;
  const Place place(call, sequence.b, i);
  sequence.begin(at, i);
  at.tiles = place.tiles;
  at.rest = {call.rest + sequence.b * call.tiles, 0};
  if (sequence.filter().any()) at.row.cut = read_cut(place.cut);
  at.p = merged(at.tiles, call.tiles, at.row.greedy, desk.agreement);
  if (!sequence.weighs_draft(i)) return;
  Proposed& law = at.drafted;
  if (sequence.known(i)) {
    law.law = Law::of_logsumexp(call.draft_logsumexp(sequence.b, i));
  } else {
    if (sequence.draft_filter().any()) law.row.cut = read_cut(place.draft_cut);
    law.law = merged(place.draft_tiles, call.draft_tiles, false, desk.agreement);
  }
  law.undefined = law.law.undefined;
}

// Position i once its tiles are measured. True for the block whose decision settles the row.
template <bool kFilters>
SPECDEC_COLD bool decide(const VerifyCall& call, int64_t b, int i, Desk& desk) {
  if (kFilters) filter_rows(call, b, i, desk);
  const Sequence sequence(call, b);
  Position at;
  open(at, sequence, i, desk);
  bool stops;
  const Decision decision = sequence.judge(at, stops, desk);
  if (sequence.rule == kBlockwise) stops = false;  // the whole draft is weighed
  return single(desk.agreement, [&] {
    *sequence.decision(i) = decision;
    publish();
    const uint64_t mine = uint64_t{1} << i | uint64_t{stops} << (32 + i);
    const uint64_t before = atomic_or(call.state + b, mine);
    publish();
    return settled(before, sequence.steps) < 0 && settled(before | mine, sequence.steps) >= 0;
  });
}

// Throws the coins from the draft's end downwards until one wins.
SPECDEC_COLD void finish_block(const Sequence& sequence, Desk& desk) {
  Position at;
  const int end = sequence.block_end(sequence.length);
  if (sequence.wins_all(end)) {
    if (end == sequence.call.positions) return sequence.write_void();
    open(at, sequence, end, desk);
    return sequence.write(at, sequence.draw_whole(at, desk));
  }
  for (int i = end - 1;; --i) {
    open(at, sequence, i, desk);
    const double weight = exp(sequence.log_weight(i));
    const Remainder left = sequence.remainder(at, weight, desk);
    if (i > 0 && !(sequence.accept_number(i - 1) < chance(left.mass, weight))) continue;
    return sequence.write(at, sequence.draw_remainder(at, weight, left, desk));
  }
}

// The next token where the draft ends at a known position.
SPECDEC_COLD void finish_at(const Sequence& sequence, int kept, Desk& desk) {
  Position at;
  open(at, sequence, kept, desk);
  if (sequence.rule == kMatch) {
    const int64_t own = read_shared(&sequence.decision(kept)->own);
    return sequence.write(at, at.p.undefined ? 0 : own);
  }
  if (kept == sequence.length || at.p.undefined) {
    return sequence.write(at, sequence.draw_whole(at, desk));
  }
  const Remainder left = sequence.remainder(at, 1.0, desk);
  sequence.write(at, sequence.draw_remainder(at, 1.0, left, desk));
}

SPECDEC_HOST_DEVICE void finish(const VerifyCall& call, int64_t b, Desk& desk) {
  const Sequence sequence(call, b);
  if (sequence.rule == kBlockwise) return finish_block(sequence, desk);
  const int kept = settled(read_shared(call.state + b), sequence.steps);
  kept == call.positions ? sequence.write_void() : finish_at(sequence, kept, desk);
}

// A run of tiles in the queue's order: positions first, then rows, then the target's runs and the
// drafter's.
struct Work {
  int position, run;
  int64_t row;
  bool draft;

  SPECDEC_HOST_DEVICE Work(const VerifyCall& call, uint32_t item) {
    const int runs = (call.tiles + call.run - 1) / call.run;
    const uint32_t all = runs + (call.draft_tiles + call.run - 1) / call.run;
    const uint32_t group = item / all, at = item % all;
    position = static_cast<int>(group / call.rows);
    row = group % call.rows;
    draft = at >= static_cast<uint32_t>(runs);
    run = static_cast<int>(at) - (draft ? runs : 0);
  }
  // False where the outcome cannot depend on it any more.
  SPECDEC_HOST_DEVICE bool needed(const VerifyCall& call) const {
    const Sequence sequence(call, row);
    if (position >= sequence.steps || (draft && !sequence.reads_draft(position))) return false;
    return !stopped_before(read_shared(call.state + row), position);
  }
};

SPECDEC_HOST_DEVICE uint32_t items(const VerifyCall& call) {
  const uint32_t runs = (call.tiles + call.run - 1) / call.run;
  const uint32_t draft_runs = (call.draft_tiles + call.run - 1) / call.run;
  return static_cast<uint32_t>(call.rows * call.positions) * (runs + draft_runs);
}

constexpr uint32_t kNoItem = ~uint32_t{0};

// The next item that is still needed.
SPECDEC_COLD uint32_t next_item(const VerifyCall& call) {
  const uint32_t all = items(call);
  uint32_t next;
  do {
    next = atomic_add(call.queue, uint32_t{1});
  } while (next < all && !Work(call, next).needed(call));
  return next < all ? next : kNoItem;
}

// Measures an item's tiles; true where its position waited for nothing else.
SPECDEC_COLD bool measure_item(const VerifyCall& call, Desk& desk) {
  const Work work(call, desk.item);
  const Sequence sequence(call, work.row);
  const int i = work.position;
  const int64_t place = work.row * call.positions + i;
  const Row row = work.draft ? sequence.draft(i) : sequence.target(i);
  Tile* to = work.draft ? call.draft_measured + (work.row * call.drafted + i) * call.draft_tiles
                        : call.measured + place * call.tiles;
  const int expected = call.tiles + (sequence.reads_draft(i) ? call.draft_tiles : 0);
  return measure_run(row, work.run, call.run, to, call.arrived + place, expected, desk);
}

// Decides an item's position and, if that settles its row, draws the row's next token.
template <bool kFilters>
SPECDEC_HOST_DEVICE void settle(const VerifyCall& call, Desk& desk) {
  const Work work(call, desk.item);
  if (decide<kFilters>(call, work.row, work.position, desk)) finish(call, work.row, desk);
  sync();
}

// Without filters there is less to keep in registers.
template <bool kFilters>
SPECDEC_HOST_DEVICE void verify_block(const VerifyCall& call, Desk& desk) {
  desk.set_up({0, 1});
  for (;;) {
    threads([&](int t) {
      if (t == 0) desk.item = next_item(call);
    });
    sync();
    if (desk.item == kNoItem) return;
    if (measure_item(call, desk)) settle<kFilters>(call, desk);
  }
}

}  // namespace specdec::blocks
