// label_map on the CPU: arithmetic of vectors of pixels or classes.
#pragma once

#include "label_map.h"
#include "simd.h"

namespace fastzs::label_map {

template <int LANES>
struct Math : Simd<LANES> {
  using F = typename Simd<LANES>::F;
  using I = typename Simd<LANES>::I;
  using U = typename Vectors<LANES>::U;

  static FASTZS_INLINE I load_int(const int* p) {
    I v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static FASTZS_INLINE void store_int(int* p, I v) { __builtin_memcpy(p, &v, sizeof v); }
  static FASTZS_INLINE I splat_int(int x) { return x - I{}; }

  // e^x, relative error 2e-7, between e^-87 and e^87. NaN stays NaN.
  static FASTZS_INLINE F exponential(F x) {
    const float to_integer = 12582912.0f;  // 1.5 * 2^23: adding it leaves the integer in the low bits
    F t = x * LOG2_E;
    t = t < -126.0f ? Simd<LANES>::splat(-126.0f) : t;
    t = t > 126.0f ? Simd<LANES>::splat(126.0f) : t;
    const F shifted = t + to_integer;
    const F f = t - (shifted - to_integer);
    F p = f * 1.5403530e-4f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    return p * (F)(((U)shifted + 127u) << 23);  // unsigned: NaN may overflow
  }

  // 1 / x for 1 <= x < 2^127: a guess from the exponent and three steps of Newton, quicker than dividing.
  static FASTZS_INLINE F inverse(F x) {
    F y = (F)(0x7ef311c7 - (I)x);
    y = y * (2.0f - x * y);
    y = y * (2.0f - x * y);
    return y + y * (1.0f - x * y);
  }

  // from[index], where index ascends by at most 2 LANES - 1. Two vectors from index[0] on are read.
  static FASTZS_INLINE F pick(const float* from, const int* index) {
#if defined(__GNUC__) && !defined(__clang__)
    if constexpr (LANES > 4) {  // one permute with AVX-512, three instructions with AVX2
      const float* at = from + index[0];
      return __builtin_shuffle(Simd<LANES>::load(at), Simd<LANES>::load(at + LANES), load_int(index) - index[0]);
    }
#endif
    F v;
    for (int l = 0; l < LANES; ++l) v[l] = from[index[l]];
    return v;
  }

  static FASTZS_INLINE F sigmoid(F x) { return inverse(1.0f + exponential(-x)); }
};

}  // namespace fastzs::label_map
