// The op `verify`: what the rules are is written in specdec_fast/ops.py.
//
// Persistent blocks take runs of tiles from a queue that holds all rows' first positions, then all
// second ones, and so on. Whoever measures the last tile of a position decides it; whoever decides
// the last position that a row's outcome waits for draws its next token. What lies behind a known
// stop is skipped. No block ever waits for another.
#pragma once

#include "call.cuh"

namespace specdec::blocks {

// How many draft tokens stay, once that is known: every position up to the stop is decided. All of
// `steps` where none stops; kNone where it is still open.
SPECDEC_HOST_DEVICE int settled(uint64_t state, int steps) {
  for (int i = 0; i < steps; ++i) {
    if (!(state >> i & 1)) return static_cast<int>(kNone);
    if (state >> (32 + i) & 1) return i;
  }
  return steps;
}

// Whether a stop before position i is known.
SPECDEC_HOST_DEVICE bool stopped_before(uint64_t state, int i) {
  return ((state >> 32) & ((uint64_t{1} << i) - 1)) != 0;
}

// The acceptance test; false where anything is undefined.
SPECDEC_HOST_DEVICE bool accepts(double log_p, double log_q, double u) {
  return log_q > -__builtin_huge_val() && log_p > log(u) + log_q;
}

// One step of rule block's weights, in log space; an undefined ratio counts as 0.
SPECDEC_HOST_DEVICE double next_log_weight(double log_weight, double log_p, double log_q) {
  const double step = log_p - log_q;
  const bool defined = log_q > -__builtin_huge_val() && step == step;
  const double next = defined ? log_weight + step : -__builtin_huge_val();
  return next < 0.0 ? next : 0.0;
}

// The coin's chance at a position that is not the last: R / (R + 1 - w), and 1 for 0/0.
SPECDEC_HOST_DEVICE double chance(double rest, double weight) {
  const double whole = rest + (1.0 - weight);
  return whole > 0.0 ? rest / whole : 1.0;
}

// What is left of a position's law.
struct Remainder {
  double mass;     // as a probability
  uint64_t total;  // in whatever unit its tiles have
};

// One row of the batch.
struct Sequence {
  const VerifyCall& call;
  int64_t b;
  float temperature;
  Rule rule;
  int length;  // draft tokens to judge
  int steps;   // positions the outcome can depend on

  SPECDEC_HOST_DEVICE Sequence(const VerifyCall& call_, int64_t b_) : call(call_), b(b_) {
    temperature = call.temperature(b);
    rule = temperature == 0.0f ? kMatch : call.rule;
    int64_t most = call.drafted < call.positions ? call.drafted : call.positions;
    const int64_t count = call.count(b);
    most = count < most ? count : most;
    length = static_cast<int>(most > 0 ? most : 0);
    steps = length < call.positions ? length + 1 : length;
  }

  SPECDEC_HOST_DEVICE Row target(int i) const { return call.logits.row(b, i, temperature); }
  SPECDEC_HOST_DEVICE Tile* target_tiles(int i) const {
    return call.measured + (b * call.positions + i) * call.tiles;
  }
  SPECDEC_HOST_DEVICE Tile* draft_tiles(int i) const {
    return call.draft_measured + (b * call.drafted + i) * call.draft_tiles;
  }
  SPECDEC_HOST_DEVICE Decision* decision(int i) const {
    return call.decided + b * call.positions + i;
  }

  // The kind of a drafted position's law; one whose tensors are not given is a point mass.
  SPECDEC_HOST_DEVICE LawKind kind(int i) const {
    const int32_t kind = call.kind(b, i);
    if (kind == kSparse && call.sparse_ids.data != nullptr) return kSparse;
    const bool compact = kind == kCompact && call.draft_logits.data != nullptr;
    return compact && call.draft_temperature(b) != 0.0f ? kCompact : kPoint;
  }
  SPECDEC_HOST_DEVICE bool known(int i) const {
    const double logsumexp = call.draft_logsumexp(b, i);
    return logsumexp - logsumexp == 0.0;
  }
  // Whether position i needs the tiles of its drafter's row.
  SPECDEC_HOST_DEVICE bool reads_draft(int i) const {
    return i < length && rule != kMatch && kind(i) == kCompact && !known(i);
  }
  SPECDEC_HOST_DEVICE int expected(int i) const {
    return call.tiles + (reads_draft(i) ? call.draft_tiles : 0);
  }

  SPECDEC_COLD Proposed proposed(int i, Desk& desk) const {
    Proposed result{kind(i),
                    false,
                    call.tokens(b, i),
                    call.draft_logits.row(b, i, call.draft_temperature(b)),
                    Law(),
                    call.map,
                    {}};
    if (result.kind == kSparse) {
      const View<int64_t>& ids = call.sparse_ids;
      const View<double>& masses = call.sparse_log_q;
      result.sparse = {ids.data + b * ids.stride[0] + i * ids.stride[1],
                       masses.data + b * masses.stride[0] + i * masses.stride[1], call.listed,
                       ids.stride[2], masses.stride[2]};
      result.undefined = result.sparse.undefined(call.logits.width);
    } else if (result.kind == kCompact) {
      result.law = known(i) ? Law::of_logsumexp(call.draft_logsumexp(b, i))
                            : merged(draft_tiles(i), call.draft_tiles, false, desk.agreement);
      result.undefined = result.law.undefined;
    }
    return result;
  }
  SPECDEC_COLD double log_q(const Proposed& law, int i) const {
    if (law.kind == kPoint) return 0.0;
    if (law.kind == kSparse) return law.sparse.log_q(law.token);
    const int64_t k = call.drawn.data ? call.drawn(b, i) : entry_of(law.token);
    const bool inside = k >= 0 && k < law.row.width;
    return inside || law.undefined ? law.law.log_prob(inside ? law.row.score(k) : 0.0f)
                                   : -__builtin_huge_val();
  }
  SPECDEC_HOST_DEVICE int64_t entry_of(int64_t token) const {
    return call.map.id ? call.map.entry_of(token) : token;
  }

  SPECDEC_COLD double number(int64_t position, int64_t offset, Purpose purpose) const {
    return philox_uniform(call.seed(b), position, offset, purpose, 0);
  }
  SPECDEC_HOST_DEVICE double accept_number(int i) const {
    return number(call.start(b), call.base + i, kAccept);
  }
  SPECDEC_HOST_DEVICE double residual_number(int i) const {
    return number(call.start(b), call.base + i, kResidual);
  }
  SPECDEC_HOST_DEVICE double target_number(int i) const {
    return number(call.start(b) + call.base + i, 0, kTarget);
  }

  // Position i once its tiles are measured. True for the block whose decision settles the row.
  SPECDEC_COLD bool decide(int i, Desk& desk) const {
    const Row row = target(i);
    const Law p = merged(target_tiles(i), call.tiles, row.greedy, desk.agreement);
    const bool drafted = i < length;
    const int64_t token = drafted ? call.tokens(b, i) : kNone;
    Decision decision{log_prob(row, p, token, kNone), 0.0, 0, p.undefined};
    bool stops = p.undefined || !drafted;
    if (rule == kMatch) {
      if (!p.undefined) {
        decision.own = draw(row, p, target_tiles(i), target_number(i), kNone, desk);
      }
      if (row.greedy) decision.log_p = log_prob(row, p, token, decision.own);
      stops = stops || decision.own != token;
    } else if (drafted) {
      decision.log_q = log_q(proposed(i, desk), i);
      const bool accepted =
          rule == kBlockwise || accepts(decision.log_p, decision.log_q, accept_number(i));
      stops = stops || !accepted;
    }
    if (rule == kBlockwise) stops = false;  // the whole draft is weighed
    return single(desk.agreement, [&] {
      *this->decision(i) = decision;
      publish();
      const uint64_t mine = uint64_t{1} << i | uint64_t{stops} << (32 + i);
      const uint64_t before = atomic_or(call.state + b, mine);
      publish();
      return settled(before, steps) < 0 && settled(before | mine, steps) >= 0;
    });
  }

  // log p of a token; at temperature 0 of the one that is certain.
  SPECDEC_HOST_DEVICE double log_prob(const Row& row, const Law& p, int64_t token,
                                      int64_t certain) const {
    if (p.undefined) return __builtin_nan("");
    if (token < 0 || token >= row.width) return -__builtin_huge_val();
    if (row.greedy) return token == certain ? 0.0 : -__builtin_huge_val();
    return p.log_prob(row.score(token));
  }

  SPECDEC_COLD Remainder remainder(int i, const Row& row, const Law& p, const Proposed& drafted,
                                   double weight, Desk& desk) const {
    if (drafted.undefined) return {weight, 0};
    if (drafted.kind == kPoint) {
      // weight * p - 1 at the draft token is nothing, elsewhere it is weight * p
      const bool inside = drafted.token >= 0 && drafted.token < row.width;
      const uint64_t total =
          weigh_tiles(row, p, target_tiles(i), inside ? drafted.token : kNone, desk);
      return {weight * (static_cast<double>(total) / p.total), total};
    }
    const Probability of_p(p, weight), of_q(drafted.law, 1.0);
    Remainder result{0.0, 0};
    int64_t entry = 0;
    for (int tile = 0; tile < call.tiles; ++tile) {
      const int64_t first = entry;
      const uint64_t mass = subtracted(row, of_p, drafted, of_q, tile, entry, desk);
      result.total += mass;
      threads([&](int t) {
        if (t == 0) call.rest[b * call.tiles + tile] = {mass, first};
      });
    }
    sync();
    result.mass = static_cast<double>(result.total) / kCertain;
    return result;
  }

  // One draw from what is left; from p where nothing is, or where q is undefined.
  SPECDEC_COLD int64_t draw_remainder(int i, const Row& row, const Law& p, const Proposed& drafted,
                                      double weight, const Remainder& left, Desk& desk) const {
    const double u = residual_number(i);
    if (drafted.undefined || left.total == 0) {
      return draw(row, p, target_tiles(i), u, kNone, desk);
    }
    if (drafted.kind == kPoint) {
      const bool inside = drafted.token >= 0 && drafted.token < row.width;
      return draw(row, p, target_tiles(i), u, inside ? drafted.token : kNone, desk);
    }
    const Rest* rest = call.rest + b * call.tiles;
    threads([&](int t) {
      for (int j = t; j < kTile; j += kThreads) {
        desk.weights.at(j) = j < call.tiles ? rest[j].mass : 0;
      }
    });
    desk.weights.add_up();
    const uint64_t level = level_of(u, left.total);
    const Found tile = found(desk.weights, level, desk.agreement);
    const int at = static_cast<int>(tile.index);
    int64_t entry = rest[at].entry;
    const Probability of_p(p, weight), of_q(drafted.law, 1.0);
    subtracted(row, of_p, drafted, of_q, at, entry, desk);
    return static_cast<int64_t>(at) * kTile +
           found(desk.weights, level - tile.below, desk.agreement).index;
  }

  SPECDEC_COLD void finish(Desk& desk) const {
    if (rule == kBlockwise) return finish_block(desk);
    const int kept = settled(read_shared(call.state + b), steps);
    if (kept == call.positions) return finish_void();
    if (rule == kMatch || kept == length || read_shared(&decision(kept)->undefined)) {
      return finish_whole(kept, desk);
    }
    const Row row = target(kept);
    const Law p = merged(target_tiles(kept), call.tiles, row.greedy, desk.agreement);
    const Proposed drafted = proposed(kept, desk);
    const Remainder left = remainder(kept, row, p, drafted, 1.0, desk);
    const int64_t token = draw_remainder(kept, row, p, drafted, 1.0, left, desk);
    write(kept, row, p, token, drafted.undefined ? kDraftUndefined : 0);
  }

  // The next token from the target's whole law.
  SPECDEC_COLD void finish_whole(int i, Desk& desk) const {
    const Row row = target(i);
    const Law p = merged(target_tiles(i), call.tiles, row.greedy, desk.agreement);
    int64_t token = 0;
    if (!p.undefined) {
      token = rule == kMatch ? read_shared(&decision(i)->own)
                             : draw(row, p, target_tiles(i), residual_number(i), kNone, desk);
    }
    write(i, row, p, token, p.undefined ? kTargetUndefined : 0);
  }

  // Throws the coins from the draft's end downwards until one wins.
  SPECDEC_COLD void finish_block(Desk& desk) const {
    int end = 0;
    while (end < length && !read_shared(&decision(end)->undefined)) ++end;
    if (end == 0 || accept_number(end - 1) < exp(log_weight(end))) {
      return end == call.positions ? finish_void() : finish_whole(end, desk);
    }
    for (int i = end - 1;; --i) {
      const Row row = target(i);
      const Law p = merged(target_tiles(i), call.tiles, false, desk.agreement);
      const Proposed drafted = proposed(i, desk);
      const double weight = exp(log_weight(i));
      const Remainder left = remainder(i, row, p, drafted, weight, desk);
      if (i > 0 && !(accept_number(i - 1) < chance(left.mass, weight))) continue;
      const int64_t token = draw_remainder(i, row, p, drafted, weight, left, desk);
      return write(i, row, p, token, drafted.undefined ? kDraftUndefined : 0);
    }
  }

  SPECDEC_COLD double log_weight(int i) const {
    double result = 0.0;
    for (int j = 0; j < i; ++j) {
      result = next_log_weight(result, read_shared(&decision(j)->log_p),
                               read_shared(&decision(j)->log_q));
    }
    return result;
  }

  SPECDEC_COLD void write(int kept, const Row& row, const Law& p, int64_t token,
                          int32_t status) const {
    threads([&](int t) {
      if (t != 0) return;
      call.accepted[b] = kept;
      call.token[b] = token;
      call.status[b] = status;
      if (call.log_prob == nullptr) return;
      write_log_probs(kept);
      call.log_prob[b * call.positions + kept] = log_prob(row, p, token, token);
    });
  }

  // Every position given was used up.
  SPECDEC_HOST_DEVICE void finish_void() const {
    threads([&](int t) {
      if (t != 0) return;
      call.accepted[b] = call.positions;
      call.token[b] = -1;
      call.status[b] = 0;
      if (call.log_prob != nullptr) write_log_probs(static_cast<int>(call.positions));
    });
  }

  SPECDEC_HOST_DEVICE void write_log_probs(int kept) const {
    for (int i = 0; i < call.positions; ++i) {
      call.log_prob[b * call.positions + i] = i < kept ? read_shared(&decision(i)->log_p) : -1.0;
    }
  }
};

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

// The next item that is still needed; items(call) or more where none is.
SPECDEC_COLD uint32_t next_item(const VerifyCall& call, uint32_t all) {
  uint32_t next;
  do {
    next = atomic_add(call.queue, uint32_t{1});
  } while (next < all && !Work(call, next).needed(call));
  return next;
}

// Measures an item's tiles; true where its position waited for nothing else.
SPECDEC_COLD bool measure_item(const VerifyCall& call, uint32_t item, Desk& desk) {
  const Work work(call, item);
  const Sequence sequence(call, work.row);
  const int i = work.position;
  const Row row = work.draft ? call.draft_logits.row(work.row, i, call.draft_temperature(work.row))
                             : sequence.target(i);
  Tile* to = work.draft ? sequence.draft_tiles(i) : sequence.target_tiles(i);
  uint32_t* arrived = call.arrived + work.row * call.positions + i;
  return measure_run(row, work.run, call.run, to, arrived, sequence.expected(i), desk);
}

// Decides an item's position and, if that settles its row, draws the row's next token.
SPECDEC_COLD void settle(const VerifyCall& call, uint32_t item, Desk& desk) {
  const Work work(call, item);
  const Sequence sequence(call, work.row);
  if (sequence.decide(work.position, desk)) sequence.finish(desk);
  sync();
}

SPECDEC_HOST_DEVICE void verify_block(const VerifyCall& call, Desk& desk) {
  desk.powers.fill();
  const uint32_t all = items(call);
  for (;;) {
    const uint32_t item = single(desk.agreement, [&] { return next_item(call, all); });
    if (item >= all) return;
    if (measure_item(call, item, desk)) settle(call, item, desk);
  }
}

}  // namespace specdec::blocks
