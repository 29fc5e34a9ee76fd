// Tokens to feed as they lie in lists, one a row, of any lengths.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <vector>

#include "llama_model.h"
#include "memory.h"

namespace specdec {

// Tokens by lane, and where they stand
struct Texts {
  std::vector<int64_t> tokens, row, column, hidden;
  std::vector<int64_t> last;  // lane of each text

  // Adds a text of so many lanes behind `before` columns of a row of the cache.
  void place(int64_t lanes, int64_t at, int64_t before, int64_t padding) {
    row.insert(row.end(), lanes, at);
    hidden.insert(hidden.end(), lanes, padding);
    for (int64_t i = 0; i < lanes; ++i) column.push_back(before + i);
    last.push_back(static_cast<int64_t>(row.size()) - 1);
  }

  Lanes lanes() const {
    return {static_cast<int64_t>(tokens.size()), row.data(), column.data(), hidden.data()};
  }
};

// The texts of some rows, once it is sure that a session has room for them and for `more` columns
// behind each.
inline Texts texts_of(const Session& session, std::vector<int64_t> tokens,
                      const std::vector<int64_t>& lengths, const std::vector<int64_t>& rows,
                      const std::vector<int64_t>& columns, const std::vector<int64_t>& hidden,
                      const std::vector<int64_t>& more) {
  const size_t height = rows.size();
  STD_TORCH_CHECK(height > 0 && lengths.size() == height && columns.size() == height &&
                      hidden.size() == height && more.size() == height,
                  "llama: a text for each row");
  Texts texts;
  for (size_t r = 0; r < height; ++r) {
    STD_TORCH_CHECK(lengths[r] > 0 && more[r] >= 0 && hidden[r] >= 0 &&
                        session.holds(rows[r], columns[r]) &&
                        session.holds(rows[r], columns[r] + lengths[r] + more[r] - 1),
                    "llama: a row without tokens, or one out of range");
    texts.place(lengths[r], rows[r], columns[r], hidden[r]);
  }
  bool known = tokens.size() == texts.row.size();
  for (const int64_t token : tokens)
    known = known && token >= 0 && token < session.model->vocabulary;
  STD_TORCH_CHECK(known, "llama: a token is out of range, or one too many");
  texts.tokens = std::move(tokens);
  return texts;
}

// A memory takes note of a drafter's new drafts of some rows.
inline void remember(Memory& memory, const Session& session, const std::vector<int64_t>& rows) {
  STD_TORCH_CHECK(
      memory.hidden() == session.model->hidden && memory.entries() == session.model->width(),
      "llama: a memory of another model");
  for (const int64_t row : rows) {
    STD_TORCH_CHECK(memory.holds(row), "llama: a row that a memory has no room for");
    memory.begin(row);
  }
}

// Lists behind one another in memory
class Board {
 public:
  Board(const int64_t* numbers, const int64_t* end) : at_(numbers), end_(end) {}

  std::vector<int64_t> next(int64_t n) {
    STD_TORCH_CHECK(n >= 0 && n <= end_ - at_, "llama: another length");
    const int64_t* from = at_;
    return {from, at_ += n};
  }

  void close() const { STD_TORCH_CHECK(at_ == end_, "llama: another length"); }

 private:
  const int64_t *at_, *end_;
};

}  // namespace specdec
