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
#include "race.h"
#include "share.h"
#include "texts.h"
#include "tree.h"

namespace specdec {

namespace {

// Where a row's tree grows
struct Growth {
  int64_t row, column, hidden;  // of the cache, and where its first node goes
  int64_t deepest, most;        // levels and nodes at most
  int64_t seed, start;          // of its numbers
  const double* sure;           // [levels] how often a node of that confidence follows its parent
  const double* worth;          // [deepest] what a level's chances must exceed for another one
};

struct Node {
  int64_t entry, id, parent, depth, level;
  double chance;  // that the target comes by
  int64_t place = -1;
  int64_t note = -1;  // the memory's, of what was drawn behind it
};

struct Wanted {
  std::vector<int64_t> tokens;
  std::vector<int64_t> lengths, rows, columns, hidden, deepest, most, seed, start;
  std::vector<double> told;  // of each row, sure and worth
  int64_t levels = 0;
  double least = 0.0;  // chance of a node
  Filters filters;
  const int64_t* ids = nullptr;    // the drafter's of each entry, null: its place
  const int32_t* index = nullptr;  // the target's, the same
  std::shared_ptr<Memory> memory;
};

class Tree {
 public:
  Tree(const Growth& growth, const Wanted& wanted) : growth_(growth), wanted_(wanted) {}

  const Growth& growth() const { return growth_; }
  const std::vector<Node>& nodes() const { return nodes_; }
  const std::vector<int64_t>& frontier() const { return frontier_; }

  // Adds what may come behind a node, -1 for the text.
  void add(int64_t parent, const std::vector<Ranked>& order, const std::vector<double>& mass) {
    const double chance = parent < 0 ? 1.0 : nodes_[parent].chance;
    const int64_t depth = parent < 0 ? 1 : nodes_[parent].depth + 1;
    for (size_t i = 0; i < order.size(); ++i) {
      // Most of what is put up has little mass: levels are narrow there
      const double scaled =
          mass[i] > 0.0 ? std::sqrt(mass[i]) * static_cast<double>(wanted_.levels) : 0.0;
      const int64_t level = std::min(static_cast<int64_t>(scaled), wanted_.levels - 1);
      const int64_t entry = order[i].entry, id = wanted_.ids ? wanted_.ids[entry] : entry;
      Node node{entry, id, parent, depth, level, chance * growth_.sure[level]};
      if (node.chance >= wanted_.least || (parent < 0 && i == 0)) nodes_.push_back(node);
    }
  }

  // Drops all but the best nodes, and says which of the deepest level are to have children.
  void settle(int64_t depth) {
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

  // Gives the frontier places in the cache, and puts it among the lanes of a pass.
  void plant(Grove& grove) {
    passes_ += !frontier_.empty();
    for (const int64_t i : frontier_) {
      nodes_[i].place = growth_.column + planted_++;
      std::vector<int64_t> path;
      for (int64_t at = i; at >= 0; at = nodes_[at].parent) path.push_back(nodes_[at].place);
      std::reverse(path.begin(), path.end());
      grove.put(nodes_[i].id, growth_.row, growth_.column, growth_.hidden, std::move(path));
    }
  }

  // The memory's note of what was drawn behind a node, -1 for the text
  void note(int64_t node, int64_t number) { (node < 0 ? root_note_ : nodes_[node].note) = number; }

  // Tells the memory which nodes its notes are of.
  void name(Memory& memory) const {
    if (root_note_ >= 0) memory.name(growth_.row, root_note_, -1);
    for (size_t i = 0; i < nodes_.size(); ++i) {
      if (nodes_[i].note >= 0) memory.name(growth_.row, nodes_[i].note, static_cast<int64_t>(i));
    }
  }

  // Passes that wrote it
  int64_t passes() const { return passes_; }

 private:
  // The chance that a new node must exceed to be among the best
  double lowest() const {
    if (static_cast<int64_t>(nodes_.size()) < growth_.most) return 0.0;
    double least = 1.0;
    for (const Node& node : nodes_) least = std::min(least, node.chance);
    return least;
  }

  Growth growth_;
  const Wanted& wanted_;
  std::vector<Node> nodes_;
  std::vector<int64_t> frontier_;
  int64_t planted_ = 0, passes_ = 1, root_note_ = -1;
};

class Gardener {
 public:
  Gardener(const Session& session, const Wanted& wanted, Team& team)
      : session_(session), wanted_(wanted), team_(team), share_(share_of(team)) {}

  void grow(std::vector<Tree>& trees, const Texts& texts) {
    const int64_t width = session_.model->width();
    session_.scores.reserve(static_cast<int64_t>(trees.size()) * width);
    pass([&] {
      session_.run(team_, texts.lanes(), texts.tokens.data(), texts.last, session_.scores.data(),
                   ends(static_cast<int64_t>(trees.size())));
    });
    std::vector<std::pair<Tree*, int64_t>> asked;
    for (Tree& tree : trees) asked.push_back({&tree, -1});
    for (int64_t depth = 1;; ++depth) {
      mend(asked, depth);
      look(asked, depth);
      Grove grove;
      asked.clear();
      for (Tree& tree : trees) {
        tree.settle(depth);
        tree.plant(grove);
        for (const int64_t i : tree.frontier()) asked.push_back({&tree, i});
      }
      if (asked.empty()) return;
      for (int64_t i = 0; i < grove.size(); ++i) {
        const int64_t id = grove.tokens()[i];
        strange_ = strange_ || id < 0 || id >= session_.model->vocabulary;
      }
      if (strange_) return;
      std::vector<int64_t> all(asked.size());
      for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int64_t>(i);
      session_.scores.reserve(grove.size() * width);
      pass([&] {
        session_.run(team_, grove.lanes(), grove.tokens(), all, session_.scores.data(),
                     ends(grove.size()));
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

  // Where the hidden states of a pass go, null where nobody wants them
  float* ends(int64_t lanes) {
    if (!wanted_.memory) return nullptr;
    session_.ends.reserve(lanes * session_.model->hidden);
    return session_.ends.data();
  }

  // Lets the memory mend the logits of some nodes.
  void mend(const std::vector<std::pair<Tree*, int64_t>>& asked, int64_t depth) {
    if (!wanted_.memory) return;
    std::vector<Memory::Place> places;
    for (size_t i = 0; i < asked.size(); ++i) {
      const Growth& growth = asked[i].first->growth();
      const int64_t at = static_cast<int64_t>(i);
      places.push_back({growth.row, growth.start + depth - 1,
                        session_.ends + at * session_.model->hidden,
                        session_.scores + at * session_.model->width()});
    }
    wanted_.memory->mend(*session_.kernels, share_, places);
    for (size_t i = 0; i < asked.size(); ++i) asked[i].first->note(asked[i].second, places[i].note);
  }

  // Adds to each tree what may come behind its node, by the logits of that.
  void look(const std::vector<std::pair<Tree*, int64_t>>& asked, int64_t depth) {
    const int64_t width = session_.model->width();
    const bool greedy = wanted_.filters.greedy();
    std::vector<Row> rows;
    std::vector<Row*> all;
    for (size_t i = 0; i < asked.size(); ++i) {
      rows.push_back(row_of(session_.scores.data() + static_cast<int64_t>(i) * width, width,
                            greedy ? Filters{} : wanted_.filters));
    }
    for (Row& row : rows) all.push_back(&row);
    measure(all, share_);
    for (size_t begin = 0, end; begin < asked.size(); begin = end) {
      Tree& tree = *asked[begin].first;
      std::vector<const Row*> own;
      std::vector<int64_t> parents;
      for (end = begin; end < asked.size() && asked[end].first == &tree; ++end) {
        if (rows[end].undefined) continue;
        own.push_back(&rows[end]);
        parents.push_back(asked[end].second);
      }
      const Growth& growth = tree.growth();
      const Runners runners{growth.seed, growth.start + depth - 1, wanted_.index, greedy};
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
  bool strange_ = false;
  Clock::duration passes_{0};
};

// Nodes and passes of each row; entry, parent (-1: the text) and level of each, [rows, most]
// apiece; and nanoseconds of the passes
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
  if (given.memory) remember(*given.memory, session, given.rows);
  std::vector<Tree> trees;
  const double* at = given.told.data();
  for (int64_t r = 0; r < height; ++r) {
    trees.emplace_back(
        Growth{given.rows[r], given.columns[r] + lengths[r], given.hidden[r], given.deepest[r],
               given.most[r], given.seed[r], given.start[r], at, at + given.levels},
        given);
    at += given.levels + given.deepest[r];
  }
  std::vector<int64_t> report(height * (2 + 3 * widest) + 1);
  bool strange = false;
  Team::gather([&](Team& team) {
    Gardener gardener(session, given, team);
    gardener.grow(trees, texts);
    report.back() = gardener.passes();
    strange = gardener.strange();
  });
  STD_TORCH_CHECK(!strange, "llama_branch: a token was drawn that the model cannot read");
  for (int64_t r = 0; r < height; ++r) {
    if (given.memory) trees[r].name(*given.memory);
    const std::vector<Node>& nodes = trees[r].nodes();
    report[r] = static_cast<int64_t>(nodes.size());
    report[height + r] = trees[r].passes();
    for (size_t i = 0; i < nodes.size(); ++i) {
      int64_t* to = report.data() + 2 * height + r * widest + static_cast<int64_t>(i);
      to[0] = nodes[i].entry;
      to[height * widest] = nodes[i].parent;
      to[2 * height * widest] = nodes[i].level;
    }
  }
  return report;
}

// Numbers: session, rows, tokens of all texts, levels, top-k, the addresses of the drafter's and
// the target's ids of each entry, and the memory; lengths, rows, columns, hidden, levels and nodes
// at most, seed and start of every row, and the tokens. Reals: temperature, top-p, min-p, the least
// chance; for every row what is told.
std::vector<int64_t> branch(const int64_t* numbers, int64_t count, const double* reals,
                            int64_t told_reals) {
  STD_TORCH_CHECK(count >= 8, "llama_branch: too few numbers");
  const int64_t height = numbers[1];
  Board board(numbers + 8, numbers + count);
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
