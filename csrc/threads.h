// Work in pieces of unlike length on torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace fastzs {

// The numbers of the pieces, 0 to n - 1, each given out once and in this order.
class Queue {
 public:
  explicit Queue(int64_t n) : n_(n) {}
  bool next(int64_t& piece) {
    piece = given_.fetch_add(1, std::memory_order_relaxed);
    return piece < n_;
  }

 private:
  const int64_t n_;
  std::atomic<int64_t> given_{0};
};

// Calls work(queue) in each thread, which takes pieces until none is left: one with short pieces takes more of them.
// Which thread computes a piece must not change its result.
template <class Work>
void share_out(int64_t n, const Work& work) {
  Queue queue(n);
  const int64_t threads = std::min<int64_t>(n, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) { work(queue); });
}

}  // namespace fastzs
