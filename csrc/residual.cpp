#include "residual.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace specdec {

Range IndexMap::entries(int64_t low, int64_t high) const {
  if (id == nullptr) return {low, high};
  const int32_t* first = std::lower_bound(id, id + size, low);
  return {first - id, std::lower_bound(first, id + size, high) - id};
}

bool SparseLaw::undefined(int64_t width) const {
  for (int64_t s = 0; s < size; ++s) {
    if (id_at(s) >= 0 && id_at(s) < width && std::isnan(log_mass_at(s))) return true;
  }
  return false;
}

double Law::log_q() const {
  if (kind == kPoint) return 0.0;
  if (kind == kCompact) {
    if (drawn.end - drawn.begin == 1) return row.log_prob(drawn.begin);
    double sum = 0.0;
    for (int64_t k = drawn.begin; k < drawn.end; ++k) sum += std::exp(row.log_prob(k));
    return std::log(sum);
  }
  for (int64_t s = 0; s < sparse.size; ++s) {
    if (token >= 0 && sparse.id_at(s) == token) return sparse.log_mass_at(s);
  }
  return -std::numeric_limits<double>::infinity();
}

void Law::subtract(int64_t chunk, int64_t n, double* target) const {
  const int64_t first = chunk * kChunk;
  if (kind == kPoint) {
    if (token >= first && token < first + n) target[token - first] -= 1.0;
    return;
  }
  if (kind == kSparse) {
    for (int64_t s = 0; s < sparse.size; ++s) {
      const int64_t id = sparse.id_at(s);
      if (id >= first && id < first + n) target[id - first] -= std::exp(sparse.log_mass_at(s));
    }
    return;
  }
  alignas(64) double q[kChunk];
  if (map.id == nullptr) {
    if (first >= row.width) return;
    row.weights(chunk, 1.0, q);
    const int64_t common = std::min(n, row.chunk_size(chunk));
    for (int64_t j = 0; j < common; ++j) target[j] -= q[j];
    return;
  }
  // The entries of the chunk lie side by side, though across chunks of their own row
  auto [k, end] = map.entries(first, first + n);
  while (k < end) {
    const int64_t own = k / kChunk, stop = std::min(end, (own + 1) * kChunk);
    // Which entries count where one is infinite is a whole chunk's affair
    const int64_t from = row.infinite ? own * kChunk : k;
    row.weights(from, row.infinite ? row.chunk_size(own) : stop - k, 1.0, q);
    for (; k < stop; ++k) {
      const int64_t j = map.id[k] - first;
      if (j >= 0 && j < n) target[j] -= q[k - from];  // false only where ids do not ascend
    }
  }
}

double Residual::fill(int64_t chunk, double* out) const {
  const int64_t n = p->chunk_size(chunk);
  p->weights(chunk, weight, out);
  if (!law->undefined()) law->subtract(chunk, n, out);
  return chunk_kernels().positive_sum(out, padded(n));
}

int64_t Residual::draw(double u) const {
  if (!(sum > 0.0)) return specdec::draw(*p, u);
  return pick(masses, p->width, u, [this](int64_t chunk, double* out) { fill(chunk, out); });
}

void measure(std::vector<Residual*>& residuals, const Share& share) {
  std::vector<std::pair<Residual*, int64_t>> todo;
  for (Residual* residual : residuals) {
    const Row& p = *residual->p;
    residual->masses.resize(p.chunks());
    const double scale = residual->weight / p.total;
    const bool certain = residual->law->kind == kPoint;
    for (int64_t c = 0; c < p.chunks(); ++c) residual->masses[c] = p.masses[c] * scale;
    if (residual->law->undefined()) continue;
    if (!certain) {
      for (int64_t c = 0; c < p.chunks(); ++c) todo.emplace_back(residual, c);
    } else if (const int64_t token = residual->law->token; token >= 0 && token < p.width) {
      todo.emplace_back(residual, token / kChunk);  // the rest is p
    }
  }
  if (!todo.empty()) {
    share(static_cast<int64_t>(todo.size()), 4, [&](int64_t begin, int64_t end) {
      alignas(64) double weights[kChunk];
      for (int64_t i = begin; i < end; ++i) {
        todo[i].first->masses[todo[i].second] = todo[i].first->fill(todo[i].second, weights);
      }
    });
  }
  for (Residual* residual : residuals) {
    residual->sum = 0.0;
    for (const double mass : residual->masses) residual->sum += mass;
  }
}

}  // namespace specdec
