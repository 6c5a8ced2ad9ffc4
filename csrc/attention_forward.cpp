// Attention on the CPU, forward.
//
// A thread packs the keys and values of a head once and then takes a block of query rows at a time: their scores
// against a block of keys become weights in registers, which stay in the nearest cache and are multiplied with the
// values. What a patch sees besides, its region's bridge token, is where its sums start. The bridge rows, of a few keys
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
constexpr int64_t WEIGHT_STRIDE = FORWARD_KEYS + 16;
constexpr float LEAST = 0x1p-40f, MOST = 0x1p60f;  // of a row's weights together

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
      FORWARD_ROWS * (2 * STRIDE + WEIGHT_STRIDE) + round_up(1 + in.layout.cell(), 16);
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
  U* weights;                            // [FORWARD_ROWS, WEIGHT_STRIDE]
  float* region_scores;                  // [1 + cell]
  float top[FORWARD_ROWS], total[FORWARD_ROWS];  // of a row: the score with weight 1, the weights' sum
  int64_t region[FORWARD_ROWS];          // of a row, -1 without one
  float own[FORWARD_ROWS];               // the score against the region's bridge token, -infinity without one

  FASTZS_INLINE ForwardScratch(float* memory, int64_t keys, int columns, const Layout& layout) : keys(keys) {
    keys_packed = reinterpret_cast<U*>(take(memory, keys * columns));
    values_packed = reinterpret_cast<U*>(take(memory, keys * columns));
    bridge_keys = take(memory, layout.regions() * STRIDE);
    bridge_values = take(memory, layout.regions() * STRIDE);
    query = reinterpret_cast<U*>(take(memory, FORWARD_ROWS * STRIDE));
    output = take(memory, FORWARD_ROWS * STRIDE);
    query_row = take(memory, STRIDE);
    weights = reinterpret_cast<U*>(take(memory, FORWARD_ROWS * WEIGHT_STRIDE));
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

// Makes scores in base 2, where the exponential is cheapest, of the products of the rows from `token` with the keys
// from `key`, less each row's top; -infinity where there is no key.
template <int LANES, int NV, typename T, typename Sums>
FASTZS_INLINE void to_scores(const Inputs<T>& in, int64_t token, int64_t key, const float* top, Sums& sum) {
  using V = Simd<LANES>;
  const float factor = in.scale * LOG2_E;
  each<NV>([&](int r, int v) FASTZS_INLINE_LAMBDA { sum[r][v] = sum[r][v] * factor - V::broadcast(top + r); });
  if (in.near_rows != nullptr) {
    float near[ROWS * NV * LANES] = {};
    for (int64_t r = 0; r < ROWS && token + r < in.layout.shared(); ++r)
      add_nearness(in, token + r, key, NV * LANES, near + r * NV * LANES);
    each<NV>([&](int r, int v) FASTZS_INLINE_LAMBDA { sum[r][v] += V::load(near + (r * NV + v) * LANES); });
  }
  const int64_t left = in.keys() - key;
  if (left >= NV * LANES) return;
  each<NV>([&](int r, int v) FASTZS_INLINE_LAMBDA {
    sum[r][v] = V::first(static_cast<int>(left) - v * LANES) ? sum[r][v] : V::splat(-INFINITY);
  });
}

// The greatest score of each row from `first`.
template <int LANES, bool PAIRS, typename T>
FASTZS_INLINE void greatest(
    const Inputs<T>& in, const ForwardScratch<PAIRS>& s, int64_t first, int64_t rows, float* top) {
  using V = Simd<LANES>;
  const int64_t n = round_up(in.keys(), LANES);
  const float zeros[ROWS] = {};
  float wide[FORWARD_ROWS * LANES];
  for (int64_t r = 0; r < rows; ++r) V::store(wide + r * LANES, V::splat(s.own[r]));
  const auto compare = [&](int64_t from, int64_t key, auto& sum) FASTZS_INLINE_LAMBDA {
    constexpr int NV = VECTORS_OF<LANES, decltype(sum)>;
    to_scores<LANES, NV>(in, first + from, key, zeros, sum);
    each<NV>([&](int r, int v) FASTZS_INLINE_LAMBDA {
      float* of = wide + (from + r) * LANES;
      const auto so_far = V::load(of);
      V::store(of, sum[r][v] > so_far ? sum[r][v] : so_far);
    });
  };
  score<LANES, PAIRS>(s.query, rows, s.keys_packed, n, PAIRS ? in.d / 2 : in.d, compare);
  for (int64_t r = 0; r < rows; ++r) top[r] = V::max(V::load(wide + r * LANES));
}

// The weights of the rows against keys [from, from + n) and what they add to the rows' sums, [FORWARD_ROWS, LANES].
template <int LANES, bool PAIRS, typename T>
FASTZS_INLINE void weigh(
    const Inputs<T>& in, ForwardScratch<PAIRS>& s, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t from,
    int64_t n, float* sums) {
  using V = Simd<LANES>;
  using F = typename V::F;
  const int depth = PAIRS ? in.d / 2 : in.d;
  const auto finish = [&](int64_t tile, int64_t k, auto& p) FASTZS_INLINE_LAMBDA {
    constexpr int NV = VECTORS_OF<LANES, decltype(p)>;
    to_scores<LANES, NV>(in, first + tile, from + k, s.top + tile, p);
    each<NV>([&](int r, int v) FASTZS_INLINE_LAMBDA { p[r][v] = V::template exp2<PAIRS>(p[r][v]); });
    each<NV>([&](int r, int v) FASTZS_INLINE_LAMBDA {
      float* of = sums + (tile + r) * LANES;
      V::store(of, V::load(of) + p[r][v]);
    });
    if (in.dropout.least > 0)
      each<NV>([&](int r, int v) FASTZS_INLINE_LAMBDA {
        const RowBits bits = in.bits(b, h, first + tile + r);
        p[r][v] = (F)((typename V::I)p[r][v] & kept<LANES>(bits, from + k + v * LANES, in.dropout.least));
      });
    each<NV>([&](int r, int v) FASTZS_INLINE_LAMBDA {
      auto* to = s.weights + (tile + r) * WEIGHT_STRIDE;
      if constexpr (PAIRS) {
        store_pairs(reinterpret_cast<T*>(to) + k + v * LANES, p[r][v]);
      } else {
        V::store(to + k + v * LANES, p[r][v]);
      }
    });
  };
  score<LANES, PAIRS>(s.query, rows, s.keys_packed + from * depth, n, depth, finish);
}

FASTZS_INLINE bool fits(float total) { return total >= LEAST && total <= MOST; }

// Prefix and patch rows [first, first + FORWARD_ROWS) of a head; what a tile has beyond the last row is computed from
// zeros and dropped.
//
// A score becomes a weight while it is in a register, before the row's greatest score is known. Floats, and bf16, have
// room for weights far from 1, so a score of 0 gets the weight 1. Where the weights' sum shows that this was no choice,
// the row's greatest score is sought, and its rows are computed again.
template <int LANES, bool PAIRS, typename T>
FASTZS_INLINE void forward_rows(const Forward<T>& a, ForwardScratch<PAIRS>& s, int64_t b, int64_t h, int64_t first) {
  using V = Simd<LANES>;
  constexpr int STEP = PAIRS ? 2 : 1;
  const Inputs<T>& in = *a.in;
  const int64_t left = in.layout.shared() - first, rows = left < FORWARD_ROWS ? left : FORWARD_ROWS;
  const int64_t rounded = round_up(rows, ROWS), keys = round_up(in.keys(), LANES);
  const int d = in.d, columns = static_cast<int>(round_up(d, LANES)), depth = d / STEP;

  for (int64_t r = 0; r < rounded; ++r) {
    s.own[r] = -INFINITY, s.top[r] = 0, s.region[r] = -1;
    if (r >= rows) {
      __builtin_memset(s.query + r * STRIDE, 0, depth * sizeof(float));
      continue;
    }
    const T* row = in.q.row(b, h, first + r);
    if (first + r + FORWARD_ROWS < in.layout.shared()) in.q.fetch(b, h, first + r + FORWARD_ROWS, d);
    read_units<LANES, PAIRS>(row, in.q.channel, d, s.query + r * STRIDE);
    s.region[r] = in.layout.region(first + r);
    if (s.region[r] < 0) continue;
    read<LANES>(row, in.q.channel, d, s.query_row);
    s.own[r] = dot<LANES>(s.query_row, s.bridge_keys + s.region[r] * STRIDE, columns) * in.scale * LOG2_E;
  }

  for (bool again = false;; again = true) {
    float sums[FORWARD_ROWS * LANES] = {};
    for (int64_t r = 0; r < rounded; ++r) {
      __builtin_memset(s.output + r * STRIDE, 0, columns * sizeof(float));
      s.total[r] = 0;
      if (s.region[r] < 0) continue;
      s.total[r] = V::template exp2<false>(V::splat(s.own[r] - s.top[r]))[0];
      add_row<LANES>(s.output + r * STRIDE, s.total[r], s.bridge_values + s.region[r] * STRIDE, columns);
    }
    for (int64_t from = 0; from < keys; from += FORWARD_KEYS) {
      const int64_t n = keys - from < FORWARD_KEYS ? keys - from : FORWARD_KEYS;
      weigh<LANES, PAIRS>(in, s, b, h, first, rounded, from, n, sums);
      multiply_panels<LANES, PAIRS, WEIGHT_STRIDE, 1>(
          s.weights, rounded, s.values_packed, s.keys / STEP, from / STEP, n / STEP, columns, s.output, STRIDE);
    }
    bool fit = true;
    for (int64_t r = 0; r < rows; ++r) {
      s.total[r] += V::sum(V::load(sums + r * LANES));
      fit = fit && fits(s.total[r]);
    }
    if (fit || again) break;
    float top[FORWARD_ROWS];
    greatest<LANES, PAIRS>(in, s, first, rounded, top);
    for (int64_t r = 0; r < rows; ++r)
      if (!fits(s.total[r])) s.top[r] = top[r];
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
