// Ops of a target over texts as they lie in lists: `llama_read`, one pass, and `llama_judge`, a
// pass over drafts and their verification behind it.
//
// Logits that only a rule wants never become a tensor: they are judged where the pass has left
// them, by the threads that have run it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

#include "arguments.h"
#include "judge.h"
#include "share.h"
#include "texts.h"

namespace specdec {

namespace {

Tensor llama_read(int64_t number, std::vector<int64_t> tokens, std::vector<int64_t> lengths,
                  std::vector<int64_t> rows, std::vector<int64_t> columns,
                  std::vector<int64_t> hidden, std::vector<int64_t> tails) {
  const std::shared_ptr<const Session> session = llama_session(number);
  const std::vector<int64_t> none(rows.size(), 0);
  const Texts texts = texts_of(*session, std::move(tokens), lengths, rows, columns, hidden, none);
  STD_TORCH_CHECK(tails.size() == rows.size(), "llama_read: a tail for each row");
  const int64_t widest = *std::max_element(tails.begin(), tails.end());
  std::vector<int64_t> asked;
  for (size_t r = 0; r < rows.size(); ++r) {
    STD_TORCH_CHECK(tails[r] > 0 && tails[r] <= lengths[r],
                    "llama_read: a tail is part of its text");
    for (int64_t i = 0; i < widest; ++i)  // behind its own, the last one again
      asked.push_back(texts.last[r] - std::max<int64_t>(tails[r] - 1 - i, 0));
  }
  Tensor logits = new_tensor(session->kept[0],
                             {static_cast<int64_t>(rows.size()), widest, session->model->width()},
                             ScalarType::Float);
  Team::gather([&](Team& team) {
    session->run(team, texts.lanes(), texts.tokens.data(), asked, pointer<float>(logits));
  });
  return logits;
}

// Feeds each row one token and its draft, and judges the drafts. Of a draft there are `counts`
// tokens, `drafts` [rows, longest] target ids; where there are scores [rows, >= longest, entries],
// `drawn` says which entry each token was drawn as, and `index` which target id an entry is.
// Returns the number accepted and the next token of every row, -1 where the target's scores are no
// law; and nanoseconds: of the pass, and of judging.
std::vector<int64_t> llama_judge(int64_t number, std::vector<int64_t> first,
                                 std::vector<int64_t> drafts, std::vector<int64_t> counts,
                                 std::vector<int64_t> rows, std::vector<int64_t> columns,
                                 std::vector<int64_t> hidden, std::vector<int64_t> drawn,
                                 const MaybeTensor& scores, const MaybeTensor& logsumexp,
                                 const MaybeTensor& index, std::vector<int64_t> seed,
                                 std::vector<int64_t> start, double temperature, int64_t top_k,
                                 double top_p, double min_p, int64_t rule) {
  using Clock = std::chrono::steady_clock;
  const std::shared_ptr<const Session> session = llama_session(number);
  const int64_t height = static_cast<int64_t>(rows.size()), width = session->model->width();
  STD_TORCH_CHECK(height > 0 && first.size() == rows.size() && counts.size() == rows.size() &&
                      seed.size() == rows.size() && start.size() == rows.size(),
                  "llama_judge: a token, a count, a seed and a start for each row");
  const int64_t longest = *std::max_element(counts.begin(), counts.end()), positions = longest + 1;
  STD_TORCH_CHECK(*std::min_element(counts.begin(), counts.end()) >= 0 &&
                      static_cast<int64_t>(drafts.size()) == height * longest &&
                      (!scores || drawn.size() == drafts.size()),
                  "llama_judge: drafts are [rows, longest]");
  const int64_t known = session->model->vocabulary;
  std::vector<int64_t> tokens, lengths, asked;
  for (int64_t r = 0; r < height; ++r) {
    lengths.push_back(counts[r] + 1);
    tokens.push_back(first[r]);
    tokens.insert(tokens.end(), drafts.begin() + r * longest,
                  drafts.begin() + r * longest + counts[r]);
  }
  // An id that the model does not have is read as another one
  for (int64_t& token : tokens) token = std::min(std::max<int64_t>(token, 0), known - 1);
  const std::vector<int64_t> none(height, 0);
  const Texts texts = texts_of(*session, std::move(tokens), lengths, rows, columns, hidden, none);
  for (int64_t r = 0; r < height; ++r) {
    for (int64_t i = 0; i < positions; ++i)  // behind its own, the last one again
      asked.push_back(texts.last[r] - std::max<int64_t>(counts[r] - i, 0));
  }
  session->scores.reserve(height * positions * width);
  float* logits = session->scores.data();

  const Logits own(logits, positions, width);
  std::optional<Logits> law;
  IndexMap map;
  Reader<double> sums(std::numeric_limits<double>::quiet_NaN());
  if (scores && longest) {
    law.emplace("scores", *scores, 3);
    STD_TORCH_CHECK(scores->size(0) == height && scores->size(1) >= longest,
                    "llama_judge: scores of every draft token");
    if (logsumexp) sums = {"logsumexp", *logsumexp, {height, scores->size(1)}};
    if (index) {
      Reader<int32_t>("index", *index, {law->width});
      STD_TORCH_CHECK(index->is_contiguous(), "llama_judge: an index is contiguous");
      map = {static_cast<const int32_t*>(index->const_data_ptr()), law->width};
    }
  }
  const Call call{
      own,
      FilterReader(Filters{static_cast<float>(temperature), static_cast<int32_t>(top_k),
                           static_cast<float>(top_p), static_cast<float>(min_p)}),
      Reader<int64_t>(drafts.data(), longest),
      Reader<int64_t>(counts.data()),
      Reader<int32_t>(law ? kCompact : kPoint),
      law ? &*law : nullptr,
      FilterReader(Filters{}),
      map,
      law ? Reader<int64_t>(drawn.data(), longest) : Reader<int64_t>(int64_t{-1}),
      sums,
      Reader<int64_t>(int64_t{-1}),
      Reader<double>(0.0),
      Reader<int64_t>(seed.data()),
      Reader<int64_t>(start.data()),
      height,
      positions,
      longest,
      0,
      0,
      static_cast<Rule>(rule),
  };
  std::vector<int64_t> report(2 * height + 2);
  std::vector<int32_t> status(height);
  const Output output{report.data(), report.data() + height, nullptr, status.data()};
  const auto begin = Clock::now();
  auto through = begin;
  Team::gather([&](Team& team) {
    session->run(team, texts.lanes(), texts.tokens.data(), asked, logits);
    through = Clock::now();
    judge(call, output, share_of(team));
  });
  const auto nanoseconds = [](Clock::duration time) {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(time).count();
  };
  for (int64_t r = 0; r < height; ++r) {
    if (status[r] & kTargetUndefined) report[height + r] = -1;
  }
  report[2 * height] = nanoseconds(through - begin);
  report[2 * height + 1] = nanoseconds(Clock::now() - through);
  return report;
}

}  // namespace

}  // namespace specdec

STABLE_TORCH_LIBRARY_IMPL(specdec_fast, CompositeExplicitAutograd, library) {
  library.impl("llama_read", TORCH_BOX(&specdec::llama_read));
  library.impl("llama_judge", TORCH_BOX(&specdec::llama_judge));
}
