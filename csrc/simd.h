// Vectors of LANES floats by the compilers' vector extension: the same source becomes AVX-512, AVX2, SSE2 or NEON.
#pragma once

#include <cstdint>

#include "cpu.h"

namespace fastzs {

constexpr float LOG2_E = 1.44269504f;

// GCC drops a vector_size that depends on a template parameter, so the three widths are spelled out.
template <int LANES>
struct Vectors;
#define FASTZS_VECTORS(LANES)                                     \
  template <>                                                     \
  struct Vectors<LANES> {                                         \
    typedef float F __attribute__((vector_size(4 * LANES)));      \
    typedef int32_t I __attribute__((vector_size(4 * LANES)));    \
    typedef uint32_t U __attribute__((vector_size(4 * LANES)));   \
    typedef int16_t S __attribute__((vector_size(2 * LANES)));    \
    typedef uint8_t B __attribute__((vector_size(LANES)));        \
  };
FASTZS_VECTORS(4)
FASTZS_VECTORS(8)
FASTZS_VECTORS(16)
#undef FASTZS_VECTORS

// Vectors of the columns of a product's tile, which has 6 rows: with 32 registers (AVX-512, NEON), else 16, all of its
// sums stay in registers.
#if defined(__aarch64__)
template <int LANES>
constexpr int VECTORS = 4;
#else
template <int LANES>
constexpr int VECTORS = LANES == 16 ? 4 : 2;
#endif

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
  // bf16 is the upper half of fp32.
  static FASTZS_INLINE F load(const torch::headeronly::BFloat16* p) {
    S v;
    __builtin_memcpy(&v, p, sizeof v);
    return (F)(__builtin_convertvector(v, I) << 16);
  }
  static FASTZS_INLINE F load(const torch::headeronly::Half* p) {
    S v;
    __builtin_memcpy(&v, p, sizeof v);
    const I bits = __builtin_convertvector(v, I), size = (bits & 0x7fff) << 13;
    const F value = (F)size * 0x1p112f;  // moves the exponent's bias, and makes subnormal numbers right
    const I infinite = size >= 0x0f800000;
    return (F)((infinite ? (size | 0x7f800000) : (I)value) | ((bits & 0x8000) << 16));
  }
  // To 16 bits: rounded to nearest, ties to even.
  static FASTZS_INLINE I round_bf16(F x) {
    const I bits = (I)x, upper = (bits >> 16) & 0xffff;
    const I rounded = ((bits + 0x7fff + (upper & 1)) >> 16) & 0xffff;
    return x == x ? rounded : (upper | 0x40);
  }
  static FASTZS_INLINE void store(torch::headeronly::BFloat16* p, F x) {
    const S v = __builtin_convertvector(round_bf16(x), S);
    __builtin_memcpy(p, &v, sizeof v);
  }
  static FASTZS_INLINE void store(torch::headeronly::Half* p, F x) {
    const I bits = (I)x, size = bits & 0x7fffffff;
    const I normal = (size - 0x37fff001 + ((size >> 13) & 1)) >> 13;   // bias 127 becomes 15
    const I small = (I)((F)size + 0.5f) - 0x3f000000;                  // the sum's last bit is 2^-24
    I v = size < 0x38800000 ? small : normal;
    v = size > 0x477fffff ? I{} + 0x7c00 : v;
    v = size > 0x7f800000 ? I{} + 0x7e00 : v;
    const S half = __builtin_convertvector(v | ((bits >> 16) & 0x8000), S);
    __builtin_memcpy(p, &half, sizeof half);
  }
  // The first `count` values, at most LANES, rounded to integers in [-127, 127] and moved up by 128.
  static FASTZS_INLINE void store_bytes(uint8_t* p, F x, int64_t count) {
    const I bits = (I)(x + 12582912.0f) + 128;  // 1.5 * 2^23: adding it leaves the integer in the low bits
    const auto bytes = __builtin_convertvector(bits & 255, typename Vectors<LANES>::B);
    __builtin_memcpy(p, &bytes, count < LANES ? count : LANES);
  }
  // `count` values, `step` apart, at most LANES; zeros behind them.
  template <class T>
  static FASTZS_INLINE F load(const T* p, int64_t step, int64_t count) {
    if (step == 1 && count >= LANES) return load(p);
    alignas(T) char values[LANES * sizeof(T)] = {};
    for (int64_t k = 0; k < (count < LANES ? count : LANES); ++k) {
      __builtin_memcpy(values + k * sizeof(T), static_cast<const void*>(p + k * step), sizeof(T));
    }
    return load(reinterpret_cast<const T*>(values));
  }
  // The first `count` values.
  template <class T>
  static FASTZS_INLINE void store(T* p, F v, int64_t count) {
    if (count >= LANES) return store(p, v);
    alignas(T) char values[LANES * sizeof(T)];
    store(reinterpret_cast<T*>(values), v);
    __builtin_memcpy(static_cast<void*>(p), values, count * sizeof(T));
  }
  static FASTZS_INLINE F splat(float x) { return x - F{}; }
  // A number in all lanes, by the one instruction for it. Left to itself, GCC 12 broadcasts from a register: on x86 on a
  // port that the products need, on Arm after loading so many at once that sums leave their registers.
  static FASTZS_INLINE F broadcast(const float* p) {
#if FASTZS_X86_ASM
    if constexpr (LANES > 4) {
      F v;
      asm("vbroadcastss %1, %0" : "=v"(v) : "m"(*p));
      return v;
    }
#elif defined(__aarch64__)
    F v;
    asm("ld1r {%0.4s}, %1" : "=w"(v) : "Q"(*p));
    return v;
#endif
    return splat(*p);
  }
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

  static FASTZS_INLINE float max(F v) {
    if constexpr (LANES == 4) {
      const float a = v[0] > v[2] ? v[0] : v[2], b = v[1] > v[3] ? v[1] : v[3];
      return a > b ? a : b;
    } else {
      typedef typename Simd<LANES / 2>::F Half;
      Half low, high;
      __builtin_memcpy(&low, &v, sizeof low);
      __builtin_memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
      return Simd<LANES / 2>::max(low > high ? low : high);
    }
  }

  // e^x for x <= 0, relative error 1e-7 down to -10 and 4e-7 below, and at least e^-86. With n = round(x / ln 2),
  // e^x = 2^n e^(x - n ln 2).
  static FASTZS_INLINE F exp_negative(F x) {
    const float to_integer = 12582912.0f;  // 1.5 * 2^23: adding it leaves the integer in the low bits
    x = x < -86.0f ? splat(-86.0f) : x;
    F shifted = x * LOG2_E + to_integer;
    const F n = shifted - to_integer;
    // Of 4 lanes there is no fused multiply-add everywhere: the first product is exact, the second small.
    const F r = LANES > 4 ? x - n * 0.693147181f : (x - n * 0.693359375f) + n * 2.12194440e-4f;
    F p = r * 0.00138368458f + 0.00837481581f;
    p = p * r + 0.0416682251f;
    p = p * r + 0.166664198f;
    p = p * r + 0.499999911f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return (F)((I)p + ((I)shifted << 23));
  }

  // 2^x, relative error 2e-7, or with ROUGH, for results that are rounded to bf16, 8e-5. What is below 2^-126 is that,
  // or with exp2_rough less; what is above 2^127 is that, or with exp2_rough more.
  template <bool ROUGH>
  static FASTZS_INLINE F exp2(F x) {
#if FASTZS_X86_ASM
    if constexpr (ROUGH && LANES == 16) return exp2_rough(x);
#endif
    const float to_integer = 12582912.0f;  // as above
    x = x < -126.0f ? splat(-126.0f) : x;
    x = x > 127.0f ? splat(127.0f) : x;
    const F shifted = x + to_integer, r = x - (shifted - to_integer);
    F p;
    if constexpr (ROUGH) {
      p = r * 0.0551716685f + 0.24261114f;
      p = p * r + 0.693260968f;
      p = p * r + 0.999928057f;
    } else {
      p = r * 0.00132764713f + 0.00967554189f;
      p = p * r + 0.0555071309f;
      p = p * r + 0.240221202f;
      p = p * r + 0.693146944f;
      p = p * r + 1.00000012f;
    }
    return (F)((I)p + ((I)shifted << 23));
  }

#if FASTZS_X86_ASM
  // 2^x for any x, relative error 8e-5, of 16 lanes: 0 and infinity where floats end.
  static FASTZS_INLINE F exp2_rough(F x) {
    F r, y;
    asm("vreduceps $1, %1, %0" : "=v"(r) : "v"(x));  // x - floor(x)
    F p = r * 0.0780245219f + 0.226067182f;
    p = p * r + 0.69583349f;
    p = p * r + 0.999925214f;
    asm("vscalefps %2, %1, %0" : "=v"(y) : "v"(p), "v"(x));  // p 2^floor(x)
    return y;
  }
#endif

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

// A square of numbers of 32 bits, a vector a row, is turned: corners of SIZE, 2 SIZE, ... rows change places.
template <int LANES, int SIZE = 1>
FASTZS_INLINE void transpose(typename Simd<LANES>::I (&rows)[LANES]) {
#if defined(__clang__)  // has no shuffle by a vector
  for (int r = 0; r < LANES; ++r)
    for (int k = 0; k < r; ++k) {
      const int32_t corner = rows[r][k];
      rows[r][k] = rows[k][r];
      rows[k][r] = corner;
    }
#else
  using I = typename Simd<LANES>::I;
  I lane, low, high;  // which lanes of two rows, the second's follow the first's
  for (int k = 0; k < LANES; ++k) lane[k] = k;
  low = lane & SIZE ? lane + (LANES - SIZE) : lane;
  high = lane & SIZE ? lane + LANES : lane + SIZE;
#pragma GCC unroll 8
  for (int n = 0; n < LANES / 2; ++n) {
    const int r = n / SIZE * 2 * SIZE + n % SIZE;
    const I first = rows[r], second = rows[r + SIZE];
    rows[r] = __builtin_shuffle(first, second, low);
    rows[r + SIZE] = __builtin_shuffle(first, second, high);
  }
  if constexpr (2 * SIZE < LANES) transpose<LANES, 2 * SIZE>(rows);
#endif
}

#if FASTZS_X86_ASM
// 16 floats rounded to bf16 by the instruction for it, where the caller's target has AVX512-BF16.
FASTZS_INLINE void store_pairs(torch::headeronly::BFloat16* p, Simd<16>::F x) {
  Simd<16>::S v;
  asm("vcvtneps2bf16 %1, %0" : "=v"(v) : "v"(x));
  __builtin_memcpy(p, &v, sizeof v);
}
// And two vectors as pairs, those of the first in the lower halves.
FASTZS_INLINE void store_pairs(int32_t* p, Simd<16>::F low, Simd<16>::F high) {
  typedef int16_t Words __attribute__((vector_size(64)));
  Words v;
  asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(v) : "v"(high), "v"(low));
  const Words order = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const Words pairs = __builtin_shuffle(v, order);
  __builtin_memcpy(p, &pairs, sizeof pairs);
}
#endif

}  // namespace fastzs
