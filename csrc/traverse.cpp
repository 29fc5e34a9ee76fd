#include "traverse.h"

#include <algorithm>
#include <cmath>

#include "../kernels/cuda/philox.cuh"
#include "llama_pass.h"
#include "tree.h"

namespace specdec {

namespace {

enum Purpose : uint32_t { kAccept = 1, kResidual = 2 };  // randomness.Purpose
constexpr int64_t kGrain = 4;                            // chunks a thread takes at once

}  // namespace

Traverser::Traverser(const Drawing& tree, const float* logits, int64_t width,
                     const Filters& filters, const Share& share)
    : tree_(tree), share_(share), children_(tree.count + 1) {
  for (int64_t i = 0; i <= tree.count; ++i)
    rows_.push_back(row_of(logits + i * width, width, filters));
  std::vector<Row*> inner;
  for (int64_t i = 0; i < tree.count; ++i) {
    std::vector<int64_t>& siblings = children_[tree.parents[i] + 1];
    if (siblings.empty()) inner.push_back(&row(tree.parents[i]));
    siblings.push_back(i);
  }
  measure(inner, share);
}

int64_t Traverser::traverse(std::vector<int64_t>& passed) {
  visit(-1, 1.0, 0, passed);
  std::reverse(passed.begin(), passed.end());
  return token_;
}

double Traverser::number(int64_t offset, uint32_t purpose) const {
  return philox_uniform(tree_.seed, tree_.start, offset, purpose, 0);
}

bool Traverser::visit(int64_t node, double weight, int64_t depth, std::vector<int64_t>& passed) {
  Rest rest{weight};
  const std::vector<int64_t>& drawn = children(node);
  if (!drawn.empty() && !row(node).undefined) {
    Law law;
    law.kind = kCompact;
    law.map = tree_.map;
    const int64_t place = node < 0 ? tree_.root : tree_.laws[node];
    law.row = row_of(tree_.scores + place * tree_.width, tree_.width, Filters{});
    if (std::isfinite(tree_.logsumexp[place])) {
      law.row.peak = tree_.logsumexp[place];
      law.row.total = 1.0;
      law.row.measured = true;
    }
    measure({&law.row}, share_);
    double undrawn = 1.0;
    for (const int64_t child : drawn) {
      const double chance = this->weight(rest, node, child, law.row, undrawn, depth);
      if (visit(child, chance, depth + 1, passed)) {
        passed.push_back(child);
        return true;
      }
      subtract(rest, node, law, undrawn, depth);
      undrawn -= std::exp(law.row.log_prob(tree_.entries[child]));
    }
  }
  if (node >= 0 && !(number(node, kAccept) < rest.weight)) return false;
  token_ = settled(rest, node, depth);
  return true;
}

double Traverser::weight(const Rest& rest, int64_t node, int64_t child, const Row& law,
                         double undrawn, int64_t depth) {
  const int64_t id = tree_.tokens[child];
  double left = 0.0;
  if (rest.masses.empty()) {
    left = rest.weight * std::exp(row(node).log_prob(id));
  } else if (id < row(node).width) {
    left = masses(depth)[id] * rest.scale;
  }
  const double own = std::exp(law.log_prob(tree_.entries[child])) / undrawn;
  return own > 0.0 ? std::min(left / own, 1.0) : 0.0;
}

void Traverser::subtract(Rest& rest, int64_t node, const Law& law, double undrawn, int64_t depth) {
  const Row& own = row(node);
  double* left = masses(depth);
  const bool first = rest.masses.empty();
  rest.masses.resize(own.chunks());
  const double factor = 1.0 / undrawn;
  share_(own.chunks(), kGrain, [&](int64_t begin, int64_t end) {
    alignas(64) double taken[kChunk];
    for (int64_t c = begin; c < end; ++c) {
      const int64_t n = own.chunk_size(c), all = padded(n);
      double* to = left + c * kChunk;
      if (first) own.weights(c, rest.weight, to);
      std::fill_n(taken, all, 0.0);
      law.subtract(c, n, taken);
      // Of what was drawn before nothing is left to be taken: it was rejected since f was below Q
      const double scale = rest.scale;
      for (int64_t j = 0; j < all; ++j) to[j] = to[j] * scale + taken[j] * factor;
      rest.masses[c] = chunk_kernels().positive_sum(to, all);
    }
  });
  double sum = 0.0;
  for (const double mass : rest.masses) sum += mass;
  const double whole = sum + (1.0 - rest.weight);
  if (whole > 0.0) {
    rest.weight = sum / whole;
    rest.scale = 1.0 / whole;
  } else {  // rounding alone comes here: a rejection has no chance
    rest.weight = rest.scale = 1.0;
    rest.masses.clear();
  }
}

int64_t Traverser::settled(const Rest& rest, int64_t node, int64_t depth) {
  Row& own = row(node);
  measure({&own}, share_);
  if (own.undefined) return -1;
  const double u = number(depth, kResidual);
  if (rest.masses.empty()) return draw(own, u);
  const double* left = masses(depth);
  const auto fill = [&](int64_t chunk, double* weights) {
    std::copy_n(left + chunk * kChunk, padded(own.chunk_size(chunk)), weights);
  };
  const int64_t token = pick(rest.masses, own.width, u, fill);
  return token < 0 ? draw(own, u) : token;
}

double* Traverser::masses(int64_t depth) const {
  // A megabyte or so for each level of the tree at hand, which fresh pages would make dear
  thread_local std::vector<Buffer<double>> kept;
  if (static_cast<int64_t>(kept.size()) <= depth) kept.resize(depth + 1);
  Buffer<double>& own = kept[depth];
  own.reserve(rows_[0].chunks() * kChunk);
  return own.data();
}

}  // namespace specdec
