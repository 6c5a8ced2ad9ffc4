// Vectors of LANES floats by the compilers' vector extension: the same source becomes AVX-512, AVX2, SSE2 or NEON.
#pragma once

#include <cstdint>

#include "cpu.h"

namespace fastzs {

// GCC drops a vector_size that depends on a template parameter, so the three widths are spelled out.
template <int LANES>
struct Vectors;
#define FASTZS_VECTORS(LANES)                                     \
  template <>                                                     \
  struct Vectors<LANES> {                                         \
    typedef float F __attribute__((vector_size(4 * LANES)));      \
    typedef int32_t I __attribute__((vector_size(4 * LANES)));    \
    typedef int16_t S __attribute__((vector_size(2 * LANES)));    \
  };
FASTZS_VECTORS(4)
FASTZS_VECTORS(8)
FASTZS_VECTORS(16)
#undef FASTZS_VECTORS

template <int LANES>
struct Simd {
  using F = typename Vectors<LANES>::F;
  using I = typename Vectors<LANES>::I;
  using S = typename Vectors<LANES>::S;

  static FASTZS_INLINE F load(const float* p) {
    F v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static FASTZS_INLINE void store(float* p, F v) { __builtin_memcpy(p, &v, sizeof v); }
  static FASTZS_INLINE I load(const int16_t* p) {
    S v;
    __builtin_memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, I);
  }
  static FASTZS_INLINE F splat(float x) { return x - F{}; }
  // -1 in the lanes below n, 0 in the others.
  static FASTZS_INLINE I first(int n) {
    I lane;
    for (int k = 0; k < LANES; ++k) lane[k] = k;
    return lane < n;
  }

  static FASTZS_INLINE float sum(F v) {
    if constexpr (LANES == 4) {
      return (v[0] + v[2]) + (v[1] + v[3]);
    } else {
      typedef typename Simd<LANES / 2>::F Half;
      Half low, high;
      __builtin_memcpy(&low, &v, sizeof low);
      __builtin_memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
      return Simd<LANES / 2>::sum(low + high);
    }
  }

  // e^x for x <= 0, relative error 2e-7 and at least e^-86. With n = round(x / ln 2), e^x = 2^n e^(x - n ln 2).
  static FASTZS_INLINE F exp_negative(F x) {
    const float to_integer = 12582912.0f;  // 1.5 * 2^23: adding it leaves the integer in the low bits
    x = x < -86.0f ? splat(-86.0f) : x;
    F shifted = x * 1.44269504f + to_integer;
    F r = x - (shifted - to_integer) * 0.693147181f;
    F p = r * 0.00829764767f + 0.0419154314f;
    p = p * r + 0.166675751f;
    p = p * r + 0.499988944f;
    p = p * r + 0.999999692f;
    p = p * r + 1.00000007f;
    return (F)((I)p + ((I)shifted << 23));
  }

  // log(1 + e) for e in [0, 1], relative error 4e-7.
  static FASTZS_INLINE F log1p_unit(F e) {
    F p = e * -0.00853919842f + 0.0440895962f;
    p = p * e + -0.107681664f;
    p = p * e + 0.177452381f;
    p = p * e + -0.244954616f;
    p = p * e + 0.332754796f;
    p = p * e + -0.499974054f;
    p = p * e + 0.999999806f;
    return p * e;
  }
};

}  // namespace fastzs
