// Things that operations know by a number: an argument of some hundred tensors would cost more than
// a small model's pass.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

namespace specdec {

template <class Thing>
class Shelf {
 public:
  // Never destroyed: tensors must not outlive torch's own state.
  static Shelf& all() {
    static Shelf* const shelf = new Shelf;
    return *shelf;
  }

  int64_t put(std::shared_ptr<Thing> thing) {
    const std::lock_guard<std::mutex> guard(mutex_);
    things_[++last_] = std::move(thing);
    return last_;
  }

  std::shared_ptr<Thing> get(int64_t number) {
    const std::lock_guard<std::mutex> guard(mutex_);
    const auto found = things_.find(number);
    STD_TORCH_CHECK(found != things_.end(), "llama: nothing has the number ", number);
    return found->second;
  }

  void drop(int64_t number) {
    const std::lock_guard<std::mutex> guard(mutex_);
    things_.erase(number);
  }

 private:
  std::mutex mutex_;
  std::map<int64_t, std::shared_ptr<Thing>> things_;
  int64_t last_ = 0;
};

}  // namespace specdec
