// `llama_climb`: a target judges a tree.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "arguments.h"
#include "race.h"
#include "share.h"
#include "texts.h"
#include "traverse.h"
#include "tree.h"

namespace specdec {

namespace {

struct Judged {
  std::vector<int64_t> first, counts, rows, columns, hidden, seed, start;
  std::vector<int64_t> tokens, parents;  // [rows, most]
  Filters filters;
  std::shared_ptr<Memory> memory;  // of what the trees were drawn from
  // Where the target judges by the law of the draws: the law behind each row's text, [rows, most]
  // what each node was drawn as and the law behind it, the scores of all laws [known, width], their
  // logsumexp, and the target's id of each entry, null: its place. Null scores: the target draws
  // its own tokens.
  std::vector<int64_t> roots, entries, laws;
  const float* scores = nullptr;
  const double* logsumexp = nullptr;
  const int32_t* index = nullptr;
  int64_t known = 0, width = 0;

  // Whether a node's entry, its token and the law it was drawn from are there
  bool lawful(int64_t r, int64_t i) const {
    const int64_t at = r * static_cast<int64_t>(tokens.size() / rows.size());
    const int64_t parent = parents[at + i], entry = entries[at + i];
    const int64_t law = parent < 0 ? roots[r] : laws[at + parent];
    return law >= 0 && law < known && entry >= 0 && entry < width &&
           tokens[at + i] == (index ? index[entry] : entry);
  }

  Drawing drawing(int64_t r) const {
    const int64_t most = static_cast<int64_t>(tokens.size() / rows.size()), at = r * most;
    return {counts[r],
            tokens.data() + at,
            parents.data() + at,
            entries.data() + at,
            laws.data() + at,
            roots[r],
            scores,
            logsumexp,
            width,
            index ? IndexMap{index, width} : IndexMap{},
            seed[r],
            start[r]};
  }
};

class Climber {
 public:
  Climber(const Session& session, const Judged& given, int64_t most, const Share& share)
      : session_(session), given_(given), most_(most), share_(share) {}

  // Goes up a row's tree as far as the target's own tokens are in it; returns the next token, -1
  // where its scores are no law, and writes down the nodes passed.
  int64_t climb(int64_t r, const float* logits, std::vector<int64_t>& passed) const {
    const int64_t* tokens = given_.tokens.data() + r * most_;
    const int64_t* parents = given_.parents.data() + r * most_;
    for (int64_t node = -1;;) {
      const int64_t token = own(logits + (node + 1) * session_.model->width(), r,
                                static_cast<int64_t>(passed.size()));
      int64_t next = 0;
      while (next < given_.counts[r] && (parents[next] != node || tokens[next] != token)) ++next;
      if (token < 0 || next == given_.counts[r]) return token;
      passed.push_back(node = next);
    }
  }

 private:
  // The target's own token at a position
  int64_t own(const float* logits, int64_t r, int64_t depth) const {
    Row row = row_of(logits, session_.model->width(), given_.filters);
    measure({&row}, share_);
    if (row.undefined) return -1;
    if (given_.filters.greedy()) return row.argmax();
    const Runners runners{given_.seed[r], given_.start[r] + depth};
    const auto order = race({&row}, runners, 1, share_);
    return order[0].empty() ? -1 : order[0][0].entry;
  }

  const Session& session_;
  const Judged& given_;
  int64_t most_;
  const Share& share_;
};

// Moves what stands in some columns of a row to the columns from `begin` on; the columns ascend.
void close_ranks(const Session& session, int64_t row, int64_t begin,
                 const std::vector<int64_t>& columns) {
  const Shape& shape = session.model->shape;
  for (const Stored& stored : session.caches) {
    const int64_t bytes = shape.dim * (stored.half ? 2 : 4);
    for (void* part : {stored.keys, stored.values}) {
      for (int64_t h = 0; h < shape.kv_heads; ++h) {
        char* head =
            static_cast<char*>(part) + (row * shape.kv_heads + h) * stored.capacity * bytes;
        for (size_t i = 0; i < columns.size(); ++i) {
          const int64_t to = begin + static_cast<int64_t>(i);
          if (columns[i] != to) std::memcpy(head + to * bytes, head + columns[i] * bytes, bytes);
        }
      }
    }
  }
}

// How many nodes of each row stay, the token behind them, the nodes themselves [rows, most]; and
// nanoseconds of the pass and of judging
std::vector<int64_t> climbed(const Session& session, Judged given) {
  const int64_t height = static_cast<int64_t>(given.rows.size()), width = session.model->width();
  for (const auto* list :
       {&given.first, &given.counts, &given.columns, &given.hidden, &given.seed, &given.start})
    STD_TORCH_CHECK(height > 0 && list->size() == given.rows.size(),
                    "llama_climb: a number for each row");
  const int64_t most = static_cast<int64_t>(given.tokens.size()) / height;
  STD_TORCH_CHECK(!given.scores || (given.logsumexp && !given.filters.greedy()),
                  "llama_climb: laws have sums, and a temperature");
  STD_TORCH_CHECK(given.parents.size() == given.tokens.size() &&
                      static_cast<int64_t>(given.tokens.size()) == most * height,
                  "llama_climb: trees are [rows, most]");
  Grove grove;
  std::vector<int64_t> begins, asked;
  const auto known = [&](int64_t token) {  // an id that the model does not have is read as another
    return std::min(std::max<int64_t>(token, 0), session.model->vocabulary - 1);
  };
  for (int64_t r = 0; r < height; ++r) {
    const int64_t row = given.rows[r], column = given.columns[r], count = given.counts[r];
    STD_TORCH_CHECK(count >= 0 && count <= most && given.hidden[r] >= 0 &&
                        session.holds(row, column) && session.holds(row, column + count),
                    "llama_climb: a row or a node is out of range");
    begins.push_back(grove.size());
    grove.put(known(given.first[r]), row, column, given.hidden[r]);
    std::vector<std::vector<int64_t>> paths;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t parent = given.parents[r * most + i];
      STD_TORCH_CHECK(parent >= -1 && parent < i, "llama_climb: a node stands behind its parent");
      STD_TORCH_CHECK(!given.scores || given.lawful(r, i),
                      "llama_climb: a node was drawn from a law behind its parent");
      paths.push_back(parent < 0 ? std::vector<int64_t>() : paths[parent]);
      paths.back().push_back(column + 1 + i);
      grove.put(known(given.tokens[r * most + i]), row, column + 1, given.hidden[r], paths.back());
    }
  }
  for (int64_t i = 0; i < grove.size(); ++i) asked.push_back(i);
  session.scores.reserve(grove.size() * width);
  float* logits = session.scores.data();
  std::vector<int64_t> report(2 * height + height * most + 2);
  const auto begin = Clock::now();
  auto through = begin;
  Team::gather([&](Team& team) {
    session.run(team, grove.lanes(), grove.tokens(), asked, logits);
    through = Clock::now();
    const Share share = share_of(team);
    const Climber climber(session, given, most, share);
    std::vector<Memory::Said> said;
    for (int64_t r = 0; r < height; ++r) {
      std::vector<int64_t> passed, columns;
      const float* own = logits + begins[r] * width;
      if (given.scores) {
        const Drawing drawing = given.drawing(r);
        report[height + r] = Traverser(drawing, own, width, given.filters, share).traverse(passed);
      } else {
        report[height + r] = climber.climb(r, own, passed);
      }
      report[r] = static_cast<int64_t>(passed.size());
      for (size_t i = 0; i < passed.size(); ++i) {
        report[2 * height + r * most + static_cast<int64_t>(i)] = passed[i];
        columns.push_back(given.columns[r] + 1 + passed[i]);
      }
      close_ranks(session, given.rows[r], given.columns[r] + 1, columns);
      said.push_back({given.rows[r], -1, given.start[r], own});
      for (size_t i = 0; i < passed.size(); ++i)
        said.push_back({given.rows[r], passed[i], given.start[r] + static_cast<int64_t>(i) + 1,
                        own + (passed[i] + 1) * width});
    }
    if (given.memory) given.memory->hear(*session.kernels, share, said, width);
  });
  report[2 * height + height * most] = nanoseconds(through - begin);
  report.back() = nanoseconds(Clock::now() - through);
  return report;
}

// Numbers: session, rows, nodes of the largest tree, top-k, the memory; the addresses of scores,
// sums and index, how many laws those are, and entries of each; first, counts, rows, columns,
// hidden, seed and start of every row, tokens and parents; where there are scores, the law behind
// every text, what each node was drawn as, and the law behind it. Reals: temperature, top-p and
// min-p.
std::vector<int64_t> climb(const int64_t* numbers, int64_t count, const double* reals,
                           int64_t told_reals) {
  STD_TORCH_CHECK(count >= 10 && (told_reals < 0 || told_reals == 3),
                  "llama_climb: numbers are too few, or reals not three");
  const int64_t height = numbers[1];
  Board board(numbers + 10, numbers + count);
  Judged given;
  for (auto* list : {&given.first, &given.counts, &given.rows, &given.columns, &given.hidden,
                     &given.seed, &given.start})
    *list = board.next(height);
  STD_TORCH_CHECK(height > 0 && numbers[2] >= 0 && numbers[2] <= kMostNodes,
                  "llama_climb: trees are [rows, most], and not too large");
  given.tokens = board.next(height * numbers[2]);
  given.parents = board.next(height * numbers[2]);
  given.scores = reinterpret_cast<const float*>(numbers[5]);
  given.logsumexp = reinterpret_cast<const double*>(numbers[6]);
  given.index = reinterpret_cast<const int32_t*>(numbers[7]);
  given.known = numbers[8], given.width = numbers[9];
  if (given.scores) {
    given.roots = board.next(height);
    given.entries = board.next(height * numbers[2]);
    given.laws = board.next(height * numbers[2]);
  }
  board.close();
  given.filters = {static_cast<float>(reals[0]), static_cast<int32_t>(numbers[3]),
                   static_cast<float>(reals[1]), static_cast<float>(reals[2])};
  given.memory = memory_of(numbers[4]);
  return climbed(*llama_session(numbers[0]), std::move(given));
}

std::vector<int64_t> llama_climb(std::vector<int64_t> numbers, std::vector<double> reals) {
  return call<&climb>(std::move(numbers), std::move(reals));
}

int64_t llama_climb_entry() { return reinterpret_cast<int64_t>(&entry<&climb>); }

}  // namespace

}  // namespace specdec

STABLE_TORCH_LIBRARY_IMPL(specdec_fast, CompositeExplicitAutograd, library) {
  library.impl("llama_climb", TORCH_BOX(&specdec::llama_climb));
  library.impl("llama_climb_entry", TORCH_BOX(&specdec::llama_climb_entry));
}
