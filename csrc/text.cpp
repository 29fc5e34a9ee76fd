// What is not a tensor: structures over token ids and text, bound with pybind11.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "reader.h"

namespace py = pybind11;

namespace {

// specdec_fast.ngram.PythonNgramIndex is the reference; see there for the structure.
class NgramIndex {
 public:
  explicit NgramIndex(int64_t max_ngram) : max_ngram_(max_ngram) {
    if (max_ngram < 1) throw py::value_error("max_ngram must be at least 1");
  }

  void extend(const std::vector<int64_t>& ids) {
    for (const int64_t id : ids) {
      if (id < 0 || id > kMaxId) {
        throw py::value_error("ids must be in [0, 2^31), not " + std::to_string(id));
      }
    }
    for (const int64_t id : ids) {
      record();
      ids_.push_back(static_cast<uint32_t>(id));
    }
  }

  std::vector<int64_t> lookup(int64_t count) const {
    if (count < 0) throw py::value_error("count must not be negative");
    const size_t length = ids_.size();
    uint32_t node = kRoot;
    for (size_t n = 1; n <= depth(); ++n) {
      const auto child = child_.find(edge(node, ids_[length - n]));
      if (child == child_.end()) break;
      node = child->second;
    }
    if (node == kRoot) return {};
    const size_t begin = follow_[node];
    const size_t size = std::min(length - begin, static_cast<size_t>(count));
    return {ids_.begin() + begin, ids_.begin() + begin + size};
  }

  size_t size() const { return ids_.size(); }

 private:
  static constexpr int64_t kMaxId = 0x7fffffff;
  static constexpr uint32_t kRoot = 0;

  static uint64_t edge(uint32_t node, uint32_t id) { return (uint64_t{node} << 32) | id; }
  size_t depth() const { return std::min(ids_.size(), static_cast<size_t>(max_ngram_)); }

  // Every suffix n-gram is about to be followed by the id at index ids_.size().
  void record() {
    const size_t length = ids_.size();
    uint32_t node = kRoot;
    for (size_t n = 1; n <= depth(); ++n) {
      const auto [child, added] =
          child_.try_emplace(edge(node, ids_[length - n]), static_cast<uint32_t>(follow_.size()));
      node = child->second;
      if (added) follow_.push_back(0);
      follow_[node] = length;
    }
  }

  // std::hash of an integer is the identity, which clusters keys made of two packed fields.
  struct Mix {
    size_t operator()(uint64_t key) const {
      key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9u;
      key = (key ^ (key >> 27)) * 0x94D049BB133111EBu;
      return key ^ (key >> 31);
    }
  };

  int64_t max_ngram_;
  std::vector<uint32_t> ids_;
  std::unordered_map<uint64_t, uint32_t, Mix> child_;
  std::vector<size_t> follow_{0};  // by node; the root's entry is never read
};

std::shared_ptr<specdec::Pieces> pieces_of(const std::vector<std::optional<py::bytes>>& table) {
  auto pieces = std::make_shared<specdec::Pieces>();
  for (const auto& data : table) {
    if (data) {
      pieces->add(static_cast<std::string_view>(*data));
    } else {
      pieces->add_none();
    }
  }
  return pieces;
}

std::shared_ptr<specdec::ByteLevelBpe> bpe_of(
    std::shared_ptr<specdec::Pieces> pieces, specdec::Pattern pattern, const py::bytes& classes,
    const std::vector<int64_t>& letters, const std::vector<std::array<int64_t, 3>>& merges,
    const std::vector<std::pair<py::bytes, int64_t>>& whole, std::vector<std::string> marked) {
  std::vector<specdec::ByteLevelBpe::Merge> ranked;
  bool sound = letters.size() == 256;
  for (const auto& [left, right, made] : merges) {
    for (const int64_t id : {left, right, made}) sound = sound && id >= 0 && id < pieces->size();
    ranked.push_back({left, right, made});
  }
  std::vector<std::pair<std::string, int64_t>> words;
  for (const auto& [word, id] : whole) {
    sound = sound && id >= 0 && id < pieces->size();
    words.emplace_back(static_cast<std::string>(word), id);
  }
  for (const int64_t id : letters) sound = sound && id < pieces->size();
  for (const std::string& text : marked) sound = sound && !text.empty();
  if (!sound) throw py::value_error("an id is out of range, or a marked text is empty");
  auto bpe = std::make_shared<specdec::ByteLevelBpe>(pattern, static_cast<std::string>(classes),
                                                     letters, ranked, words, std::move(marked));
  bpe->use(std::move(pieces));
  return bpe;
}

std::optional<std::pair<std::vector<int64_t>, std::vector<int64_t>>> encode(
    specdec::ByteLevelBpe& bpe, std::string_view text) {
  specdec::Encoded found;
  if (!bpe.encode(text, found)) return std::nullopt;
  std::vector<int64_t> starts;
  for (const auto& place : found.starts) starts.push_back(place.character);
  return std::pair{std::move(found.ids), std::move(starts)};
}

specdec::NativeReader reader_of(
    std::shared_ptr<specdec::ByteLevelBpe> bpe, std::shared_ptr<specdec::Pieces> source,
    specdec::Slow slow, std::unordered_map<int64_t, specdec::NativeReader::Special> specials,
    std::vector<int64_t> opening, bool drop_space, bool drop_space_after_special,
    int64_t lookbehind) {
  return specdec::NativeReader(std::move(bpe), std::move(source), std::move(slow),
                               std::move(specials), std::move(opening), drop_space,
                               drop_space_after_special, lookbehind);
}

}  // namespace

PYBIND11_MODULE(_text, module) {
  py::class_<NgramIndex>(module, "NgramIndex")
      .def(py::init<int64_t>(), py::arg("max_ngram"))
      .def("extend", &NgramIndex::extend, py::arg("ids"))
      .def("lookup", &NgramIndex::lookup, py::arg("count"))
      .def("__len__", &NgramIndex::size);

  using namespace specdec;
  py::class_<Pieces, std::shared_ptr<Pieces>>(module, "Pieces")
      .def(py::init(&pieces_of), py::arg("table"));
  py::enum_<Pattern>(module, "Pattern")
      .value("GPT2", Pattern::kGpt2)
      .value("GPT2_DIGITS", Pattern::kGpt2Digits)
      .value("ONE_DIGIT", Pattern::kOneDigit)
      .value("THREE_DIGITS", Pattern::kThreeDigits);
  py::class_<ByteLevelBpe, std::shared_ptr<ByteLevelBpe>>(module, "ByteLevelBpe")
      .def(py::init(&bpe_of), py::arg("pieces"), py::arg("pattern"), py::arg("classes"),
           py::arg("letters"), py::arg("merges"), py::arg("whole"), py::arg("marked"))
      .def("encode", &encode, py::arg("text"));
  py::class_<NativeReader::Special>(module, "Special")
      .def(py::init<int64_t, bool, bool, std::string, std::string, bool>(), py::arg("mapped"),
           py::arg("opens"), py::arg("unsaid"), py::arg("text"), py::arg("marker"),
           py::arg("plain"));
  py::class_<NativeReader>(module, "Reader")
      .def(py::init(&reader_of), py::arg("bpe"), py::arg("source"), py::arg("slow"),
           py::arg("specials"), py::arg("opening"), py::arg("drop_space"),
           py::arg("drop_space_after_special"), py::arg("lookbehind"))
      .def("append", &NativeReader::append, py::arg("source_ids"))
      .def_property_readonly("kept", &NativeReader::kept);
  py::class_<NativeProposer>(module, "Proposer")
      .def(py::init([](std::shared_ptr<ByteLevelBpe> bpe, std::shared_ptr<Pieces> drafter,
                       int64_t lookbehind) {
             return NativeProposer(std::move(bpe), std::move(drafter), lookbehind);
           }),
           py::arg("bpe"), py::arg("drafter"), py::arg("lookbehind"))
      .def("propose", &NativeProposer::propose, py::arg("committed"), py::arg("context"),
           py::arg("drafted"));
}
