// dropout on the CPU, after a relu or alone, and its gradient: one pass over memory.
//
// All four are one loop: x without the elements that a seed says and those where a gate is not positive, the others
// enlarged. The gate of a relu is its own input, and for its gradient the result, which is positive where both let
// through. So backward needs the seed, and the result only where there is a relu.
#include "dropout.h"

#include <optional>
#include <type_traits>

#include "cpu.h"
#include "simd.h"

namespace fastzs {
namespace {

using torch::stable::Tensor;

constexpr int64_t ELEMENTS = 1 << 15;  // a thread's at least

template <typename T>
struct Rows {
  const T* x;     // [rows, length]
  const T* gate;  // the same, or null
  T* out;
  int64_t begin, end, length;
  Dropout dropout;
};

template <int LANES, typename T>
FASTZS_INLINE void drop_rows(const Rows<T>& a) {
  using V = Simd<LANES>;
  using F = typename V::F;
  for (int64_t row = a.begin; row < a.end; ++row) {
    const RowBits bits(a.dropout.seed, row);
    for (int64_t at = 0; at < a.length; at += LANES) {
      const int64_t here = row * a.length + at, left = a.length - at;
      const F value = V::load(a.x + here, 1, left) * a.dropout.enlarged;
      typename V::I keep = kept<LANES>(bits, at, a.dropout.least);
      if (a.gate != nullptr) keep &= ~(V::load(a.gate + here, 1, left) <= 0.0f);  // NaN is let through, as relu does
      V::store(a.out + here, (F)((typename V::I)value & keep), left);
    }
  }
}

FASTZS_MULTIVERSION(run, drop_rows, Rows<float>)
FASTZS_MULTIVERSION(run, drop_rows, Rows<torch::headeronly::BFloat16>)
FASTZS_MULTIVERSION(run, drop_rows, Rows<torch::headeronly::Half>)

Tensor drop(const Tensor& x, const Tensor* gate, double rate, const Tensor& seed) {
  STD_TORCH_CHECK(x.dim() > 0 && x.is_contiguous(),
      "dropout: expected contiguous values with at least one dimension, got ", describe(x));
  STD_TORCH_CHECK(gate == nullptr || (gate->is_contiguous() && gate->numel() == x.numel() &&
      gate->scalar_type() == x.scalar_type()),
      "dropout: expected a result as the gradient is, ", describe(x), ", got ", describe(*gate));
  const Dropout dropout = dropout_of("dropout", rate, seed);
  Tensor out = torch::stable::empty_like(x);
  if (x.numel() == 0) return out;
  const int64_t length = x.size(x.dim() - 1);
  dispatch_floating(x, "dropout", [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    const auto* from = static_cast<const T*>(x.const_data_ptr());
    const auto* through = gate == nullptr ? nullptr : static_cast<const T*>(gate->const_data_ptr());
    auto* to = static_cast<T*>(out.mutable_data_ptr());
    const Isa isa = cpu_isa();
    torch::stable::parallel_for(0, x.numel() / length, ELEMENTS / length + 1, [&](int64_t begin, int64_t end) {
      run(isa, Rows<T>{from, through, to, begin, end, length, dropout});
    });
  });
  return out;
}

Tensor dropout(const Tensor& x, bool relu, double rate, const Tensor& seed) {
  return drop(x, relu ? &x : nullptr, rate, seed);
}

Tensor dropout_backward(const Tensor& grad, const std::optional<Tensor>& out, double rate, const Tensor& seed) {
  return drop(grad, out.has_value() ? &*out : nullptr, rate, seed);
}

}  // namespace
}  // namespace fastzs

STABLE_TORCH_LIBRARY_FRAGMENT(fastzs, m) {
  m.def("dropout(Tensor x, bool relu, float rate, Tensor seed) -> Tensor");
  m.def("dropout_backward(Tensor grad, Tensor? out, float rate, Tensor seed) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastzs, CPU, m) {
  m.impl("dropout", TORCH_BOX(&fastzs::dropout));
  m.impl("dropout_backward", TORCH_BOX(&fastzs::dropout_backward));
}
