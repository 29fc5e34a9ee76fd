// memory.h, and the operations that make a memory, tell it something and give it up.
#include "memory.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <utility>

#include "arguments.h"
#include "share.h"
#include "shelf.h"

namespace specdec {

namespace {

// specdec_fast/memory.py has the same, and says what they are.
constexpr int64_t kSlots = 64;
constexpr size_t kMost = 8;
constexpr float kSharpness = 12.0f, kRecent = 0.035f, kFading = 2.0f, kDoubt = 0.125f;

constexpr int64_t kStretch = 4096;  // entries that a thread takes at once
constexpr int64_t kNobody = -2;     // no node yet

float dot(const float* x, const float* y, int64_t n) {
  float sums[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    for (int j = 0; j < 16; ++j) sums[j] += x[i + j] * y[i + j];
  }
  float total = 0.0f;
  for (const float sum : sums) total += sum;
  for (; i < n; ++i) total += x[i] * y[i];
  return total;
}

// Leaves no more of a row than it has room for: two places must not be written to one slot at once.
template <class Met>
void forget_all_but_the_last(std::vector<Met>& met) {
  std::map<const void*, int64_t> left;
  for (const Met& one : met) ++left[one.row];
  met.erase(std::remove_if(met.begin(), met.end(),
                           [&left](const Met& one) { return left[one.row]-- > kSlots; }),
            met.end());
}

int64_t stretches(int64_t entries) { return (entries + kStretch - 1) / kStretch; }

}  // namespace

Memory::Memory(int64_t rows, int64_t hidden, int64_t entries, std::vector<int32_t> index)
    : hidden_(hidden), entries_(entries), index_(std::move(index)), rows_(rows) {
  largest_ = index_.empty() ? entries - 1 : *std::max_element(index_.begin(), index_.end());
}

void Memory::begin(int64_t row) { rows_[row].waits = 0; }

Memory::Waiting& Memory::wait(Row& row) const {
  if (row.waits == static_cast<int64_t>(row.waiting.size())) {
    row.waiting.push_back({std::vector<float>(hidden_), std::vector<float>(entries_), 0, kNobody});
  }
  return row.waiting[row.waits++];
}

Memory::Kept& Memory::slot(Row& row) const {
  if (static_cast<int64_t>(row.kept.size()) < kSlots) {
    row.kept.push_back({std::vector<float>(hidden_), std::vector<uint16_t>(entries_), 0});
    return row.kept.back();
  }
  Kept& kept = row.kept[row.oldest];
  row.oldest = (row.oldest + 1) % kSlots;
  return kept;
}

void Memory::look(const Row& row, const std::vector<float>& hidden, Mixture& mixture) const {
  std::vector<std::pair<float, const Kept*>> like;
  for (const Kept& kept : row.kept) {
    const float cosine = dot(hidden.data(), kept.hidden.data(), hidden_);
    const int64_t between = std::max<int64_t>(mixture.place->position - kept.position - 1, 0);
    like.push_back({std::exp(kSharpness * (cosine - 1.0f)) +
                        kRecent * std::exp(-static_cast<float>(between) / kFading),
                    &kept});
  }
  const size_t most = std::min(like.size(), kMost);
  std::partial_sort(
      like.begin(), like.begin() + most, like.end(), [](const auto& one, const auto& two) {
        return one.first > two.first ||
               (one.first == two.first && one.second->position > two.second->position);
      });
  float total = kDoubt;
  for (size_t i = 0; i < most; ++i) total += like[i].first;
  for (size_t i = 0; i < most; ++i) {
    mixture.parts.push_back(like[i].second->apart.data());
    mixture.weights.push_back(like[i].first / total);
  }
}

void Memory::mend(const PassKernels& kernels, const Share& share, std::vector<Place>& places) {
  std::vector<Mixture> mixtures;
  for (Place& place : places) {
    Row& row = rows_[place.row];
    Waiting& waiting = wait(row);
    place.note = row.waits - 1;
    waiting.position = place.position;
    waiting.node = kNobody;
    const float length = std::sqrt(dot(place.hidden, place.hidden, hidden_));
    const float factor = length > 0.0f ? 1.0f / length : 0.0f;
    for (int64_t i = 0; i < hidden_; ++i) waiting.hidden[i] = place.hidden[i] * factor;
    Mixture mixture{&place, waiting.logits.data(), {}, {}};
    look(row, waiting.hidden, mixture);
    mixtures.push_back(std::move(mixture));
  }
  const int64_t pieces = stretches(entries_);
  share(static_cast<int64_t>(mixtures.size()) * pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const Mixture& mixture = mixtures[k / pieces];
      const int64_t at = k % pieces * kStretch, size = std::min(kStretch, entries_ - at);
      float* logits = mixture.place->logits + at;
      std::memcpy(mixture.before + at, logits, size * sizeof(float));
      kernels.mix(logits, mixture.parts.data(), mixture.weights.data(),
                  static_cast<int64_t>(mixture.parts.size()), at, size);
    }
  });
}

void Memory::name(int64_t row, int64_t note, int64_t node) { rows_[row].waiting[note].node = node; }

void Memory::hear(const PassKernels& kernels, const Share& share, const std::vector<Said>& said,
                  int64_t width) {
  if (largest_ >= width) return;  // some entries are no token of this target
  struct Met {
    Row* row;
    Waiting* waiting;
    const float* logits;
  };
  std::vector<Met> met;
  for (const Said& one : said) {
    if (!holds(one.row)) continue;
    Row& row = rows_[one.row];
    for (int64_t i = 0; i < row.waits; ++i) {
      Waiting& waiting = row.waiting[i];
      if (waiting.node == one.node && waiting.position == one.position)
        met.push_back({&row, &waiting, one.logits});
    }
  }
  for (const Met& one : met) one.waiting->node = kNobody;  // whatever becomes of it
  forget_all_but_the_last(met);
  // Differences first, as nothing else tells whether they are numbers
  const int64_t pieces = stretches(entries_);
  std::vector<char> whole(met.size() * pieces);
  share(static_cast<int64_t>(whole.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const float* logits = met[k / pieces].logits;
      float* apart = met[k / pieces].waiting->logits.data();
      const int64_t at = k % pieces * kStretch, last = std::min(at + kStretch, entries_);
      if (index_.empty()) {
        for (int64_t i = at; i < last; ++i) apart[i] = logits[i] - apart[i];
      } else {
        for (int64_t i = at; i < last; ++i) apart[i] = logits[index_[i]] - apart[i];
      }
      float sums[16] = {};  // NaN beside what is none, or is infinite as bfloat16
      for (int64_t i = at; i < last; ++i) sums[i % 16] += apart[i] * 1.01f * 0.0f;
      whole[k] = 1;
      for (const float sum : sums) whole[k] = whole[k] && sum == 0.0f;
    }
  });
  std::vector<std::pair<const float*, uint16_t*>> narrowed;
  for (size_t m = 0; m < met.size(); ++m) {
    const auto first = whole.begin() + static_cast<int64_t>(m) * pieces;
    Waiting& waiting = *met[m].waiting;
    if (!std::all_of(first, first + pieces, [](char one) { return one; })) continue;
    Kept& kept = slot(*met[m].row);
    kept.hidden.swap(waiting.hidden);
    kept.position = waiting.position;
    narrowed.push_back({waiting.logits.data(), kept.apart.data()});
  }
  share(static_cast<int64_t>(narrowed.size()) * pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const auto& [from, to] = narrowed[k / pieces];
      const int64_t at = k % pieces * kStretch;
      kernels.narrow(from + at, to + at, std::min(kStretch, entries_ - at));
    }
  });
}

std::shared_ptr<Memory> memory_of(int64_t number) {
  return number ? Shelf<Memory>::all().get(number) : nullptr;
}

namespace {

int64_t llama_memory(int64_t rows, int64_t hidden, int64_t entries, const MaybeTensor& index) {
  STD_TORCH_CHECK(rows > 0 && hidden > 0 && entries > 0,
                  "llama_memory: rows, hidden states and logits have entries");
  std::vector<int32_t> ids;
  if (index) {
    Reader<int32_t>("index", *index, {entries});
    STD_TORCH_CHECK(index->is_contiguous(), "llama_memory: an index is contiguous");
    const int32_t* at = index->const_data_ptr<int32_t>();
    ids.assign(at, at + entries);
    STD_TORCH_CHECK(*std::min_element(ids.begin(), ids.end()) >= 0,
                    "llama_memory: an index holds ids");
  }
  return Shelf<Memory>::all().put(std::make_shared<Memory>(rows, hidden, entries, std::move(ids)));
}

void llama_memory_forget(int64_t number) { Shelf<Memory>::all().drop(number); }

// Says the logits [n, width] behind some nodes of some rows, at some positions.
void llama_memory_hear(int64_t number, std::vector<int64_t> rows, std::vector<int64_t> nodes,
                       std::vector<int64_t> positions, const Tensor& logits) {
  const std::shared_ptr<Memory> memory = Shelf<Memory>::all().get(number);
  const int64_t n = static_cast<int64_t>(rows.size());
  STD_TORCH_CHECK(nodes.size() == rows.size() && positions.size() == rows.size() &&
                      logits.dim() == 2 && logits.size(0) == n && logits.is_contiguous() &&
                      logits.scalar_type() == ScalarType::Float,
                  "llama_memory_hear: a node, a position and a line of float32 logits a row");
  const int64_t width = logits.size(1);
  std::vector<Memory::Said> said;
  for (int64_t i = 0; i < n; ++i) {
    said.push_back({rows[i], nodes[i], positions[i], logits.const_data_ptr<float>() + i * width});
  }
  Team::gather([&](Team& team) { memory->hear(pass_kernels(), share_of(team), said, width); });
}

}  // namespace

}  // namespace specdec

STABLE_TORCH_LIBRARY_IMPL(specdec_fast, CompositeExplicitAutograd, library) {
  library.impl("llama_memory", TORCH_BOX(&specdec::llama_memory));
  library.impl("llama_memory_forget", TORCH_BOX(&specdec::llama_memory_forget));
  library.impl("llama_memory_hear", TORCH_BOX(&specdec::llama_memory_hear));
}
