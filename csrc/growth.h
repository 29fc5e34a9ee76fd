// A drafter's tree as it grows: what trees whose nodes are found by races (branch.cpp) and those
// whose nodes are drawn (drawn.h) have in common.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "memory.h"
#include "rows.h"
#include "tree.h"

namespace specdec {

// Where a row's tree grows
struct Growth {
  int64_t number;               // among the rows of the call
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
  int64_t law = -1;   // the row of scores that what is behind it was drawn from
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
  // Where the scores go that nodes are drawn from [rows, room, width], and their logsumexp
  // [rows, room]; null: nodes are found by races
  float* scores = nullptr;
  double* logsumexp = nullptr;
  int64_t room = 0;
};

class Tree {
 public:
  Tree(const Growth& growth, const Wanted& wanted) : growth_(growth), wanted_(wanted) {}
  virtual ~Tree() = default;

  const Growth& growth() const { return growth_; }
  const std::vector<Node>& nodes() const { return nodes_; }
  const std::vector<int64_t>& frontier() const { return frontier_; }
  // 0: the text
  int64_t depth(int64_t node) const { return node < 0 ? 0 : nodes_[node].depth; }

  // After so many passes: settles which nodes there are, and which of them are to have children.
  virtual void settle(int64_t passes) = 0;

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

 protected:
  double chance(int64_t node) const { return node < 0 ? 1.0 : nodes_[node].chance; }

  Node made(int64_t entry, int64_t parent, int64_t level) const {
    const int64_t id = wanted_.ids ? wanted_.ids[entry] : entry;
    return {entry, id, parent, depth(parent) + 1, level, chance(parent) * growth_.sure[level]};
  }

  Growth growth_;
  const Wanted& wanted_;
  std::vector<Node> nodes_;
  std::vector<int64_t> frontier_;

 private:
  int64_t planted_ = 0, passes_ = 1, root_note_ = -1;
};

}  // namespace specdec
