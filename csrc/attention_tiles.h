// Attention on the CPU: what forward and backward share. Operands, their packing, and the matrix products.
#pragma once

#include <cstdint>

#include "cpu.h"
#include "memory.h"
#include "simd.h"

namespace fastzs::attention {

constexpr int MAX_D = 128;
constexpr int AHEAD = 16;  // tokens that are fetched before they are packed
constexpr int STRIDE = MAX_D + 16;  // of buffers with a token per row: not a power of two, whose lines would collide

// Keys and values of one kind, [B, H, tokens, d] with any strides; a batch stride of 0 serves one for all pictures.
template <typename T>
struct Operand {
  const T* data;
  int64_t batch, head, token, channel;  // strides

  FASTZS_INLINE const T* row(int64_t b, int64_t h, int64_t n) const { return data + b * batch + h * head + n * token; }
  // Fetches a token's d numbers, which are read soon: tokens of a head lie too far apart for the processor to guess.
  FASTZS_INLINE void fetch(int64_t b, int64_t h, int64_t n, int d) const {
    const char* p = reinterpret_cast<const char*>(row(b, h, n));
    for (size_t i = 0; i < d * sizeof(T); i += 64) __builtin_prefetch(p + i);
  }
};

// Prefix and patches are the shared tokens. Region (i, j) has the patches [i ch, (i + 1) ch) x [j cw, (j + 1) cw).
struct Layout {
  int64_t prefix, h, w, rh, rw;  // rh = rw = 0 without a bridge

  int64_t patches() const { return h * w; }
  int64_t shared() const { return prefix + h * w; }
  int64_t regions() const { return rh * rw; }
  int64_t length() const { return shared() + regions(); }
  int64_t cell() const { return rh == 0 ? 0 : (h / rh) * (w / rw); }  // patches of a region
  // Region of a shared token, -1 where it has none.
  FASTZS_INLINE int64_t region(int64_t token) const {
    if (rh == 0 || token < prefix) return -1;
    const int64_t i = (token - prefix) / w / (h / rh), j = (token - prefix) % w / (w / rw);
    return i < rh && j < rw ? i * rw + j : -1;
  }
  // The n-th patch of region r, as a token.
  FASTZS_INLINE int64_t patch(int64_t r, int64_t n) const {
    const int64_t rows = h / rh, columns = w / rw;
    return prefix + (r / rw * rows + n / columns) * w + r % rw * columns + n % columns;
  }
};

// A product multiplies fp32 numbers, or pairs of bf16 numbers that one instruction multiplies and adds up in fp32.
template <bool PAIRS>
struct Unit {
  using Type = float;
};
template <>
struct Unit<true> {
  using Type = int32_t;
};

constexpr int ROWS = 6;  // of a tile

template <int LANES, bool PAIRS>
struct Dot {
  using F = typename Simd<LANES>::F;
  static FASTZS_INLINE F load(const float* p) { return Simd<LANES>::load(p); }
  static FASTZS_INLINE F splat(const float* p) {
    return Simd<LANES>::broadcast(p);
  }
  static FASTZS_INLINE void add(F& sum, F a, F b) { sum += a * b; }
};
#if FASTZS_X86_ASM
template <>
struct Dot<16, true> {
  using F = Simd<16>::F;
  using I = Simd<16>::I;
  static FASTZS_INLINE I load(const int32_t* p) {
    I v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static FASTZS_INLINE I splat(const int32_t* p) {
    I v;
    asm("vpbroadcastd %1, %0" : "=v"(v) : "m"(*p));
    return v;
  }
  static FASTZS_INLINE void add(F& sum, I a, I b) { asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }
};
#endif

// sum[r, n] = sum_k a[r * A_ROW + k * A_DEPTH] b[k * ldb + n] for ROWS rows and NV vectors of n, in registers, where
// done(sum) takes them.
template <int LANES, bool PAIRS, int NV, int A_ROW, int A_DEPTH, typename Done>
FASTZS_INLINE void product(
    const typename Unit<PAIRS>::Type* a, const typename Unit<PAIRS>::Type* b, int64_t ldb, int64_t depth,
    const Done& done) {
  using D = Dot<LANES, PAIRS>;
  typename Simd<LANES>::F sum[ROWS][NV] = {};
  for (int64_t k = 0; k < depth; ++k) {
    decltype(D::load(b)) right[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) right[v] = D::load(b + k * ldb + v * LANES);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
      const auto left = D::splat(a + r * A_ROW + k * A_DEPTH);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) D::add(sum[r][v], left, right[v]);
    }
  }
  done(sum);
}

// product with the first `vectors` vectors of n, 1 to NV of them.
template <int LANES, bool PAIRS, int A_ROW, int A_DEPTH, int NV = VECTORS<LANES>, typename Done>
FASTZS_INLINE void product_of(
    int64_t vectors, const typename Unit<PAIRS>::Type* a, const typename Unit<PAIRS>::Type* b, int64_t ldb,
    int64_t depth, const Done& done) {
  if (vectors == NV) {
    product<LANES, PAIRS, NV, A_ROW, A_DEPTH>(a, b, ldb, depth, done);
  } else if constexpr (NV > 1) {
    product_of<LANES, PAIRS, A_ROW, A_DEPTH, NV - 1>(vectors, a, b, ldb, depth, done);
  }
}

// f(r, v) for each vector of a product's sums, which thereby stay in registers.
template <int NV, typename F>
FASTZS_INLINE void each(const F& f) {
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) f(r, v);
}

template <int LANES, typename Sums>
constexpr int VECTORS_OF = sizeof(Sums) / (ROWS * LANES * sizeof(float));

// c[r, n] += a product, for the first `vectors` vectors of n.
template <int LANES, bool PAIRS, int A_ROW, int A_DEPTH>
FASTZS_INLINE void add_product(
    int64_t vectors, const typename Unit<PAIRS>::Type* a, const typename Unit<PAIRS>::Type* b, int64_t ldb,
    int64_t depth, float* c, int64_t ldc) {
  using V = Simd<LANES>;
  product_of<LANES, PAIRS, A_ROW, A_DEPTH>(vectors, a, b, ldb, depth, [&](const auto& sum) FASTZS_INLINE_LAMBDA {
    each<VECTORS_OF<LANES, decltype(sum)>>([&](int r, int v) FASTZS_INLINE_LAMBDA {
      float* to = c + r * ldc + v * LANES;
      V::store(to, V::load(to) + sum[r][v]);
    });
  });
}

// `count` rows, a multiple of ROWS, times n keys, a multiple of LANES, of pack_transposed: done(r, k, sums) takes the
// products of the rows from r and the keys from k.
template <int LANES, bool PAIRS, typename Done>
FASTZS_INLINE void score(
    const typename Unit<PAIRS>::Type* rows, int64_t count, const typename Unit<PAIRS>::Type* keys, int64_t n,
    int64_t depth, const Done& done) {
  constexpr int WIDE = VECTORS<LANES> * LANES;
  for (int64_t k = 0; k < n; k += WIDE) {
    const int64_t width = n - k < WIDE ? n - k : WIDE;
    for (int64_t r = 0; r < count; r += ROWS)
      product_of<LANES, PAIRS, STRIDE, 1>(
          width / LANES, rows + r * STRIDE, keys + k * depth, WIDE, depth,
          [&](auto& sum) FASTZS_INLINE_LAMBDA { done(r, k, sum); });
  }
}

// A matrix [depth, columns] in panels: VECTORS vectors of columns at a time, and in the last what is left.
// c[rows, columns] += the product with all panels, `rows` a multiple of ROWS. panel_rows: rows of a whole panel.
template <int LANES, bool PAIRS, int A_ROW, int A_DEPTH>
FASTZS_INLINE void multiply_panels(
    const typename Unit<PAIRS>::Type* a, int64_t rows, const typename Unit<PAIRS>::Type* panels, int64_t panel_rows,
    int64_t first, int64_t depth, int columns, float* c, int64_t ldc) {
  constexpr int WIDE = VECTORS<LANES> * LANES;
  for (int n = 0; n < columns; n += WIDE) {
    const int width = columns - n < WIDE ? columns - n : WIDE;
    const auto* panel = panels + n * panel_rows + first * width;
    for (int64_t r = 0; r < rows; r += ROWS)
      add_product<LANES, PAIRS, A_ROW, A_DEPTH>(
          width / LANES, a + r * A_ROW, panel, width, depth, c + r * ldc + n, ldc);
  }
}

// c[r, columns] += the tile's product with a matrix [depth, columns] that has a row per STRIDE.
template <int LANES, bool PAIRS, int A_ROW, int A_DEPTH>
FASTZS_INLINE void multiply_rows(
    const typename Unit<PAIRS>::Type* a, const typename Unit<PAIRS>::Type* rows, int64_t depth, int columns, float* c,
    int64_t ldc) {
  constexpr int WIDE = VECTORS<LANES> * LANES;
  for (int n = 0; n < columns; n += WIDE) {
    const int width = columns - n < WIDE ? columns - n : WIDE;
    add_product<LANES, PAIRS, A_ROW, A_DEPTH>(width / LANES, a, rows + n, STRIDE, depth, c + n, ldc);
  }
}

// A token's d numbers as floats; out is filled up with zeros to whole vectors.
template <int LANES, typename T>
FASTZS_INLINE void read(const T* p, int64_t stride, int d, float* out) {
  using V = Simd<LANES>;
  int i = 0;
  if (stride == 1)
    for (; i + LANES <= d; i += LANES) V::store(out + i, V::load(p + i));
  if (i == d) return;
  T rest[MAX_D];
  __builtin_memset(static_cast<void*>(rest), 0, sizeof rest);
  for (int k = i; k < d; ++k) rest[k] = p[k * stride];
  for (; i < d; i += LANES) V::store(out + i, V::load(rest + i));
}

// Rounds to T, after a product with factor. What row has beyond d up to whole vectors may be anything.
template <int LANES, typename T>
FASTZS_INLINE void write(const float* row, float factor, int d, T* out) {
  using V = Simd<LANES>;
  int i = 0;
  for (; i + LANES <= d; i += LANES) V::store(out + i, V::load(row + i) * factor);
  if (i == d) return;
  T rest[LANES];
  V::store(rest, V::load(row + i) * factor);
  for (int k = i; k < d; ++k) out[k] = rest[k - i];
}

// A token's numbers as the units of a product's depth, d or d / 2 of them.
template <int LANES, bool PAIRS, typename T>
FASTZS_INLINE void read_units(const T* p, int64_t stride, int d, typename Unit<PAIRS>::Type* out) {
  if constexpr (PAIRS) {
    if (stride == 1) {
      for (int i = 0; i < d; i += 8)  // d is a multiple of 8; a copy of any length would be a call
        __builtin_memcpy(out + i / 2, static_cast<const void*>(p + i), 8 * sizeof(T));
    } else {
      for (int i = 0; i < d; ++i)
        __builtin_memcpy(reinterpret_cast<char*>(out) + i * sizeof(T), static_cast<const void*>(p + i * stride), sizeof(T));
    }
  } else {
    read<LANES>(p, stride, d, out);
  }
}

// Two rows of d bf16 numbers as pairs, filled up with zeros to whole vectors.
template <int LANES>
FASTZS_INLINE void pair_units(const int32_t* low, const int32_t* high, int d, int32_t* out) {
  using V = Simd<LANES>;
  using S = typename V::S;
  for (int i = 0; i < d; i += LANES) {
    S first = {}, second = {};
    const bool whole = d - i >= LANES;  // so that the common case has no loop
    __builtin_memcpy(&first, low + i / 2, whole ? sizeof first : (d - i) * sizeof first[0]);
    __builtin_memcpy(&second, high + i / 2, whole ? sizeof second : (d - i) * sizeof second[0]);
    const auto pair = (__builtin_convertvector(first, typename V::I) & 0xffff) |
        (__builtin_convertvector(second, typename V::I) << 16);
    __builtin_memcpy(out + i, &pair, sizeof pair);
  }
}

// The keys that the shared tokens see, prompts first, of one picture and head.
template <typename T>
struct Tokens {
  Operand<T> prompts, tokens;
  int64_t b, h, prompt_count, count;  // count: with the prompts

  FASTZS_INLINE const T* row(int64_t n) const {
    return n < prompt_count ? prompts.row(b, h, n) : tokens.row(b, h, n - prompt_count);
  }
  FASTZS_INLINE int64_t stride(int64_t n) const { return n < prompt_count ? prompts.channel : tokens.channel; }
  FASTZS_INLINE void fetch(int64_t n, int d) const {
    if (n >= count) return;
    n < prompt_count ? prompts.fetch(b, h, n, d) : tokens.fetch(b, h, n - prompt_count, d);
  }
};

// Tokens transposed, for products over d: panels of VECTORS vectors of tokens, [panel][depth][tokens]. Tokens are
// filled up to whole panels with zeros. Only tokens [from, to) are packed, where they lie among all; `from` is a
// multiple of a panel.
template <int LANES, bool PAIRS, typename T>
FASTZS_INLINE void pack_transposed(
    const Tokens<T>& tokens, int d, int64_t from, int64_t to, typename Unit<PAIRS>::Type* out) {
  using U = typename Unit<PAIRS>::Type;
  using I = typename Simd<LANES>::I;
  constexpr int WIDE = VECTORS<LANES> * LANES;
  const int depth = PAIRS ? d / 2 : d;
  U rows[LANES][MAX_D];
  out += from * depth;
  for (int64_t first = from; first < to; first += LANES) {
    for (int lane = 0; lane < LANES; ++lane) {
      const int64_t n = first + lane;
      tokens.fetch(n + AHEAD, d);
      if (n < tokens.count) {
        read_units<LANES, PAIRS>(tokens.row(n), tokens.stride(n), d, rows[lane]);
      } else {
        __builtin_memset(rows[lane], 0, depth * sizeof(U));
      }
    }
    U* panel = out + (first - from) / WIDE * WIDE * depth + (first - from) % WIDE;
    for (int k = 0; k < depth; k += LANES) {
      I units[LANES];
#pragma GCC unroll 16
      for (int lane = 0; lane < LANES; ++lane) __builtin_memcpy(&units[lane], &rows[lane][k], sizeof units[lane]);
      transpose<LANES>(units);
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i)
        if (k + i < depth) __builtin_memcpy(panel + (k + i) * WIDE, &units[i], sizeof units[i]);
    }
  }
}

// Tokens as they are, for products over tokens: panels of VECTORS vectors of channels (see multiply_panels) and of
// `rows` rows of tokens or of pairs of tokens. Only rows [from, to) are packed, zeros where there are no tokens.
template <int LANES, bool PAIRS, typename T>
FASTZS_INLINE void pack_rows(
    const Tokens<T>& tokens, int d, int64_t rows, int64_t from, int64_t to, typename Unit<PAIRS>::Type* out) {
  using V = Simd<LANES>;
  using I = typename V::I;
  constexpr int WIDE = VECTORS<LANES> * LANES, STEP = PAIRS ? 2 : 1;
  const int columns = static_cast<int>(round_up(d, LANES));
  for (int64_t i = from; i < to; ++i) {
    for (int s = 0; s < STEP; ++s) tokens.fetch(i * STEP + s + AHEAD, d);
    for (int c = 0; c < columns; c += LANES) {
      I bits[STEP] = {};  // of floats, whose lower halves are 0 where they were bf16
      for (int s = 0; s < STEP; ++s) {
        const int64_t n = i * STEP + s;
        if (n < tokens.count) bits[s] = (I)V::load(tokens.row(n) + c * tokens.stride(n), tokens.stride(n), d - c);
      }
      if constexpr (PAIRS) bits[0] = ((bits[0] >> 16) & 0xffff) | bits[1];
      const int panel = c / WIDE * WIDE, width = columns - panel < WIDE ? columns - panel : WIDE;
      __builtin_memcpy(out + panel * rows + i * width + c - panel, &bits[0], sizeof bits[0]);
    }
  }
}

template <int LANES>
FASTZS_INLINE float dot(const float* a, const float* b, int columns) {
  using V = Simd<LANES>;
  auto sum = V::splat(0.0f);
  for (int i = 0; i < columns; i += LANES) sum += V::load(a + i) * V::load(b + i);
  return V::sum(sum);
}

// a += factor * b
template <int LANES>
FASTZS_INLINE void add_row(float* a, float factor, const float* b, int columns) {
  using V = Simd<LANES>;
  for (int i = 0; i < columns; i += LANES) V::store(a + i, V::load(a + i) + V::load(b + i) * factor);
}

template <int LANES>
FASTZS_INLINE void scale_row(float* a, float factor, int columns) {
  using V = Simd<LANES>;
  for (int i = 0; i < columns; i += LANES) V::store(a + i, V::load(a + i) * factor);
}

}  // namespace fastzs::attention
