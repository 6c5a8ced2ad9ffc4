// bridged_attention and dropout_attention on the CPU, forward and backward, and dense_attention, forward.
//
// Forward, a thread packs the keys and values of a head once and then takes a block of query rows at a time: their
// scores against a block of keys stay in the nearest caches, become weights there, and are multiplied with the values.
// What a patch sees besides, its region's bridge token, is where its running softmax starts. The bridge rows, of a few
// keys each, are computed directly. Rows are computed alike whichever thread does, so results repeat to the bit.
//
// Backward, a thread owns a head. It computes weights anew from the saved log-sum-exps, in blocks of rows and keys
// that stay in the second cache, in a fixed order.
#include "bridged_attention.h"

#include "dropout.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

namespace fastzs::bridged_attention {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
struct Inputs {
  Operand<T> q, k, v, prompt_k, prompt_v;
  Layout layout;
  int64_t batch, heads, prompts;
  int d;
  float scale;
  int64_t first;           // of the tokens that have a row; 0 in bridged_attention, the first patch in dense_attention
  const float* near_rows;  // [h]: what patches n rows apart add to a score, times ...
  const float* near_columns;  // [2 w - 1]: ... that of columns, from w - 1 to the left to as many to the right; or null
  bool apart;              // the tokens see the prompts only: those are the keys of dropout_attention
  Dropout dropout;

  int64_t rows() const { return layout.length() - first; }
  // That a shared row sees, but for the bridge.
  int64_t keys() const { return prompts + (apart ? 0 : layout.shared()); }
  FASTZS_INLINE RowBits bits(int64_t b, int64_t h, int64_t token) const {
    return {dropout.seed, static_cast<uint64_t>((b * heads + h) * layout.length() + token)};
  }
  Tokens<T> keys_of(int64_t b, int64_t h) const { return {prompt_k, k, b, h, prompts, keys()}; }
  Tokens<T> values_of(int64_t b, int64_t h) const { return {prompt_v, v, b, h, prompts, keys()}; }
};

// ---- forward ------------------------------------------------------------------------------------------------------

constexpr int64_t FORWARD_ROWS = 24, FORWARD_KEYS = 384;  // of a block
constexpr int64_t SCORE_STRIDE = FORWARD_KEYS + 16;

template <typename T>
struct Forward {
  const Inputs<T>* in;
  T* out;      // [B, rows, H, d]
  float* lse;  // [B, H, rows]
  int64_t begin, end;  // of the units
  float* memory;
};

// A unit is FORWARD_ROWS shared rows of a head, or all its bridge rows.
template <typename T>
int64_t forward_units_per_head(const Inputs<T>& in) {
  return (in.layout.shared() - in.first + FORWARD_ROWS - 1) / FORWARD_ROWS + (in.layout.regions() > 0);
}

// How much memory a forward thread wants, in floats.
template <typename T>
int64_t forward_memory(const Inputs<T>& in) {
  const int64_t keys = round_up(in.keys(), VECTORS<16> * 16), columns = round_up(in.d, 16);
  return 2 * keys * columns + (2 * in.layout.regions() + 1) * STRIDE +
      FORWARD_ROWS * (2 * STRIDE + 2 * SCORE_STRIDE) + round_up(1 + in.layout.cell(), 16);
}

template <bool PAIRS>
struct ForwardScratch {
  using U = typename Unit<PAIRS>::Type;
  int64_t keys;                          // filled up to whole panels
  U *keys_packed, *values_packed;        // see pack_transposed and pack_rows
  float *bridge_keys, *bridge_values;    // [R, STRIDE]
  U* query;                              // [FORWARD_ROWS, STRIDE]
  float* output;                         // [FORWARD_ROWS, STRIDE]
  float* query_row;                      // [STRIDE]
  float* scores;                         // [FORWARD_ROWS, SCORE_STRIDE]
  U* weights;                            // [FORWARD_ROWS, SCORE_STRIDE], the scores' place unless PAIRS
  float* region_scores;                  // [1 + cell]
  float top[FORWARD_ROWS], total[FORWARD_ROWS];  // of a row's running softmax: the greatest score, the weights' sum

  FASTZS_INLINE ForwardScratch(float* memory, int64_t keys, int columns, const Layout& layout) : keys(keys) {
    keys_packed = reinterpret_cast<U*>(take(memory, keys * columns));
    values_packed = reinterpret_cast<U*>(take(memory, keys * columns));
    bridge_keys = take(memory, layout.regions() * STRIDE);
    bridge_values = take(memory, layout.regions() * STRIDE);
    query = reinterpret_cast<U*>(take(memory, FORWARD_ROWS * STRIDE));
    output = take(memory, FORWARD_ROWS * STRIDE);
    query_row = take(memory, STRIDE);
    scores = take(memory, FORWARD_ROWS * SCORE_STRIDE);
    weights = reinterpret_cast<U*>(PAIRS ? take(memory, FORWARD_ROWS * SCORE_STRIDE) : scores);
    region_scores = take(memory, 1 + layout.cell());
  }
};

// Adds to the scores of one patch against keys [from, from + n) what patches near it get.
template <typename T>
FASTZS_INLINE void add_nearness(const Inputs<T>& in, int64_t token, int64_t from, int64_t n, float* scores) {
  const int64_t w = in.layout.w, y = (token - in.layout.prefix) / w, x = (token - in.layout.prefix) % w;
  const int64_t patches = in.prompts + in.layout.prefix;  // key of the first patch
  const int64_t end = from + n < in.keys() ? from + n : in.keys();
  for (int64_t key = from < patches ? patches : from; key < end;) {
    const int64_t row = (key - patches) / w, column = (key - patches) % w;
    const int64_t left = w - column, count = left < end - key ? left : end - key;
    const float factor = in.near_rows[row < y ? y - row : row - y];
    const float* near = in.near_columns + w - 1 - x + column;
    float* to = scores + key - from;
    for (int64_t i = 0; i < count; ++i) to[i] += factor * near[i];
    key += count;
  }
}

// Prefix and patch rows [first, first + FORWARD_ROWS) of a head; what a tile has beyond the last row is computed from
// zeros and dropped.
template <int LANES, bool PAIRS, typename T>
FASTZS_INLINE void forward_rows(const Forward<T>& a, ForwardScratch<PAIRS>& s, int64_t b, int64_t h, int64_t first) {
  using V = Simd<LANES>;
  const Inputs<T>& in = *a.in;
  const int64_t left = in.layout.shared() - first, rows = left < FORWARD_ROWS ? left : FORWARD_ROWS;
  const int64_t rounded = round_up(rows, ROWS);
  const int d = in.d, columns = static_cast<int>(round_up(d, LANES)), depth = PAIRS ? d / 2 : d;

  for (int64_t r = 0; r < rounded; ++r) {
    s.top[r] = -INFINITY;
    s.total[r] = 0;
    __builtin_memset(s.output + r * STRIDE, 0, columns * sizeof(float));
    if (r >= rows) {
      __builtin_memset(s.query + r * STRIDE, 0, depth * sizeof(float));
      continue;
    }
    const T* row = in.q.row(b, h, first + r);
    read_units<LANES, PAIRS>(row, in.q.channel, d, s.query + r * STRIDE);
    const int64_t region = in.layout.region(first + r);
    if (region >= 0) {
      read<LANES>(row, in.q.channel, d, s.query_row);
      s.top[r] = dot<LANES>(s.query_row, s.bridge_keys + region * STRIDE, columns) * in.scale;
      s.total[r] = 1;
      __builtin_memcpy(s.output + r * STRIDE, s.bridge_values + region * STRIDE, columns * sizeof(float));
    }
  }

  const int64_t keys = round_up(in.keys(), 2 * LANES);  // the greatest score is sought in two vectors at a time
  for (int64_t from = 0; from < keys; from += FORWARD_KEYS) {
    const int64_t n = keys - from < FORWARD_KEYS ? keys - from : FORWARD_KEYS;
    score<LANES, PAIRS>(s.query, rounded, s.keys_packed + from * depth, n, depth, s.scores, SCORE_STRIDE, in.scale);
    for (int64_t k = in.keys() - from; k < n; ++k)
      for (int64_t r = 0; r < rounded; ++r) s.scores[r * SCORE_STRIDE + k] = -INFINITY;

    for (int64_t r = 0; r < rows; ++r) {
      float* row = s.scores + r * SCORE_STRIDE;
      if (in.near_rows != nullptr) add_nearness(in, first + r, from, n, row);
      auto even = V::splat(s.top[r]), odd = even;  // two, for each waits for itself
      for (int64_t k = 0; k < n; k += 2 * LANES) {
        const auto x = V::load(row + k), y = V::load(row + k + LANES);
        even = x > even ? x : even;
        odd = y > odd ? y : odd;
      }
      const float top = V::max(even > odd ? even : odd);
      const RowBits bits = in.bits(b, h, first + r);
      auto total = V::splat(0.0f);
      for (int64_t k = 0; k < n; k += LANES) {
        auto p = V::exp_negative(V::load(row + k) - top);
        total += p;
        if (in.dropout.least > 0) p = (typename V::F)((typename V::I)p & kept<LANES>(bits, from + k, in.dropout.least));
        if constexpr (PAIRS) {
          V::store(reinterpret_cast<T*>(s.weights + r * SCORE_STRIDE) + k, p);
        } else {
          V::store(row + k, p);
        }
      }
      const float shrunk = V::exp_negative(V::splat(s.top[r] - top))[0];
      s.total[r] = s.total[r] * shrunk + V::sum(total);
      if (s.top[r] != top) scale_row<LANES>(s.output + r * STRIDE, shrunk, columns);
      s.top[r] = top;
    }
    constexpr int STEP = PAIRS ? 2 : 1;
    multiply_panels<LANES, PAIRS, SCORE_STRIDE, 1>(
        s.weights, rounded, s.values_packed, s.keys / STEP, from / STEP, n / STEP, columns, s.output, STRIDE);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = first - in.first + r;
    const float factor = in.dropout.enlarged / s.total[r];
    write<LANES>(s.output + r * STRIDE, factor, d, a.out + ((b * in.rows() + at) * in.heads + h) * d);
    a.lse[(b * in.heads + h) * in.rows() + at] = s.top[r] + __builtin_logf(s.total[r]);
  }
}

// The bridge rows of a head: each sees itself and the patches of its region.
template <int LANES, bool PAIRS, typename T>
FASTZS_INLINE void forward_bridge(const Forward<T>& a, ForwardScratch<PAIRS>& s, int64_t b, int64_t h) {
  using V = Simd<LANES>;
  const Inputs<T>& in = *a.in;
  const int64_t length = in.layout.length(), cell = in.layout.cell();
  const int d = in.d, columns = static_cast<int>(round_up(d, LANES));
  float row[MAX_D];
  for (int64_t region = 0; region < in.layout.regions(); ++region) {
    const int64_t token = in.layout.shared() + region;
    read<LANES>(in.q.row(b, h, token), in.q.channel, d, s.query_row);
    float top = -INFINITY;
    for (int64_t n = 0; n <= cell; ++n) {
      read<LANES>(in.k.row(b, h, n < cell ? in.layout.patch(region, n) : token), in.k.channel, d, row);
      s.region_scores[n] = dot<LANES>(s.query_row, row, columns) * in.scale;
      top = s.region_scores[n] > top ? s.region_scores[n] : top;
    }
    float total = 0;
    __builtin_memset(s.output, 0, columns * sizeof(float));
    for (int64_t n = 0; n <= cell; ++n) {
      const float p = V::exp_negative(V::splat(s.region_scores[n] - top))[0];
      total += p;
      read<LANES>(in.v.row(b, h, n < cell ? in.layout.patch(region, n) : token), in.v.channel, d, row);
      add_row<LANES>(s.output, p, row, columns);
    }
    write<LANES>(s.output, 1.0f / total, d, a.out + ((b * length + token) * in.heads + h) * d);
    a.lse[(b * in.heads + h) * length + token] = top + __builtin_logf(total);
  }
}

template <int LANES, bool PAIRS, typename T>
FASTZS_INLINE void forward_units(const Forward<T>& a) {
  const Inputs<T>& in = *a.in;
  const int64_t regions = in.layout.regions(), units = forward_units_per_head(in);
  const int columns = static_cast<int>(round_up(in.d, LANES));
  ForwardScratch<PAIRS> s(a.memory, round_up(in.keys(), VECTORS<LANES> * LANES), columns, in.layout);
  int64_t packed = -1;
  for (int64_t unit = a.begin; unit < a.end; ++unit) {
    const int64_t head = unit / units, b = head / in.heads, h = head % in.heads;
    if (head != packed) {
      pack_transposed<LANES, PAIRS>(in.keys_of(b, h), in.d, s.keys_packed);
      pack_rows<LANES, PAIRS>(in.values_of(b, h), in.d, s.keys / (PAIRS ? 2 : 1), s.values_packed);
      for (int64_t region = 0; region < regions; ++region) {
        const int64_t token = in.layout.shared() + region;
        read<LANES>(in.k.row(b, h, token), in.k.channel, in.d, s.bridge_keys + region * STRIDE);
        read<LANES>(in.v.row(b, h, token), in.v.channel, in.d, s.bridge_values + region * STRIDE);
      }
      packed = head;
    }
    const int64_t first = in.first + unit % units * FORWARD_ROWS;
    if (first >= in.layout.shared()) {
      forward_bridge<LANES, PAIRS>(a, s, b, h);
    } else {
      forward_rows<LANES, PAIRS>(a, s, b, h, first);
    }
  }
}

template <int LANES, typename T>
FASTZS_INLINE void forward_floats(const Forward<T>& a) {
  forward_units<LANES, false>(a);
}

FASTZS_MULTIVERSION(run_forward, forward_floats, Forward<float>)
FASTZS_MULTIVERSION(run_forward, forward_floats, Forward<BFloat16>)
FASTZS_MULTIVERSION(run_forward, forward_floats, Forward<Half>)

// ---- backward -----------------------------------------------------------------------------------------------------

constexpr int64_t BACKWARD_ROWS = 48, BACKWARD_KEYS = 192;  // of a block
constexpr int64_t BLOCK_STRIDE = BACKWARD_KEYS + 16;

template <typename T>
struct Backward {
  const Inputs<T>* in;
  Operand<T> grad, out;  // [B, H, L, d]
  const float* lse;      // [B, H, L]
  T *dq, *dk, *dv;       // [B, L, H, d]; dk and dv [B, P, H, d] where the prompts are the keys
  float *dprompt_k, *dprompt_v;  // [B, H, P, d], not where they are
  int64_t begin, end;    // of the heads
  float* memory;
};

// How much memory a backward thread wants, in floats.
template <typename T>
int64_t backward_memory(const Inputs<T>& in) {
  const int64_t keys = round_up(in.keys(), VECTORS<16> * 16), columns = round_up(in.d, 16), length = in.layout.length();
  return 3 * keys * columns + (3 * (length + ROWS) + 2 * in.prompts) * columns + 3 * BACKWARD_ROWS * STRIDE +
      4 * BACKWARD_ROWS * BLOCK_STRIDE + round_up(in.layout.shared(), 16);
}

template <bool PAIRS>
struct BackwardScratch {
  using U = typename Unit<PAIRS>::Type;
  int64_t keys;                             // filled up to whole panels
  U *keys_turned, *values_turned;           // see pack_transposed
  U* keys_packed;                           // see pack_rows
  float* dq;                                // [L + ROWS, columns]
  float *dk, *dv;                           // [P + L + ROWS, columns]
  float* delta;                             // [S]: sum of the gradient times the output
  U *query, *grad;                          // [BACKWARD_ROWS, STRIDE]
  U *query_pairs, *grad_pairs;              // [BACKWARD_ROWS / 2, STRIDE]: pairs of rows; the rows unless PAIRS
  float *weights, *dscores;                 // [BACKWARD_ROWS, BLOCK_STRIDE]
  U* dscore_rows;                           // dscores as units along the keys
  U *weight_pairs, *dscore_pairs;           // weights and dscores as units along the rows

  FASTZS_INLINE BackwardScratch(float* memory, int64_t keys, int64_t prompts, int columns, const Layout& layout)
      : keys(keys) {
    const int64_t block = BACKWARD_ROWS * BLOCK_STRIDE, rows = BACKWARD_ROWS * STRIDE;
    keys_turned = reinterpret_cast<U*>(take(memory, keys * columns));
    values_turned = reinterpret_cast<U*>(take(memory, keys * columns));
    keys_packed = reinterpret_cast<U*>(take(memory, keys * columns));
    dq = take(memory, (layout.length() + ROWS) * columns);
    dk = take(memory, (prompts + layout.length() + ROWS) * columns);
    dv = take(memory, (prompts + layout.length() + ROWS) * columns);
    delta = take(memory, layout.shared());
    query = reinterpret_cast<U*>(take(memory, rows));
    grad = reinterpret_cast<U*>(take(memory, rows));
    query_pairs = PAIRS ? reinterpret_cast<U*>(take(memory, rows / 2)) : query;
    grad_pairs = PAIRS ? reinterpret_cast<U*>(take(memory, rows / 2)) : grad;
    weights = take(memory, block);
    dscores = take(memory, block);
    dscore_rows = reinterpret_cast<U*>(PAIRS ? take(memory, block / 2) : dscores);
    weight_pairs = reinterpret_cast<U*>(PAIRS ? take(memory, block / 2) : weights);
    dscore_pairs = reinterpret_cast<U*>(PAIRS ? take(memory, block / 2) : dscores);
  }
};

// Adds the part of one row's one key to the gradients.
template <int LANES>
FASTZS_INLINE void backward_weight(
    const float* q, const float* grad, const float* key_row, const float* value_row, float lse, float delta,
    float scale, int columns, float* dq, float* dk, float* dv) {
  using V = Simd<LANES>;
  const float score = dot<LANES>(q, key_row, columns) * scale;
  const float p = V::exp_negative(V::splat(score - lse))[0];
  const float dscore = p * (dot<LANES>(grad, value_row, columns) - delta) * scale;
  add_row<LANES>(dq, dscore, key_row, columns);
  add_row<LANES>(dk, dscore, q, columns);
  add_row<LANES>(dv, p, grad, columns);
}

// What has few keys: delta and the bridge key of every shared row, and the bridge rows.
template <int LANES, bool PAIRS, typename T>
FASTZS_INLINE void backward_bridge(const Backward<T>& a, BackwardScratch<PAIRS>& s, int64_t b, int64_t h) {
  const Inputs<T>& in = *a.in;
  const Layout& layout = in.layout;
  const int64_t shared = layout.shared(), cell = layout.cell();
  const int d = in.d, columns = static_cast<int>(round_up(d, LANES));
  const float* lse = a.lse + (b * in.heads + h) * layout.length();
  float q[MAX_D], grad[MAX_D], out[MAX_D], key_row[MAX_D], value_row[MAX_D];
  for (int64_t token = 0; token < layout.length(); ++token) {
    read<LANES>(a.grad.row(b, h, token), a.grad.channel, d, grad);
    read<LANES>(a.out.row(b, h, token), a.out.channel, d, out);
    const float delta = dot<LANES>(grad, out, columns);
    if (token < shared) s.delta[token] = delta;
    // A patch has one key here, its bridge token; a bridge token itself and its region's patches.
    const int64_t region = layout.region(token), own = token - shared;
    const int64_t count = token >= shared ? 1 + cell : region >= 0;
    if (count > 0) read<LANES>(in.q.row(b, h, token), in.q.channel, d, q);
    for (int64_t n = 0; n < count; ++n) {
      const int64_t key = token < shared ? shared + region : n < cell ? layout.patch(own, n) : token;
      read<LANES>(in.k.row(b, h, key), in.k.channel, d, key_row);
      read<LANES>(in.v.row(b, h, key), in.v.channel, d, value_row);
      const int64_t at = (in.prompts + key) * columns;
      backward_weight<LANES>(
          q, grad, key_row, value_row, lse[token], delta, in.scale, columns, s.dq + token * columns, s.dk + at,
          s.dv + at);
    }
  }
}

// Rows r and r + 1 of a block of `rows` rows as pairs; row r is x's row `at`.
template <int LANES, typename T>
FASTZS_INLINE void pair_tokens(
    const Operand<T>& x, int64_t b, int64_t h, int64_t at, int64_t r, int64_t rows, int d, int32_t* out) {
  float low[MAX_D] = {}, high[MAX_D] = {};
  if (r < rows) read<LANES>(x.row(b, h, at), x.channel, d, low);
  if (r + 1 < rows) read<LANES>(x.row(b, h, at + 1), x.channel, d, high);
  pair_rows<LANES>(low, high, static_cast<int>(round_up(d, LANES)), out);
}

// Rows [first, first + BACKWARD_ROWS) against keys [from, from + n).
template <int LANES, bool PAIRS, typename T>
FASTZS_INLINE void backward_block(
    const Backward<T>& a, BackwardScratch<PAIRS>& s, int64_t b, int64_t h, int64_t first, int64_t from, int64_t n) {
  using V = Simd<LANES>;
  using U = typename Unit<PAIRS>::Type;
  constexpr int STEP = PAIRS ? 2 : 1;
  const Inputs<T>& in = *a.in;
  const int64_t left = in.layout.shared() - first, rows = left < BACKWARD_ROWS ? left : BACKWARD_ROWS;
  const int64_t rounded = round_up(rows, ROWS);  // a multiple of STEP
  const int64_t real = in.keys() - from < n ? in.keys() - from : n, whole = round_up(real, ROWS);
  const int d = in.d, columns = static_cast<int>(round_up(d, LANES)), depth = d / STEP;
  const float* lse = a.lse + (b * in.heads + h) * in.layout.length() + first;

  for (int64_t r = 0; r < rounded; ++r) {
    if (r < rows) {
      read_units<LANES, PAIRS>(in.q.row(b, h, first + r), in.q.channel, d, s.query + r * STRIDE);
      read_units<LANES, PAIRS>(a.grad.row(b, h, first + r), a.grad.channel, d, s.grad + r * STRIDE);
    } else {
      __builtin_memset(s.query + r * STRIDE, 0, columns * sizeof(U));
      __builtin_memset(s.grad + r * STRIDE, 0, columns * sizeof(U));
    }
  }
  if constexpr (PAIRS) {
    for (int64_t r = 0; r < rounded; r += 2) {
      pair_tokens<LANES>(in.q, b, h, first + r, r, rows, d, s.query_pairs + r / 2 * STRIDE);
      pair_tokens<LANES>(a.grad, b, h, first + r, r, rows, d, s.grad_pairs + r / 2 * STRIDE);
    }
  }

  const int64_t panel = from * depth;
  score<LANES, PAIRS>(s.query, rounded, s.keys_turned + panel, n, depth, s.weights, BLOCK_STRIDE, in.scale);
  score<LANES, PAIRS>(s.grad, rounded, s.values_turned + panel, n, depth, s.dscores, BLOCK_STRIDE, 1.0f);

  for (int64_t r = 0; r < rounded; ++r) {
    float *weights = s.weights + r * BLOCK_STRIDE, *dscores = s.dscores + r * BLOCK_STRIDE;
    if (r < rows) {
      const float delta = s.delta[first + r];
      const RowBits bits = in.bits(b, h, first + r);
      for (int64_t k = 0; k < n; k += LANES) {
        const auto p = V::exp_negative(V::load(weights + k) - lse[r]);
        auto dropped = p, dweight = V::load(dscores + k);
        if (in.dropout.least > 0) {
          const auto keep = kept<LANES>(bits, from + k, in.dropout.least);
          const auto factor = (typename V::F)((typename V::I)V::splat(in.dropout.enlarged) & keep);
          dropped *= factor, dweight *= factor;
        }
        V::store(weights + k, dropped);
        V::store(dscores + k, p * (dweight - delta) * in.scale);
      }
    }
    const int64_t filled = r < rows ? real : 0;
    __builtin_memset(weights + filled, 0, (BLOCK_STRIDE - filled) * sizeof(float));
    __builtin_memset(dscores + filled, 0, (BLOCK_STRIDE - filled) * sizeof(float));
  }
  if constexpr (PAIRS) {
    for (int64_t r = 0; r < rounded; ++r)
      for (int64_t k = 0; k < n; k += LANES)
        V::store(reinterpret_cast<T*>(s.dscore_rows + r * (BLOCK_STRIDE / 2)) + k, V::load(s.dscores + r * BLOCK_STRIDE + k));
    for (int64_t r = 0; r < rounded; r += 2) {
      const int64_t low = r * BLOCK_STRIDE, high = low + BLOCK_STRIDE, to = r / 2 * BLOCK_STRIDE;
      pair_rows<LANES>(s.weights + low, s.weights + high, BLOCK_STRIDE, s.weight_pairs + to);
      pair_rows<LANES>(s.dscores + low, s.dscores + high, BLOCK_STRIDE, s.dscore_pairs + to);
    }
  }

  multiply_panels<LANES, PAIRS, BLOCK_STRIDE / STEP, 1>(
      s.dscore_rows, rounded, s.keys_packed, s.keys / STEP, from / STEP, n / STEP, columns, s.dq + first * columns,
      columns);
  for (int64_t k = 0; k < whole; k += ROWS) {
    const int64_t at = (from + k) * columns;
    multiply_rows<LANES, PAIRS, 1, BLOCK_STRIDE>(
        s.weight_pairs + k, s.grad_pairs, rounded / STEP, columns, s.dv + at, columns);
    multiply_rows<LANES, PAIRS, 1, BLOCK_STRIDE>(
        s.dscore_pairs + k, s.query_pairs, rounded / STEP, columns, s.dk + at, columns);
  }
}

template <int LANES, bool PAIRS, typename T>
FASTZS_INLINE void backward_heads(const Backward<T>& a) {
  const Inputs<T>& in = *a.in;
  const int64_t length = in.layout.length(), shared = in.layout.shared();
  const int d = in.d, columns = static_cast<int>(round_up(d, LANES));
  BackwardScratch<PAIRS> s(a.memory, round_up(in.keys(), VECTORS<LANES> * LANES), in.prompts, columns, in.layout);
  for (int64_t head = a.begin; head < a.end; ++head) {
    const int64_t b = head / in.heads, h = head % in.heads;
    pack_transposed<LANES, PAIRS>(in.keys_of(b, h), d, s.keys_turned);
    pack_transposed<LANES, PAIRS>(in.values_of(b, h), d, s.values_turned);
    pack_rows<LANES, PAIRS>(in.keys_of(b, h), d, s.keys / (PAIRS ? 2 : 1), s.keys_packed);
    __builtin_memset(s.dq, 0, (length + ROWS) * columns * sizeof(float));
    __builtin_memset(s.dk, 0, (in.prompts + length + ROWS) * columns * sizeof(float));
    __builtin_memset(s.dv, 0, (in.prompts + length + ROWS) * columns * sizeof(float));
    backward_bridge<LANES, PAIRS>(a, s, b, h);
    const int64_t keys = round_up(in.keys(), LANES);
    for (int64_t from = 0; from < keys; from += BACKWARD_KEYS) {
      const int64_t n = keys - from < BACKWARD_KEYS ? keys - from : BACKWARD_KEYS;
      for (int64_t first = 0; first < shared; first += BACKWARD_ROWS)
        backward_block<LANES, PAIRS>(a, s, b, h, first, from, n);
    }
    for (int64_t n = 0; n < length; ++n) {
      const int64_t to = ((b * length + n) * in.heads + h) * d, key = (in.prompts + n) * columns;
      write<LANES>(s.dq + n * columns, 1.0f, d, a.dq + to);
      if (in.apart) continue;
      write<LANES>(s.dk + key, 1.0f, d, a.dk + to);
      write<LANES>(s.dv + key, 1.0f, d, a.dv + to);
    }
    for (int64_t n = 0; n < in.prompts; ++n) {
      if (in.apart) {
        const int64_t to = ((b * in.prompts + n) * in.heads + h) * d;
        write<LANES>(s.dk + n * columns, 1.0f, d, a.dk + to);
        write<LANES>(s.dv + n * columns, 1.0f, d, a.dv + to);
      } else {
        const int64_t to = (head * in.prompts + n) * d;
        __builtin_memcpy(a.dprompt_k + to, s.dk + n * columns, d * sizeof(float));
        __builtin_memcpy(a.dprompt_v + to, s.dv + n * columns, d * sizeof(float));
      }
    }
  }
}

template <int LANES, typename T>
FASTZS_INLINE void backward_floats(const Backward<T>& a) {
  backward_heads<LANES, false>(a);
}

FASTZS_MULTIVERSION(run_backward, backward_floats, Backward<float>)
FASTZS_MULTIVERSION(run_backward, backward_floats, Backward<BFloat16>)
FASTZS_MULTIVERSION(run_backward, backward_floats, Backward<Half>)

// ---- with the instruction that multiplies pairs of bf16 numbers ---------------------------------------------------

#if FASTZS_X86_ASM
#define FASTZS_BF16_PAIRS __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")))
FASTZS_BF16_PAIRS void run_forward_pairs(const Forward<BFloat16>& a) { forward_units<16, true>(a); }
FASTZS_BF16_PAIRS void run_backward_pairs(const Backward<BFloat16>& a) { backward_heads<16, true>(a); }
bool has_pairs() { return isa() == Isa::avx512_bf16; }
#else
void run_forward_pairs(const Forward<BFloat16>& a) { run_forward(a); }
void run_backward_pairs(const Backward<BFloat16>& a) { run_backward(a); }
bool has_pairs() { return false; }
#endif

template <typename T>
void run(const Forward<T>& a) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (has_pairs()) return run_forward_pairs(a);
  }
  run_forward(a);
}

template <typename T>
void run(const Backward<T>& a) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (has_pairs()) return run_backward_pairs(a);
  }
  run_backward(a);
}

// ---- operators ----------------------------------------------------------------------------------------------------

template <typename T>
Operand<T> operand(const Tensor& t) {
  const int64_t batch = t.size(0) == 1 ? 0 : t.stride(0);
  return {static_cast<const T*>(t.const_data_ptr()), batch, t.stride(1), t.stride(2), t.stride(3)};
}

// What the operators take; std is that of dense_attention's nearness, 0 without it.
struct Call {
  const char* op;
  const Tensor &q, &k, &v;
  std::optional<Tensor> prompt_k, prompt_v;
  Layout layout;
  double scale;
  int64_t first = 0;
  double std = 0;
  bool apart = false;  // see Inputs; k and v are not used then
  Dropout dropout = {0, 0, 1.0f};

  int64_t rows() const { return layout.length() - first; }

  void check() const {
    const int64_t d = q.dim() == 4 ? q.size(3) : 0;
    STD_TORCH_CHECK(d > 0 && d <= MAX_D && d % 8 == 0, op, ": wanted [B, H, L, d], d a multiple of 8 up to ", MAX_D);
    STD_TORCH_CHECK(layout.prefix >= 0 && layout.h > 0 && layout.w > 0 && layout.rh >= 0 && layout.rh <= layout.h &&
        layout.rw >= 0 && layout.rw <= layout.w && (layout.rh == 0) == (layout.rw == 0), op, ": no such layout");
    fits(k, q.size(0), layout.length());
    fits(v, q.size(0), layout.length());
    fits(q, q.size(0), layout.length());
    STD_TORCH_CHECK(prompt_k.has_value() == prompt_v.has_value(), op, ": prompt keys or values are missing");
    if (!prompt_k.has_value()) return;
    for (const Tensor* p : {&*prompt_k, &*prompt_v}) fits(*p, p->size(0) == 1 ? 1 : q.size(0), prompt_k->size(2));
  }

  void fits(const Tensor& t, int64_t batch, int64_t tokens) const {
    STD_TORCH_CHECK(t.scalar_type() == q.scalar_type(), op, ": the inputs differ in dtype");
    STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == batch && t.size(1) == q.size(1) && t.size(2) == tokens &&
        t.size(3) == q.size(3), op, ": an input is not [", batch, ", ", q.size(1), ", ", tokens, ", ", q.size(3), "]");
  }

  // near_rows [h], then near_columns [2 w - 1] of Inputs.
  std::vector<float> nearness() const {
    std::vector<float> near;
    if (std == 0) return near;
    const auto at = [&](int64_t n) { return static_cast<float>(std::exp(-0.5 * (n / std) * (n / std))); };
    for (int64_t n = 0; n < layout.h; ++n) near.push_back(at(n));
    for (int64_t n = 1 - layout.w; n < layout.w; ++n) near.push_back(at(n));
    return near;
  }

  template <typename T>
  Inputs<T> inputs(const std::vector<float>& near) const {
    Inputs<T> in{};
    in.q = operand<T>(q), in.k = operand<T>(k), in.v = operand<T>(v);
    if (prompt_k.has_value()) {
      in.prompt_k = operand<T>(*prompt_k), in.prompt_v = operand<T>(*prompt_v);
      in.prompts = prompt_k->size(2);
    }
    in.layout = layout;
    in.batch = q.size(0), in.heads = q.size(1), in.d = static_cast<int>(q.size(3));
    in.scale = static_cast<float>(scale), in.first = first;
    in.apart = apart, in.dropout = dropout;
    if (!near.empty()) in.near_rows = near.data(), in.near_columns = near.data() + layout.h;
    return in;
  }
};

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

using torch::stable::new_empty;
using torch::stable::transpose;

std::tuple<Tensor, Tensor> forward(const Call& call) {
  call.check();
  const Tensor& q = call.q;
  const int64_t B = q.size(0), H = q.size(1), d = q.size(3);
  Tensor out = new_empty(q, {B, call.rows(), H, d});
  Tensor lse = new_empty(q, {B, H, call.rows()}, ScalarType::Float);
  const std::vector<float> near = call.nearness();
  dispatch_floating(q, call.op, [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    const Inputs<T> in = call.inputs<T>(near);
    // A thread gets a run of units, and so packs each head that it works on once.
    const int64_t work = FORWARD_ROWS * in.keys() * d, grain = std::max<int64_t>(1, (1 << 18) / work);
    torch::stable::parallel_for(0, B * H * forward_units_per_head(in), grain, [&](int64_t begin, int64_t end) {
      const Floats memory(forward_memory(in));
      run(Forward<T>{&in, data<T>(out), data<float>(lse), begin, end, memory.data()});
    });
  });
  return {transpose(out, 1, 2), lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Call& call, const Tensor& grad, const Tensor& out, const Tensor& lse) {
  call.check();
  const Tensor& q = call.q;
  const int64_t B = q.size(0), H = q.size(1), L = q.size(2), d = q.size(3);
  const int64_t P = call.prompt_k.has_value() ? call.prompt_k->size(2) : 0;
  call.fits(grad, B, L);
  call.fits(out, B, L);
  STD_TORCH_CHECK(lse.is_contiguous() && lse.numel() == B * H * L && lse.scalar_type() == ScalarType::Float,
      call.op, ": lse must be contiguous fp32 [B, H, rows]");
  const int64_t keys = call.apart ? P : L, others = call.apart ? 0 : P;
  Tensor dq = new_empty(q, {B, L, H, d}), dk = new_empty(q, {B, keys, H, d}), dv = new_empty(q, {B, keys, H, d});
  Tensor dprompt_k = new_empty(q, {B, H, others, d}, ScalarType::Float);
  Tensor dprompt_v = new_empty(q, {B, H, others, d}, ScalarType::Float);
  dispatch_floating(q, call.op, [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    const Inputs<T> in = call.inputs<T>({});
    torch::stable::parallel_for(0, B * H, 1, [&](int64_t begin, int64_t end) {
      const Floats memory(backward_memory(in));
      run(Backward<T>{
          &in, operand<T>(grad), operand<T>(out), static_cast<const float*>(lse.const_data_ptr()), data<T>(dq),
          data<T>(dk), data<T>(dv), data<float>(dprompt_k), data<float>(dprompt_v), begin, end, memory.data()});
    });
  });
  return {transpose(dq, 1, 2), transpose(dk, 1, 2), transpose(dv, 1, 2), dprompt_k, dprompt_v};
}

std::tuple<Tensor, Tensor> bridged_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& prompt_k,
    const std::optional<Tensor>& prompt_v, int64_t prefix, int64_t h, int64_t w, int64_t rh, int64_t rw, double scale) {
  return forward(Call{"bridged_attention", q, k, v, prompt_k, prompt_v, {prefix, h, w, rh, rw}, scale});
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bridged_attention_backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& prompt_k,
    const std::optional<Tensor>& prompt_v, const Tensor& out, const Tensor& lse, int64_t prefix, int64_t h, int64_t w,
    int64_t rh, int64_t rw, double scale) {
  const Call call{"bridged_attention", q, k, v, prompt_k, prompt_v, {prefix, h, w, rh, rw}, scale};
  return backward(call, grad, out, lse);
}

// out alone: it has no gradient.
Tensor dense_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, int64_t h, int64_t w, double scale, double std) {
  const int64_t prefix = (q.dim() == 4 ? q.size(2) : 0) - h * w;
  return std::get<0>(forward(Call{"dense_attention", q, k, v, {}, {}, {prefix, h, w, 0, 0}, scale, prefix, std}));
}

// The queries are the tokens of a layout without a bridge, the keys its prompts.
Call dropped(
    const Tensor& q, const Tensor& k, const Tensor& v, double scale, double rate, const Tensor& seed) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && k.size(0) == q.size(0) && v.size(0) == q.size(0),
      "dropout_attention: wanted q [B, H, Q, d], k and v [B, H, N, d]");
  const Dropout dropout = dropout_of("dropout_attention", rate, seed);
  return {"dropout_attention", q, q, q, k, v, {0, 1, q.size(2), 0, 0}, scale, 0, 0, true, dropout};
}

std::tuple<Tensor, Tensor> dropout_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, double scale, double rate, const Tensor& seed) {
  return forward(dropped(q, k, v, scale, rate, seed));
}

std::tuple<Tensor, Tensor, Tensor> dropout_attention_backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
    double scale, double rate, const Tensor& seed) {
  const auto [dq, dk, dv, none_k, none_v] = backward(dropped(q, k, v, scale, rate, seed), grad, out, lse);
  return {dq, dk, dv};
}

}  // namespace
}  // namespace fastzs::bridged_attention

STABLE_TORCH_LIBRARY_FRAGMENT(fastzs, m) {
  m.def(
      "bridged_attention(Tensor q, Tensor k, Tensor v, Tensor? prompt_k, Tensor? prompt_v, int prefix, int h, int w, "
      "int rh, int rw, float scale) -> (Tensor out, Tensor lse)");
  m.def(
      "bridged_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? prompt_k, Tensor? prompt_v, "
      "Tensor out, Tensor lse, int prefix, int h, int w, int rh, int rw, float scale) "
      "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dprompt_k, Tensor dprompt_v)");
  m.def(
      "dropout_attention(Tensor q, Tensor k, Tensor v, float scale, float dropout, Tensor seed) "
      "-> (Tensor out, Tensor lse)");
  m.def(
      "dropout_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale, "
      "float dropout, Tensor seed) -> (Tensor dq, Tensor dk, Tensor dv)");
  m.def("dense_attention(Tensor q, Tensor k, Tensor v, int h, int w, float scale, float std) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastzs, CPU, m) {
  m.impl("bridged_attention", TORCH_BOX(&fastzs::bridged_attention::bridged_attention));
  m.impl("bridged_attention_backward", TORCH_BOX(&fastzs::bridged_attention::bridged_attention_backward));
  m.impl("dropout_attention", TORCH_BOX(&fastzs::bridged_attention::dropout_attention));
  m.impl("dropout_attention_backward", TORCH_BOX(&fastzs::bridged_attention::dropout_attention_backward));
  m.impl("dense_attention", TORCH_BOX(&fastzs::bridged_attention::dense_attention));
}
