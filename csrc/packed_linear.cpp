// packed_linear on the CPU: one or two linear layers with what stands around them, in int8, bf16 or fp32;
// linear_blocks.h computes them.
#include "linear_blocks.h"

#include <algorithm>
#include <optional>
#include <type_traits>

namespace fastzs {
namespace {

using namespace linear;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using OfFloats = Blocks<float, float>;
using OfPairs = Blocks<BFloat16, BFloat16>;
using Narrowing = Blocks<float, BFloat16>;
using Widening = Blocks<BFloat16, float>;

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
