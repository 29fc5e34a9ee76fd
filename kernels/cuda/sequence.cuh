// One row of the batch: what verification decides at a position, and what it draws there. What the
// rules are is written in specdec_fast/ops.py.
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

// The coin's chance at a position that is not the last: R / (R + 1 - w), and 1 for 0/0. Sums are
// good to 3e-11, so that less than kNothing counts as 0; no coin is reached with a greater chance
// then.
constexpr double kNothing = 1e-10;

SPECDEC_HOST_DEVICE double chance(double rest, double weight) {
  const double whole = rest + (1.0 - weight);
  return whole > kNothing ? rest / whole : 1.0;
}

// A position whose rows are measured.
struct Position : Measured {  // the target's row
  int i = 0;
  Proposed drafted;    // where the draft has a token and its law matters
  PerTile<Rest> rest;  // for what is left of p

  SPECDEC_HOST_DEVICE Position()
      : Measured{Row(nullptr, kFloats, 0, 1.0f), {}, {}}, drafted(Proposed::nothing(row)) {}
};

// What is left of a position's law.
struct Remainder {
  double mass;     // as a probability
  uint64_t total;  // in whatever unit its tiles have
};

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

  SPECDEC_HOST_DEVICE Filter filter() const { return call.filters(b); }
  SPECDEC_HOST_DEVICE Filter draft_filter() const { return call.draft_filters(b); }
  SPECDEC_HOST_DEVICE Row target(int i) const { return call.logits.row(b, i, temperature); }
  SPECDEC_HOST_DEVICE Row draft(int i) const {
    return call.draft_logits.row(b, i, call.draft_temperature(b));
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
  // Whether the drafter handed over all that a test needs: its row is then read for a residual
  // only. What filters drop from it is not part of that.
  SPECDEC_HOST_DEVICE bool known(int i) const {
    const double logsumexp = call.draft_logsumexp(b, i);
    return logsumexp - logsumexp == 0.0 && !draft_filter().any();
  }
  SPECDEC_HOST_DEVICE bool weighs_draft(int i) const {
    return i < length && rule != kMatch && kind(i) == kCompact;
  }
  SPECDEC_HOST_DEVICE bool reads_draft(int i) const { return weighs_draft(i) && !known(i); }

  // The law of position i's draft token but for a compact one's masses.
  SPECDEC_COLD Proposed proposed(int i) const {
    Proposed result{kind(i), false, call.tokens(b, i), kNone, draft(i), Law(), call.map, {}};
    if (result.kind == kSparse) {
      const View<int64_t>& ids = call.sparse_ids;
      const View<double>& masses = call.sparse_log_q;
      result.sparse = {ids.data + b * ids.stride[0] + i * ids.stride[1],
                       masses.data + b * masses.stride[0] + i * masses.stride[1], call.listed,
                       ids.stride[2], masses.stride[2]};
      result.undefined = result.sparse.undefined(call.logits.width);
    } else if (call.drawn.data != nullptr) {
      const int64_t drawn = call.drawn(b, i);
      result.drawn = drawn >= 0 ? drawn : result.row.width;  // outside: no mass
    }
    return result;
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

  // What a position says by itself, and whether the draft stops there.
  SPECDEC_COLD Decision judge(const Position& at, bool& stops, Desk& desk) const {
    const bool drafted = at.i < length, undefined = at.p.undefined;
    const int64_t token = drafted ? call.tokens(b, at.i) : kNone;
    Decision decision{log_prob(at.row, at.p, token, kNone), 0.0, 0, undefined};
    stops = undefined || !drafted;
    if (rule == kMatch) {
      if (!undefined) {
        decision.own = draw(at, target_number(at.i), kNone, desk);
      }
      if (at.row.greedy) decision.log_p = log_prob(at.row, at.p, token, decision.own);
      stops = stops || decision.own != token;
    } else if (drafted) {
      decision.log_q = at.drafted.log_q(desk.agreement);
      const bool accepted =
          rule == kBlockwise || accepts(decision.log_p, decision.log_q, accept_number(at.i));
      stops = stops || !accepted;
    }
    return decision;
  }

  // log p of a token; at temperature 0 of the one that is certain.
  SPECDEC_HOST_DEVICE double log_prob(const Row& row, const Law& p, int64_t token,
                                      int64_t certain) const {
    if (p.undefined) return __builtin_nan("");
    if (token < 0 || token >= row.width) return -__builtin_huge_val();
    if (row.greedy) return token == certain ? 0.0 : -__builtin_huge_val();
    return p.log_prob(row.score(token));
  }

  // What a position starts with, before its rows are measured.
  SPECDEC_HOST_DEVICE void begin(Position& at, int i) const {
    at.i = i;
    at.row = target(i);
    at.drafted = i < length && rule != kMatch ? proposed(i) : Proposed::nothing(at.row);
  }

  // max(0, weight * p - q): a block's share of its tiles, then the sum over all.
  SPECDEC_COLD Remainder remainder(const Position& at, double weight, Desk& desk) const {
    const Proposed& drafted = at.drafted;
    if (drafted.undefined) return {weight, 0};
    if (drafted.kind == kPoint) {
      // weight * p - 1 at the draft token is nothing, elsewhere it is weight * p
      const uint64_t total = weigh_tiles(at, excluded(drafted), desk);
      return {weight * (static_cast<double>(total) / at.p.total), total};
    }
    const Probability of_p(at.p, weight), of_q(drafted.law, 1.0);
    const int first = desk.team.begin(call.tiles), end = desk.team.end(call.tiles);
    int64_t entry = 0;
    if (drafted.kind == kCompact && drafted.map.id != nullptr && first > 0 && first < end) {
      entry = drafted.map.first_from(static_cast<int64_t>(first) * kTile, desk.agreement);
    }
    for (int tile = first; tile < end; ++tile) {
      const int64_t before = entry;
      const uint64_t mass = subtracted(at.row, of_p, drafted, of_q, tile, entry, desk);
      threads([&](int t) {
        if (t == 0) at.rest.write(tile, {mass, before});
      });
    }
    desk.team.meet();
    const uint64_t total = weigh_rest(at, desk);
    return {static_cast<double>(total) / kCertain, total};
  }

  // One draw from what is left; from p where nothing is, or where q is undefined.
  SPECDEC_COLD int64_t draw_remainder(const Position& at, double weight, const Remainder& left,
                                      Desk& desk) const {
    const Proposed& drafted = at.drafted;
    const double u = residual_number(at.i);
    if (drafted.undefined || left.total == 0) {
      return draw(at, u, kNone, desk);
    }
    if (drafted.kind == kPoint) {
      return draw(at, u, excluded(drafted), desk);
    }
    weigh_rest(at, desk);
    const uint64_t level = level_of(u, left.total);
    const Found tile = found(level, 1, desk);
    const int chosen = static_cast<int>(tile.index);
    int64_t entry = at.rest.read(chosen).entry;
    const Probability of_p(at.p, weight), of_q(drafted.law, 1.0);
    subtracted(at.row, of_p, drafted, of_q, chosen, entry, desk);
    return static_cast<int64_t>(chosen) * kTile + found(level - tile.below, 1, desk).index;
  }

  // The next token from p as it is; 0 where it is undefined.
  SPECDEC_COLD int64_t draw_whole(const Position& at, Desk& desk) const {
    if (at.p.undefined) return 0;
    return draw(at, residual_number(at.i), kNone, desk);
  }

  SPECDEC_COLD double log_weight(int i) const {
    double result = 0.0;
    for (int j = 0; j < i; ++j) {
      result = next_log_weight(result, read_shared(&decision(j)->log_p),
                               read_shared(&decision(j)->log_q));
    }
    return result;
  }
  // Rule block: where the draft ends, at the latest before an undefined row; of the first
  // positions.
  SPECDEC_HOST_DEVICE int block_end(int most) const {
    int end = 0;
    while (end < most && !read_shared(&decision(end)->undefined)) ++end;
    return end;
  }
  // And whether its last coin wins.
  SPECDEC_COLD bool wins_all(int end) const {
    return end == 0 || accept_number(end - 1) < exp(log_weight(end));
  }

  SPECDEC_COLD void write(int kept, const Outcome& outcome) const {
    threads([&](int t) {
      if (t != 0) return;
      call.accepted[b] = kept;
      call.token[b] = outcome.token;
      call.status[b] = static_cast<int32_t>(outcome.status);
      if (call.log_prob == nullptr) return;
      double* log_probs = call.log_prob + b * call.positions;
      for (int i = 0; i < call.positions; ++i) {
        log_probs[i] = i < kept ? read_shared(&decision(i)->log_p) : -1.0;
      }
      if (kept < call.positions) log_probs[kept] = outcome.log_prob;
    });
  }
  // Every position given was used up.
  SPECDEC_HOST_DEVICE void write_void() const {
    write(static_cast<int>(call.positions), {-1, 0, 0.0});
  }
  SPECDEC_COLD Outcome outcome(const Position& at, int64_t token) const {
    const bool from_rest = at.i < length && rule != kMatch;
    const int64_t status = at.p.undefined                      ? kTargetUndefined
                           : from_rest && at.drafted.undefined ? kDraftUndefined
                                                               : 0;
    return {token, status, log_prob(at.row, at.p, token, token)};
  }
  SPECDEC_COLD void write(const Position& at, int64_t token) const {
    write(at.i, outcome(at, token));
  }

 private:
  SPECDEC_HOST_DEVICE int64_t excluded(const Proposed& drafted) const {
    return drafted.token >= 0 && drafted.token < call.logits.width ? drafted.token : kNone;
  }
  SPECDEC_COLD uint64_t weigh_rest(const Position& at, Desk& desk) const {
    threads([&](int t) {
      for (int j = t; j < kTile; j += kThreads) {
        desk.weights.at(j) = j < call.tiles ? at.rest.read(j).mass : 0;
      }
    });
    return desk.weights.add_up();
  }
};

}  // namespace specdec::blocks
