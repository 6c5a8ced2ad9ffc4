// What dropout keeps of rows of numbers (of an attention map: a query's weights): a function of a seed, the row and the
// place in it, so that backward needs nothing kept of forward and results do not depend on threads or on the width of
// vectors.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "simd.h"

namespace fastzs {

struct Dropout {
  uint64_t seed;
  int32_t least;   // a number is kept if 31 random bits are at least so much; 0 without dropout
  float enlarged;  // what a kept number is multiplied with: one over the share that is kept
};

inline Dropout dropout_of(const char* op, double rate, const torch::stable::Tensor& seed) {
  STD_TORCH_CHECK(rate >= 0 && rate < 1, op, ": dropout is ", rate, "; expected 0 to below 1");
  STD_TORCH_CHECK(seed.numel() == 1 && seed.scalar_type() == torch::headeronly::ScalarType::Long,
      op, ": seed is no int64");
  const auto least = static_cast<int32_t>(std::min(std::round(rate * 0x1p31), 0x1p31 - 1));
  return {static_cast<uint64_t>(*seed.const_data_ptr<int64_t>()), least, static_cast<float>(1 / (1 - rate))};
}

// 64 random bits of a row: splitmix64.
struct RowBits {
  uint32_t low, high;

  FASTZS_INLINE RowBits(uint64_t seed, uint64_t row) {
    uint64_t x = seed + (row + 1) * 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    x ^= x >> 31;
    low = static_cast<uint32_t>(x), high = static_cast<uint32_t>(x >> 32);
  }
};

// -1 for those of the row's places [at, at + LANES) that are kept, 0 for the others. The place and half of the row's
// bits go through murmur3's last step, the other half joins in the middle.
template <int LANES>
FASTZS_INLINE typename Simd<LANES>::I kept(const RowBits& row, int64_t at, int32_t least) {
  using U = typename Vectors<LANES>::U;
  U x;
  for (int l = 0; l < LANES; ++l) x[l] = l;
  x += static_cast<uint32_t>(at) + row.low;
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13) ^ row.high) * 0xc2b2ae35u;
  x ^= x >> 16;
  return (typename Simd<LANES>::I)(x >> 1) >= least;
}

}  // namespace fastzs
