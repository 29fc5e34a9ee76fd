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

// What a pass that judges drafts is given beside its session
struct Drafts {
  // Of each row: the token before its draft, how long that is, its place, and its numbers' keys
  std::vector<int64_t> first, counts, rows, columns, hidden, seed, start;
  std::vector<int64_t> tokens;  // [rows, longest] target ids
  std::vector<int64_t> drawn;   // [rows, longest] the entry that each was drawn as
  // The scores they were drawn from [rows, room, entries] and their logsumexp [rows, room], both
  // null where they were certain; the target id of each entry, null: it is one
  const float* scores = nullptr;
  const double* logsumexp = nullptr;
  int64_t room = 0, entries = 0;
  const int32_t* index = nullptr;
  Filters filters;
  int64_t rule = kMatch;
  std::shared_ptr<Memory> memory;  // of what the drafts were drawn from
};

// Tells the memory what the target says at the places that stay.
void tell(const Session& session, const Drafts& given, const std::vector<int64_t>& accepted,
          int64_t positions, const Share& share) {
  const int64_t width = session.model->width();
  std::vector<Memory::Said> said;
  for (size_t r = 0; r < given.rows.size(); ++r) {
    const float* logits = session.scores.data() + static_cast<int64_t>(r) * positions * width;
    for (int64_t i = 0; i <= std::min(given.counts[r], accepted[r]); ++i)
      said.push_back({given.rows[r], i - 1, given.start[r] + i, logits + i * width});
  }
  given.memory->hear(*session.kernels, share, said, width);
}

// Feeds each row one token and its draft, and judges the drafts. Returns the number accepted and
// the next token of every row, -1 where the target's scores are no law; and nanoseconds: of the
// pass, and of judging.
std::vector<int64_t> judged(const Session& session, const Drafts& given) {
  using Clock = std::chrono::steady_clock;
  const size_t rows = given.rows.size();
  const int64_t height = static_cast<int64_t>(rows), width = session.model->width();
  STD_TORCH_CHECK(height > 0 && given.first.size() == rows && given.counts.size() == rows &&
                      given.seed.size() == rows && given.start.size() == rows,
                  "llama_judge: a token, a count, a seed and a start for each row");
  const auto [least, most] = std::minmax_element(given.counts.begin(), given.counts.end());
  const int64_t longest = *most, positions = longest + 1;
  STD_TORCH_CHECK(*least >= 0 && static_cast<int64_t>(given.tokens.size()) == height * longest &&
                      (!given.scores || given.drawn.size() == given.tokens.size()),
                  "llama_judge: drafts are [rows, longest]");
  STD_TORCH_CHECK(!given.scores || given.room >= longest,
                  "llama_judge: scores of every draft token");
  std::vector<int64_t> tokens, lengths, asked;
  for (int64_t r = 0; r < height; ++r) {
    const auto draft = given.tokens.begin() + r * longest;
    lengths.push_back(given.counts[r] + 1);
    tokens.push_back(given.first[r]);
    tokens.insert(tokens.end(), draft, draft + given.counts[r]);
  }
  // An id that the model does not have is read as another one
  for (int64_t& token : tokens)
    token = std::min(std::max<int64_t>(token, 0), session.model->vocabulary - 1);
  const std::vector<int64_t> none(height, 0);
  const Texts texts =
      texts_of(session, std::move(tokens), lengths, given.rows, given.columns, given.hidden, none);
  for (int64_t r = 0; r < height; ++r) {
    for (int64_t i = 0; i < positions; ++i)  // behind its own, the last one again
      asked.push_back(texts.last[r] - std::max<int64_t>(given.counts[r] - i, 0));
  }
  session.scores.reserve(height * positions * width);
  float* logits = session.scores.data();
  const Logits own(logits, positions, width);
  const Logits law(given.scores, given.room, given.entries);
  const bool known = given.scores && longest;
  const Call call{
      own,
      FilterReader(given.filters),
      Reader<int64_t>(given.tokens.data(), longest),
      Reader<int64_t>(given.counts.data()),
      Reader<int32_t>(known ? kCompact : kPoint),
      known ? &law : nullptr,
      FilterReader(Filters{}),
      given.index ? IndexMap{given.index, given.entries} : IndexMap{},
      known ? Reader<int64_t>(given.drawn.data(), longest) : Reader<int64_t>(int64_t{-1}),
      known && given.logsumexp ? Reader<double>(given.logsumexp, given.room)
                               : Reader<double>(std::numeric_limits<double>::quiet_NaN()),
      Reader<int64_t>(int64_t{-1}),
      Reader<double>(0.0),
      Reader<int64_t>(given.seed.data()),
      Reader<int64_t>(given.start.data()),
      height,
      positions,
      longest,
      0,
      0,
      static_cast<Rule>(given.rule),
  };
  std::vector<int64_t> report(2 * height + 2);
  std::vector<int32_t> status(height);
  const Output output{report.data(), report.data() + height, nullptr, status.data()};
  const auto begin = Clock::now();
  auto through = begin;
  Team::gather([&](Team& team) {
    session.run(team, texts.lanes(), texts.tokens.data(), asked, logits);
    through = Clock::now();
    judge(call, output, share_of(team));
    if (given.memory) tell(session, given, report, positions, share_of(team));
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

std::vector<int64_t> llama_judge(int64_t number, std::vector<int64_t> first,
                                 std::vector<int64_t> drafts, std::vector<int64_t> counts,
                                 std::vector<int64_t> rows, std::vector<int64_t> columns,
                                 std::vector<int64_t> hidden, std::vector<int64_t> drawn,
                                 const MaybeTensor& scores, const MaybeTensor& logsumexp,
                                 const MaybeTensor& index, std::vector<int64_t> seed,
                                 std::vector<int64_t> start, double temperature, int64_t top_k,
                                 double top_p, double min_p, int64_t rule, int64_t memory) {
  Drafts given{std::move(first),   std::move(counts), std::move(rows),
               std::move(columns), std::move(hidden), std::move(seed),
               std::move(start),   std::move(drafts), std::move(drawn)};
  if (scores && scores->numel()) {
    const int64_t height = static_cast<int64_t>(given.rows.size());
    STD_TORCH_CHECK(scores->dim() == 3 && scores->size(0) == height && scores->is_contiguous() &&
                        scores->scalar_type() == ScalarType::Float,
                    "llama_judge: scores are [rows, room, entries] float32");
    given.room = scores->size(1), given.entries = scores->size(2);
    given.scores = scores->const_data_ptr<float>();
    if (logsumexp) {
      Reader<double>("logsumexp", *logsumexp, {height, given.room});
      STD_TORCH_CHECK(logsumexp->is_contiguous(), "llama_judge: sums are contiguous");
      given.logsumexp = logsumexp->const_data_ptr<double>();
    }
    if (index) {
      Reader<int32_t>("index", *index, {given.entries});
      STD_TORCH_CHECK(index->is_contiguous(), "llama_judge: an index is contiguous");
      given.index = index->const_data_ptr<int32_t>();
    }
  }
  given.filters = {static_cast<float>(temperature), static_cast<int32_t>(top_k),
                   static_cast<float>(top_p), static_cast<float>(min_p)};
  given.rule = rule;
  given.memory = memory_of(memory);
  return judged(*llama_session(number), given);
}

// The same from numbers as they lie in memory: session, rows, longest draft, rule and top-k; of the
// scores their address, that of their sums and of the index, room and entries; the memory; then
// first, counts, rows, columns, hidden, seed and start of every row, the drafts, and what they were
// drawn as. Temperature, top-p and min-p are real. The report takes the numbers' place.
int64_t judge_entry(int64_t* numbers, const double* reals, int64_t count) noexcept try {
  const int64_t height = numbers[1], longest = numbers[2];
  Board board(numbers + 11, numbers + count);
  Drafts given{board.next(height), board.next(height),          board.next(height),
               board.next(height), board.next(height),          board.next(height),
               board.next(height), board.next(height * longest)};
  given.scores = reinterpret_cast<const float*>(numbers[5]);
  if (given.scores) given.drawn = board.next(height * longest);
  board.close();
  given.logsumexp = reinterpret_cast<const double*>(numbers[6]);
  given.index = reinterpret_cast<const int32_t*>(numbers[7]);
  given.room = numbers[8], given.entries = numbers[9];
  given.filters = {static_cast<float>(reals[0]), static_cast<int32_t>(numbers[4]),
                   static_cast<float>(reals[1]), static_cast<float>(reals[2])};
  given.rule = numbers[3];
  given.memory = memory_of(numbers[10]);
  const std::vector<int64_t> report = judged(*llama_session(numbers[0]), given);
  std::copy(report.begin(), report.end(), numbers);
  return 0;
} catch (...) {
  return 1;  // the operation says why
}

int64_t llama_judge_entry() { return reinterpret_cast<int64_t>(&judge_entry); }

}  // namespace

}  // namespace specdec

STABLE_TORCH_LIBRARY_IMPL(specdec_fast, CompositeExplicitAutograd, library) {
  library.impl("llama_read", TORCH_BOX(&specdec::llama_read));
  library.impl("llama_judge", TORCH_BOX(&specdec::llama_judge));
  library.impl("llama_judge_entry", TORCH_BOX(&specdec::llama_judge_entry));
}
