// The op `llama_draft`: a pass over texts and the steps of a drafter behind it, with the choosing
// between them.
//
// What is chosen is what specdec_fast/fused.py chooses from the logits of single passes: the same
// scores bit for bit, the same draw (rows.h) with the number of the same key. Threads are woken
// once for all steps and share the chunks of a row as they share the pieces of a pass.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <memory>
#include <tuple>
#include <vector>

#include "../kernels/cuda/philox.cuh"
#include "arguments.h"
#include "memory.h"
#include "rows.h"
#include "share.h"
#include "texts.h"
#include "warp.h"

namespace specdec {

namespace {

constexpr uint32_t kDraft = 0;  // randomness.Purpose

// One row of the batch and what is drawn for it
struct Writer {
  int64_t row, column, hidden;  // of the cache, where its first token goes, and its padding
  int64_t count;                // tokens of its draft, as far as is known
  int64_t seed, start;          // of its numbers
  int64_t* drawn;               // [most] entries
  float* scores;                // [most, width] they were drawn from, null at temperature 0
  double* logsumexp;            // [most] of those scores
  int64_t* level;               // [most] of the confidence in each token, null where nobody asks
  const double* stop;           // [levels] acceptance, [count] what its product must exceed
  double reach = 1.0;           // that product so far
};

// Where drafts end before they are as long as they may get: behind a token of less confidence than
// the least, or where the acceptance of its tokens so far, which goes by their level of confidence,
// is too small. The token stays whatever it is.
struct Ending {
  double least = 0.0;
  int64_t levels = 0;

  bool any() const { return least > 0.0 || levels > 0; }

  void judge(Writer& writer, int64_t step, double confidence) const {
    const bool unsure = least > 0.0 && !(confidence >= least);
    bool over = unsure;
    if (levels) {
      const double scaled = confidence > 0.0 ? confidence * static_cast<double>(levels) : 0.0;
      const int64_t level = std::min(static_cast<int64_t>(scaled), levels - 1);
      writer.level[step] = level;
      writer.reach *= writer.stop[level];
      over = over || !(writer.reach > writer.stop[levels + step]);
    }
    if (over) writer.count = std::min(writer.count, step + 1);
  }
};

class Chooser {
 public:
  Chooser(Team& team, const Filters& filters, const Ending& ending, int64_t width)
      : filters_(filters), ending_(ending), width_(width), share_(share_of(team)) {}

  // Draws a token for each writer from its logits [writers, width], which may be its own scores.
  void choose(const std::vector<Writer*>& writers, int64_t step, const float* logits) {
    const int64_t n = static_cast<int64_t>(writers.size());
    std::vector<const float*> from(n);
    for (int64_t i = 0; i < n; ++i) from[i] = logits + i * width_;
    if (!filters_.greedy()) {
      std::vector<float*> to(n);
      for (int64_t i = 0; i < n; ++i) to[i] = writers[i]->scores + step * width_;
      warp(from, to, width_, filters_, share_);
      from.assign(to.begin(), to.end());
    }
    Filters plain;  // the argmax needs no masses, its confidence does
    plain.temperature = filters_.greedy() && !ending_.any() ? 0.0f : 1.0f;
    const std::vector<Row> rows = measured(from, width_, plain, share_);
    share_(n, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) choose(*writers[i], step, rows[i], from[i]);
    });
  }

 private:
  void choose(Writer& writer, int64_t step, const Row& row, const float* scores) const {
    int64_t& drawn = writer.drawn[step];
    if (filters_.greedy()) {
      drawn = row.undefined ? 0 : row.argmax();
    } else {
      drawn = row.undefined ? -1
                            : draw(row, philox_uniform(writer.seed, writer.start, step, kDraft, 0));
      writer.logsumexp[step] = row.logsumexp();
    }
    if (!ending_.any()) return;
    const double score = scores[std::max<int64_t>(drawn, 0)];
    const double mass = std::exp(score - row.logsumexp());
    ending_.judge(writer, step, std::isnan(mass) ? 0.0 : mass);
  }

  Filters filters_;
  Ending ending_;
  int64_t width_;
  Share share_;
};

// All rows' drafts
class Draft {
 public:
  Draft(const Session& session, const int64_t* ids, Memory* memory)
      : session_(session), model_(*session.model), ids_(ids), memory_(memory) {}

  // Feeds each row the tokens it lacks, then draws and feeds until every draft is as long as it
  // gets.
  void write(Team& team, Chooser& chooser, std::vector<Writer>& writers, Texts fed) {
    std::vector<Writer*> going;
    for (Writer& writer : writers) going.push_back(&writer);
    for (int64_t step = 0;; ++step) {
      float* logits = writers.size() == 1 ? going[0]->scores : nullptr;
      if (logits) {
        logits += step * model_.width();
      } else {
        session_.scores.reserve(writers.size() * model_.width());
        logits = session_.scores.data();
      }
      forward(team, fed, logits);
      mend(team, going, step, logits);
      chooser.choose(going, step, logits);
      const auto over = [step](const Writer* writer) { return step + 1 >= writer->count; };
      going.erase(std::remove_if(going.begin(), going.end(), over), going.end());
      if (going.empty()) return;
      fed = Texts();
      for (Writer* writer : going) {
        const int64_t entry = std::max<int64_t>(writer->drawn[step], 0);
        const int64_t id = ids_ ? ids_[entry] : entry;
        strange_ = strange_ || id < 0 || id >= model_.vocabulary;
        fed.last.push_back(static_cast<int64_t>(fed.tokens.size()));
        fed.tokens.push_back(id);
        fed.row.push_back(writer->row);
        fed.column.push_back(writer->column + step);
        fed.hidden.push_back(writer->hidden);
      }
      if (strange_) return;
    }
  }

  // Whether a token was drawn that the model cannot read
  bool strange() const { return strange_; }

  // Time of the passes alone
  int64_t nanoseconds() const {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(passes_).count();
  }

 private:
  using Clock = std::chrono::steady_clock;

  void forward(Team& team, const Texts& fed, float* logits) {
    const auto begin = Clock::now();
    float* ends = nullptr;
    if (memory_) {
      session_.ends.reserve(static_cast<int64_t>(fed.last.size()) * model_.hidden);
      ends = session_.ends.data();
    }
    session_.run(team, fed.lanes(), fed.tokens.data(), fed.last, logits, ends);
    passes_ += Clock::now() - begin;
  }

  // Lets the memory mend the logits that writers draw from.
  void mend(Team& team, const std::vector<Writer*>& writers, int64_t step, float* logits) {
    if (!memory_) return;
    std::vector<Memory::Place> places;
    for (size_t i = 0; i < writers.size(); ++i) {
      const int64_t at = static_cast<int64_t>(i);
      places.push_back({writers[i]->row, writers[i]->start + step,
                        session_.ends + at * model_.hidden, logits + at * model_.width()});
    }
    memory_->mend(*session_.kernels, share_of(team), places);
    for (const Memory::Place& place : places) memory_->name(place.row, place.note, step - 1);
  }

  const Session& session_;
  const Llama& model_;
  const int64_t* ids_;
  Memory* memory_;
  bool strange_ = false;
  Clock::duration passes_{0};
};

// What is drafted, beside the session
struct Wanted {
  std::vector<int64_t> tokens;  // of the rows' texts, behind one another
  // Of each row: how long its text is, its place, how long a draft may get, and its numbers' keys
  std::vector<int64_t> lengths, rows, columns, hidden, steps, seed, start;
  std::vector<double> stops;  // of each row, an acceptance a level and a bound a step
  int64_t levels = 0;
  double least = 0.0;
  Filters filters;
  const int64_t* ids = nullptr;  // of each logit, null: its place
  std::shared_ptr<Memory> memory;
  // Where scores [rows, most, width] and their logsumexp [rows, most] go, unless greedy
  float* scores = nullptr;
  double* logsumexp = nullptr;

  int64_t most() const { return steps.empty() ? 0 : *std::max_element(steps.begin(), steps.end()); }
};

// Counts of the rows; what was drawn and its levels, [rows, most] each; nanoseconds of the passes
std::vector<int64_t> drafted(const Session& session, Wanted given) {
  const int64_t height = static_cast<int64_t>(given.rows.size()), width = session.model->width();
  const int64_t most = given.most(), levels = given.levels;
  std::vector<int64_t> more;  // the last token of a draft is not fed
  for (const int64_t step : given.steps) more.push_back(step - 1);
  Texts texts = texts_of(session, std::move(given.tokens), given.lengths, given.rows, given.columns,
                         given.hidden, more);
  STD_TORCH_CHECK(given.seed.size() == given.rows.size() && given.start.size() == given.rows.size(),
                  "llama_draft: a seed and a start for each row");
  int64_t told = 0;
  for (const int64_t step : given.steps) told += levels ? levels + step : 0;
  STD_TORCH_CHECK(levels >= 0 && static_cast<int64_t>(given.stops.size()) == told,
                  "llama_draft: stops are, for each row, an acceptance a level and a bound a step");
  STD_TORCH_CHECK(given.filters.greedy() || (given.scores && given.logsumexp),
                  "llama_draft: scores go somewhere");
  float* scores = given.filters.greedy() ? nullptr : given.scores;
  std::vector<int64_t> report(height * (1 + most + (levels ? most : 0)) + 1);
  std::vector<Writer> writers;
  const double* stop = given.stops.data();
  for (int64_t r = 0; r < height; ++r) {
    int64_t* drawn = report.data() + height + r * most;
    writers.push_back({given.rows[r], given.columns[r] + given.lengths[r], given.hidden[r],
                       given.steps[r], given.seed[r], given.start[r], drawn,
                       scores ? scores + r * most * width : nullptr,
                       scores ? given.logsumexp + r * most : nullptr,
                       levels ? drawn + height * most : nullptr, stop});
    stop += levels ? levels + given.steps[r] : 0;
  }
  if (given.memory) remember(*given.memory, session, given.rows);
  Draft draft(session, given.ids, given.memory.get());
  Team::gather([&](Team& team) {
    Chooser chooser(team, given.filters, Ending{given.least, levels}, width);
    draft.write(team, chooser, writers, std::move(texts));
  });
  STD_TORCH_CHECK(!draft.strange(), "llama_draft: a token was drawn that the model cannot read");
  int64_t longest = 0;
  for (const Writer& writer : writers) longest = std::max(longest, writer.count);
  for (int64_t r = 0; r < height; ++r) {
    const int64_t count = report[r] = writers[r].count;
    if (scores && longest > count) {  // nobody looks there, but plain rules run over it
      std::fill_n(writers[r].scores + count * width, (longest - count) * width, 0.0f);
      std::fill_n(writers[r].logsumexp + count, longest - count, 0.0);
    }
  }
  report.back() = draft.nanoseconds();
  return report;
}

std::tuple<std::vector<Tensor>, std::vector<int64_t>> llama_draft(
    int64_t number, std::vector<int64_t> tokens, std::vector<int64_t> lengths,
    std::vector<int64_t> rows, std::vector<int64_t> columns, std::vector<int64_t> hidden,
    std::vector<int64_t> steps, const MaybeTensor& choices, std::vector<int64_t> seed,
    std::vector<int64_t> start, double temperature, int64_t top_k, double top_p, double min_p,
    double least, int64_t levels, std::vector<double> stops, int64_t memory) {
  const std::shared_ptr<const Session> session = llama_session(number);
  Wanted given{std::move(tokens),
               std::move(lengths),
               std::move(rows),
               std::move(columns),
               std::move(hidden),
               std::move(steps),
               std::move(seed),
               std::move(start),
               std::move(stops),
               levels,
               least};
  given.filters = {static_cast<float>(temperature), static_cast<int32_t>(top_k),
                   static_cast<float>(top_p), static_cast<float>(min_p)};
  given.memory = memory_of(memory);
  const int64_t width = session->model->width();
  if (choices) {
    STD_TORCH_CHECK(choices->scalar_type() == ScalarType::Long && choices->is_contiguous() &&
                        choices->numel() == width,
                    "llama_draft: choices are an int64 id for each logit");
    given.ids = choices->const_data_ptr<int64_t>();
  }
  std::vector<Tensor> laws;
  if (!given.filters.greedy()) {
    const int64_t height = static_cast<int64_t>(given.rows.size());
    const int64_t most = std::max<int64_t>(given.most(), 0);
    laws = {new_tensor(session->kept[0], {height, most, width}, ScalarType::Float),
            new_tensor(session->kept[0], {height, most}, ScalarType::Double)};
    given.scores = pointer<float>(laws[0]);
    given.logsumexp = pointer<double>(laws[1]);
  }
  std::vector<int64_t> report = drafted(*session, std::move(given));
  return {std::move(laws), std::move(report)};
}

// The same from numbers as they lie in memory: session, rows, tokens of all texts, levels, top-k,
// the addresses of choices, scores and sums, and the memory; then lengths, rows, columns, hidden,
// steps, seed and start of every row, and the tokens. Temperature, top-p, min-p, the least
// confidence and the stops are real. The report takes the numbers' place.
int64_t draft_entry(int64_t* numbers, const double* reals, int64_t count) noexcept try {
  const int64_t height = numbers[1];
  Board board(numbers + 9, numbers + count);
  Wanted given;
  for (auto* list : {&given.lengths, &given.rows, &given.columns, &given.hidden, &given.steps,
                     &given.seed, &given.start})
    *list = board.next(height);
  given.tokens = board.next(numbers[2]);
  board.close();
  given.levels = numbers[3];
  int64_t told = 0;
  for (const int64_t step : given.steps) told += given.levels ? given.levels + step : 0;
  given.stops = {reals + 4, reals + 4 + std::max<int64_t>(told, 0)};
  given.least = reals[3];
  given.filters = {static_cast<float>(reals[0]), static_cast<int32_t>(numbers[4]),
                   static_cast<float>(reals[1]), static_cast<float>(reals[2])};
  given.ids = reinterpret_cast<const int64_t*>(numbers[5]);
  given.scores = reinterpret_cast<float*>(numbers[6]);
  given.logsumexp = reinterpret_cast<double*>(numbers[7]);
  given.memory = memory_of(numbers[8]);
  const std::vector<int64_t> report = drafted(*llama_session(numbers[0]), std::move(given));
  std::copy(report.begin(), report.end(), numbers);
  return 0;
} catch (...) {
  return 1;  // the operation says why
}

int64_t llama_draft_entry() { return reinterpret_cast<int64_t>(&draft_entry); }

}  // namespace

}  // namespace specdec

STABLE_TORCH_LIBRARY_IMPL(specdec_fast, CompositeExplicitAutograd, library) {
  library.impl("llama_draft", TORCH_BOX(&specdec::llama_draft));
  library.impl("llama_draft_entry", TORCH_BOX(&specdec::llama_draft_entry));
}
