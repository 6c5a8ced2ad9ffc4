// packed_linear on the CPU: one or two linear layers with what stands around them, in int8, bf16 or fp32.
//
// A thread takes a block of rows through everything: layer norm, rounding to the units that are multiplied (of int8 with
// a scale per row), the product with all outputs, activation, the second layer, residual, layer norm. What lies between
// never leaves its caches.
#include "linear_tiles.h"

#include <algorithm>
#include <optional>
#include <type_traits>

namespace fastzs {
namespace {

using namespace linear;
using torch::headeronly::BFloat16;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum Activation : int64_t { NONE, RELU, QUICK_GELU, GELU, GELU_TANH };

struct Layer {
  const void* weight;  // see linear_tiles.h
  const float *bias, *scale, *sum;  // [outputs up to whole panels]; int8: of a weight's unit, and the sum of its bytes
  int64_t inputs, outputs, activation;

  int64_t padded() const { return round_up(outputs, PANEL); }
};

struct Norm {
  const float *weight, *bias;  // [channels]; null for none
  float eps;
};

template <typename T>
struct Job {
  const T *x, *residual;  // [rows, inputs of the first layer], [rows, outputs of the last] or null
  T* out;
  int64_t rows, block_rows, layers;
  Layer layer[2];
  Norm before, after;
};

template <typename T>
struct Blocks {
  const Job<T>* job;
  int64_t begin, end;
  float* memory;
};

// Of a row of units: not a power of two, whose lines would collide.
int64_t unit_stride(int64_t inputs, int step) { return round_up((inputs + step - 1) / step, 16) + 16; }

// How much memory a thread wants, in floats.
template <typename T>
int64_t memory_of(const Job<T>& job, int step) {
  int64_t count = round_up(job.layer[0].inputs, 16) + job.block_rows * PANEL + job.block_rows;
  for (int64_t i = 0; i < job.layers; ++i) {
    count += job.block_rows * (unit_stride(job.layer[i].inputs, step) + job.layer[i].padded() + 16);
  }
  return count + 8 * 16;
}

template <int LANES>
FASTZS_INLINE typename Simd<LANES>::F activate(typename Simd<LANES>::F x, int64_t activation) {
  using V = Simd<LANES>;
  using F = typename V::F;
  if (activation == RELU) return x < 0.0f ? F{} : x;  // NaN stays
  if (activation == QUICK_GELU || activation == GELU_TANH) {  // x sigmoid(z), for 0.5 (1 + tanh(z / 2)) is sigmoid(z)
    const F z = activation == QUICK_GELU ? x * 1.702f : x * (x * x * 0.0713548162f + 1.59576912f);
    const F e = V::exp_negative(z < 0.0f ? z : -z);
    return x * (z < 0.0f ? e : F{} + 1.0f) / (e + 1.0f);
  }
  if (activation == GELU) {  // erf by Abramowitz and Stegun 7.1.26: within 1.5e-7
    const F z = x * 0.707106781f, size = z < 0.0f ? -z : z, t = 1.0f / (size * 0.3275911f + 1.0f);
    F p = t * 1.061405429f + -1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t + -0.284496736f;
    p = (p * t + 0.254829592f) * t;
    const F tail = p * V::exp_negative(-size * size);  // 1 - erf(size)
    return x * 0.5f * (z < 0.0f ? tail : 2.0f - tail);
  }
  return x;
}

// A row [n] is replaced by its layer norm; what it has beyond n up to whole vectors may be anything.
template <int LANES>
FASTZS_INLINE void normalise(float* row, int64_t n, const Norm& norm) {
  using V = Simd<LANES>;
  auto total = V::splat(0.0f), squares = total;
  for (int64_t k = 0; k < n; k += LANES) total += V::load(row + k, 1, n - k);
  const float mean = V::sum(total) / n;
  for (int64_t k = 0; k < n; k += LANES) {
    auto x = V::load(row + k, 1, n - k) - mean;
    if (n - k < LANES) x = (typename V::F)((typename V::I)x & V::first(static_cast<int>(n - k)));
    squares += x * x;
  }
  const float scale = 1.0f / __builtin_sqrtf(V::sum(squares) / n + norm.eps);
  for (int64_t k = 0; k < n; k += LANES) {
    const int64_t left = n - k;
    const auto x = (V::load(row + k, 1, left) - mean) * scale;
    V::store(row + k, x * V::load(norm.weight + k, 1, left) + V::load(norm.bias + k, 1, left), left);
  }
}

// A row of floats [n] as units, filled up with zeros to a whole one. Returns the scale of a byte, NaN if a number is
// not finite.
template <int LANES, Kind KIND, typename Unit>
FASTZS_INLINE float to_units(const float* row, int64_t n, Unit* out) {
  using V = Simd<LANES>;
  if constexpr (KIND == Kind::floats) {
    __builtin_memcpy(out, row, n * sizeof(float));
    return 1.0f;
  } else if constexpr (KIND == Kind::pairs) {
    auto* to = reinterpret_cast<BFloat16*>(out);
    out[(n - 1) / 2] = 0;
    for (int64_t k = 0; k < n; k += LANES) V::store(to + k, V::load(row + k, 1, n - k), n - k);
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

// Rows of units times a layer, a panel of outputs at a time; put(r, n, values, left) gets a vector of what comes out.
template <int LANES, Kind KIND, bool NATIVE, typename Put>
FASTZS_INLINE void apply(
    const Layer& layer, const typename Product<LANES, KIND, NATIVE>::Unit* units, int64_t stride, int64_t rows,
    const float* scales, float* sums, const Put& put) {
  using V = Simd<LANES>;
  using Unit = typename Product<LANES, KIND, NATIVE>::Unit;
  const int64_t rounded = round_up(rows, ROWS), depth = (layer.inputs + STEP<KIND> - 1) / STEP<KIND>;
  const auto* weight = static_cast<const Unit*>(layer.weight);
  for (int64_t n = 0; n < layer.outputs; n += PANEL) {
    if constexpr (KIND == Kind::bytes) {
      int32_t start[PANEL];  // a row's bytes are 128 too large
      for (int c = 0; c < PANEL; ++c) start[c] = -128 * static_cast<int32_t>(layer.sum[n + c]);
      for (int64_t r = 0; r < rounded; ++r) __builtin_memcpy(sums + r * PANEL, start, sizeof start);
    } else {
      __builtin_memset(sums, 0, rounded * PANEL * sizeof(float));
    }
    multiply<LANES, KIND, NATIVE>(units, stride, rounded, weight + n * depth, depth, reinterpret_cast<char*>(sums));
    const int columns = layer.outputs - n < PANEL ? static_cast<int>(layer.outputs - n) : PANEL;
    for (int64_t r = 0; r < rows; ++r) {
      for (int c = 0; c < columns; c += LANES) {
        typename V::F y;
        if constexpr (KIND == Kind::bytes) {
          typename V::I sum;
          __builtin_memcpy(&sum, sums + r * PANEL + c, sizeof sum);
          y = __builtin_convertvector(sum, typename V::F) * (V::load(layer.scale + n + c) * scales[r]);
        } else {
          y = V::load(sums + r * PANEL + c);
        }
        put(r, n + c, activate<LANES>(y + V::load(layer.bias + n + c), layer.activation), columns - c);
      }
    }
  }
}

template <int LANES, Kind KIND, bool NATIVE, typename T>
FASTZS_INLINE void take_blocks(const Blocks<T>& a) {
  using V = Simd<LANES>;
  using F = typename V::F;
  using Unit = typename Product<LANES, KIND, NATIVE>::Unit;
  const Job<T>& job = *a.job;
  const Layer &first = job.layer[0], &last = job.layer[job.layers - 1];
  const int64_t stride = unit_stride(first.inputs, STEP<KIND>), last_stride = unit_stride(last.inputs, STEP<KIND>);
  const int64_t wide = last.padded() + 16, hidden_wide = first.padded() + 16;
  float* memory = a.memory;
  float* row = take(memory, round_up(first.inputs, 16));
  float* sums = take(memory, job.block_rows * PANEL);
  float* scales = take(memory, job.block_rows);
  auto* units = reinterpret_cast<Unit*>(take(memory, job.block_rows * stride));
  float* results = take(memory, job.block_rows * wide);  // wanted for a layer norm
  auto* hidden_units = reinterpret_cast<Unit*>(job.layers == 2 ? take(memory, job.block_rows * last_stride) : nullptr);
  float* hidden = job.layers == 2 ? take(memory, job.block_rows * hidden_wide) : nullptr;

  for (int64_t block = a.begin; block < a.end; ++block) {
    const int64_t at = block * job.block_rows, left = job.rows - at, rows = left < job.block_rows ? left : job.block_rows;
    for (int64_t r = rows; r < round_up(rows, ROWS); ++r) {
      __builtin_memset(units + r * stride, 0, stride * sizeof(Unit));
      if (job.layers == 2) __builtin_memset(hidden_units + r * last_stride, 0, last_stride * sizeof(Unit));
    }
    for (int64_t r = 0; r < rows; ++r) {
      const T* x = job.x + (at + r) * first.inputs;
      for (int64_t k = 0; k < first.inputs; k += LANES)
        V::store(row + k, V::load(x + k, 1, first.inputs - k), first.inputs - k);
      if (job.before.weight != nullptr) normalise<LANES>(row, first.inputs, job.before);
      scales[r] = to_units<LANES, KIND>(row, first.inputs, units + r * stride);
    }
    if (job.layers == 2) {
      apply<LANES, KIND, NATIVE>(first, units, stride, rows, scales, sums, [&](int64_t r, int64_t n, F y, int64_t) FASTZS_INLINE_LAMBDA {
        if constexpr (KIND == Kind::bytes) {  // the row's largest number must be known
          V::store(hidden + r * hidden_wide + n, y);
        } else if constexpr (KIND == Kind::pairs) {
          V::store(reinterpret_cast<BFloat16*>(hidden_units + r * last_stride) + n, y);
        } else {
          V::store(hidden_units + r * last_stride + n, y);
        }
      });
      if constexpr (KIND == Kind::bytes) {
        for (int64_t r = 0; r < rows; ++r)
          scales[r] = to_units<LANES, KIND>(hidden + r * hidden_wide, last.inputs, hidden_units + r * last_stride);
      }
    }
    const Unit* from = job.layers == 2 ? hidden_units : units;
    apply<LANES, KIND, NATIVE>(
        last, from, last_stride, rows, scales, sums, [&](int64_t r, int64_t n, F y, int64_t count) FASTZS_INLINE_LAMBDA {
          const int64_t to = (at + r) * last.outputs + n;
          if (job.residual != nullptr) y += V::load(job.residual + to, 1, count);
          if (job.after.weight != nullptr) {
            V::store(results + r * wide + n, y);
          } else {
            V::store(job.out + to, y, count);
          }
        });
    if (job.after.weight == nullptr) continue;
    for (int64_t r = 0; r < rows; ++r) {
      float* result = results + r * wide;
      normalise<LANES>(result, last.outputs, job.after);
      for (int64_t n = 0; n < last.outputs; n += LANES)
        V::store(job.out + (at + r) * last.outputs + n, V::load(result + n), last.outputs - n);
    }
  }
}

template <int LANES, typename T>
FASTZS_INLINE void floats_anywhere(const Blocks<T>& a) {
  take_blocks<LANES, Kind::floats, false>(a);
}
template <int LANES, typename T>
FASTZS_INLINE void pairs_anywhere(const Blocks<T>& a) {
  take_blocks<LANES, Kind::pairs, false>(a);
}
template <int LANES, typename T>
FASTZS_INLINE void bytes_anywhere(const Blocks<T>& a) {
  take_blocks<LANES, Kind::bytes, false>(a);
}
FASTZS_MULTIVERSION(run_floats, floats_anywhere, Blocks<float>)
FASTZS_MULTIVERSION(run_floats, floats_anywhere, Blocks<BFloat16>)
FASTZS_MULTIVERSION(run_pairs, pairs_anywhere, Blocks<float>)
FASTZS_MULTIVERSION(run_pairs, pairs_anywhere, Blocks<BFloat16>)
FASTZS_MULTIVERSION(run_bytes, bytes_anywhere, Blocks<float>)
FASTZS_MULTIVERSION(run_bytes, bytes_anywhere, Blocks<BFloat16>)

#if FASTZS_X86_ASM
#define FASTZS_VNNI_512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")))
#define FASTZS_VNNI_256 __attribute__((target("avx2,fma,avxvnni")))
FASTZS_VNNI_512 void run_wide_bytes(const Blocks<float>& a) { take_blocks<16, Kind::bytes, true>(a); }
FASTZS_VNNI_512 void run_wide_bytes(const Blocks<BFloat16>& a) { take_blocks<16, Kind::bytes, true>(a); }
FASTZS_VNNI_256 void run_narrow_bytes(const Blocks<float>& a) { take_blocks<8, Kind::bytes, true>(a); }
FASTZS_VNNI_256 void run_narrow_bytes(const Blocks<BFloat16>& a) { take_blocks<8, Kind::bytes, true>(a); }
FASTZS_BF16_PAIRS void run_native_pairs(const Blocks<float>& a) { take_blocks<16, Kind::pairs, true>(a); }
FASTZS_BF16_PAIRS void run_native_pairs(const Blocks<BFloat16>& a) { take_blocks<16, Kind::pairs, true>(a); }
#endif

template <typename T>
void run(Isa isa, Kind kind, const Blocks<T>& a) {
#if FASTZS_X86_ASM
  if (kind == Kind::pairs && has_pairs(isa)) return run_native_pairs(a);
  if (kind == Kind::bytes && isa >= Isa::avx512_vnni) return run_wide_bytes(a);
  if (kind == Kind::bytes && isa == Isa::avx2_vnni) return run_narrow_bytes(a);
#endif
  if (kind == Kind::floats) return run_floats(isa, a);
  if (kind == Kind::pairs) return run_pairs(isa, a);
  run_bytes(isa, a);
}

// ---- operator -----------------------------------------------------------------------------------------------------

Kind kind_of(const Tensor& weight) {
  switch (weight.scalar_type()) {
    case ScalarType::Float: return Kind::floats;
    case ScalarType::BFloat16: return Kind::pairs;
    case ScalarType::Char: return Kind::bytes;
    default: STD_TORCH_CHECK(false, "packed_linear: wanted weights in float32, bfloat16 or int8");
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

Tensor packed_linear(
    const Tensor& x, const std::optional<Tensor>& before, double before_eps, const Tensor& weight,
    const Tensor& columns, int64_t outputs, int64_t activation, const std::optional<Tensor>& weight2,
    const std::optional<Tensor>& columns2, int64_t outputs2, const std::optional<Tensor>& residual,
    const std::optional<Tensor>& after, double after_eps) {
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), "packed_linear: wanted contiguous x [rows, inputs]");
  const bool two = weight2.has_value();
  STD_TORCH_CHECK(two == columns2.has_value() && (!two || weight2->scalar_type() == weight.scalar_type()),
      "packed_linear: the second layer is not as the first");
  const int64_t rows = x.size(0), inputs = x.size(1), last = two ? outputs2 : outputs;
  STD_TORCH_CHECK(!residual.has_value() || (residual->is_contiguous() && residual->scalar_type() == x.scalar_type() &&
      residual->dim() == 2 && residual->size(0) == rows && residual->size(1) == last),
      "packed_linear: the residual is not contiguous [", rows, ", ", last, "] in the dtype of x");
  Tensor out = torch::stable::new_empty(x, {rows, last});
  const Kind kind = kind_of(weight);
  const Isa isa = cpu_isa();
  const auto compute = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Job<T> job{};
    job.x = static_cast<const T*>(x.const_data_ptr());
    job.residual = residual.has_value() ? static_cast<const T*>(residual->const_data_ptr()) : nullptr;
    job.out = static_cast<T*>(out.mutable_data_ptr());
    job.rows = rows, job.layers = two ? 2 : 1;
    job.layer[0] = layer_of(weight, columns, inputs, outputs, activation);
    if (two) job.layer[1] = layer_of(*weight2, *columns2, outputs, outputs2, NONE);
    job.before = norm_of(before, before_eps, inputs), job.after = norm_of(after, after_eps, last);
    // A block's rows share the reading of the weights; smaller blocks where there are many threads for few rows.
    const int64_t threads = torch::stable::get_num_threads();
    job.block_rows = std::clamp(round_up((rows + threads - 1) / threads, ROWS), int64_t{ROWS}, BLOCK_ROWS);
    const int64_t blocks = (rows + job.block_rows - 1) / job.block_rows;
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      const Floats memory(memory_of(job, 4 / static_cast<int>(weight.element_size())));
      run(isa, kind, Blocks<T>{&job, begin, end, memory.data()});
    });
  };
  if (x.scalar_type() == ScalarType::Float) {
    compute(static_cast<float*>(nullptr));
  } else {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16, "packed_linear: wanted x in float32 or bfloat16");
    compute(static_cast<BFloat16*>(nullptr));
  }
  return out;
}

}  // namespace
}  // namespace fastzs

STABLE_TORCH_LIBRARY_FRAGMENT(fastzs, m) {
  m.def(
      "packed_linear(Tensor x, Tensor? before, float before_eps, Tensor weight, Tensor columns, int outputs, "
      "int activation, Tensor? weight2, Tensor? columns2, int outputs2, Tensor? residual, Tensor? after, "
      "float after_eps) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastzs, CPU, m) { m.impl("packed_linear", TORCH_BOX(&fastzs::packed_linear)); }
