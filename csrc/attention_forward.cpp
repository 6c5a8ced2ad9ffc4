// Attention on the CPU, forward.
//
// A thread packs the keys and values of a head once and then takes a block of query rows at a time: their scores
// against a block of keys stay in the nearest caches, become weights there, and are multiplied with the values. What a
// patch sees besides, its region's bridge token, is where its running softmax starts. The bridge rows, of a few keys
// each, are computed directly. Rows are computed alike whichever thread does, so results repeat to the bit.
#include "attention.h"

#include <algorithm>
#include <type_traits>

namespace fastzs::attention {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

constexpr int64_t FORWARD_ROWS = 12, FORWARD_KEYS = 1152;  // of a block
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
    const float factor = in.near_rows[row < y ? y - row : row - y] * LOG2_E;
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
  const float factor = in.scale * LOG2_E;  // scores are held in base 2, where the exponential is cheapest

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
      s.top[r] = dot<LANES>(s.query_row, s.bridge_keys + region * STRIDE, columns) * factor;
      s.total[r] = 1;
      __builtin_memcpy(s.output + r * STRIDE, s.bridge_values + region * STRIDE, columns * sizeof(float));
    }
  }

  const int64_t keys = round_up(in.keys(), 2 * LANES);  // the greatest score is sought in two vectors at a time
  for (int64_t from = 0; from < keys; from += FORWARD_KEYS) {
    const int64_t n = keys - from < FORWARD_KEYS ? keys - from : FORWARD_KEYS;
    score<LANES, PAIRS>(s.query, rounded, s.keys_packed + from * depth, n, depth, s.scores, SCORE_STRIDE, factor);
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
        auto p = V::template exp2_negative<PAIRS>(V::load(row + k) - top);
        total += p;
        if (in.dropout.least > 0) p = (typename V::F)((typename V::I)p & kept<LANES>(bits, from + k, in.dropout.least));
        if constexpr (PAIRS) {
          store_pairs(reinterpret_cast<T*>(s.weights + r * SCORE_STRIDE) + k, p);
        } else {
          V::store(row + k, p);
        }
      }
      const float shrunk = V::template exp2_negative<false>(V::splat(s.top[r] - top))[0];
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
    const float share = in.dropout.enlarged / s.total[r];
    write<LANES>(s.output + r * STRIDE, share, d, a.out + ((b * in.rows() + at) * in.heads + h) * d);
    a.lse[(b * in.heads + h) * in.rows() + at] = s.top[r] / LOG2_E + __builtin_logf(s.total[r]);
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
      const int64_t rows = s.keys / (PAIRS ? 2 : 1);
      pack_transposed<LANES, PAIRS>(in.keys_of(b, h), in.d, 0, s.keys, s.keys_packed);
      pack_rows<LANES, PAIRS>(in.values_of(b, h), in.d, rows, 0, rows, s.values_packed);
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

// ---- with the instruction that multiplies pairs of bf16 numbers ---------------------------------------------------

#if FASTZS_X86_ASM
FASTZS_BF16_PAIRS void run_forward_pairs(const Forward<BFloat16>& a) { forward_units<16, true>(a); }
#else
void run_forward_pairs(const Forward<BFloat16>& a) { run_forward(Isa::portable, a); }
#endif

template <typename T>
void run(Isa isa, const Forward<T>& a) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (has_pairs(isa)) return run_forward_pairs(a);
  }
  run_forward(isa, a);
}

}  // namespace

std::tuple<Tensor, Tensor> forward(const Call& call) {
  call.check();
  const Tensor& q = call.q;
  const int64_t B = q.size(0), H = q.size(1), d = q.size(3);
  Tensor out = torch::stable::new_empty(q, {B, call.rows(), H, d});
  Tensor lse = torch::stable::new_empty(q, {B, H, call.rows()}, ScalarType::Float);
  const std::vector<float> near = call.nearness();
  dispatch_floating(q, call.op, [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    const Inputs<T> in = call.inputs<T>(near);
    // A thread gets a run of units, and so packs each head that it works on once.
    const int64_t work = std::max<int64_t>(1, FORWARD_ROWS * in.keys() * d);
    const int64_t grain = std::max<int64_t>(1, (1 << 18) / work);
    const Isa isa = cpu_isa();
    torch::stable::parallel_for(0, B * H * forward_units_per_head(in), grain, [&](int64_t begin, int64_t end) {
      const Floats memory(forward_memory(in));
      run(isa, Forward<T>{&in, data<T>(out), data<float>(lse), begin, end, memory.data()});
    });
  });
  return {torch::stable::transpose(out, 1, 2), lse};
}

}  // namespace fastzs::attention
