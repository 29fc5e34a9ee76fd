// The op `verify`. What the rules are is written in specdec_fast/ops.py.
//
// Rules *match* and *token* go from position to position with the rows that are still accepting:
// what lies behind a rejection is never read. Rule *block* needs the weights of a row's whole
// draft, but a residual only from its last position downwards until a coin wins.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "../kernels/cuda/philox.cuh"
#include "judge.h"
#include "share.h"

namespace specdec {

namespace {

enum Purpose : uint32_t { kAccept = 1, kResidual = 2, kTarget = 3 };  // randomness.Purpose

// One row of the batch on its way through the positions.
class Sequence {
 public:
  Sequence(const Call& call, const Output& output, int64_t b)
      : call_(call), output_(output), b_(b), filters_(call.filters(b)) {
    length_ = std::min({std::max<int64_t>(call.count(b), 0), call.drafted, call.positions});
    rule_ = filters_.greedy() ? kMatch : call.rule;
    rows_.resize(rule_ == kBlock ? length_ + 1 : 1);
    laws_.resize(rule_ == kBlock ? length_ : rule_ == kToken && length_ > 0 ? 1 : 0);
  }

  Rule rule() const { return rule_; }
  bool greedy() const { return filters_.greedy(); }
  bool done() const { return done_; }
  bool rejected() const { return rejected_; }

  // Rules match and token: adds the rows that position i needs.
  void open(int64_t i, std::vector<Row*>& needed) {
    if (i == call_.positions) return finish_void();
    rows_[0] = call_.logits.row(b_, i, filters_);
    needed.push_back(&rows_[0]);
    if (rule_ == kToken && i < length_) open_law(laws_[0], i, needed);
  }

  // Decides position i; a residual is put off until it is measured with the others.
  void decide(int64_t i) {
    const Row& p = rows_[0];
    if (p.undefined) return finish(i, p, 0);
    if (rule_ == kMatch) {
      const int64_t own = draw(p, target_number(i));
      if (i < length_ && own == call_.tokens(b_, i)) return keep(i, p);
      return finish(i, p, own);
    }
    if (i == length_) return finish(i, p, draw(p, residual_number(i)));
    const double log_p = p.log_prob(laws_[0].token), log_q = laws_[0].log_q();
    const bool drawable = log_q > -std::numeric_limits<double>::infinity();
    if (drawable && log_p > std::log(accept_number(i)) + log_q) return keep(i, p);
    place_ = i;
    residual_ = {&p, &laws_[0], 1.0, {}, 0.0};
    rejected_ = true;
  }

  Residual& residual() { return residual_; }

  void draw_rejected() {
    finish(place_, *residual_.p, residual_.draw(residual_number(place_)));
    if (residual_.law->undefined()) output_.status[b_] |= kDraftUndefined;
  }

  // Rule block: adds the rows of all drafted positions.
  void open_block(std::vector<Row*>& needed) {
    for (int64_t i = 0; i < length_; ++i) {
      rows_[i] = call_.logits.row(b_, i, filters_);
      needed.push_back(&rows_[i]);
      open_law(laws_[i], i, needed);
    }
  }

  // Weighs the draft; the last coin decides here, and its row is added if it is not measured yet.
  void weigh(std::vector<Row*>& needed) {
    end_ = 0;
    while (end_ < length_ && !rows_[end_].undefined) ++end_;
    log_weights_.assign(1, 0.0);
    for (int64_t i = 0; i < end_; ++i) {
      const double log_p = rows_[i].log_prob(laws_[i].token), log_q = laws_[i].log_q();
      const double step = log_p - log_q;
      const bool defined = log_q > -std::numeric_limits<double>::infinity() && !std::isnan(step);
      const double next =
          defined ? log_weights_.back() + step : -std::numeric_limits<double>::infinity();
      log_weights_.push_back(std::min(next, 0.0));
    }
    place_ = end_;
    won_ = end_ == 0 || accept_number(end_ - 1) < std::exp(log_weights_[end_]);
    if (!won_) return;
    if (end_ < call_.positions && end_ == length_) {
      rows_[end_] = call_.logits.row(b_, end_, filters_);
      needed.push_back(&rows_[end_]);
    }
  }

  void finish_block() {
    if (!won_) return;
    done_ = true;
    for (int64_t i = 0; i < place_; ++i) keep(i, rows_[i]);
    if (place_ == call_.positions) return finish_void();
    const Row& p = rows_[place_];
    finish(place_, p, p.undefined ? 0 : draw(p, residual_number(place_)));
  }

  // The next position downwards and its residual.
  void descend() {
    --place_;
    residual_ = {&rows_[place_], &laws_[place_], std::exp(log_weights_[place_]), {}, 0.0};
  }

  // Throws the coin of that position; if it wins, the token is drawn.
  void settle() {
    const double whole = residual_.sum + (1.0 - residual_.weight);
    const double chance = whole > 0.0 ? residual_.sum / whole : 1.0;
    if (place_ > 0 && !(accept_number(place_ - 1) < chance)) return;
    for (int64_t i = 0; i < place_; ++i) keep(i, rows_[i]);
    draw_rejected();
  }

 private:
  void open_law(Law& law, int64_t i, std::vector<Row*>& needed) {
    law = Law();
    law.token = call_.tokens(b_, i);
    const int32_t kind = call_.kind(b_, i);
    const Filters filters = call_.draft_filters(b_);
    if (kind == kSparse && call_.sparse_ids.given()) {
      law.kind = kSparse;
      law.sparse = {&call_.sparse_ids, &call_.sparse_log_q, b_, i, call_.listed};
      law.sparse_undefined = law.sparse.undefined(call_.logits.width);
    }
    if (kind != kCompact || call_.draft_logits == nullptr || filters.greedy()) return;
    law.kind = kCompact;
    law.row = call_.draft_logits->row(b_, i, filters);
    law.map = call_.map;
    const int64_t drawn = call_.drawn(b_, i);
    law.drawn =
        call_.drawn.given() ? Range{drawn, drawn + 1} : law.map.entries(law.token, law.token + 1);
    const double known = call_.draft_logsumexp(b_, i);
    if (filters.any() || !std::isfinite(known)) {
      needed.push_back(&law.row);
    } else {
      law.row.peak = known;
      law.row.total = 1.0;
      law.row.measured = true;
    }
  }

  void keep(int64_t i, const Row& p) {
    if (output_.log_prob)
      output_.log_prob[b_ * call_.positions + i] = p.log_prob(call_.tokens(b_, i));
  }

  void finish(int64_t i, const Row& p, int64_t token) {
    done_ = true;
    output_.accepted[b_] = i;
    output_.token[b_] = std::max<int64_t>(token, 0);
    output_.status[b_] = p.undefined ? kTargetUndefined : 0;
    if (output_.log_prob) output_.log_prob[b_ * call_.positions + i] = p.log_prob(token);
  }

  // Every position given was used up.
  void finish_void() {
    done_ = true;
    output_.accepted[b_] = call_.positions;
    output_.token[b_] = -1;
    output_.status[b_] = 0;
  }

  double number(int64_t position, int64_t offset, uint32_t purpose) const {
    return philox_uniform(call_.seed(b_), position, offset, purpose, 0);
  }
  double accept_number(int64_t i) const { return number(call_.start(b_), call_.base + i, kAccept); }
  double residual_number(int64_t i) const {
    return number(call_.start(b_), call_.base + i, kResidual);
  }
  double target_number(int64_t i) const {
    return number(call_.start(b_) + call_.base + i, 0, kTarget);
  }

  const Call& call_;
  Output output_;
  int64_t b_;
  Filters filters_;
  Rule rule_;
  int64_t length_;  // draft tokens to judge
  std::vector<Row> rows_;
  std::vector<Law> laws_;
  Residual residual_;
  int64_t place_ = 0;
  int64_t end_ = 0;  // block: where the draft ends, at the latest before an undefined row
  bool won_ = false;
  bool rejected_ = false;
  bool done_ = false;
  std::vector<double> log_weights_;
};

using Sequences = std::vector<Sequence*>;

template <typename Decision>
void parallel(const Sequences& sequences, const Share& share, const Decision& decision) {
  constexpr int64_t kGrain = 4;  // a decision takes about 5 us
  share(static_cast<int64_t>(sequences.size()), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) decision(*sequences[i]);
  });
}

void drop_done(Sequences& sequences) {
  const auto done = [](Sequence* sequence) { return sequence->done(); };
  sequences.erase(std::remove_if(sequences.begin(), sequences.end(), done), sequences.end());
}

void measure_residuals(const Sequences& sequences, const Share& share) {
  std::vector<Residual*> residuals;
  for (Sequence* sequence : sequences) residuals.push_back(&sequence->residual());
  measure(residuals, share);
}

void go_forward(Sequences open, const Share& share) {
  for (int64_t i = 0; !open.empty(); ++i) {
    std::vector<Row*> needed;
    for (Sequence* sequence : open) sequence->open(i, needed);
    drop_done(open);
    measure(needed, share);
    parallel(open, share, [i](Sequence& sequence) { sequence.decide(i); });
    Sequences rejected;
    for (Sequence* sequence : open) {
      if (sequence->rejected()) rejected.push_back(sequence);
    }
    measure_residuals(rejected, share);
    parallel(rejected, share, [](Sequence& sequence) { sequence.draw_rejected(); });
    drop_done(open);
  }
}

void judge_blocks(Sequences open, const Share& share) {
  std::vector<Row*> needed;
  for (Sequence* sequence : open) sequence->open_block(needed);
  measure(needed, share);
  needed.clear();
  for (Sequence* sequence : open) sequence->weigh(needed);
  measure(needed, share);
  parallel(open, share, [](Sequence& sequence) { sequence.finish_block(); });
  drop_done(open);
  while (!open.empty()) {
    for (Sequence* sequence : open) sequence->descend();
    measure_residuals(open, share);
    parallel(open, share, [](Sequence& sequence) { sequence.settle(); });
    drop_done(open);
  }
}

}  // namespace

int64_t pieces_of(const Call& call) {
  const int64_t chunks = (call.logits.width + kChunk - 1) / kChunk;
  int64_t pieces = 0;
  for (int64_t b = 0; b < call.rows; ++b) {
    const bool greedy = call.filters(b).greedy();
    const bool whole = !greedy && call.rule == kBlock;
    pieces += whole ? chunks * call.positions : greedy ? chunks / 4 : chunks;
  }
  return pieces;
}

void judge(const Call& call, const Output& output, const Share& share) {
  std::vector<Sequence> sequences;
  sequences.reserve(call.rows);
  for (int64_t b = 0; b < call.rows; ++b) sequences.emplace_back(call, output, b);
  Sequences forward, blocks;
  for (Sequence& s : sequences) (s.rule() == kBlock ? blocks : forward).push_back(&s);
  go_forward(forward, share);
  judge_blocks(blocks, share);
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> verify(
    const Tensor& logits_, const MaybeTensor& temperature, const MaybeTensor& top_k,
    const MaybeTensor& top_p, const MaybeTensor& min_p, const Tensor& tokens, const Tensor& count,
    const MaybeTensor& kind, const MaybeTensor& draft_logits_, const MaybeTensor& draft_temperature,
    const MaybeTensor& draft_top_k, const MaybeTensor& draft_top_p, const MaybeTensor& draft_min_p,
    const MaybeTensor& index, const MaybeTensor& drawn, const MaybeTensor& draft_logsumexp,
    const MaybeTensor& sparse_ids, const MaybeTensor& sparse_log_q, const Tensor& seed,
    const Tensor& start, int64_t base, int64_t rule, bool log_probs) {
  const Logits logits("logits", logits_, 3);
  const int64_t rows = logits_.size(0), positions = logits_.size(1), drafted = tokens.size(1);
  std::optional<Logits> draft_logits;
  IndexMap map;
  Tensor index_kept;
  if (draft_logits_) {
    draft_logits.emplace("draft_logits", *draft_logits_, 3);
    STD_TORCH_CHECK(draft_logits_->size(0) == rows && draft_logits_->size(1) == drafted,
                    "draft_logits must have the rows and positions of tokens");
    if (index) {
      Reader<int32_t>("index", *index, {draft_logits->width});
      index_kept = torch::stable::contiguous(*index);
      map = {static_cast<const int32_t*>(index_kept.const_data_ptr()), draft_logits->width};
    }
  }
  const int64_t listed = sparse_ids ? sparse_ids->size(2) : 0;
  const LawKind usual = draft_logits ? kCompact : sparse_ids ? kSparse : kPoint;
  constexpr double kNone = std::numeric_limits<double>::quiet_NaN();
  const Call call{
      logits,
      {temperature, top_k, top_p, min_p, rows},
      {"tokens", tokens, {rows, drafted}},
      {"count", count, {rows}},
      {"kind", kind, {rows, drafted}, usual},
      draft_logits ? &*draft_logits : nullptr,
      {draft_temperature, draft_top_k, draft_top_p, draft_min_p, rows},
      map,
      {"drawn", drawn, {rows, drafted}, -1},
      {"draft_logsumexp", draft_logsumexp, {rows, drafted}, kNone},
      {"sparse_ids", sparse_ids, {rows, drafted, listed}, -1},
      {"sparse_log_q", sparse_log_q, {rows, drafted, listed}, 0.0},
      {"seed", seed, {rows}},
      {"start", start, {rows}},
      rows,
      positions,
      drafted,
      listed,
      base,
      static_cast<Rule>(rule),
  };
  Tensor accepted = new_tensor(logits_, {rows}, ScalarType::Long);
  Tensor token = new_tensor(logits_, {rows}, ScalarType::Long);
  Tensor log_prob = new_tensor(logits_, {rows, log_probs ? positions : 0}, ScalarType::Double);
  Tensor status = new_tensor(logits_, {rows}, ScalarType::Int);
  if (log_probs) std::fill_n(pointer<double>(log_prob), rows * positions, -1.0);
  const Output output{pointer<int64_t>(accepted), pointer<int64_t>(token),
                      log_probs ? pointer<double>(log_prob) : nullptr, pointer<int32_t>(status)};

  together(pieces_of(call), [&](const Share& share) { judge(call, output, share); });
  return {accepted, token, log_prob, status};
}

}  // namespace

}  // namespace specdec

STABLE_TORCH_LIBRARY_IMPL(specdec_fast, CPU, library) {
  library.impl("verify", TORCH_BOX(&specdec::verify));
}
