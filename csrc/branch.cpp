// `llama_branch`: a drafter writes a tree.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "arguments.h"
#include "drawn.h"
#include "growth.h"
#include "race.h"
#include "share.h"
#include "texts.h"
#include "tree.h"
#include "warp.h"

namespace specdec {

namespace {

// A tree whose nodes are the likeliest, or the first ones of races
class RacedTree final : public Tree {
 public:
  using Tree::Tree;

  // Adds what may come behind a node, -1 for the text.
  void add(int64_t parent, const std::vector<Ranked>& order, const std::vector<double>& mass) {
    for (size_t i = 0; i < order.size(); ++i) {
      // Most of what is put up has little mass: levels are narrow there
      const double scaled =
          mass[i] > 0.0 ? std::sqrt(mass[i]) * static_cast<double>(wanted_.levels) : 0.0;
      const int64_t level = std::min(static_cast<int64_t>(scaled), wanted_.levels - 1);
      const Node node = made(order[i].entry, parent, level);
      if (node.chance >= wanted_.least || (parent < 0 && i == 0)) nodes_.push_back(node);
    }
  }

  // Drops all but the best nodes, and says which of the deepest level are to have children.
  void settle(int64_t depth) override {
    std::vector<int64_t> order(nodes_.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
    // A node's chance is not above its parent's, which comes before it among equals
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return nodes_[a].chance > nodes_[b].chance; });
    if (static_cast<int64_t>(order.size()) > growth_.most) order.resize(growth_.most);
    std::sort(order.begin(), order.end());
    std::vector<int64_t> now(nodes_.size(), -1);
    std::vector<Node> kept;
    for (const int64_t i : order) {
      Node node = nodes_[i];
      if (node.parent >= 0) node.parent = now[node.parent];
      if (nodes_[i].parent >= 0 && node.parent < 0) continue;
      now[i] = static_cast<int64_t>(kept.size());
      kept.push_back(node);
    }
    nodes_ = std::move(kept);
    frontier_.clear();
    if (depth >= growth_.deepest) return;
    double chances = 0.0;
    const double surest = *std::max_element(growth_.sure, growth_.sure + wanted_.levels);
    for (size_t i = 0; i < nodes_.size(); ++i) {
      if (nodes_[i].depth != depth ||
          nodes_[i].chance * surest < std::max(wanted_.least, lowest())) {
        continue;
      }
      frontier_.push_back(static_cast<int64_t>(i));
      chances += nodes_[i].chance;
    }
    if (!(chances > growth_.worth[depth - 1])) frontier_.clear();
  }

 private:
  // The chance that a new node must exceed to be among the best
  double lowest() const {
    if (static_cast<int64_t>(nodes_.size()) < growth_.most) return 0.0;
    double least = 1.0;
    for (const Node& node : nodes_) least = std::min(least, node.chance);
    return least;
  }
};

// Nodes of trees that are read in one pass, those of a tree side by side; -1: its text
using Asked = std::vector<std::pair<Tree*, int64_t>>;

class Gardener {
 public:
  Gardener(const Session& session, const Wanted& wanted, Team& team)
      : session_(session), wanted_(wanted), team_(team), share_(share_of(team)) {}

  void grow(const std::vector<std::unique_ptr<Tree>>& trees, const Texts& texts) {
    Asked asked;
    for (const auto& tree : trees) asked.push_back({tree.get(), -1});
    place(asked);
    pass([&] {
      session_.run(team_, texts.lanes(), texts.tokens.data(), texts.last, logits_,
                   ends(static_cast<int64_t>(trees.size())));
    });
    for (int64_t passes = 1;; ++passes) {
      mend(asked);
      wanted_.scores ? open(asked) : look(asked);
      Grove grove;
      asked.clear();
      for (const auto& tree : trees) {
        tree->settle(passes);
        tree->plant(grove);
        for (const int64_t i : tree->frontier()) asked.push_back({tree.get(), i});
      }
      if (asked.empty()) return;
      for (int64_t i = 0; i < grove.size(); ++i) {
        const int64_t id = grove.tokens()[i];
        strange_ = strange_ || id < 0 || id >= session_.model->vocabulary;
      }
      if (strange_) return;
      std::vector<int64_t> all(asked.size());
      for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int64_t>(i);
      place(asked);
      pass([&] {
        session_.run(team_, grove.lanes(), grove.tokens(), all, logits_, ends(grove.size()));
      });
    }
  }

  int64_t passes() const { return nanoseconds(passes_); }

  // Whether a token was drawn that the model cannot read
  bool strange() const { return strange_; }

 private:
  template <class Body>
  void pass(const Body& body) {
    const auto begin = Clock::now();
    body();
    passes_ += Clock::now() - begin;
  }

  // Settles where the logits of a pass go: a single row's to where they are kept.
  void place(const Asked& asked) {
    const int64_t width = session_.model->width();
    if (wanted_.scores && wanted_.rows.size() == 1) {
      logits_ = wanted_.scores + static_cast<const DrawnTree&>(*asked[0].first).laws() * width;
    } else {
      session_.scores.reserve(static_cast<int64_t>(asked.size()) * width);
      logits_ = session_.scores.data();
    }
  }

  // Where the hidden states of a pass go, null where nobody wants them
  float* ends(int64_t lanes) {
    if (!wanted_.memory) return nullptr;
    session_.ends.reserve(lanes * session_.model->hidden);
    return session_.ends.data();
  }

  // Lets the memory mend the logits of some nodes.
  void mend(const Asked& asked) {
    if (!wanted_.memory) return;
    std::vector<Memory::Place> places;
    for (size_t i = 0; i < asked.size(); ++i) {
      const auto& [tree, node] = asked[i];
      const Growth& growth = tree->growth();
      const int64_t at = static_cast<int64_t>(i);
      places.push_back({growth.row, growth.start + tree->depth(node),
                        session_.ends + at * session_.model->hidden,
                        logits_ + at * session_.model->width()});
    }
    wanted_.memory->mend(*session_.kernels, share_, places);
    for (size_t i = 0; i < asked.size(); ++i) asked[i].first->note(asked[i].second, places[i].note);
  }

  // Lets each tree draw what comes behind its nodes from the logits of those.
  void open(const Asked& asked) {
    const int64_t width = session_.model->width();
    std::vector<const float*> from;
    std::vector<float*> to;
    std::vector<double*> sums;
    for (size_t i = 0, before = 0; i < asked.size(); ++i) {
      const auto& tree = static_cast<const DrawnTree&>(*asked[i].first);
      before = i > 0 && asked[i - 1].first == &tree ? before + 1 : 0;
      const int64_t law = tree.growth().number * wanted_.room + tree.laws() + before;
      from.push_back(logits_ + static_cast<int64_t>(i) * width);
      to.push_back(wanted_.scores + law * width);
      sums.push_back(wanted_.logsumexp + law);
    }
    warp(from, to, width, wanted_.filters, share_);
    const std::vector<Row> rows = measured({to.begin(), to.end()}, width, Filters{}, share_);
    for (size_t i = 0; i < asked.size(); ++i) {
      *sums[i] = rows[i].logsumexp();
      static_cast<DrawnTree&>(*asked[i].first).open(asked[i].second, rows[i]);
    }
  }

  // Adds to each tree what may come behind its nodes, by the logits of those.
  void look(const Asked& asked) {
    const int64_t width = session_.model->width();
    const bool greedy = wanted_.filters.greedy();
    std::vector<Row> rows;
    std::vector<Row*> all;
    for (size_t i = 0; i < asked.size(); ++i) {
      rows.push_back(row_of(logits_ + static_cast<int64_t>(i) * width, width,
                            greedy ? Filters{} : wanted_.filters));
    }
    for (Row& row : rows) all.push_back(&row);
    measure(all, share_);
    for (size_t begin = 0, end; begin < asked.size(); begin = end) {
      auto& tree = static_cast<RacedTree&>(*asked[begin].first);
      std::vector<const Row*> own;
      std::vector<int64_t> parents;
      for (end = begin; end < asked.size() && asked[end].first == &tree; ++end) {
        if (rows[end].undefined) continue;
        own.push_back(&rows[end]);
        parents.push_back(asked[end].second);
      }
      const Growth& growth = tree.growth();
      const int64_t depth = tree.depth(asked[begin].second);  // they are all of one level
      const Runners runners{growth.seed, growth.start + depth, wanted_.index, greedy};
      const auto orders = race(own, runners, growth.most, share_);
      for (size_t i = 0; i < orders.size(); ++i) {
        std::vector<double> mass;
        double total = 0.0;
        for (const Ranked& one : orders[i]) {
          mass.push_back(greedy ? std::exp(-one.key - own[i]->logsumexp()) : 1.0 / one.key);
          total += mass.back();
        }
        // In a race the drafter's chances are told from how far ahead of the others each is
        for (double& part : mass) part = greedy ? part : part / total;
        tree.add(parents[i], orders[i], mass);
      }
    }
  }

  const Session& session_;
  const Wanted& wanted_;
  Team& team_;
  Share share_;
  float* logits_ = nullptr;  // of the pass at hand
  bool strange_ = false;
  Clock::duration passes_{0};
};

// Nodes and passes of each row; entry, parent (-1: the text), level and law (-1: none) of each,
// [rows, most] apiece; and nanoseconds of the passes
std::vector<int64_t> branched(const Session& session, Wanted given) {
  const int64_t height = static_cast<int64_t>(given.rows.size());
  for (const auto* list : {&given.deepest, &given.most, &given.seed, &given.start})
    STD_TORCH_CHECK(list->size() == given.rows.size(), "llama_branch: a number for each row");
  std::vector<int64_t> more;
  int64_t widest = 0;
  for (int64_t r = 0; r < height; ++r) {
    STD_TORCH_CHECK(given.deepest[r] > 0 && given.most[r] > 0 && given.most[r] <= kMostNodes,
                    "llama_branch: a tree has a level and a node at least, and not too many");
    widest = std::max(widest, given.most[r]);
    more.push_back(given.deepest[r] * given.most[r]);
  }
  const std::vector<int64_t> lengths = given.lengths;
  const Texts texts = texts_of(session, std::move(given.tokens), lengths, given.rows, given.columns,
                               given.hidden, more);
  STD_TORCH_CHECK(!given.scores || (given.logsumexp && given.room > widest &&
                                    !given.filters.greedy() && given.levels == DrawnTree::kLevels),
                  "llama_branch: drawn nodes need room for their laws, and levels of their own");
  if (given.memory) remember(*given.memory, session, given.rows);
  std::vector<std::unique_ptr<Tree>> trees;
  const double* at = given.told.data();
  for (int64_t r = 0; r < height; ++r) {
    const Growth growth{r,
                        given.rows[r],
                        given.columns[r] + lengths[r],
                        given.hidden[r],
                        given.deepest[r],
                        given.most[r],
                        given.seed[r],
                        given.start[r],
                        at,
                        at + given.levels};
    if (given.scores) {
      trees.push_back(std::make_unique<DrawnTree>(growth, given));
    } else {
      trees.push_back(std::make_unique<RacedTree>(growth, given));
    }
    at += given.levels + given.deepest[r];
  }
  std::vector<int64_t> report(height * (2 + 4 * widest) + 1);
  bool strange = false;
  Team::gather([&](Team& team) {
    Gardener gardener(session, given, team);
    gardener.grow(trees, texts);
    report.back() = gardener.passes();
    strange = gardener.strange();
  });
  STD_TORCH_CHECK(!strange, "llama_branch: a token was drawn that the model cannot read");
  for (int64_t r = 0; r < height; ++r) {
    if (given.memory) trees[r]->name(*given.memory);
    const std::vector<Node>& nodes = trees[r]->nodes();
    report[r] = static_cast<int64_t>(nodes.size());
    report[height + r] = trees[r]->passes();
    for (size_t i = 0; i < nodes.size(); ++i) {
      int64_t* to = report.data() + 2 * height + r * widest + static_cast<int64_t>(i);
      to[0] = nodes[i].entry;
      to[height * widest] = nodes[i].parent;
      to[2 * height * widest] = nodes[i].level;
      to[3 * height * widest] = nodes[i].law < 0 ? -1 : r * given.room + nodes[i].law;
    }
  }
  return report;
}

// Numbers: session, rows, tokens of all texts, levels, top-k, the addresses of the drafter's and
// the target's ids of each entry, and the memory; the addresses of scores and sums, 0 for races,
// and the rows of a tree there; lengths, rows, columns, hidden, levels and nodes at most, seed and
// start of every row, and the tokens. Reals: temperature, top-p, min-p, the least chance; for every
// row what is told.
std::vector<int64_t> branch(const int64_t* numbers, int64_t count, const double* reals,
                            int64_t told_reals) {
  STD_TORCH_CHECK(count >= 11, "llama_branch: too few numbers");
  const int64_t height = numbers[1];
  Board board(numbers + 11, numbers + count);
  Wanted given;
  for (auto* list : {&given.lengths, &given.rows, &given.columns, &given.hidden, &given.deepest,
                     &given.most, &given.seed, &given.start})
    *list = board.next(height);
  given.tokens = board.next(numbers[2]);
  board.close();
  given.levels = numbers[3];
  int64_t told = 0;
  for (const int64_t deepest : given.deepest) {
    STD_TORCH_CHECK(deepest > 0 && given.levels > 0, "llama_branch: a tree has a level at least");
    told += given.levels + deepest;
  }
  STD_TORCH_CHECK(told_reals < 0 || told_reals == told + 4,
                  "llama_branch: an acceptance a level of confidence and a bound a level");
  given.told = {reals + 4, reals + 4 + told};
  given.least = reals[3];
  given.filters = {static_cast<float>(reals[0]), static_cast<int32_t>(numbers[4]),
                   static_cast<float>(reals[1]), static_cast<float>(reals[2])};
  given.ids = reinterpret_cast<const int64_t*>(numbers[5]);
  given.index = reinterpret_cast<const int32_t*>(numbers[6]);
  given.memory = memory_of(numbers[7]);
  given.scores = reinterpret_cast<float*>(numbers[8]);
  given.logsumexp = reinterpret_cast<double*>(numbers[9]);
  given.room = numbers[10];
  return branched(*llama_session(numbers[0]), std::move(given));
}

std::vector<int64_t> llama_branch(std::vector<int64_t> numbers, std::vector<double> reals) {
  return call<&branch>(std::move(numbers), std::move(reals));
}

int64_t llama_branch_entry() { return reinterpret_cast<int64_t>(&entry<&branch>); }

}  // namespace

}  // namespace specdec

STABLE_TORCH_LIBRARY_IMPL(specdec_fast, CompositeExplicitAutograd, library) {
  library.impl("llama_branch", TORCH_BOX(&specdec::llama_branch));
  library.impl("llama_branch_entry", TORCH_BOX(&specdec::llama_branch_entry));
}
