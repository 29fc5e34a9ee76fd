// A byte-level BPE tokenizer's step from text to ids, for the texts it is sure of.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace specdec {

// What each id stands for: bytes, or none (specials, ids that do not exist).
class Pieces {
 public:
  void add(std::string_view data) {
    bytes_.append(data);
    end_.push_back(bytes_.size());
    known_.push_back(1);
  }
  void add_none() {
    end_.push_back(bytes_.size());
    known_.push_back(0);
  }
  int64_t size() const { return static_cast<int64_t>(known_.size()); }
  bool known(int64_t id) const { return id >= 0 && id < size() && known_[id]; }
  std::string_view of(int64_t id) const {
    return {bytes_.data() + end_[id], end_[id + 1] - end_[id]};
  }

 private:
  std::string bytes_;
  std::vector<size_t> end_{0};
  std::vector<uint8_t> known_;
};

// A token and the character it begins in: its number, and its first byte.
struct Place {
  int64_t character, byte;
};

struct Encoded {
  std::vector<int64_t> ids;
  std::vector<Place> starts;
};

enum class Pattern { kGpt2, kGpt2Digits, kOneDigit, kThreeDigits };

// Classes of characters; those not below are the rest, which patterns call [^\s\p{L}\p{N}].
enum Class : uint8_t { kOther = 0, kLetter = 1, kNumber = 2, kSpace = 3, kUnsure = 4 };

class ByteLevelBpe {
 public:
  struct Merge {
    int64_t left, right, made;
  };

  // classes: of each code point, those behind the last are not sure. letters: id of each byte, or
  // -1. merges: in the order of their rank. whole: words that are not put together by merges
  // (ignore_merges). marked: texts in which the tokenizer sees something else than text.
  ByteLevelBpe(Pattern pattern, std::string classes, const std::vector<int64_t>& letters,
               const std::vector<Merge>& merges,
               const std::vector<std::pair<std::string, int64_t>>& whole,
               std::vector<std::string> marked)
      : pattern_(pattern), classes_(std::move(classes)), marked_(std::move(marked)) {
    std::copy_n(letters.begin(), 256, letters_.begin());
    size_t slots = 16;
    while (slots < 2 * merges.size()) slots *= 2;
    slots_.assign(slots, Slot{});
    for (size_t rank = 0; rank < merges.size(); ++rank) {
      const auto [left, right, made] = merges[rank];
      const uint64_t key = pair(left, right);
      size_t at = mixed(key) & (slots - 1);
      while (slots_[at].key != kNoPair && slots_[at].key != key) at = (at + 1) & (slots - 1);
      slots_[at] = {key, static_cast<int32_t>(rank), static_cast<int32_t>(made)};
    }
    size_t places = 16;
    while (places < 2 * whole.size()) places *= 2;
    if (!whole.empty()) whole_.assign(places, -1);
    for (const auto& [word, id] : whole) {
      size_t at = hash(word) & (places - 1);
      while (whole_[at] >= 0) at = (at + 1) & (places - 1);
      whole_[at] = static_cast<int32_t>(words_.size());
      words_.emplace_back(word, id);
    }
    for (const std::string& text : marked_) marks_[static_cast<uint8_t>(text[0])] = true;
    recent_.resize(kRecent);
  }

  // False where it is not sure of a text (UTF-8); what `out` holds then is worth nothing.
  bool encode(std::string_view text, Encoded& out) {
    out.ids.clear();
    out.starts.clear();
    if (!read(text)) return false;
    const size_t end = begin_.size() - 1;
    size_t at = 0;
    while (at < end) {
      const size_t next = word_end(at, end);
      if (!word(text, at, next, out)) return false;
      at = next;
    }
    return true;
  }

 private:
  static constexpr uint64_t kNoPair = ~uint64_t{0};
  static constexpr size_t kRecent = 4096;
  static constexpr size_t kLongest = 256;  // bytes of a word; quadratic in it

  struct Slot {
    uint64_t key = kNoPair;
    int32_t rank = 0, made = 0;
  };

  // A word met before, in one line of the cache.
  struct alignas(64) Recent {
    uint64_t hash = 0;
    uint8_t size = 0, count = 0;
    char bytes[22];
    int32_t ids[8];
  };
  static_assert(sizeof(Recent) == 64);

  static uint64_t pair(int64_t left, int64_t right) {
    return (static_cast<uint64_t>(left) << 32) | static_cast<uint32_t>(right);
  }
  static uint64_t mixed(uint64_t key) {
    key = (key ^ (key >> 31)) * 0x9E3779B97F4A7C15u;
    return key ^ (key >> 29);
  }
  static uint64_t hash(std::string_view word) {
    uint64_t sum = word.size();
    for (size_t at = 0; at < word.size(); at += 8) {
      uint64_t part = 0;
      std::memcpy(&part, word.data() + at, std::min<size_t>(8, word.size() - at));
      sum = mixed(sum ^ part) + part;
    }
    return mixed(sum);
  }

  // Where each character begins, and its class; false where the tokenizer may see more in it.
  bool read(std::string_view text) {
    begin_.clear();
    class_.clear();
    size_t at = 0;
    while (at < text.size()) {
      const auto lead = static_cast<uint8_t>(text[at]);
      if (marks_[lead]) {
        for (const std::string& mark : marked_) {
          if (text.compare(at, mark.size(), mark) == 0) return false;
        }
      }
      uint32_t point = lead;
      size_t width = 1;
      if (lead >= 0x80) {
        width = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : 2;
        if (at + width > text.size()) return false;
        point = lead & (0x7F >> width);
        for (size_t k = 1; k < width; ++k) {
          point = (point << 6) | (static_cast<uint8_t>(text[at + k]) & 0x3F);
        }
      }
      if (point >= classes_.size()) return false;
      const auto kind = static_cast<uint8_t>(classes_[point]);
      if (kind == kUnsure) return false;
      begin_.push_back(static_cast<uint32_t>(at));
      class_.push_back(kind);
      at += width;
    }
    text_ = text;
    begin_.push_back(static_cast<uint32_t>(at));
    return true;
  }

  char letter(size_t at) const { return text_[begin_[at]]; }
  bool line(size_t at) const { return letter(at) == '\n' || letter(at) == '\r'; }
  size_t run(size_t at, size_t end, uint8_t kind) const {
    while (at < end && class_[at] == kind) ++at;
    return at;
  }

  // 's 't 'm 'd 're 've 'll: characters behind an apostrophe, 0 for none.
  size_t contraction(size_t at, size_t end, bool any_case) const {
    const auto low = [&](size_t k) {
      const char c = k < end ? letter(k) : '\0';
      return any_case && c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c;
    };
    const char one = low(at + 1), two = low(at + 2);
    if (one == 's' || one == 't' || one == 'm' || one == 'd') return 1;
    return ((one == 'r' || one == 'v') && two == 'e') || (one == 'l' && two == 'l') ? 2 : 0;
  }

  size_t word_end(size_t at, size_t end) const {
    if (pattern_ ==
        Pattern::kGpt2Digits) {  // digits stand alone, and what is between them is a text
      if (class_[at] == kNumber) return at + 1;
      size_t stop = at;
      while (stop < end && class_[stop] != kNumber) ++stop;
      return gpt2_end(at, stop);
    }
    return pattern_ == Pattern::kGpt2 ? gpt2_end(at, end) : later_end(at, end);
  }

  // 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
  size_t gpt2_end(size_t at, size_t end) const {
    if (letter(at) == '\'') {
      if (const size_t more = contraction(at, end, false)) return at + 1 + more;
    }
    const size_t from = at + (letter(at) == ' ');
    if (from < end && class_[from] != kSpace) return run(from, end, class_[from]);
    return space_end(at, end);
  }

  // (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,n}| ?[^\s\p{L}\p{N}]+[\r\n]*
  // |\s*[\r\n]+|\s+(?!\S)|\s+
  size_t later_end(size_t at, size_t end) const {
    if (letter(at) == '\'') {
      if (const size_t more = contraction(at, end, true)) return at + 1 + more;
    }
    const uint8_t kind = class_[at];
    if (kind == kLetter) return run(at, end, kLetter);
    if (kind == kNumber) {
      const size_t most = pattern_ == Pattern::kOneDigit ? 1 : 3;
      return run(at, std::min(end, at + most), kNumber);
    }
    if (!line(at) && at + 1 < end && class_[at + 1] == kLetter) return run(at + 1, end, kLetter);
    const size_t from = at + (letter(at) == ' ');
    if (from < end && class_[from] == kOther) {
      size_t stop = run(from, end, kOther);
      while (stop < end && line(stop)) ++stop;
      return stop;
    }
    for (size_t last = run(at, end, kSpace); last > at; --last) {
      if (line(last - 1)) return last;
    }
    return space_end(at, end);
  }

  // \s+(?!\S)|\s+
  size_t space_end(size_t at, size_t end) const {
    const size_t stop = run(at, end, kSpace);
    return stop == end || stop == at + 1 ? stop : stop - 1;
  }

  const Slot* merge(int64_t left, int64_t right) const {
    const uint64_t key = pair(left, right);
    size_t at = mixed(key) & (slots_.size() - 1);
    while (slots_[at].key != key) {
      if (slots_[at].key == kNoPair) return nullptr;
      at = (at + 1) & (slots_.size() - 1);
    }
    return &slots_[at];
  }

  bool word(std::string_view text, size_t first, size_t end, Encoded& out) {
    const std::string_view data = text.substr(begin_[first], begin_[end] - begin_[first]);
    if (data.size() > kLongest) return false;
    const uint64_t sum = hash(data);
    Recent& known = recent_[sum & (kRecent - 1)];
    const bool met = known.hash == sum && known.size == data.size() && known.count &&
                     std::memcmp(known.bytes, data.data(), data.size()) == 0;
    ids_.clear();
    if (met) {
      ids_.assign(known.ids, known.ids + known.count);
    } else {
      if (!spell(data, sum)) return false;
      if (data.size() <= sizeof(known.bytes) && ids_.size() <= 8) {
        known.hash = sum;
        known.size = static_cast<uint8_t>(data.size());
        known.count = static_cast<uint8_t>(ids_.size());
        std::memcpy(known.bytes, data.data(), data.size());
        std::copy(ids_.begin(), ids_.end(), known.ids);
      }
    }
    size_t at = begin_[first], character = first;
    for (const int32_t id : ids_) {
      while (begin_[character + 1] <= at) ++character;
      out.ids.push_back(id);
      out.starts.push_back(
          {static_cast<int64_t>(character), static_cast<int64_t>(begin_[character])});
      at += length(id);
    }
    return true;
  }

  bool spell(std::string_view data, uint64_t sum) {
    if (!whole_.empty()) {
      size_t at = sum & (whole_.size() - 1);
      for (; whole_[at] >= 0; at = (at + 1) & (whole_.size() - 1)) {
        if (words_[whole_[at]].first == data) {
          ids_.push_back(static_cast<int32_t>(words_[whole_[at]].second));
          return true;
        }
      }
    }
    for (const char c : data) {
      const int32_t id = static_cast<int32_t>(letters_[static_cast<uint8_t>(c)]);
      if (id < 0) return false;
      ids_.push_back(id);
    }
    found_.clear();
    for (size_t k = 0; k + 1 < ids_.size(); ++k) found_.push_back(merge(ids_[k], ids_[k + 1]));
    while (true) {  // the first pair of the lowest rank
      size_t best = found_.size();
      for (size_t k = 0; k < found_.size(); ++k) {
        if (found_[k] && (best == found_.size() || found_[k]->rank < found_[best]->rank)) best = k;
      }
      if (best == found_.size()) return true;
      ids_[best] = found_[best]->made;
      ids_.erase(ids_.begin() + best + 1);
      found_.erase(found_.begin() + best);
      if (best > 0) found_[best - 1] = merge(ids_[best - 1], ids_[best]);
      if (best < found_.size()) found_[best] = merge(ids_[best], ids_[best + 1]);
    }
  }

 public:
  // Bytes of each id, so that tokens can be placed.
  void use(std::shared_ptr<const Pieces> pieces) { pieces_ = std::move(pieces); }
  const Pieces& pieces() const { return *pieces_; }

 private:
  size_t length(int32_t id) const { return pieces_->known(id) ? pieces_->of(id).size() : 0; }

  Pattern pattern_;
  std::string classes_;
  std::vector<std::string> marked_;
  std::array<bool, 256> marks_{};
  std::array<int64_t, 256> letters_;
  std::vector<Slot> slots_;
  std::vector<int32_t> whole_;
  std::vector<std::pair<std::string, int64_t>> words_;
  std::vector<Recent> recent_;
  std::shared_ptr<const Pieces> pieces_;
  // Of the text at hand
  std::string_view text_;
  std::vector<uint32_t> begin_;
  std::vector<uint8_t> class_;
  std::vector<int32_t> ids_;
  std::vector<const Slot*> found_;
};

}  // namespace specdec
