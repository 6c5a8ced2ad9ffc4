// Attention on the CPU, backward.
//
// Weights are computed anew from the saved log-sum-exps, in blocks of rows and keys that stay in the second cache.
// A thread takes a head, or where there are few heads for many threads some of a head's keys. Their gradients are the
// thread's own; those of the queries go through the hands of all threads at work on the head, in the order of their
// keys. So every sum has one order, whatever the threads.
#include "attention.h"
#include "threads.h"

#include <thread>
#include <type_traits>

namespace fastzs::attention {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

constexpr int64_t BACKWARD_ROWS = 48, BACKWARD_KEYS = 384;  // of a block
constexpr int64_t BLOCK_STRIDE = BACKWARD_KEYS + 16;

template <typename T>
struct Backward {
  const Inputs<T>* in;
  Operand<T> grad, out;  // [B, H, L, d]
  const float* lse;      // [B, H, L]
  T *dq, *dk, *dv;       // [B, L, H, d]; dk and dv [B, P, H, d] where the prompts are the keys
  float *dprompt_k, *dprompt_v;  // [B, H, P, d], not where they are
  int64_t head;
  int64_t from, to;      // of the keys a shared row sees
  float* sums;           // of the queries' gradients, [L + ROWS, columns]
  // Blocks of rows whose sums the part of the keys before has finished, and this one; null where there is none.
  const int64_t* before;
  int64_t* finished;
  float* memory;
};

// How much memory a backward thread wants, in floats.
template <typename T>
int64_t backward_memory(const Inputs<T>& in) {
  const int64_t keys = round_up(in.keys(), VECTORS<16> * 16), columns = round_up(in.d, 16), length = in.layout.length();
  return 3 * keys * columns + 2 * (in.prompts + length + ROWS) * columns + 3 * BACKWARD_ROWS * STRIDE +
      2 * BACKWARD_ROWS * BLOCK_STRIDE + round_up(in.layout.shared(), 16);
}

// And the sums of the queries' gradients of a head.
template <typename T>
int64_t sums_memory(const Inputs<T>& in) {
  return (in.layout.length() + ROWS) * round_up(in.d, 16);
}

// How many keys at a time a thread takes of a head, all if there are heads enough: the time is that of the thread with
// most to do, and a head's second part begins a block of rows after its first.
inline int64_t keys_of_a_part(int64_t heads, int64_t rows, int64_t keys, int64_t threads) {
  const int64_t row_blocks = (rows + BACKWARD_ROWS - 1) / BACKWARD_ROWS;
  const int64_t blocks = std::max<int64_t>((keys + BACKWARD_KEYS - 1) / BACKWARD_KEYS, 1);
  int64_t best = blocks, least = INT64_MAX;
  for (int64_t size = blocks; size > 0; --size) {
    const int64_t parts = (blocks + size - 1) / size, rounds = (heads * parts + threads - 1) / threads;
    const int64_t time = rounds * size * (row_blocks + parts - 1);
    if (time < least) best = size, least = time;
  }
  return best * BACKWARD_KEYS;
}

// Returns when another thread has counted to `count`. That thread is at work, for parts are begun in their order.
__attribute__((noinline)) void wait_for(const int64_t* finished, int64_t count) {
  while (__atomic_load_n(finished, __ATOMIC_ACQUIRE) < count) std::this_thread::yield();
}

template <bool PAIRS>
struct BackwardScratch {
  using U = typename Unit<PAIRS>::Type;
  int64_t keys;                             // filled up to whole panels
  U *keys_turned, *values_turned;           // see pack_transposed
  U* keys_packed;                           // see pack_rows
  float *dk, *dv;                           // [P + L + ROWS, columns]
  float* delta;                             // [S]: sum of the gradient times the output
  U *query, *grad;                          // [BACKWARD_ROWS, STRIDE]
  U *query_pairs, *grad_pairs;              // [BACKWARD_ROWS / 2, STRIDE]: pairs of rows; the rows unless PAIRS
  U *weights, *dscores;                     // of a block, units along the rows: [BACKWARD_ROWS / STEP, BLOCK_STRIDE]
  U* dscore_rows;                           // dscores as units along the keys: [BACKWARD_ROWS, BLOCK_STRIDE / STEP]

  FASTZS_INLINE BackwardScratch(float* memory, int64_t keys, int64_t prompts, int columns, const Layout& layout)
      : keys(keys) {
    const int64_t block = BACKWARD_ROWS * BLOCK_STRIDE, rows = BACKWARD_ROWS * STRIDE;
    keys_turned = reinterpret_cast<U*>(take(memory, keys * columns));
    values_turned = reinterpret_cast<U*>(take(memory, keys * columns));
    keys_packed = reinterpret_cast<U*>(take(memory, keys * columns));
    dk = take(memory, (prompts + layout.length() + ROWS) * columns);
    dv = take(memory, (prompts + layout.length() + ROWS) * columns);
    delta = take(memory, layout.shared());
    query = reinterpret_cast<U*>(take(memory, rows));
    grad = reinterpret_cast<U*>(take(memory, rows));
    query_pairs = PAIRS ? reinterpret_cast<U*>(take(memory, rows / 2)) : query;
    grad_pairs = PAIRS ? reinterpret_cast<U*>(take(memory, rows / 2)) : grad;
    weights = reinterpret_cast<U*>(take(memory, PAIRS ? block / 2 : block));
    dscores = reinterpret_cast<U*>(take(memory, PAIRS ? block / 2 : block));
    dscore_rows = PAIRS ? reinterpret_cast<U*>(take(memory, block / 2)) : dscores;
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

// What has few keys: delta and the bridge key of every shared row, and the bridge rows. The first part of a head adds
// it to the queries' gradients; every part does to the keys', of which it keeps its own.
template <int LANES, bool PAIRS, typename T>
FASTZS_INLINE void backward_bridge(const Backward<T>& a, BackwardScratch<PAIRS>& s, int64_t b, int64_t h) {
  const Inputs<T>& in = *a.in;
  const Layout& layout = in.layout;
  const int64_t shared = layout.shared(), cell = layout.cell();
  const int d = in.d, columns = static_cast<int>(round_up(d, LANES));
  const float* lse = a.lse + (b * in.heads + h) * layout.length();
  float q[MAX_D], grad[MAX_D], out[MAX_D], key_row[MAX_D], value_row[MAX_D], dropped[MAX_D] = {};
  const Operand<T>* const all[] = {&a.grad, &a.out, &in.q, &in.k, &in.v};
  for (int64_t token = 0; token < layout.length(); ++token) {
    if (token + AHEAD < layout.length())
      for (const Operand<T>* of : all) of->fetch(b, h, token + AHEAD, d);
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
          q, grad, key_row, value_row, lse[token], delta, in.scale, columns,
          a.from == 0 ? a.sums + token * columns : dropped, s.dk + at, s.dv + at);
    }
  }
}

// What dropout multiplies a row's weights by, those of the keys from `key` on.
template <int LANES, typename T>
FASTZS_INLINE typename Simd<LANES>::F dropped(const Inputs<T>& in, int64_t b, int64_t h, int64_t token, int64_t key) {
  using V = Simd<LANES>;
  const auto enlarged = (typename V::I)V::splat(in.dropout.enlarged);
  return (typename V::F)(enlarged & kept<LANES>(in.bits(b, h, token), key, in.dropout.least));
}

// Where a tile of weights or of their gradients goes: units along the rows.
template <int LANES, int NV, bool PAIRS, typename Sums>
FASTZS_INLINE void store_along_rows(const Sums& x, typename Unit<PAIRS>::Type* out) {
  each<NV>([&](int r, int v) FASTZS_INLINE_LAMBDA {
    if constexpr (!PAIRS) {
      Simd<LANES>::store(out + r * BLOCK_STRIDE + v * LANES, x[r][v]);
    } else {
      if (r % 2 == 0) store_pairs(out + r / 2 * BLOCK_STRIDE + v * LANES, x[r][v], x[r + 1][v]);
    }
  });
}

// The weights of a tile, rows from `row` on of the block and keys from `key` on, and their gradients' part in those of
// the scores, from the products of queries with keys and of the output's gradients with values.
template <int LANES, bool PAIRS, int NV, typename T>
FASTZS_INLINE void backward_tile(
    const Backward<T>& a, BackwardScratch<PAIRS>& s, int64_t b, int64_t h, int64_t first, int64_t row, int64_t from,
    int64_t k, const float* lse, const float* delta) {
  using V = Simd<LANES>;
  using I = typename V::I;
  constexpr int WIDE = VECTORS<LANES> * LANES, STEP = PAIRS ? 2 : 1;
  const Inputs<T>& in = *a.in;
  const int64_t real = in.keys() - from - k;
  const int depth = in.d / STEP;
  const int64_t at = row / STEP * BLOCK_STRIDE + k;
  float weights[ROWS * WIDE];  // as they are without dropout
  const float factor = PAIRS ? in.scale * LOG2_E : in.scale;
  product<LANES, PAIRS, NV, STRIDE, 1>(
      s.query + row * STRIDE, s.keys_turned + (from + k) * depth, WIDE, depth, [&](auto& p) FASTZS_INLINE_LAMBDA {
        each<NV>([&](int r, int v) FASTZS_INLINE_LAMBDA {
          const auto score = p[r][v] * factor - V::broadcast(lse + r);
          if constexpr (PAIRS) {
            p[r][v] = V::template exp2<true>(score);
          } else {
            p[r][v] = V::exp_negative(score);
          }
        });
        if (real < NV * LANES)
          each<NV>([&](int r, int v) FASTZS_INLINE_LAMBDA {
            p[r][v] = (typename V::F)((I)p[r][v] & V::first(static_cast<int>(real) - v * LANES));
          });
        each<NV>([&](int r, int v) FASTZS_INLINE_LAMBDA { V::store(weights + r * WIDE + v * LANES, p[r][v]); });
        if (in.dropout.least > 0) each<NV>([&](int r, int v) FASTZS_INLINE_LAMBDA {
          p[r][v] *= dropped<LANES>(in, b, h, first + row + r, from + k + v * LANES);
        });
        store_along_rows<LANES, NV, PAIRS>(p, s.weights + at);
      });
  product<LANES, PAIRS, NV, STRIDE, 1>(
      s.grad + row * STRIDE, s.values_turned + (from + k) * depth, WIDE, depth, [&](auto& g) FASTZS_INLINE_LAMBDA {
        if (in.dropout.least > 0) each<NV>([&](int r, int v) FASTZS_INLINE_LAMBDA {
          g[r][v] *= dropped<LANES>(in, b, h, first + row + r, from + k + v * LANES);
        });
        each<NV>([&](int r, int v) FASTZS_INLINE_LAMBDA {
          const auto dweight = g[r][v] * in.scale;
          g[r][v] = V::load(weights + r * WIDE + v * LANES) * (dweight - V::broadcast(delta + r));
        });
        store_along_rows<LANES, NV, PAIRS>(g, s.dscores + at);
        if constexpr (PAIRS)
          each<NV>([&](int r, int v) FASTZS_INLINE_LAMBDA {
            store_pairs(reinterpret_cast<T*>(s.dscore_rows + (row + r) * (BLOCK_STRIDE / 2)) + k + v * LANES, g[r][v]);
          });
      });
}

template <int LANES, bool PAIRS, int NV = VECTORS<LANES>, typename T, typename... More>
FASTZS_INLINE void backward_tile_of(
    int64_t vectors, const Backward<T>& a, BackwardScratch<PAIRS>& s, const More&... more) {
  if (vectors == NV) {
    backward_tile<LANES, PAIRS, NV>(a, s, more...);
  } else if constexpr (NV > 1) {
    backward_tile_of<LANES, PAIRS, NV - 1>(vectors, a, s, more...);
  }
}

// Rows [first, first + BACKWARD_ROWS) against keys [from, from + n).
template <int LANES, bool PAIRS, typename T>
FASTZS_INLINE void backward_block(
    const Backward<T>& a, BackwardScratch<PAIRS>& s, int64_t b, int64_t h, int64_t first, int64_t from, int64_t n) {
  using U = typename Unit<PAIRS>::Type;
  constexpr int STEP = PAIRS ? 2 : 1, WIDE = VECTORS<LANES> * LANES;
  const Inputs<T>& in = *a.in;
  const int64_t left = in.layout.shared() - first, rows = left < BACKWARD_ROWS ? left : BACKWARD_ROWS;
  const int64_t rounded = round_up(rows, ROWS);  // a multiple of STEP
  const int64_t real = in.keys() - from < n ? in.keys() - from : n, whole = round_up(real, ROWS);
  const int d = in.d, columns = static_cast<int>(round_up(d, LANES));
  float lse[BACKWARD_ROWS], delta[BACKWARD_ROWS];  // in the scores' base, times the scale; of rows that are none 0

  for (int64_t r = 0; r < rounded; ++r) {
    lse[r] = delta[r] = 0;
    if (r < rows) {
      if (first + r + AHEAD < in.layout.shared()) {
        in.q.fetch(b, h, first + r + AHEAD, d);
        a.grad.fetch(b, h, first + r + AHEAD, d);
      }
      read_units<LANES, PAIRS>(in.q.row(b, h, first + r), in.q.channel, d, s.query + r * STRIDE);
      read_units<LANES, PAIRS>(a.grad.row(b, h, first + r), a.grad.channel, d, s.grad + r * STRIDE);
      lse[r] = a.lse[(b * in.heads + h) * in.layout.length() + first + r] * (PAIRS ? LOG2_E : 1.0f);
      delta[r] = s.delta[first + r] * in.scale;
    } else {
      __builtin_memset(s.query + r * STRIDE, 0, columns * sizeof(U));
      __builtin_memset(s.grad + r * STRIDE, 0, columns * sizeof(U));
    }
  }
  if constexpr (PAIRS) {
    for (int64_t r = 0; r < rounded; r += 2) {
      pair_units<LANES>(s.query + r * STRIDE, s.query + (r + 1) * STRIDE, d, s.query_pairs + r / 2 * STRIDE);
      pair_units<LANES>(s.grad + r * STRIDE, s.grad + (r + 1) * STRIDE, d, s.grad_pairs + r / 2 * STRIDE);
    }
  }

  for (int64_t k = 0; k < n; k += WIDE) {
    const int64_t width = n - k < WIDE ? n - k : WIDE;
    for (int64_t r = 0; r < rounded; r += ROWS)
      backward_tile_of<LANES, PAIRS>(width / LANES, a, s, b, h, first, r, from, k, lse + r, delta + r);
  }
  for (int64_t r = 0; r < rounded / STEP; ++r) {  // a tile of keys may end behind the last vector
    __builtin_memset(s.weights + r * BLOCK_STRIDE + n, 0, ROWS * sizeof(U));
    __builtin_memset(s.dscores + r * BLOCK_STRIDE + n, 0, ROWS * sizeof(U));
  }

  multiply_panels<LANES, PAIRS, BLOCK_STRIDE / STEP, 1>(
      s.dscore_rows, rounded, s.keys_packed, s.keys / STEP, from / STEP, n / STEP, columns, a.sums + first * columns,
      columns);
  for (int64_t k = 0; k < whole; k += ROWS) {
    const int64_t at = (from + k) * columns;
    multiply_rows<LANES, PAIRS, 1, BLOCK_STRIDE>(
        s.weights + k, s.grad_pairs, rounded / STEP, columns, s.dv + at, columns);
    multiply_rows<LANES, PAIRS, 1, BLOCK_STRIDE>(
        s.dscores + k, s.query_pairs, rounded / STEP, columns, s.dk + at, columns);
  }
}

template <int LANES, bool PAIRS, typename T>
FASTZS_INLINE void backward_part(const Backward<T>& a) {
  constexpr int STEP = PAIRS ? 2 : 1;
  const Inputs<T>& in = *a.in;
  const int64_t length = in.layout.length(), shared = in.layout.shared(), b = a.head / in.heads, h = a.head % in.heads;
  const int64_t keys = in.keys(), panels = round_up(keys, VECTORS<LANES> * LANES);
  const int64_t to = a.to < keys ? a.to : panels;  // the last part's, filled up
  const bool last = a.to >= keys, apart = in.apart;
  const int d = in.d, columns = static_cast<int>(round_up(d, LANES));
  BackwardScratch<PAIRS> s(a.memory, panels, in.prompts, columns, in.layout);
  pack_transposed<LANES, PAIRS>(in.keys_of(b, h), d, a.from, to, s.keys_turned);
  pack_transposed<LANES, PAIRS>(in.values_of(b, h), d, a.from, to, s.values_turned);
  pack_rows<LANES, PAIRS>(in.keys_of(b, h), d, panels / STEP, a.from / STEP, to / STEP, s.keys_packed);
  if (a.from == 0) __builtin_memset(a.sums, 0, (length + ROWS) * columns * sizeof(float));
  __builtin_memset(s.dk, 0, (in.prompts + length + ROWS) * columns * sizeof(float));
  __builtin_memset(s.dv, 0, (in.prompts + length + ROWS) * columns * sizeof(float));
  backward_bridge<LANES, PAIRS>(a, s, b, h);

  // Keys of one block stay in the cache for all rows. Where another thread waits for the rows, it gets them early.
  const bool alone = a.from == 0 && last;
  const int64_t end = last ? round_up(keys, LANES) : a.to, step = alone ? BACKWARD_KEYS : end - a.from;
  for (int64_t start = a.from; start < end; start += step)
    for (int64_t first = 0, done = 1; first < shared; first += BACKWARD_ROWS, ++done) {
      if (a.before != nullptr) wait_for(a.before, done);
      for (int64_t from = start; from < start + step && from < end; from += BACKWARD_KEYS)
        backward_block<LANES, PAIRS>(a, s, b, h, first, from, end - from < BACKWARD_KEYS ? end - from : BACKWARD_KEYS);
      if (a.finished != nullptr) __atomic_store_n(a.finished, done, __ATOMIC_RELEASE);
    }

  for (int64_t n = 0; last && n < length; ++n)
    write<LANES>(a.sums + n * columns, 1.0f, d, a.dq + ((b * length + n) * in.heads + h) * d);
  // The last part has the bridge tokens, too.
  for (int64_t n = a.from; n < (last ? apart ? keys : in.prompts + length : a.to); ++n) {
    const float *dk = s.dk + n * columns, *dv = s.dv + n * columns;
    if (n < in.prompts && !apart) {
      const int64_t at = (a.head * in.prompts + n) * d;
      __builtin_memcpy(a.dprompt_k + at, dk, d * sizeof(float));
      __builtin_memcpy(a.dprompt_v + at, dv, d * sizeof(float));
    } else {
      const int64_t token = apart ? n : n - in.prompts, tokens = apart ? in.prompts : length;
      const int64_t at = ((b * tokens + token) * in.heads + h) * d;
      write<LANES>(dk, 1.0f, d, a.dk + at);
      write<LANES>(dv, 1.0f, d, a.dv + at);
    }
  }
}

template <int LANES, typename T>
FASTZS_INLINE void backward_floats(const Backward<T>& a) {
  backward_part<LANES, false>(a);
}

FASTZS_MULTIVERSION(run_backward, backward_floats, Backward<float>)
FASTZS_MULTIVERSION(run_backward, backward_floats, Backward<BFloat16>)
FASTZS_MULTIVERSION(run_backward, backward_floats, Backward<Half>)

// ---- with the instruction that multiplies pairs of bf16 numbers ---------------------------------------------------

#if FASTZS_X86_ASM
FASTZS_BF16_PAIRS void run_backward_pairs(const Backward<BFloat16>& a) { backward_part<16, true>(a); }
#else
void run_backward_pairs(const Backward<BFloat16>& a) { run_backward(Isa::portable, a); }
#endif

template <typename T>
void run(Isa isa, const Backward<T>& a) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (has_pairs(isa)) return run_backward_pairs(a);
  }
  run_backward(isa, a);
}

}  // namespace

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
  Tensor dq = torch::stable::new_empty(q, {B, L, H, d}), dk = torch::stable::new_empty(q, {B, keys, H, d}), dv = torch::stable::new_empty(q, {B, keys, H, d});
  Tensor dprompt_k = torch::stable::new_empty(q, {B, H, others, d}, ScalarType::Float);
  Tensor dprompt_v = torch::stable::new_empty(q, {B, H, others, d}, ScalarType::Float);
  dispatch_floating(q, call.op, [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    const Inputs<T> in = call.inputs<T>({});
    const Isa isa = cpu_isa();
    const int64_t heads = B * H, size = keys_of_a_part(heads, in.layout.shared(), in.keys(), torch::stable::get_num_threads());
    const int64_t parts = std::max<int64_t>((in.keys() + size - 1) / size, 1), sums = sums_memory(in);
    const Floats all_sums(parts > 1 ? heads * sums : 0);
    std::vector<int64_t> finished(parts > 1 ? heads * parts : 0);
    share_out(heads * parts, [&](Queue& queue) {
      const Floats memory(backward_memory(in)), own_sums(parts > 1 ? 0 : sums);
      for (int64_t i; queue.next(i);) {
        const int64_t head = i / parts, part = i % parts;
        run(isa, Backward<T>{
            &in, operand<T>(grad), operand<T>(out), static_cast<const float*>(lse.const_data_ptr()), data<T>(dq),
            data<T>(dk), data<T>(dv), data<float>(dprompt_k), data<float>(dprompt_v), head, part * size,
            part + 1 < parts ? (part + 1) * size : INT64_MAX, parts > 1 ? all_sums.data() + head * sums : own_sums.data(),
            part > 0 ? &finished[i - 1] : nullptr, parts > 1 ? &finished[i] : nullptr, memory.data()});
      }
    });
  });
  return {torch::stable::transpose(dq, 1, 2), torch::stable::transpose(dk, 1, 2), torch::stable::transpose(dv, 1, 2), dprompt_k, dprompt_v};
}

}  // namespace fastzs::attention
