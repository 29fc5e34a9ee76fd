// The ops `sample` and `verify` for few rows: a team of blocks takes a position's rows, the
// target's and the drafter's, into its shared memory and reads them from there however often it has
// to. All positions are under way at once; each works out what the outcome is if the draft ends
// with it, and the last one done picks the result.
#pragma once

#include "sample.cuh"
#include "sequence.cuh"

namespace specdec::blocks {

// How a block's shared memory is used by a team: items of the tiles it has, then the tiles
// themselves, as many as fit; the others are read from global memory again.
struct Layout {
  int share, draft_share;  // tiles of a block
  int held, draft_held;    // of them on the shelf

  SPECDEC_HOST_DEVICE Layout(int tiles, int draft_tiles, const Logits& logits,
                             const Logits& draft_logits, int blocks, int64_t bytes) {
    share = (tiles + blocks - 1) / blocks;
    draft_share = (draft_tiles + blocks - 1) / blocks;
    int64_t left = bytes - items();
    held = fitting(share, logits, left);
    draft_held = fitting(draft_share, draft_logits, left);
  }
  // With room for everything.
  SPECDEC_HOST_DEVICE static int64_t all(int tiles, int draft_tiles, const Logits& logits,
                                         const Logits& draft_logits, int blocks) {
    const Layout empty(tiles, draft_tiles, logits, draft_logits, blocks, 0);
    return empty.items() + empty.share * tile_bytes(logits) +
           empty.draft_share * tile_bytes(draft_logits);
  }
  SPECDEC_HOST_DEVICE int64_t items() const {
    return static_cast<int64_t>(sizeof(Tile)) * (share + draft_share) +
           static_cast<int64_t>(sizeof(Rest)) * share;
  }
  SPECDEC_HOST_DEVICE static int64_t tile_bytes(const Logits& logits) {
    return kTile * (logits.type == kFloats ? 4 : 2);
  }

 private:
  SPECDEC_HOST_DEVICE static int fitting(int most, const Logits& logits, int64_t& left) {
    const int64_t each = tile_bytes(logits), fit = left > 0 ? left / each : 0;
    const int count = fit < most ? static_cast<int>(fit) : most;
    left -= count * each;
    return count;
  }
};

// 16 bytes to shared memory without waiting for them.
SPECDEC_HOST_DEVICE void copy_16(char* to, const char* from) {
#ifdef __CUDA_ARCH__
  const unsigned there = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(there),
               "l"(__cvta_generic_to_global(from))
               : "memory");
#else
  memcpy(to, from, 16);
#endif
}

SPECDEC_HOST_DEVICE void wait_for_copies() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Puts a block's share of a row on its shelf.
SPECDEC_COLD void shelve(Row& row, const Shelf& shelf, const Team& team) {
  const int bytes = row.entry_bytes(), end = team.end(row.tiles());
  for (int tile = team.begin(row.tiles()); tile < end; ++tile) {
    const int slot = tile % shelf.share, size = row.tile_size(tile) * bytes;
    if (slot >= shelf.held) break;
    const char* from = row.in_memory(tile);
    char* to = shelf.own + static_cast<int64_t>(slot) * kTile * bytes;
    // Rows of an odd width start anywhere: those are copied entry by entry
    const int whole = reinterpret_cast<uintptr_t>(from) % 16 == 0 ? size / 16 * 16 : 0;
    threads([&](int t) {
      for (int at = t * 16; at < whole; at += kThreads * 16) copy_16(to + at, from + at);
      for (int at = whole + t * bytes; at < size; at += kThreads * bytes) {
        memcpy(to + at, from + at, 2);
        if (bytes == 4) memcpy(to + at + 2, from + at + 2, 2);
      }
    });
  }
  row.shelf = shelf;
}

SPECDEC_COLD void measure_share(const Row& row, const PerTile<Tile>& tiles, Desk& desk) {
  const int end = desk.team.end(row.tiles());
  for (int i = desk.team.begin(row.tiles()); i < end; ++i) {
    const Tile tile = measured<false>(row, i, desk.agreement, desk.powers);
    threads([&](int t) {
      if (t == 0) tiles.write(i, tile);
    });
  }
}

// A block's shared memory beside its desk, dealt out by a Layout.
struct Room {
  PerTile<Tile> tiles, draft_tiles;
  PerTile<Rest> rest;
  Shelf shelf, draft_shelf;

  SPECDEC_HOST_DEVICE Room(const Layout& layout, char* memory, const Logits& logits) {
    tiles = {reinterpret_cast<Tile*>(memory), layout.share};
    draft_tiles = {tiles.own + layout.share, layout.draft_share};
    rest = {reinterpret_cast<Rest*>(draft_tiles.own + layout.draft_share), layout.share};
    shelf = {memory + layout.items(), layout.share, layout.held};
    char* behind = shelf.own + layout.held * Layout::tile_bytes(logits);
    draft_shelf = {behind, layout.draft_share, layout.draft_held};
  }
};

// One team's row of `sample`.
SPECDEC_HOST_DEVICE void sample_team(const SampleCall& call, uint32_t b, const Team& team,
                                     char* memory, int64_t bytes, Desk& desk) {
  desk.set_up(team);
  const Room room(Layout(call.tiles, 0, call.logits, call.logits, team.size, bytes), memory,
                  call.logits);
  Row row = call.logits.row(b, 0, call.temperature(b));
  shelve(row, room.shelf, team);
  wait_for_copies();
  sync();
  measure_share(row, room.tiles, desk);
  team.meet();
  finish_sample<true>(call, b, row, room.tiles, desk);
  team.meet();  // no block leaves while another reads its memory
}

// A position with its rows on the team's shelves. A drafter's row that only a residual would need
// is left where it is.
SPECDEC_COLD void gather(Position& at, const Sequence& sequence, int i, const Room& room,
                         Desk& desk) {
  const bool reads_draft = sequence.reads_draft(i);
  sequence.begin(at, i);
  at.tiles = room.tiles;
  at.rest = room.rest;
  shelve(at.row, room.shelf, desk.team);
  if (reads_draft) shelve(at.drafted.row, room.draft_shelf, desk.team);
  wait_for_copies();
  sync();
  measure_share(at.row, room.tiles, desk);
  if (reads_draft) measure_share(at.drafted.row, room.draft_tiles, desk);
  desk.team.meet();
  at.p = filtered(at.row, room.tiles, sequence.filter(), desk);
  if (!sequence.weighs_draft(i)) return;
  Law& law = at.drafted.law;
  law = reads_draft ? filtered(at.drafted.row, room.draft_tiles, sequence.draft_filter(), desk)
                    : Law::of_logsumexp(sequence.call.draft_logsumexp(sequence.b, i));
  at.drafted.undefined = law.undefined;
}

// Rule block: what a position's draft weighs is known once all positions before it are judged.
// Those belong to teams that have begun, since items are handed out in order.
SPECDEC_COLD void wait_for_weights(const Sequence& sequence, int i, Desk& desk) {
  const uint32_t* judged = sequence.call.arrived + sequence.b * sequence.call.positions;
  single(desk.agreement, [&] {
    for (int j = 0; j < i; ++j) {
      while (read_awaited(judged + j) == 0) {
      }
    }
    publish();
    return 0;
  });
}

// The next token if the draft ends at a position, where that is possible; `wins` says whether it
// is.
SPECDEC_COLD int64_t next_token(const Sequence& sequence, const Position& at,
                                const Decision& decision, bool& wins, Desk& desk) {
  const int i = at.i;
  if (sequence.rule == kMatch) return at.p.undefined ? 0 : decision.own;
  if (i >= sequence.length || at.p.undefined) return sequence.draw_whole(at, desk);
  double weight = 1.0;
  if (sequence.rule == kBlockwise) {
    wait_for_weights(sequence, i, desk);
    wins = sequence.block_end(i) == i;
    if (!wins) return 0;
    weight = exp(sequence.log_weight(i));
  }
  const Remainder left = sequence.remainder(at, weight, desk);
  if (sequence.rule == kBlockwise && i > 0) {
    wins = sequence.accept_number(i - 1) < chance(left.mass, weight);
  }
  return wins ? sequence.draw_remainder(at, weight, left, desk) : 0;
}

// How many tokens stay, once all positions have said what they know: `wins` has a bit for each that
// the draft may end at.
SPECDEC_COLD int kept_of(const Sequence& sequence, uint64_t state) {
  if (sequence.rule != kBlockwise) return settled(state, sequence.steps);
  const int end = sequence.block_end(sequence.length);
  if (sequence.wins_all(end)) return end;
  int kept = end - 1;
  while (kept > 0 && !(state >> (32 + kept) & 1)) --kept;
  return kept;
}

// Whether a row's outcome is known: with rule block once every position has decided.
SPECDEC_HOST_DEVICE bool complete(const Sequence& sequence, uint64_t state) {
  if (sequence.rule != kBlockwise) return settled(state, sequence.steps) >= 0;
  const uint64_t all = (uint64_t{1} << sequence.steps) - 1;
  return (state & all) == all;
}

// Everything about one position, and the row's result by the last one done.
SPECDEC_COLD void decide_position(const Sequence& sequence, int i, const Room& room, Desk& desk) {
  const VerifyCall& call = sequence.call;
  const int64_t place = sequence.b * call.positions + i;
  const bool leads = desk.team.rank == 0;
  Position at;
  gather(at, sequence, i, room, desk);
  bool stops;
  const Decision decision = sequence.judge(at, stops, desk);
  if (leads) {
    single(desk.agreement, [&] {
      *sequence.decision(i) = decision;
      publish();
      return atomic_add(call.arrived + place, uint32_t{1});
    });
  }
  bool wins = stops;
  Outcome outcome{0, 0, 0.0};
  if (stops || sequence.rule == kBlockwise) {
    outcome = sequence.outcome(at, next_token(sequence, at, decision, wins, desk));
  }
  if (!leads) return;
  const int64_t kept = single(desk.agreement, [&] {
    call.outcome[place] = outcome;
    publish();
    const uint64_t mine = uint64_t{1} << i | uint64_t{wins} << (32 + i);
    const uint64_t before = atomic_or(call.state + sequence.b, mine);
    publish();
    const bool last = !complete(sequence, before) && complete(sequence, before | mine);
    return last ? static_cast<int64_t>(kept_of(sequence, before | mine)) : kNone;
  });
  if (kept == kNone) return;
  if (kept == call.positions) return sequence.write_void();
  const Outcome* result = call.outcome + sequence.b * call.positions + kept;
  sequence.write(static_cast<int>(kept), {read_shared(&result->token), read_shared(&result->status),
                                          read_shared(&result->log_prob)});
}

SPECDEC_HOST_DEVICE uint32_t teams(const VerifyCall& call) {
  return static_cast<uint32_t>(call.rows * call.positions);
}

// One team's position of `verify`; `item` counts the teams of the launch. Where positions wait for
// others the order of their beginning counts instead.
SPECDEC_HOST_DEVICE void verify_team(const VerifyCall& call, uint32_t item, const Team& team,
                                     char* memory, int64_t bytes, Desk& desk) {
  desk.set_up(team);
  if (call.rule == kBlockwise) {
    if (team.rank == 0) {
      threads([&](int t) {
        if (t == 0) desk.agreement.extra = atomic_add(call.queue, uint32_t{1});
      });
    }
    team.meet();
    item = static_cast<uint32_t>(*remote(&desk.agreement.extra, 0));
    team.meet();
  }
  const Sequence sequence(call, item % call.rows);
  const int i = static_cast<int>(item / call.rows);
  if (i < sequence.steps) {
    const Room room(
        Layout(call.tiles, call.draft_tiles, call.logits, call.draft_logits, team.size, bytes),
        memory, call.logits);
    decide_position(sequence, i, room, desk);
  }
  team.meet();  // no block leaves while another reads its memory
}

}  // namespace specdec::blocks
