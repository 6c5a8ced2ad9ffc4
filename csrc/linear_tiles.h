// Linear layers on the CPU: the product of a block of rows with packed weights, in one of three precisions.
//
// Weights [N, K] are packed into panels of PANEL outputs, [N / PANEL][K / STEP][PANEL][STEP]: STEP values of K are a
// unit of 4 bytes, which one instruction multiplies and adds up. The order does not depend on the instruction set.
#pragma once

#include <cstdint>

#include "cpu.h"
#include "memory.h"
#include "simd.h"

namespace fastzs::linear {

constexpr int PANEL = 64;
constexpr int ROWS = 6;             // of a tile
constexpr int64_t DEPTH = 384;      // units of K at a time: a panel's part stays in the second cache for all rows
constexpr int64_t BLOCK_ROWS = 48;  // that a thread takes through all of N, so that what it makes stays in its caches

// Bytes of the next weights that a tile of a whole block fetches for each unit of K: all tiles together fetch them all.
constexpr int64_t FETCHED = PANEL * 4 / (BLOCK_ROWS / ROWS);

// What a unit is and how units are multiplied: a row's unit against a vector of weights.
enum class Kind { floats, pairs, bytes };

template <Kind KIND>
constexpr int STEP = KIND == Kind::floats ? 1 : KIND == Kind::pairs ? 2 : 4;

// NATIVE: by the one instruction for it, which the caller's target must have.
template <int LANES, Kind KIND, bool NATIVE>
struct Product;

template <int LANES, bool NATIVE>
struct Product<LANES, Kind::floats, NATIVE> {
  using F = typename Simd<LANES>::F;
  using Sum = F;
  using Unit = float;
  static FASTZS_INLINE F splat(const float* p) {
    return Simd<LANES>::broadcast(p);
  }
  static FASTZS_INLINE void add(F& sum, F a, F b) { sum += a * b; }
};

template <int LANES>
struct Words {
  using I = typename Simd<LANES>::I;
  using Unit = int32_t;
  static FASTZS_INLINE I splat(const int32_t* p) {
#if FASTZS_X86_ASM
    if constexpr (LANES > 4) {
      I v;
      asm("vpbroadcastd %1, %0" : "=v"(v) : "m"(*p));
      return v;
    }
#endif
    return *p - I{};
  }
};

// Pairs of bf16 numbers.
template <int LANES, bool NATIVE>
struct Product<LANES, Kind::pairs, NATIVE> : Words<LANES> {
  using F = typename Simd<LANES>::F;
  using I = typename Simd<LANES>::I;
  using Sum = F;
  static FASTZS_INLINE void add(F& sum, I a, I b) {
#if FASTZS_X86_ASM
    if constexpr (NATIVE) {
      asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
      return;
    }
#endif
    sum += (F)(a << 16) * (F)(b << 16);
    sum += (F)(a & -65536) * (F)(b & -65536);
  }
};

// Four bytes: of a row unsigned, of weights signed.
template <int LANES, bool NATIVE>
struct Product<LANES, Kind::bytes, NATIVE> : Words<LANES> {
  using I = typename Simd<LANES>::I;
  using Sum = I;
  static FASTZS_INLINE void add(I& sum, I a, I b) {
#if FASTZS_X86_ASM
    if constexpr (NATIVE) {
      if constexpr (LANES == 16) {
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
      } else {
        asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
      }
      return;
    }
#endif
    sum += (a & 255) * ((b << 24) >> 24) + ((a >> 8) & 255) * ((b << 16) >> 24) +
        ((a >> 16) & 255) * ((b << 8) >> 24) + ((a >> 24) & 255) * (b >> 24);
  }
};

// c[ROWS, columns of NV vectors] += rows of units times weights; c holds sums, 4 bytes each, a row per PANEL of them.
// FIRST: c is written, and sums start at those of `start`, the same for all rows.
// Weights at `next` will be wanted soon: half a line of them is fetched for each unit of depth.
template <int LANES, Kind KIND, bool NATIVE, bool FIRST>
FASTZS_INLINE void tile(
    const typename Product<LANES, KIND, NATIVE>::Unit* a, int64_t lda,
    const typename Product<LANES, KIND, NATIVE>::Unit* b, int64_t depth, char* c, const char* start, const char* next) {
  using P = Product<LANES, KIND, NATIVE>;
  constexpr int NV = VECTORS<LANES>;
  typename P::Sum sum[ROWS][NV];
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v)
      __builtin_memcpy(&sum[r][v], FIRST ? start + 4 * v * LANES : c + 4 * (r * PANEL + v * LANES), sizeof sum[r][v]);
  for (int64_t k = 0; k < depth; ++k) {
    __builtin_prefetch(next + k * FETCHED);
    decltype(P::splat(b)) right[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) __builtin_memcpy(&right[v], b + k * PANEL + v * LANES, sizeof right[v]);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
      const auto left = P::splat(a + r * lda + k);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) P::add(sum[r][v], left, right[v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) __builtin_memcpy(c + 4 * (r * PANEL + v * LANES), &sum[r][v], sizeof sum[r][v]);
}

// sums [rows, PANEL], `rows` a multiple of ROWS: `start` [PANEL] + rows of units [rows, lda] times one panel
// [depth, PANEL]. done(r) is called as soon as the rows from r of a tile have their sums.
template <int LANES, Kind KIND, bool NATIVE, typename Done>
FASTZS_INLINE void multiply(
    const typename Product<LANES, KIND, NATIVE>::Unit* a, int64_t lda, int64_t rows,
    const typename Product<LANES, KIND, NATIVE>::Unit* panel, int64_t depth, const char* start, char* sums,
    const Done& done) {
  for (int64_t k = 0; k < depth; k += DEPTH) {
    const int64_t n = depth - k < DEPTH ? depth - k : DEPTH;
    const auto* next = reinterpret_cast<const char*>(panel + (k + n) * PANEL);
    for (int64_t r = 0; r < rows; r += ROWS, next += n * FETCHED) {
      for (int c = 0; c < PANEL; c += VECTORS<LANES> * LANES) {
        const auto *left = a + r * lda + k, *right = panel + k * PANEL + c;
        char* to = sums + 4 * (r * PANEL + c);
        if (k == 0) {
          tile<LANES, KIND, NATIVE, true>(left, lda, right, n, to, start + 4 * c, next);
        } else {
          tile<LANES, KIND, NATIVE, false>(left, lda, right, n, to, start, next);
        }
      }
      if (k + n == depth) done(r);
    }
  }
}

}  // namespace fastzs::linear
