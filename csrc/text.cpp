// What is not a tensor: structures over token ids and text, bound with pybind11.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

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

}  // namespace

PYBIND11_MODULE(_text, module) {
  py::class_<NgramIndex>(module, "NgramIndex")
      .def(py::init<int64_t>(), py::arg("max_ngram"))
      .def("extend", &NgramIndex::extend, py::arg("ids"))
      .def("lookup", &NgramIndex::lookup, py::arg("count"))
      .def("__len__", &NgramIndex::size);
}
