// What the target said at the places where a drafter drew, kept to mend the drafter's scores at the
// places to come. docs/memory.md has the rule.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "pass.h"
#include "rows.h"

namespace specdec {

class Memory {
 public:
  // A place that a drafter draws at: so many tokens into a row's text and its draft
  struct Place {
    int64_t row, position;
    const float* hidden;  // the drafter's final hidden state there
    float* logits;        // its logits there, which are mended
    int64_t note = -1;    // by which the place is named afterwards
  };
  // What the target said behind a node of a draft, -1 being the text before it
  struct Said {
    int64_t row, node, position;
    const float* logits;
  };

  // Rows of a batch; entries of the drafter's hidden state, and of its logits; and the target's id
  // of each of these, none: its place
  Memory(int64_t rows, int64_t hidden, int64_t entries, std::vector<int32_t> index);

  int64_t hidden() const { return hidden_; }
  int64_t entries() const { return entries_; }
  bool holds(int64_t row) const { return row >= 0 && row < static_cast<int64_t>(rows_.size()); }

  // A row's new draft begins: places that the target has said nothing of are forgotten.
  void begin(int64_t row);

  // Adds to the logits of each place what the target's differed by at like places of its row.
  void mend(const PassKernels& kernels, const Share& share, std::vector<Place>& places);

  // The place of a note is that behind a node of the draft.
  void name(int64_t row, int64_t note, int64_t node);

  // Keeps by how much the target's logits, of which there are `width` a place, differ from those
  // the drafter had before they were mended. What is said of other places is not heard.
  void hear(const PassKernels& kernels, const Share& share, const std::vector<Said>& said,
            int64_t width);

 private:
  struct Waiting {  // for what the target says
    std::vector<float> hidden, logits;
    int64_t position, node;
  };
  struct Kept {
    std::vector<float> hidden;    // of length 1
    std::vector<uint16_t> apart;  // the target's logits less the drafter's, bfloat16
    int64_t position;
  };
  struct Row {
    std::vector<Waiting> waiting;
    int64_t waits = 0;  // so many of them
    std::vector<Kept> kept;
    int64_t oldest = 0;  // the next one to be given up, once there are kSlots
  };
  struct Mixture {
    Place* place;
    float* before;  // where the drafter's own logits go
    std::vector<const uint16_t*> parts;
    std::vector<float> weights;
  };

  Waiting& wait(Row& row) const;
  Kept& slot(Row& row) const;
  void look(const Row& row, const std::vector<float>& hidden, Mixture& mixture) const;

  int64_t hidden_, entries_, largest_;
  std::vector<int32_t> index_;
  std::vector<Row> rows_;
};

// The memory of a number, null for 0
std::shared_ptr<Memory> memory_of(int64_t number);

}  // namespace specdec
