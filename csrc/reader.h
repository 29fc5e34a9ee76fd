// A row's text in another tokenizer's ids: specdec_fast.text.Reader and TextProposer are the
// reference; see there for the rules. Places are counted in characters, as there, and in bytes, to
// cut the text.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "bpe.h"

namespace specdec {

// Ids of a text, and the character at which each begins, from the tokenizer itself.
using Slow = std::function<std::pair<std::vector<int64_t>, std::vector<int64_t>>(std::string_view)>;

inline bool continues(char c) { return (static_cast<uint8_t>(c) & 0xC0) == 0x80; }

inline int64_t characters(std::string_view text) {
  return std::count_if(text.begin(), text.end(), [](char c) { return !continues(c); });
}

// Byte at which a character begins, or the end of the text.
inline size_t byte_of(std::string_view text, int64_t character) {
  size_t at = 0;
  for (; at < text.size(); ++at) {
    if (!continues(text[at]) && character-- == 0) break;
  }
  return at;
}

// How many bytes from `at` on make a character: > 0 whole; < 0 so many that are none; 0: the text
// ends inside of what may become one.
inline int character_at(std::string_view data, size_t at) {
  const auto byte = [&](size_t k) { return static_cast<uint8_t>(data[at + k]); };
  const uint8_t lead = byte(0);
  if (lead < 0x80) return 1;
  const int width = lead < 0xC2 ? 0 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : lead < 0xF5 ? 4 : 0;
  if (width == 0) return -1;
  for (int k = 1; k < width; ++k) {
    if (at + k == data.size()) return 0;
    uint8_t low = 0x80, high = 0xBF;
    if (k == 1) {
      if (lead == 0xE0) low = 0xA0;
      if (lead == 0xED) high = 0x9F;
      if (lead == 0xF0) low = 0x90;
      if (lead == 0xF4) high = 0x8F;
    }
    if (byte(k) < low || byte(k) > high) return -k;
  }
  return width;
}

// As Python's incremental decoder with "replace"; what may become a character stays in `data`.
inline std::string decoded(std::string& data, bool final) {
  std::string text;
  size_t at = 0;
  while (at < data.size()) {
    const int width = character_at(data, at);
    if (width > 0) {
      text.append(data, at, width);
      at += width;
    } else if (width < 0) {
      text += "\xEF\xBF\xBD";
      at += -width;
    } else if (final) {
      text += "\xEF\xBF\xBD";
      at = data.size();
    } else {
      break;
    }
  }
  data.erase(0, at);
  return text;
}

// Bytes of whole characters at the beginning; nothing where something is no text.
inline std::optional<size_t> whole_text(std::string_view data) {
  size_t at = 0;
  while (at < data.size()) {
    const int width = character_at(data, at);
    if (width < 0) return std::nullopt;
    if (width == 0) break;
    at += width;
  }
  return at;
}

// A space and a letter: all pre-tokenisers, and all merge lists, begin a token there.
inline bool begins_word(std::string_view data) {
  if (data.size() < 2 || data[0] != ' ') return false;
  const char low = data[1] | 0x20;
  return low >= 'a' && low <= 'z';
}

class NativeReader {
 public:
  struct Special {
    int64_t mapped;      // the destination's, or -1
    bool opens, unsaid;  // marks the beginning of a text; has no text to be kept
    std::string text, marker;
    bool plain;  // whether text behind the marker is encoded as if it stood alone
  };

  NativeReader(std::shared_ptr<ByteLevelBpe> bpe, std::shared_ptr<const Pieces> source, Slow slow,
               std::unordered_map<int64_t, Special> specials, std::vector<int64_t> opening,
               bool drop_space, bool drop_space_after_special, int64_t lookbehind)
      : bpe_(std::move(bpe)),
        source_(std::move(source)),
        slow_(std::move(slow)),
        specials_(std::move(specials)),
        drop_space_(drop_space),
        drop_after_special_(drop_space_after_special),
        lookbehind_(lookbehind),
        ids_(std::move(opening)),
        starts_(ids_.size(), Place{0, 0}) {
    open_segment("", true);
  }

  // How many ids stay as they were, and those behind them now.
  std::pair<int64_t, std::vector<int64_t>> append(const std::vector<int64_t>& source_ids) {
    int64_t same = size();
    std::string run;
    for (const int64_t id : source_ids) {
      if (source_->known(id)) {
        run += source_->of(id);
      } else if (const auto special = specials_.find(id); special != specials_.end()) {
        same = std::min(same, append_bytes(run, true));
        same = std::min(same, append_special(special->second));
        run.clear();
      }
    }
    same = std::min(same, append_bytes(run, false));
    return {same, {ids_.begin() + same, ids_.end()}};
  }

  // Characters of text that later windows may look at.
  int64_t kept() const { return length_; }

 private:
  static constexpr int64_t kGrowth[] = {1, 4, 16};
  static constexpr int64_t kAgreement = 3;
  static constexpr int64_t kCharsAToken = 32;

  int64_t size() const { return static_cast<int64_t>(ids_.size()); }

  int64_t append_bytes(const std::string& data, bool final) {
    pending_ += data;
    std::string text = decoded(pending_, final);
    if (text.empty()) return size();
    if (drop_space_) {
      drop_space_ = false;
      if (text[0] == ' ') text.erase(0, 1);
    }
    at_row_start_ = false;
    return text.empty() ? size() : append_text(text);
  }

  int64_t append_special(const Special& special) {
    const bool opening = at_row_start_ && special.opens;
    const bool there = std::find(ids_.begin(), ids_.end(), special.mapped) != ids_.end();
    if (opening && (special.mapped < 0 || there)) return size();
    at_row_start_ = false;
    if (!opening) drop_space_ = drop_after_special_;
    if (special.mapped >= 0) {
      ids_.push_back(special.mapped);
      starts_.push_back({0, 0});
      open_segment(special.marker, special.plain);
      return size() - 1;
    }
    return special.unsaid ? size() : append_text(special.text);
  }

  void open_segment(const std::string& marker, bool plain) {
    first_ = size();
    marker_ = marker;
    plain_ = plain;
    text_.clear();
    length_ = 0;
    offset_ = {0, 0};
  }

  int64_t append_text(const std::string& text) {
    const Place before{length_ + offset_.character,
                       static_cast<int64_t>(text_.size()) + offset_.byte};
    text_ += text;
    length_ += characters(text);
    const auto [at, from] = encode_window(text, before);
    int64_t same = 0;
    const int64_t fresh = static_cast<int64_t>(found_.ids.size()) - from;
    while (same < std::min(size() - at, fresh) && ids_[at + same] == found_.ids[from + same])
      ++same;
    ids_.resize(at);
    starts_.resize(at);
    ids_.insert(ids_.end(), found_.ids.begin() + from, found_.ids.end());
    starts_.insert(starts_.end(), found_.starts.begin() + from, found_.starts.end());
    forget();
    return at + same;
  }

  // Where to splice, and from which of the tokens found on.
  std::pair<int64_t, int64_t> encode_window(const std::string& text, Place before) {
    for (const int64_t growth : kGrowth) {
      const int64_t width = growth * lookbehind_;
      const auto [at, firm] = window(width);
      const Place start = at > first_ ? starts_[at] : Place{0, 0};
      if (start.character < offset_.character ||
          before.character - start.character > 4 * width * kCharsAToken) {
        break;
      }
      encode_from(at, start);
      if (firm) return {at, 0};
      if (const auto step = in_step(at)) return *step;
    }
    encode(text, before);
    return {size(), 0};
  }

  std::pair<int64_t, bool> window(int64_t width) const {
    const Pieces& pieces = bpe_->pieces();
    int64_t latest = size() - width;
    if (latest <= first_) return {first_, true};
    const int64_t lowest = std::max(first_, latest - 3 * width);
    for (int64_t at = latest; at > lowest; --at) {
      if (!pieces.known(ids_[at]) || begins_word(pieces.of(ids_[at]))) return {at, true};
    }
    if (lowest == first_) return {first_, true};
    while (latest > lowest && inside(ids_[latest])) --latest;
    return {latest, false};
  }

  bool inside(int64_t id) const {
    const Pieces& pieces = bpe_->pieces();
    return pieces.known(id) && !pieces.of(id).empty() && continues(pieces.of(id)[0]);
  }

  void encode_from(int64_t at, Place start) {
    const std::string_view text = std::string_view(text_).substr(start.byte - offset_.byte);
    if (at != first_ || marker_.empty()) return encode(text, start);
    if (plain_ && bpe_->encode(text, found_)) return move_by(start);
    const std::string whole = marker_ + std::string(text);
    encode(whole, {0, 0});
    if (found_.ids.empty() || found_.ids[0] != ids_[first_ - 1]) return encode(text, start);
    const int64_t width = characters(marker_);
    found_.ids.erase(found_.ids.begin());
    found_.starts.erase(found_.starts.begin());
    for (Place& place : found_.starts) {
      place.character = std::max<int64_t>(0, place.character - width);
      place.byte = std::max<int64_t>(0, place.byte - static_cast<int64_t>(marker_.size()));
    }
    move_by(start);
  }

  void encode(std::string_view text, Place start) {
    if (!bpe_->encode(text, found_)) {
      auto [ids, starts] = slow_(text);
      found_.ids = std::move(ids);
      found_.starts.clear();
      Place place{0, 0};
      for (const int64_t next : starts) {
        if (next < place.character) place = {0, 0};
        place.byte += byte_of(text.substr(place.byte), next - place.character);
        place.character = next;
        found_.starts.push_back(place);
      }
    }
    move_by(start);
  }

  void move_by(Place start) {
    for (Place& place : found_.starts) {
      place.character += start.character;
      place.byte += start.byte;
    }
  }

  // First old token k and new one j that agree, for some tokens.
  std::optional<std::pair<int64_t, int64_t>> in_step(int64_t at) const {
    const auto& [ids, starts] = found_;
    const int64_t fresh = static_cast<int64_t>(ids.size());
    for (int64_t j = 0; j + kAgreement <= fresh; ++j) {
      const auto behind = std::upper_bound(
          starts_.begin() + at, starts_.end(), starts[j].character,
          [](int64_t character, const Place& place) { return character < place.character; });
      int64_t k = behind - starts_.begin() - 1;
      while (k >= at && starts_[k].character == starts[j].character && ids_[k] != ids[j]) --k;
      if (k < at || starts_[k].character != starts[j].character) continue;
      if (k + kAgreement > size()) continue;
      bool agree = true;
      for (int64_t n = 0; n < kAgreement; ++n) {
        agree = agree && ids_[k + n] == ids[j + n] &&
                starts_[k + n].character == starts[j + n].character;
      }
      if (agree) return std::pair{k, j};
    }
    return std::nullopt;
  }

  void forget() {
    const int64_t reach = 5 * kGrowth[2] * lookbehind_;
    if (length_ <= 2 * kCharsAToken * reach) return;
    const int64_t last = size() - reach, end = offset_.character + length_;
    int64_t keep = last > first_ ? starts_[last].character : end - kCharsAToken * reach;
    keep = std::max({offset_.character, keep, end - kCharsAToken * reach});
    const size_t bytes = byte_of(text_, keep - offset_.character);
    text_.erase(0, bytes);
    length_ -= keep - offset_.character;
    offset_ = {keep, offset_.byte + static_cast<int64_t>(bytes)};
  }

  std::shared_ptr<ByteLevelBpe> bpe_;
  std::shared_ptr<const Pieces> source_;
  Slow slow_;
  std::unordered_map<int64_t, Special> specials_;
  bool drop_space_, drop_after_special_, at_row_start_ = true;
  int64_t lookbehind_;
  std::vector<int64_t> ids_;
  std::vector<Place> starts_;
  std::string pending_, text_, marker_;
  bool plain_ = true;
  int64_t first_ = 0, length_ = 0;
  Place offset_{0, 0};
  Encoded found_;
};

// TextProposer.propose where no special is drafted and the committed text is one the encoder is
// sure of; otherwise it says nothing.
class NativeProposer {
 public:
  NativeProposer(std::shared_ptr<ByteLevelBpe> bpe, std::shared_ptr<const Pieces> drafter,
                 int64_t lookbehind)
      : bpe_(std::move(bpe)), drafter_(std::move(drafter)), lookbehind_(lookbehind) {}

  // committed, context: the last ids of each, four times the lookbehind at most.
  std::optional<std::vector<int64_t>> propose(const std::vector<int64_t>& committed,
                                              const std::vector<int64_t>& context,
                                              const std::vector<int64_t>& drafted) {
    const Pieces& pieces = bpe_->pieces();
    const size_t begin = after_special(pieces, committed);
    const std::string read = bytes_of(*drafter_, context, after_special(*drafter_, context));
    if (begin == committed.size() || read.empty()) return std::nullopt;
    std::string data;
    for (const int64_t id : drafted) {
      if (!drafter_->known(id)) return std::nullopt;
      data += drafter_->of(id);
    }
    const std::string behind = bytes_of(pieces, committed, begin);
    std::string_view end = read;
    if (end.size() >= 16) {
      end = end.substr(end.size() - 16);
    } else if (end[0] == ' ') {
      end.remove_prefix(1);
    }
    const size_t at = end.empty() ? std::string::npos : behind.rfind(end);
    if (at == std::string::npos) return std::nullopt;
    const std::string_view missing = std::string_view(behind).substr(at + end.size());
    if (data.compare(0, missing.size(), missing) != 0) return std::vector<int64_t>{};
    return go_on(committed, begin, std::string_view(data).substr(missing.size()));
  }

 private:
  static size_t after_special(const Pieces& pieces, const std::vector<int64_t>& ids) {
    size_t k = ids.size();
    while (k > 0 && pieces.known(ids[k - 1])) --k;
    return k;
  }

  static std::string bytes_of(const Pieces& pieces, const std::vector<int64_t>& ids, size_t from) {
    std::string data;
    for (; from < ids.size(); ++from) data += pieces.of(ids[from]);
    return data;
  }

  size_t window(const std::vector<int64_t>& ids, size_t begin) const {
    const Pieces& pieces = bpe_->pieces();
    const int64_t first = static_cast<int64_t>(begin);
    int64_t latest = std::max(first, static_cast<int64_t>(ids.size()) - lookbehind_);
    for (int64_t at = latest; at >= first; --at) {
      if (begins_word(pieces.of(ids[at]))) return at;
    }
    while (latest > first && !pieces.of(ids[latest]).empty() &&
           continues(pieces.of(ids[latest])[0])) {
      --latest;
    }
    return latest;
  }

  std::optional<std::vector<int64_t>> go_on(const std::vector<int64_t>& committed, size_t begin,
                                            std::string_view data) {
    const Pieces& pieces = bpe_->pieces();
    std::string text = bytes_of(pieces, committed, window(committed, begin));
    const size_t behind = text.size();
    text += data;
    const auto whole = whole_text(text);
    if (!whole) return std::nullopt;
    if (*whole == 0) return std::vector<int64_t>{};
    if (!bpe_->encode(std::string_view(text).substr(0, *whole), found_)) return std::nullopt;
    size_t end = 0;
    for (size_t k = 0; k < found_.ids.size() && end <= behind; ++k) {
      if (end == behind) return std::vector<int64_t>(found_.ids.begin() + k, found_.ids.end());
      end += pieces.of(found_.ids[k]).size();
    }
    // A merge across the boundary: the new text on its own
    if (data.empty() || continues(data[0])) return std::nullopt;
    const auto own = whole_text(data);
    if (!own) return std::nullopt;
    if (*own == 0) return std::vector<int64_t>{};
    if (!bpe_->encode(data.substr(0, *own), found_)) return std::nullopt;
    return found_.ids;
  }

  std::shared_ptr<ByteLevelBpe> bpe_;
  std::shared_ptr<const Pieces> drafter_;
  int64_t lookbehind_;
  Encoded found_;
};

}  // namespace specdec
