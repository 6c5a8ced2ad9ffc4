// A thread's scratch memory: one allocation, taken in parts.
#pragma once

#include <cstdint>
#include <memory>

#include "cpu.h"

namespace fastzs {

FASTZS_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// The next `count` floats of a thread's memory, on a boundary of 64 bytes if the memory is.
FASTZS_INLINE float* take(float*& memory, int64_t count) {
  float* taken = memory;
  memory += round_up(count, 16);
  return taken;
}

// Floats on a boundary of 64 bytes.
class Floats {
 public:
  explicit Floats(int64_t count) : memory_(new char[count * sizeof(float) + 64]) {
    const auto at = reinterpret_cast<uintptr_t>(memory_.get());
    data_ = reinterpret_cast<float*>((at + 63) / 64 * 64);
  }
  float* data() const { return data_; }

 private:
  std::unique_ptr<char[]> memory_;
  float* data_;
};

}  // namespace fastzs
