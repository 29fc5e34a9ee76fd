// A tree whose nodes are drawn from the drafter's law, for a target that judges them by that law
// (traverse.h).
//
// Behind a node come draws without replacement. A tree may grow as it likes as long as it never
// takes back what it has drawn: which draw is made next may hang on all draws before it, and the
// target's law is the output's all the same (docs/trees.md has the proof).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "../kernels/cuda/philox.cuh"
#include "growth.h"

namespace specdec {

class DrawnTree final : public Tree {
 public:
  using Tree::Tree;

  static constexpr int64_t kFirst = 8, kLater = 4;  // levels of first and of later children
  static constexpr int64_t kLevels = kFirst + kLater;

  // What comes behind a node (-1: the text) may be drawn from a measured row from now on.
  void open(int64_t node, Row row) {
    if (node >= 0) nodes_[node].law = static_cast<int64_t>(laws_.size());
    const double mass = row.undefined ? 0.0 : 1.0;
    laws_.push_back({node, std::move(row), {}, mass, chance(node)});
  }

  // Rows of scores in use
  int64_t laws() const { return static_cast<int64_t>(laws_.size()); }

  void settle(int64_t passes) override {
    frontier_.clear();
    // A node is worth reading where its own children would be among the best in the end
    const double enough = std::max(kEnough / static_cast<double>(growth_.most), wanted_.least);
    bool going = passes < growth_.deepest;
    double chances = 0.0;
    for (Law* law = best(enough); law != nullptr; law = best(enough)) {
      const int64_t node = draw(*law);
      if (node < 0 || nodes_[node].chance < enough || depth(node) >= growth_.deepest) continue;
      frontier_.push_back(node);
      chances += nodes_[node].chance;
    }
    going = going && room() && chances > growth_.worth[passes - 1];
    if (going) return;
    frontier_.clear();
    for (Law* law = best(wanted_.least); law != nullptr; law = best(wanted_.least)) draw(*law);
  }

 private:
  static constexpr uint32_t kDraft = 0;   // randomness.Purpose
  static constexpr double kEnough = 0.7;  // of an even share of the nodes
  static constexpr double kTaken = 1e-6;  // of a law is too little to draw from
  static constexpr double kOthers = 0.2;  // what the likeliest of the others has of their mass

  struct Law {
    int64_t node;
    Row row;
    std::vector<int64_t> gone;  // entries drawn
    double rest;                // mass of the others
    double left;                // chance that the target comes by and takes none of those drawn
  };

  bool room() const { return static_cast<int64_t>(nodes_.size()) < growth_.most; }

  // The level of the next draw of a law, of so much of what is left of it
  int64_t level(const Law& law, double mass) const {
    const int64_t number = static_cast<int64_t>(law.gone.size());
    if (number) return kFirst - 1 + std::min(number, kLater);
    const int64_t scaled = mass > 0.0 ? static_cast<int64_t>(std::sqrt(mass) * kFirst) : 0;
    return std::min(scaled, kFirst - 1);
  }

  // The chance that the target comes by the next draw of a law
  double hope(const Law& law) const {
    if (law.rest < kTaken) return 0.0;
    if (!law.gone.empty()) return law.left * growth_.sure[level(law, 0.0)];
    const double likeliest = std::exp(law.row.peak - law.row.logsumexp());
    const double other = growth_.sure[level(law, kOthers * (1.0 - likeliest))];
    return law.left * (likeliest * growth_.sure[level(law, likeliest)] + (1.0 - likeliest) * other);
  }

  // The law to draw from next, null where none is worth it
  Law* best(double least) {
    Law* found = nullptr;
    double most = 0.0;
    if (!room()) return found;
    for (Law& law : laws_) {
      const double own = hope(law);
      if (own > most) found = &law, most = own;
    }
    return most >= least || nodes_.empty() ? found : nullptr;
  }

  // One more node, -1 where there is nothing to draw
  int64_t draw(Law& law) {
    const int64_t number = static_cast<int64_t>(nodes_.size());
    const auto fill = [&law](int64_t chunk, double* weights) {
      law.row.weights(chunk, law.row.total, weights);
      for (const int64_t entry : law.gone) {
        if (entry / kChunk == chunk) weights[entry % kChunk] = 0.0;
      }
    };
    const double u = philox_uniform(growth_.seed, growth_.start, number, kDraft, 0);
    const int64_t entry = pick(law.row.masses, law.row.width, u, fill);
    const double mass = entry < 0 ? 0.0 : std::exp(law.row.log_prob(entry));
    if (entry < 0) {
      law.rest = 0.0;
      return entry;
    }
    nodes_.push_back(made(entry, law.node, level(law, mass / law.rest)));
    const double stays = growth_.sure[nodes_.back().level];
    nodes_.back().chance = law.left * stays;
    law.left *= 1.0 - stays;
    law.rest -= mass;
    law.gone.push_back(entry);
    alignas(64) double weights[kChunk];
    const int64_t chunk = entry / kChunk;
    fill(chunk, weights);
    law.row.masses[chunk] =
        chunk_kernels().positive_sum(weights, padded(law.row.chunk_size(chunk)));
    return number;
  }

  std::vector<Law> laws_;
};

}  // namespace specdec
