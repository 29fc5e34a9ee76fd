// Ops over texts as they lie in lists, rows of any lengths: `llama_read`, one pass, and
// `llama_draft`, a pass and the steps of a drafter behind it, with the choosing between them.
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
#include <cstring>
#include <limits>
#include <memory>
#include <tuple>
#include <vector>

#include "../kernels/cuda/philox.cuh"
#include "arguments.h"
#include "llama_model.h"
#include "rows.h"
#include "share.h"

namespace specdec {

namespace {

constexpr uint32_t kDraft = 0;  // randomness.Purpose
constexpr float kForbidden = -std::numeric_limits<float>::infinity();

// Tokens to feed, a list a row, and where they stand
struct Texts {
  std::vector<int64_t> tokens, row, column, hidden;  // by lane
  std::vector<int64_t> last;                         // lane of each text
  int64_t highest_row = 0, highest_column = 0;

  Lanes lanes() const {
    return {static_cast<int64_t>(tokens.size()), row.data(), column.data(), hidden.data()};
  }
};

// `more` columns behind each text must be there as well.
Texts texts_of(const Llama& model, std::vector<int64_t> tokens, const std::vector<int64_t>& lengths,
               const std::vector<int64_t>& rows, const std::vector<int64_t>& columns,
               const std::vector<int64_t>& hidden, const std::vector<int64_t>& more) {
  const size_t height = rows.size();
  STD_TORCH_CHECK(height > 0 && lengths.size() == height && columns.size() == height &&
                      hidden.size() == height && more.size() == height,
                  "llama: a text for each row");
  Texts texts;
  for (size_t r = 0; r < height; ++r) {
    STD_TORCH_CHECK(
        lengths[r] > 0 && more[r] >= 0 && rows[r] >= 0 && columns[r] >= 0 && hidden[r] >= 0,
        "llama: a row without tokens, or one out of range");
    for (int64_t i = 0; i < lengths[r]; ++i) {
      texts.row.push_back(rows[r]);
      texts.column.push_back(columns[r] + i);
      texts.hidden.push_back(hidden[r]);
    }
    texts.last.push_back(static_cast<int64_t>(texts.row.size()) - 1);
    texts.highest_row = std::max(texts.highest_row, rows[r]);
    texts.highest_column = std::max(texts.highest_column, columns[r] + lengths[r] + more[r] - 1);
  }
  bool known = tokens.size() == texts.row.size();
  for (const int64_t token : tokens) known = known && token >= 0 && token < model.vocabulary;
  STD_TORCH_CHECK(known, "llama: a token is out of range, or one too many");
  texts.tokens = std::move(tokens);
  return texts;
}

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
    if (!filters_.greedy()) warp(writers, step, logits);
    std::vector<const float*> from(n);
    for (int64_t i = 0; i < n; ++i)
      from[i] = filters_.greedy() ? logits + i * width_ : writers[i]->scores + step * width_;
    Filters plain;  // the argmax needs no masses, its confidence does
    plain.temperature = filters_.greedy() && !ending_.any() ? 0.0f : 1.0f;
    const std::vector<Row> rows = measured(from, plain);
    share_(n, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) choose(*writers[i], step, rows[i], from[i]);
    });
  }

 private:
  std::vector<Row> measured(const std::vector<const float*>& from, const Filters& filters) const {
    std::vector<Row> rows(from.size());
    std::vector<Row*> all;
    for (size_t i = 0; i < from.size(); ++i) {
      rows[i].data = reinterpret_cast<const char*>(from[i]);
      rows[i].width = width_;
      rows[i].filters = filters;
      all.push_back(&rows[i]);
    }
    measure(all, share_);
    return rows;
  }

  // The scores of a step: logits by temperature, -inf where a filter leaves no mass.
  void warp(const std::vector<Writer*>& writers, int64_t step, const float* logits) const {
    const int64_t n = static_cast<int64_t>(writers.size()), chunks = (width_ + kChunk - 1) / kChunk;
    std::vector<Row> rows;
    if (filters_.any()) {
      std::vector<const float*> from(n);
      for (int64_t i = 0; i < n; ++i) from[i] = logits + i * width_;
      rows = measured(from, filters_);
    }
    if (!filters_.any() && filters_.temperature == 1.0f && n == 1 &&
        logits == writers[0]->scores + step * width_)
      return;
    share_(n * chunks, 1, [&](int64_t begin, int64_t end) {
      alignas(64) float scores[kChunk];
      alignas(64) double weights[kChunk];
      for (int64_t k = begin; k < end; ++k) {
        const int64_t i = k / chunks, c = k % chunks, size = std::min(kChunk, width_ - c * kChunk);
        float* to = writers[i]->scores + step * width_ + c * kChunk;
        const bool undefined = filters_.any() && rows[i].undefined;
        if (filters_.any() && !undefined) rows[i].weights(c, 1.0, weights);
        const float* from = logits + i * width_ + c * kChunk;
        chunk_kernels().load[kFloat32](from, size, filters_.temperature, scores);
        for (int64_t j = 0; filters_.any() && j < size; ++j) {
          if (undefined || !(weights[j] > 0.0)) scores[j] = kForbidden;
        }
        std::memcpy(to, scores, size * sizeof(float));
      }
    });
  }

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
  Draft(const Llama& model, const PassKernels& kernels, const std::vector<Stored>& caches,
        const float* turns, const int64_t* ids)
      : model_(model), kernels_(kernels), caches_(caches), turns_(turns), ids_(ids) {}

  // Feeds each row the tokens it lacks, then draws and feeds until every draft is as long as it
  // gets.
  void write(Team& team, Chooser& chooser, std::vector<Writer>& writers, Texts fed) {
    std::vector<Writer*> going;
    for (Writer& writer : writers) going.push_back(&writer);
    std::unique_ptr<float[]> scratch;
    for (int64_t step = 0;; ++step) {
      float* logits = writers.size() == 1 ? going[0]->scores : nullptr;
      if (logits) {
        logits += step * model_.width();
      } else {
        if (!scratch) scratch.reset(new float[writers.size() * model_.width()]);
        logits = scratch.get();
      }
      forward(team, fed, logits);
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
    model_.run(team, kernels_, fed.lanes(), fed.tokens.data(), caches_, turns_, fed.last, logits);
    passes_ += Clock::now() - begin;
  }

  const Llama& model_;
  const PassKernels& kernels_;
  const std::vector<Stored>& caches_;
  const float* turns_;
  const int64_t* ids_;
  bool strange_ = false;
  Clock::duration passes_{0};
};

Tensor llama_read(int64_t number, std::vector<int64_t> tokens, std::vector<int64_t> lengths,
                  std::vector<int64_t> rows, std::vector<int64_t> columns,
                  std::vector<int64_t> hidden, std::vector<int64_t> tails, const Tensor& rotations,
                  std::vector<Tensor> keys, std::vector<Tensor> values, int64_t capability) {
  const std::shared_ptr<const Llama> model = llama(number);
  const std::vector<int64_t> none(rows.size(), 0);
  const Texts texts = texts_of(*model, std::move(tokens), lengths, rows, columns, hidden, none);
  STD_TORCH_CHECK(tails.size() == rows.size(), "llama_read: a tail for each row");
  const int64_t widest = *std::max_element(tails.begin(), tails.end());
  std::vector<int64_t> asked;
  for (size_t r = 0; r < rows.size(); ++r) {
    STD_TORCH_CHECK(tails[r] > 0 && tails[r] <= lengths[r],
                    "llama_read: a tail is part of its text");
    for (int64_t i = 0; i < widest; ++i)  // behind its own, the last one again
      asked.push_back(texts.last[r] - std::max<int64_t>(tails[r] - 1 - i, 0));
  }
  const float* turns = llama_turns(rotations, model->shape);
  STD_TORCH_CHECK(texts.highest_column < rotations.size(0), "llama_read: a column is out of range");
  const std::vector<Stored> caches =
      model->caches(keys, values, texts.highest_row, texts.highest_column);
  const PassKernels& kernels = llama_kernels(capability);
  Tensor logits = new_tensor(rotations, {static_cast<int64_t>(rows.size()), widest, model->width()},
                             ScalarType::Float);
  Team::gather([&](Team& team) {
    model->run(team, kernels, texts.lanes(), texts.tokens.data(), caches, turns, asked,
               pointer<float>(logits));
  });
  return logits;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> llama_draft(
    int64_t number, std::vector<int64_t> tokens, std::vector<int64_t> lengths,
    std::vector<int64_t> rows, std::vector<int64_t> columns, std::vector<int64_t> hidden,
    std::vector<int64_t> steps, const MaybeTensor& choices, const Tensor& seed_,
    const Tensor& start_, double temperature, int64_t top_k, double top_p, double min_p,
    double least, int64_t levels, std::vector<double> stops, const Tensor& rotations,
    std::vector<Tensor> keys, std::vector<Tensor> values, int64_t capability) {
  const std::shared_ptr<const Llama> model = llama(number);
  const int64_t height = static_cast<int64_t>(rows.size()), width = model->width();
  std::vector<int64_t> more;  // the last token of a draft is not fed
  for (const int64_t step : steps) more.push_back(step - 1);
  Texts texts = texts_of(*model, std::move(tokens), lengths, rows, columns, hidden, more);
  const Reader<int64_t> seed("seed", seed_, {height}), start("start", start_, {height});
  const int64_t most = *std::max_element(steps.begin(), steps.end());
  if (choices) {
    STD_TORCH_CHECK(choices->scalar_type() == ScalarType::Long && choices->is_contiguous() &&
                        choices->numel() == width,
                    "llama_draft: choices are an int64 id for each logit");
  }
  int64_t told = 0;
  for (const int64_t step : steps) told += levels ? levels + step : 0;
  STD_TORCH_CHECK(levels >= 0 && static_cast<int64_t>(stops.size()) == told,
                  "llama_draft: stops are, for each row, an acceptance a level and a bound a step");
  const int64_t* ids = choices ? choices->const_data_ptr<int64_t>() : nullptr;
  const float* turns = llama_turns(rotations, model->shape);
  STD_TORCH_CHECK(texts.highest_column < rotations.size(0),
                  "llama_draft: a column is out of range");
  const std::vector<Stored> caches =
      model->caches(keys, values, texts.highest_row, texts.highest_column);
  const PassKernels& kernels = llama_kernels(capability);
  const Filters filters{static_cast<float>(temperature), static_cast<int32_t>(top_k),
                        static_cast<float>(top_p), static_cast<float>(min_p)};

  const int64_t kept = filters.greedy() ? 0 : most;
  Tensor drawn = new_tensor(rotations, {height, most}, ScalarType::Long);
  Tensor scores = new_tensor(rotations, {height, kept, width}, ScalarType::Float);
  Tensor logsumexp = new_tensor(rotations, {height, kept}, ScalarType::Double);
  Tensor level = new_tensor(rotations, {height, levels ? most : 0}, ScalarType::Long);
  Tensor report = new_tensor(rotations, {height + 1}, ScalarType::Long);
  std::fill_n(pointer<int64_t>(drawn), height * most, 0);
  if (levels) std::fill_n(pointer<int64_t>(level), height * most, 0);
  std::vector<Writer> writers;
  const double* stop = stops.data();
  for (int64_t r = 0; r < height; ++r) {
    float* own = kept ? pointer<float>(scores) + r * kept * width : nullptr;
    double* sums = kept ? pointer<double>(logsumexp) + r * kept : nullptr;
    writers.push_back({rows[r], columns[r] + lengths[r], hidden[r], steps[r], seed(r), start(r),
                       pointer<int64_t>(drawn) + r * most, own, sums,
                       levels ? pointer<int64_t>(level) + r * most : nullptr, stop});
    stop += levels ? levels + steps[r] : 0;
  }
  Draft draft(*model, kernels, caches, turns, ids);
  Team::gather([&](Team& team) {
    Chooser chooser(team, filters, Ending{least, levels}, width);
    draft.write(team, chooser, writers, std::move(texts));
  });
  STD_TORCH_CHECK(!draft.strange(), "llama_draft: a token was drawn that the model cannot read");
  for (int64_t r = 0; r < height; ++r) {
    const int64_t count = pointer<int64_t>(report)[r] = writers[r].count;
    if (kept > count) {  // nobody looks there, but plain rules run over it
      std::fill_n(writers[r].scores + count * width, (kept - count) * width, 0.0f);
      std::fill_n(writers[r].logsumexp + count, kept - count, 0.0);
    }
  }
  pointer<int64_t>(report)[height] = draft.nanoseconds();
  return {drawn, scores, logsumexp, level, report};
}

}  // namespace

}  // namespace specdec

STABLE_TORCH_LIBRARY_IMPL(specdec_fast, CPU, library) {
  library.impl("llama_read", TORCH_BOX(&specdec::llama_read));
  library.impl("llama_draft", TORCH_BOX(&specdec::llama_draft));
}
