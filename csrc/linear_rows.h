// Linear layers on the CPU: what happens to a row of floats around a product.
#pragma once

#include "linear_tiles.h"

namespace fastzs::linear {

enum Activation : int64_t { NONE, RELU, QUICK_GELU, GELU, GELU_TANH };

struct Norm {
  const float *weight, *bias;  // [channels]; null for none
  float eps;
};

// ROUNDS: with the instruction that rounds to bf16, which the caller's target must have.
template <int LANES, bool ROUNDS, typename T>
FASTZS_INLINE void put(T* p, typename Simd<LANES>::F x) {
#if FASTZS_X86_ASM
  if constexpr (ROUNDS && LANES == 16 && sizeof(T) == 2) return store_pairs(p, x);
#endif
  Simd<LANES>::store(p, x);
}

template <int LANES, bool ROUNDS, typename T>
FASTZS_INLINE void put(T* p, typename Simd<LANES>::F x, int64_t count) {
  if (count >= LANES) return put<LANES, ROUNDS>(p, x);
  Simd<LANES>::store(p, x, count);
}

template <int LANES>
constexpr int PANEL_VECTORS = PANEL / LANES;

// A row's numbers of a panel, of which the first `columns` are in memory, with one question for all of them.
template <int LANES, bool ROUNDS, typename T>
FASTZS_INLINE void put_panel(T* p, const typename Simd<LANES>::F (&y)[PANEL_VECTORS<LANES>], int columns) {
  if (columns == PANEL) {
#pragma GCC unroll 4
    for (int v = 0; v < PANEL_VECTORS<LANES>; ++v) put<LANES, ROUNDS>(p + v * LANES, y[v]);
  } else {
    for (int v = 0; v * LANES < columns; ++v) put<LANES, ROUNDS>(p + v * LANES, y[v], columns - v * LANES);
  }
}

template <int LANES, typename T>
FASTZS_INLINE void get_panel(const T* p, typename Simd<LANES>::F (&y)[PANEL_VECTORS<LANES>], int columns) {
  using V = Simd<LANES>;
  if (columns == PANEL) {
#pragma GCC unroll 4
    for (int v = 0; v < PANEL_VECTORS<LANES>; ++v) y[v] = V::load(p + v * LANES);
  } else {
    for (int v = 0; v < PANEL_VECTORS<LANES>; ++v) y[v] = V::load(p + v * LANES, 1, columns - v * LANES);
  }
}

// ROUGH, here and below: for results that are rounded to bf16 or bytes, relative error 1e-4. x: not infinite unless ROUGH.
template <int LANES, bool ROUGH>
FASTZS_INLINE typename Simd<LANES>::F inverse(typename Simd<LANES>::F x) {
#if FASTZS_X86_ASM
  if constexpr (LANES == 16) {  // a division takes as long as a dozen products
    typename Simd<LANES>::F y;
    asm("vrcp14ps %1, %0" : "=v"(y) : "v"(x));
    return ROUGH ? y : y + y * (1.0f - x * y);
  }
#endif
  return 1.0f / x;
}

// e^x for x <= 0.
template <int LANES, bool ROUGH>
FASTZS_INLINE typename Simd<LANES>::F exponential(typename Simd<LANES>::F x) {
  if constexpr (ROUGH) return Simd<LANES>::template exp2<true>(x * LOG2_E);
  return Simd<LANES>::exp_negative(x);
}

template <int LANES, bool ROUGH>
FASTZS_INLINE typename Simd<LANES>::F sigmoid(typename Simd<LANES>::F z) {
  using F = typename Simd<LANES>::F;
#if FASTZS_X86_ASM
  if constexpr (ROUGH && LANES == 16) return inverse<LANES, true>(Simd<LANES>::exp2_rough(z * -LOG2_E) + 1.0f);
#endif
  const F e = exponential<LANES, ROUGH>(z < 0.0f ? z : -z);
  return (z < 0.0f ? e : F{} + 1.0f) * inverse<LANES, ROUGH>(e + 1.0f);
}

// The normal distribution at x: erf by Abramowitz and Stegun 7.1.26, within 1.5e-7. bell: e^(-x^2 / 2).
template <int LANES, bool ROUGH>
FASTZS_INLINE typename Simd<LANES>::F normal(typename Simd<LANES>::F x, typename Simd<LANES>::F& bell) {
  using F = typename Simd<LANES>::F;
  const F z = x * 0.707106781f, far = F{} + 1e18f, any = z < 0.0f ? -z : z, size = any > far ? far : any;  // NaN stays
  const F t = inverse<LANES, ROUGH>(size * 0.3275911f + 1.0f);
  F p = t * 1.061405429f + -1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t + -0.284496736f;
  p = (p * t + 0.254829592f) * t;
  bell = exponential<LANES, ROUGH>(-size * size);
  const F tail = p * bell;  // 1 - erf(size)
  return 0.5f * (z < 0.0f ? tail : 2.0f - tail);
}

// x times the normal distribution there.
template <int LANES, bool ROUGH>
FASTZS_INLINE typename Simd<LANES>::F gelu(typename Simd<LANES>::F x) {
  using F = typename Simd<LANES>::F;
  if constexpr (!ROUGH) {
    F bell;
    return x * normal<LANES, false>(x, bell);
  }
  // 7.1.28 there, within 3e-7 and rounding: the tail is the sixteenth power of a polynomial's inverse, and needs no
  // exponential.
  const F size = x < 0.0f ? -x : x;
  F t = size * 5.382975e-06f + 4.88906356e-05f;
  t = t * size + 3.8003575e-05f;
  t = t * size + 0.00327762632f;
  t = t * size + 0.0211410062f;
  t = t * size + 0.049867347f;
  t = t * size + 1.0f;
  t *= t, t *= t, t *= t, t *= t;
  return (x < 0.0f ? F{} : x) - size * 0.5f * inverse<LANES, true>(t);  // NaN stays
}

// f(activation) for an activation that the compiler then knows.
template <typename F>
FASTZS_INLINE void with_activation(int64_t activation, const F& f) {
  switch (activation) {
    case RELU: return f(RELU);
    case QUICK_GELU: return f(QUICK_GELU);
    case GELU: return f(GELU);
    case GELU_TANH: return f(GELU_TANH);
    default: return f(NONE);
  }
}

template <int LANES, bool ROUGH>
FASTZS_INLINE typename Simd<LANES>::F activate(typename Simd<LANES>::F x, int64_t activation) {
  using F = typename Simd<LANES>::F;
  if (activation == RELU) return x < 0.0f ? F{} : x;  // NaN stays
  if (activation == QUICK_GELU) return x * sigmoid<LANES, ROUGH>(x * 1.702f);
  if (activation == GELU_TANH)  // 0.5 (1 + tanh(z / 2)) is sigmoid(z)
    return x * sigmoid<LANES, ROUGH>(x * (x * x * 0.0713548162f + 1.59576912f));
  if (activation == GELU) return gelu<LANES, ROUGH>(x);
  return x;
}

template <int LANES, bool ROUGH>
FASTZS_INLINE void activate_panel(typename Simd<LANES>::F (&y)[PANEL_VECTORS<LANES>], int64_t activation) {
  with_activation(activation, [&](Activation known) FASTZS_INLINE_LAMBDA {
#pragma GCC unroll 4
    for (int v = 0; v < PANEL_VECTORS<LANES>; ++v) y[v] = activate<LANES, ROUGH>(y[v], known);
  });
}

// The derivative of an activation.
template <int LANES, bool ROUGH>
FASTZS_INLINE typename Simd<LANES>::F slope(typename Simd<LANES>::F x, int64_t activation) {
  using F = typename Simd<LANES>::F;
  const F one = F{} + 1.0f;
  if (activation == RELU) return x > 0.0f ? one : F{};
  if (activation == QUICK_GELU) {
    const F s = sigmoid<LANES, ROUGH>(x * 1.702f);
    return s * (x * 1.702f * (one - s) + 1.0f);
  }
  if (activation == GELU_TANH) {
    const F s = sigmoid<LANES, ROUGH>(x * (x * x * 0.0713548162f + 1.59576912f));
    return s * (x * (x * x * 0.2140644486f + 1.59576912f) * (one - s) + 1.0f);
  }
  if (activation == GELU) {
    F bell;
    const F share = normal<LANES, ROUGH>(x, bell);
    return share + x * bell * 0.398942280f;
  }
  return one;
}

// The mean of a row [n] and one over its deviation; what it has beyond n up to whole vectors may be anything.
template <int LANES>
FASTZS_INLINE void moments(const float* row, int64_t n, float eps, float& mean, float& scale) {
  using V = Simd<LANES>;
  auto total = V::splat(0.0f), squares = total;
  for (int64_t k = 0; k < n; k += LANES) total += V::load(row + k, 1, n - k);
  mean = V::sum(total) / n;
  for (int64_t k = 0; k < n; k += LANES) {
    auto x = V::load(row + k, 1, n - k) - mean;
    if (n - k < LANES) x = (typename V::F)((typename V::I)x & V::first(static_cast<int>(n - k)));
    squares += x * x;
  }
  scale = 1.0f / __builtin_sqrtf(V::sum(squares) / n + eps);
}

// A row [n] is replaced by its layer norm.
template <int LANES>
FASTZS_INLINE void normalise(float* row, int64_t n, const Norm& norm) {
  using V = Simd<LANES>;
  float mean, scale;
  moments<LANES>(row, n, norm.eps, mean, scale);
  for (int64_t k = 0; k < n; k += LANES) {
    const int64_t left = n - k;
    const auto x = (V::load(row + k, 1, left) - mean) * scale;
    V::store(row + k, x * V::load(norm.weight + k, 1, left) + V::load(norm.bias + k, 1, left), left);
  }
}

// The gradient [n] of what a layer norm gave is replaced by that of the row [n] that it was given.
template <int LANES>
FASTZS_INLINE void normalise_backward(float* grad, const float* row, int64_t n, const Norm& norm) {
  using V = Simd<LANES>;
  float mean, scale;
  moments<LANES>(row, n, norm.eps, mean, scale);
  auto sum = V::splat(0.0f), along = sum;  // of the gradient times the gain, and that along the normalised row
  for (int64_t k = 0; k < n; k += LANES) {
    const int64_t left = n - k;
    const auto g = V::load(grad + k, 1, left) * V::load(norm.weight + k, 1, left);
    sum += g;
    along += g * ((V::load(row + k, 1, left) - mean) * scale);
  }
  const float shift = V::sum(sum) / n, tilt = V::sum(along) / n;
  for (int64_t k = 0; k < n; k += LANES) {
    const int64_t left = n - k;
    const auto g = V::load(grad + k, 1, left) * V::load(norm.weight + k, 1, left);
    const auto x = (V::load(row + k, 1, left) - mean) * scale;
    V::store(grad + k, (g - shift - x * tilt) * scale, left);
  }
}

// A row of floats [n] as units, filled up with zeros to a whole one. Returns the scale of a byte, NaN if a number is
// not finite.
template <int LANES, Kind KIND, bool ROUNDS, typename Unit>
FASTZS_INLINE float to_units(const float* row, int64_t n, Unit* out) {
  using V = Simd<LANES>;
  if constexpr (KIND == Kind::floats) {
    __builtin_memcpy(out, row, n * sizeof(float));
    return 1.0f;
  } else if constexpr (KIND == Kind::pairs) {
    auto* to = reinterpret_cast<torch::headeronly::BFloat16*>(out);
    out[(n - 1) / 2] = 0;
    for (int64_t k = 0; k < n; k += LANES) put<LANES, ROUNDS>(to + k, V::load(row + k, 1, n - k), n - k);
    return 1.0f;
  } else {
    auto top = V::splat(0.0f), strange = top;
    for (int64_t k = 0; k < n; k += LANES) {
      const auto x = V::load(row + k, 1, n - k), size = x < 0.0f ? -x : x;
      top = size > top ? size : top;
      strange += x * 0.0f;
    }
    const float largest = V::max(top), factor = largest > 0 ? 127.0f / largest : 0.0f;
    auto* to = reinterpret_cast<uint8_t*>(out);
    out[(n - 1) / 4] = static_cast<Unit>(0x80808080);
    for (int64_t k = 0; k < n; k += LANES) V::store_bytes(to + k, V::load(row + k, 1, n - k) * factor, n - k);
    return largest / 127.0f + V::sum(strange);
  }
}

}  // namespace fastzs::linear
