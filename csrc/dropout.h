// Which weights of an attention map dropout keeps: a function of a seed, the row and the key, so that backward needs
// nothing kept of forward and results do not depend on threads or on the width of vectors.
#pragma once

#include <cstdint>

#include "simd.h"

namespace fastzs {

struct Dropout {
  uint64_t seed;
  int32_t least;   // a weight is kept if 31 random bits are at least so much; 0 without dropout
  float enlarged;  // what a kept weight is multiplied with: one over the share that is kept
};

// 64 random bits of a row of the map: splitmix64.
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

// -1 for those of keys [key, key + LANES) that are kept, 0 for the others. The key's number and half of the row's bits
// go through murmur3's last step, the other half joins in the middle.
template <int LANES>
FASTZS_INLINE typename Simd<LANES>::I kept(const RowBits& row, int64_t key, int32_t least) {
  using U = typename Vectors<LANES>::U;
  U x;
  for (int l = 0; l < LANES; ++l) x[l] = l;
  x += static_cast<uint32_t>(key) + row.low;
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13) ^ row.high) * 0xc2b2ae35u;
  x ^= x >> 16;
  return (typename Simd<LANES>::I)(x >> 1) >= least;
}

}  // namespace fastzs
