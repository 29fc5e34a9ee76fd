// A target judges a tree by the law that its nodes were drawn from.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "residual.h"
#include "rows.h"

namespace specdec {

// A row's tree, and what its nodes were drawn from
struct Drawing {
  int64_t count;
  const int64_t *tokens, *parents;  // [count]; a parent stands before its children, -1: the text
  const int64_t *entries, *laws;    // [count] what each was drawn as, and the law behind each
  int64_t root;                     // the law behind the text
  const float* scores;              // of every law, [.., width]
  const double* logsumexp;          // the same
  int64_t width;
  IndexMap map;         // the target's id of each entry
  int64_t seed, start;  // of the numbers' keys
};

// Rule *block* on a tree (docs/trees.md): children in the order in which they were drawn, each with
// all that is behind it before the next. On a chain this is the operation `verify`, number by
// number.
class Traverser {
 public:
  // logits: the target's behind the text and behind each node, [1 + count, width]
  Traverser(const Drawing& tree, const float* logits, int64_t width, const Filters& filters,
            const Share& share);

  // The next token, -1 where the target's scores are no law; and the nodes that stay.
  int64_t traverse(std::vector<int64_t>& passed);

 private:
  // What is left of the target's law at a node once some of its children are rejected: the masses
  // are to be multiplied by `scale` to have the sum `weight`. While none is, `masses` are empty,
  // and it is the law itself.
  struct Rest {
    double weight;
    double scale = 1.0;
    std::vector<double> masses;  // by chunk
  };

  Row& row(int64_t node) { return rows_[node + 1]; }
  const std::vector<int64_t>& children(int64_t node) const { return children_[node + 1]; }
  double number(int64_t offset, uint32_t purpose) const;
  // Whether the target's text goes on from this node, or behind it; its token is then settled
  bool visit(int64_t node, double weight, int64_t depth, std::vector<int64_t>& passed);
  // How likely a child stays, by what is left at its parent
  double weight(const Rest& rest, int64_t node, int64_t child, const Row& law, double undrawn,
                int64_t depth);
  // Takes a law, of which so much is not drawn yet, from what is left at a node.
  void subtract(Rest& rest, int64_t node, const Law& law, double undrawn, int64_t depth);
  int64_t settled(const Rest& rest, int64_t node, int64_t depth);
  double* masses(int64_t depth) const;

  const Drawing& tree_;
  const Share& share_;
  std::vector<Row> rows_;
  std::vector<std::vector<int64_t>> children_;
  int64_t token_ = -1;
};

}  // namespace specdec
