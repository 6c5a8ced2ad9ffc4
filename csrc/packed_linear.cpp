// packed_linear on the CPU: one or two linear layers with what stands around them, in int8, bf16 or fp32.
//
// A thread takes a block of rows through everything: layer norm, rounding to the units that are multiplied (of int8 with
// a scale per row), the product with all outputs, activation, the second layer, residual, layer norm. What lies between
// never leaves its caches.
#include "linear_rows.h"

#include <algorithm>
#include <optional>
#include <type_traits>

namespace fastzs {
namespace {

using namespace linear;
using torch::headeronly::BFloat16;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Layer {
  const void* weight;  // see linear_tiles.h
  const float *bias, *scale, *sum;  // [outputs up to whole panels]; int8: of a weight's unit, and the sum of its bytes
  int64_t inputs, outputs, activation;

  int64_t padded() const { return round_up(outputs, PANEL); }
};

template <typename T, typename O>
struct Job {
  const T* x;         // [rows, inputs of the first layer]
  const O* residual;  // [rows, outputs of the last layer], or null
  O* out;
  void* hidden;  // null, or [rows, outputs of the first layer] before its activation, fp32 or bf16 as the weights:
  bool slopes;   // written; or given, and the first layer's results are multiplied by the activation's slopes there
  int64_t rows, block_rows, layers;  // block_rows: at most, a multiple of ROWS
  Layer layer[2];
  Norm before, after;
  const O* normed;  // null, or [rows, outputs of the last layer]: results are gradients of the norm `after` of these
};

template <typename T, typename O>
struct Blocks {
  const Job<T, O>* job;
  int64_t begin, end;  // of the tiles, ROWS rows each
  float* memory;
};
using OfFloats = Blocks<float, float>;
using OfPairs = Blocks<BFloat16, BFloat16>;
using Narrowing = Blocks<float, BFloat16>;
using Widening = Blocks<BFloat16, float>;

// Of a row of units: not a power of two, whose lines would collide.
int64_t unit_stride(int64_t inputs, int step) { return round_up((inputs + step - 1) / step, 16) + 16; }

// How much memory a thread wants, in floats.
template <typename T, typename O>
int64_t memory_of(const Job<T, O>& job, int step) {
  int64_t count = round_up(std::max(job.layer[0].inputs, job.layer[job.layers - 1].outputs), 16) + job.block_rows * PANEL + job.block_rows;
  for (int64_t i = 0; i < job.layers; ++i) {
    count += job.block_rows * (unit_stride(job.layer[i].inputs, step) + job.layer[i].padded() + 16);
  }
  return count + 8 * 16;
}

// Rows of units times a layer, a panel of outputs at a time; give(r, n, values, left) gets a vector of what comes out,
// before the activation.
template <int LANES, Kind KIND, bool NATIVE, typename Give>
FASTZS_INLINE void apply(
    const Layer& layer, const typename Product<LANES, KIND, NATIVE>::Unit* units, int64_t stride, int64_t rows,
    const float* scales, float* sums, const Give& give) {
  using V = Simd<LANES>;
  using Unit = typename Product<LANES, KIND, NATIVE>::Unit;
  const int64_t rounded = round_up(rows, ROWS), depth = (layer.inputs + STEP<KIND> - 1) / STEP<KIND>;
  const auto* weight = static_cast<const Unit*>(layer.weight);
  for (int64_t n = 0; n < layer.outputs; n += PANEL) {
    int32_t start[PANEL] = {};
    if constexpr (KIND == Kind::bytes)  // a row's bytes are 128 too large
      for (int c = 0; c < PANEL; ++c) start[c] = -128 * static_cast<int32_t>(layer.sum[n + c]);
    const int columns = layer.outputs - n < PANEL ? static_cast<int>(layer.outputs - n) : PANEL;
    const auto finish = [&](int64_t tile) FASTZS_INLINE_LAMBDA {
      const int64_t end = rows - tile < ROWS ? rows : tile + ROWS;
      for (int64_t r = tile; r < end; ++r) {
        for (int c = 0; c < columns; c += LANES) {
          typename V::F y;
          if constexpr (KIND == Kind::bytes) {
            typename V::I sum;
            __builtin_memcpy(&sum, sums + r * PANEL + c, sizeof sum);
            y = __builtin_convertvector(sum, typename V::F) * (V::load(layer.scale + n + c) * scales[r]);
          } else {
            y = V::load(sums + r * PANEL + c);
          }
          give(r, n + c, y + V::load(layer.bias + n + c), columns - c);
        }
      }
    };
    multiply<LANES, KIND, NATIVE>(
        units, stride, rounded, weight + n * depth, depth, reinterpret_cast<const char*>(start),
        reinterpret_cast<char*>(sums), finish);
  }
}

template <int LANES, Kind KIND, bool NATIVE, bool ROUNDS, typename T, typename O>
FASTZS_INLINE void take_blocks(const Blocks<T, O>& a) {
  using V = Simd<LANES>;
  using F = typename V::F;
  using Unit = typename Product<LANES, KIND, NATIVE>::Unit;
  constexpr bool ROUGH = KIND != Kind::floats;
  using Hidden = std::conditional_t<KIND == Kind::pairs, BFloat16, float>;
  const Job<T, O>& job = *a.job;
  const Layer &first = job.layer[0], &last = job.layer[job.layers - 1];
  const int64_t stride = unit_stride(first.inputs, STEP<KIND>), last_stride = unit_stride(last.inputs, STEP<KIND>);
  const int64_t wide = last.padded() + 16, hidden_wide = first.padded() + 16;
  float* memory = a.memory;
  float* row = take(memory, round_up(first.inputs > last.outputs ? first.inputs : last.outputs, 16));
  float* sums = take(memory, job.block_rows * PANEL);
  float* scales = take(memory, job.block_rows);
  auto* units = reinterpret_cast<Unit*>(take(memory, job.block_rows * stride));
  float* results = take(memory, job.block_rows * wide);  // for a layer norm
  auto* hidden_units = reinterpret_cast<Unit*>(job.layers == 2 ? take(memory, job.block_rows * last_stride) : nullptr);
  float* hidden = job.layers == 2 ? take(memory, job.block_rows * hidden_wide) : nullptr;

  const int64_t tiles = a.end - a.begin, most = job.block_rows / ROWS, blocks = (tiles + most - 1) / most;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t at = (a.begin + tiles * block / blocks) * ROWS, end = (a.begin + tiles * (block + 1) / blocks) * ROWS;
    const int64_t rows = (end < job.rows ? end : job.rows) - at;
    for (int64_t r = rows; r < round_up(rows, ROWS); ++r) {
      __builtin_memset(units + r * stride, 0, stride * sizeof(Unit));
      if (job.layers == 2) __builtin_memset(hidden_units + r * last_stride, 0, last_stride * sizeof(Unit));
    }
    for (int64_t r = 0; r < rows; ++r) {
      const T* x = job.x + (at + r) * first.inputs;
      for (int64_t k = 0; k < first.inputs; k += LANES)
        V::store(row + k, V::load(x + k, 1, first.inputs - k), first.inputs - k);
      if (job.before.weight != nullptr) normalise<LANES>(row, first.inputs, job.before);
      scales[r] = to_units<LANES, KIND, ROUNDS>(row, first.inputs, units + r * stride);
    }
    if (job.layers == 2) {
      apply<LANES, KIND, NATIVE>(first, units, stride, rows, scales, sums, [&](int64_t r, int64_t n, F y, int64_t count) FASTZS_INLINE_LAMBDA {
        Hidden* kept = job.hidden == nullptr ? nullptr : static_cast<Hidden*>(job.hidden) + (at + r) * first.outputs + n;
        if (job.slopes) {
          y *= slope<LANES, ROUGH>(V::load(kept, 1, count), first.activation);
        } else {
          if (kept != nullptr) put<LANES, ROUNDS>(kept, y, count);
          y = activate<LANES, ROUGH>(y, first.activation);
        }
        if constexpr (KIND == Kind::bytes) {  // the row's largest number must be known
          V::store(hidden + r * hidden_wide + n, y);
        } else {
          put<LANES, ROUNDS>(reinterpret_cast<Hidden*>(hidden_units + r * last_stride) + n, y);
        }
      });
      if constexpr (KIND == Kind::bytes) {
        for (int64_t r = 0; r < rows; ++r)
          scales[r] = to_units<LANES, KIND, ROUNDS>(hidden + r * hidden_wide, last.inputs, hidden_units + r * last_stride);
      }
    }
    const Unit* from = job.layers == 2 ? hidden_units : units;
    apply<LANES, KIND, NATIVE>(
        last, from, last_stride, rows, scales, sums, [&](int64_t r, int64_t n, F y, int64_t count) FASTZS_INLINE_LAMBDA {
          const int64_t to = (at + r) * last.outputs + n;
          y = activate<LANES, ROUGH>(y, last.activation);
          if (job.residual != nullptr && job.normed == nullptr) y += V::load(job.residual + to, 1, count);
          if (job.after.weight != nullptr) {
            V::store(results + r * wide + n, y);
          } else {
            put<LANES, ROUNDS>(job.out + to, y, count);
          }
        });
    if (job.after.weight == nullptr) continue;
    for (int64_t r = 0; r < rows; ++r) {
      float* result = results + r * wide;
      const int64_t to = (at + r) * last.outputs;
      if (job.normed == nullptr) {
        normalise<LANES>(result, last.outputs, job.after);
      } else {
        for (int64_t n = 0; n < last.outputs; n += LANES)
          V::store(row + n, V::load(job.normed + to + n, 1, last.outputs - n), last.outputs - n);
        normalise_backward<LANES>(result, row, last.outputs, job.after);
      }
      for (int64_t n = 0; n < last.outputs; n += LANES) {
        const int64_t left = last.outputs - n;
        auto y = V::load(result + n, 1, left);
        if (job.residual != nullptr && job.normed != nullptr) y += V::load(job.residual + to + n, 1, left);
        put<LANES, ROUNDS>(job.out + to + n, y, left);
      }
    }
  }
}

template <int LANES, typename Blocks>
FASTZS_INLINE void floats_anywhere(const Blocks& a) {
  take_blocks<LANES, Kind::floats, false, false>(a);
}
template <int LANES, typename Blocks>
FASTZS_INLINE void pairs_anywhere(const Blocks& a) {
  take_blocks<LANES, Kind::pairs, false, false>(a);
}
template <int LANES, typename Blocks>
FASTZS_INLINE void bytes_anywhere(const Blocks& a) {
  take_blocks<LANES, Kind::bytes, false, false>(a);
}
FASTZS_MULTIVERSION(run_floats, floats_anywhere, OfFloats)
FASTZS_MULTIVERSION(run_floats, floats_anywhere, OfPairs)
FASTZS_MULTIVERSION(run_pairs, pairs_anywhere, OfFloats)
FASTZS_MULTIVERSION(run_pairs, pairs_anywhere, OfPairs)
FASTZS_MULTIVERSION(run_pairs, pairs_anywhere, Narrowing)
FASTZS_MULTIVERSION(run_pairs, pairs_anywhere, Widening)
FASTZS_MULTIVERSION(run_bytes, bytes_anywhere, OfFloats)
FASTZS_MULTIVERSION(run_bytes, bytes_anywhere, OfPairs)

#if FASTZS_X86_ASM
#define FASTZS_VNNI_512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")))
#define FASTZS_VNNI_BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma")))
#define FASTZS_VNNI_256 __attribute__((target("avx2,fma,avxvnni")))
FASTZS_VNNI_512 void run_wide_bytes(const OfFloats& a) { take_blocks<16, Kind::bytes, true, false>(a); }
FASTZS_VNNI_512 void run_wide_bytes(const OfPairs& a) { take_blocks<16, Kind::bytes, true, false>(a); }
FASTZS_VNNI_BF16 void run_rounding_bytes(const OfPairs& a) { take_blocks<16, Kind::bytes, true, true>(a); }
FASTZS_VNNI_256 void run_narrow_bytes(const OfFloats& a) { take_blocks<8, Kind::bytes, true, false>(a); }
FASTZS_VNNI_256 void run_narrow_bytes(const OfPairs& a) { take_blocks<8, Kind::bytes, true, false>(a); }
FASTZS_BF16_PAIRS void run_native_pairs(const OfFloats& a) { take_blocks<16, Kind::pairs, true, true>(a); }
FASTZS_BF16_PAIRS void run_native_pairs(const OfPairs& a) { take_blocks<16, Kind::pairs, true, true>(a); }
FASTZS_BF16_PAIRS void run_native_pairs(const Narrowing& a) { take_blocks<16, Kind::pairs, true, true>(a); }
FASTZS_BF16_PAIRS void run_native_pairs(const Widening& a) { take_blocks<16, Kind::pairs, true, true>(a); }
#endif

template <typename T, typename O>
void run(Isa isa, Kind kind, const Blocks<T, O>& a) {
#if FASTZS_X86_ASM
  if (kind == Kind::pairs && has_pairs(isa)) return run_native_pairs(a);
#endif
  if (kind == Kind::pairs) return run_pairs(isa, a);
  if constexpr (std::is_same_v<T, O>) {
#if FASTZS_X86_ASM
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (kind == Kind::bytes && has_pairs(isa)) return run_rounding_bytes(a);
    }
    if (kind == Kind::bytes && isa >= Isa::avx512_vnni) return run_wide_bytes(a);
    if (kind == Kind::bytes && isa == Isa::avx2_vnni) return run_narrow_bytes(a);
#endif
    if (kind == Kind::floats) return run_floats(isa, a);
    run_bytes(isa, a);
  }
}

// ---- operator -----------------------------------------------------------------------------------------------------

Kind kind_of(const Tensor& weight) {
  switch (weight.scalar_type()) {
    case ScalarType::Float: return Kind::floats;
    case ScalarType::BFloat16: return Kind::pairs;
    case ScalarType::Char: return Kind::bytes;
    default: STD_TORCH_CHECK(false, "packed_linear: expected weights in float32, bfloat16 or int8, got ", describe(weight));
  }
}

Layer layer_of(const Tensor& weight, const Tensor& columns, int64_t inputs, int64_t outputs, int64_t activation) {
  const int step = static_cast<int>(4 / weight.element_size());
  const int64_t padded = round_up(outputs, PANEL), bytes = weight.scalar_type() == ScalarType::Char;
  STD_TORCH_CHECK(outputs > 0 && inputs > 0 && weight.is_contiguous() && weight.dim() == 4 &&
      weight.size(0) == padded / PANEL && weight.size(1) == (inputs + step - 1) / step && weight.size(2) == PANEL &&
      weight.size(3) == step, "packed_linear: the weights are not packed for ", inputs, " inputs and ", outputs, " outputs");
  STD_TORCH_CHECK(columns.is_contiguous() && columns.scalar_type() == ScalarType::Float && columns.dim() == 2 &&
      columns.size(0) == (bytes ? 3 : 1) && columns.size(1) == padded, "packed_linear: columns do not fit the weights");
  STD_TORCH_CHECK(!bytes || inputs <= 65536, "packed_linear: int8 sums hold 65536 inputs, got ", inputs);
  const float* of = columns.const_data_ptr<float>();
  return {weight.const_data_ptr(), of, bytes ? of + padded : nullptr, bytes ? of + 2 * padded : nullptr, inputs,
      outputs, activation};
}

Norm norm_of(const std::optional<Tensor>& norm, double eps, int64_t channels) {
  if (!norm.has_value()) return {nullptr, nullptr, 0};
  STD_TORCH_CHECK(norm->is_contiguous() && norm->scalar_type() == ScalarType::Float && norm->dim() == 2 &&
      norm->size(0) == 2 && norm->size(1) == channels, "packed_linear: a norm is not fp32 [2, ", channels, "]");
  const float* of = norm->const_data_ptr<float>();
  return {of, of + channels, static_cast<float>(eps)};
}

// What a call of an operator asks for, checked.
struct Call {
  Tensor x;
  std::optional<Tensor> residual;
  Kind kind;
  int64_t layers;
  Layer layer[2];
  Norm before, after;
  bool wide;  // results in fp32, else in bf16
  std::optional<Tensor> normed;
  void* hidden = nullptr;
  bool slopes = false;

  int64_t outputs() const { return layer[layers - 1].outputs; }
};

template <typename T, typename O>
void compute(const Call& call, Tensor& out) {
  Job<T, O> job{};
  job.x = static_cast<const T*>(call.x.const_data_ptr());
  job.residual = call.residual.has_value() ? static_cast<const O*>(call.residual->const_data_ptr()) : nullptr;
  job.normed = call.normed.has_value() ? static_cast<const O*>(call.normed->const_data_ptr()) : nullptr;
  job.out = static_cast<O*>(out.mutable_data_ptr());
  job.hidden = call.hidden, job.slopes = call.slopes;
  job.rows = call.x.size(0), job.layers = call.layers;
  job.layer[0] = call.layer[0], job.layer[1] = call.layer[1];
  job.before = call.before, job.after = call.after;
  // A block's rows share the reading of the weights. Threads share out the tiles: they wait for each other's last.
  const int64_t tiles = (job.rows + ROWS - 1) / ROWS;
  job.block_rows = std::min(tiles * ROWS, BLOCK_ROWS);
  const int step = call.kind == Kind::floats ? STEP<Kind::floats> : call.kind == Kind::pairs ? STEP<Kind::pairs> : STEP<Kind::bytes>;
  const Isa isa = cpu_isa();
  torch::stable::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    const Floats memory(memory_of(job, step));
    run(isa, call.kind, Blocks<T, O>{&job, begin, end, memory.data()});
  });
}

Tensor run_call(const Call& call) {
  const Tensor& x = call.x;
  const bool floats = x.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous(),
      "packed_linear: expected contiguous x [rows, inputs], got ", describe(x));
  STD_TORCH_CHECK(floats || x.scalar_type() == ScalarType::BFloat16,
      "packed_linear: expected x in float32 or bfloat16, got ", describe(x));
  STD_TORCH_CHECK(floats == call.wide || call.kind == Kind::pairs,
      "packed_linear: only products of bfloat16 give another dtype than that of x");
  const ScalarType type = call.wide ? ScalarType::Float : ScalarType::BFloat16;
  for (const auto* given : {&call.residual, &call.normed})
    STD_TORCH_CHECK(!given->has_value() || ((*given)->is_contiguous() && (*given)->scalar_type() == type &&
        (*given)->dim() == 2 && (*given)->size(0) == x.size(0) && (*given)->size(1) == call.outputs()),
        "packed_linear: the residual, or what was normalised, is not contiguous [", x.size(0), ", ", call.outputs(),
        "] in the dtype of the results");
  Tensor out = torch::stable::new_empty(x, {x.size(0), call.outputs()}, type);
  if (floats && call.wide) compute<float, float>(call, out);
  if (floats && !call.wide) compute<float, BFloat16>(call, out);
  if (!floats && call.wide) compute<BFloat16, float>(call, out);
  if (!floats && !call.wide) compute<BFloat16, BFloat16>(call, out);
  return out;
}

Tensor packed_linear(
    const Tensor& x, const std::optional<Tensor>& before, double before_eps, const Tensor& weight,
    const Tensor& columns, int64_t outputs, int64_t activation, const std::optional<Tensor>& weight2,
    const std::optional<Tensor>& columns2, int64_t outputs2, const std::optional<Tensor>& residual,
    const std::optional<Tensor>& after, double after_eps, bool wide) {
  const bool two = weight2.has_value();
  STD_TORCH_CHECK(two == columns2.has_value() && (!two || weight2->scalar_type() == weight.scalar_type()),
      "packed_linear: the second layer is not as the first");
  const int64_t inputs = x.size(1);
  Call call{x, residual, kind_of(weight), two ? 2 : 1};
  call.layer[0] = layer_of(weight, columns, inputs, outputs, activation);
  if (two) call.layer[1] = layer_of(*weight2, *columns2, outputs, outputs2, NONE);
  call.before = norm_of(before, before_eps, inputs), call.after = norm_of(after, after_eps, call.outputs());
  call.wide = wide;
  return run_call(call);
}

// Two layers in training; `hidden` is what lies between, before its activation.
Call mlp_of(
    const Tensor& x, const Tensor& weight, const Tensor& columns, int64_t outputs, int64_t activation,
    const Tensor& weight2, const Tensor& columns2, int64_t outputs2, const Tensor& hidden) {
  const Kind kind = kind_of(weight);
  STD_TORCH_CHECK(kind != Kind::bytes && kind_of(weight2) == kind,
      "packed_mlp: expected float32 or bfloat16 weights of one dtype, got ", describe(weight), " and ", describe(weight2));
  Call call{x, std::nullopt, kind, 2};
  call.layer[0] = layer_of(weight, columns, x.size(1), outputs, activation);
  call.layer[1] = layer_of(weight2, columns2, outputs, outputs2, NONE);
  call.wide = x.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(hidden.is_contiguous() && hidden.dim() == 2 && hidden.size(0) == x.size(0) &&
      hidden.size(1) == outputs && hidden.scalar_type() == weight.scalar_type(),
      "packed_mlp: the hidden layer is not contiguous [", x.size(0), ", ", outputs, "] in the dtype of the weights");
  call.hidden = hidden.mutable_data_ptr();
  return call;
}

std::tuple<Tensor, Tensor> packed_mlp(
    const Tensor& x, const Tensor& norm, double eps, const Tensor& weight, const Tensor& columns, int64_t outputs,
    int64_t activation, const Tensor& weight2, const Tensor& columns2) {
  Tensor hidden = torch::stable::new_empty(x, {x.size(0), outputs}, weight.scalar_type());
  Call call = mlp_of(x, weight, columns, outputs, activation, weight2, columns2, x.size(1), hidden);
  call.before = norm_of(norm, eps, x.size(1)), call.residual = x;
  return {run_call(call), hidden};
}

// The gradient of x: a layer norm's, which came first, and that of the residual.
Tensor packed_mlp_backward(
    const Tensor& grad, const Tensor& x, const Tensor& norm, double eps, const Tensor& hidden, const Tensor& weight,
    const Tensor& columns, int64_t activation, const Tensor& weight2, const Tensor& columns2) {
  Call call = mlp_of(grad, weight, columns, hidden.size(1), activation, weight2, columns2, grad.size(1), hidden);
  call.slopes = true, call.residual = grad;
  call.normed = x, call.after = norm_of(norm, eps, grad.size(1));
  return run_call(call);
}

// The gradient of x, of that of packed_linear(x, before = the norm, the weights).
Tensor packed_linear_backward(
    const Tensor& grad, const Tensor& x, const Tensor& norm, double eps, const Tensor& weight, const Tensor& columns) {
  Call call{grad, std::nullopt, kind_of(weight), 1};
  call.layer[0] = layer_of(weight, columns, grad.size(1), x.size(1), NONE);
  call.wide = x.scalar_type() == ScalarType::Float;
  call.normed = x, call.after = norm_of(norm, eps, x.size(1));
  return run_call(call);
}

}  // namespace
}  // namespace fastzs

STABLE_TORCH_LIBRARY_FRAGMENT(fastzs, m) {
  m.def(
      "packed_linear(Tensor x, Tensor? before, float before_eps, Tensor weight, Tensor columns, int outputs, "
      "int activation, Tensor? weight2, Tensor? columns2, int outputs2, Tensor? residual, Tensor? after, "
      "float after_eps, bool wide) -> Tensor");
  m.def(
      "packed_mlp(Tensor x, Tensor norm, float eps, Tensor weight, Tensor columns, int outputs, int activation, "
      "Tensor weight2, Tensor columns2) -> (Tensor out, Tensor hidden)");
  m.def(
      "packed_mlp_backward(Tensor grad, Tensor x, Tensor norm, float eps, Tensor hidden, Tensor weight, "
      "Tensor columns, int activation, Tensor weight2, Tensor columns2) -> Tensor");
  m.def(
      "packed_linear_backward(Tensor grad, Tensor x, Tensor norm, float eps, Tensor weight, Tensor columns) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastzs, CPU, m) {
  m.impl("packed_linear", TORCH_BOX(&fastzs::packed_linear));
  m.impl("packed_mlp", TORCH_BOX(&fastzs::packed_mlp));
  m.impl("packed_mlp_backward", TORCH_BOX(&fastzs::packed_mlp_backward));
  m.impl("packed_linear_backward", TORCH_BOX(&fastzs::packed_linear_backward));
}
