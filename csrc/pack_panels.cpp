// Weights of linear layers in the panels of linear_tiles.h, for layers in training, whose weights are packed in each
// call: that takes a few hundredths of the product's time.
#include "linear_tiles.h"

#include <type_traits>

namespace fastzs {
namespace {

using namespace linear;
using torch::headeronly::BFloat16;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int CHUNK = 16;  // units of a row at a time: the lines that they are spread over stay in the first cache

template <typename T>
struct Panels {
  const T* weight;       // [outputs, inputs], or turned: [inputs, outputs]
  int64_t stride;        // of its rows
  int64_t outputs, inputs;
  bool turned;
  int32_t* out;          // [panels, depth, PANEL] units
  int64_t begin, end;    // of the panels
};

template <int LANES, bool PAIRS, typename T>
FASTZS_INLINE void take_panels(const Panels<T>& a) {
  using V = Simd<LANES>;
  using I = typename V::I;
  using To = std::conditional_t<PAIRS, BFloat16, float>;
  constexpr int STEP = PAIRS ? 2 : 1;
  const int64_t depth = (a.inputs + STEP - 1) / STEP;
  for (int64_t panel = a.begin; panel < a.end; ++panel) {
    const int64_t first = panel * PANEL, left = a.outputs - first, columns = left < PANEL ? left : PANEL;
    int32_t* out = a.out + panel * depth * PANEL;
    if (a.turned) {
      for (int64_t k = 0; k < depth; ++k) {
        const T* row = a.weight + k * STEP * a.stride + first;
        for (int64_t c = 0; c < PANEL; c += LANES) {
          I unit = (I)V::load(row + c, 1, columns - c);
          if constexpr (PAIRS) {
            const auto high = k * STEP + 1 < a.inputs ? V::load(row + a.stride + c, 1, columns - c) : V::splat(0.0f);
            unit = V::round_bf16((typename V::F)unit) | (V::round_bf16(high) << 16);
          }
          __builtin_memcpy(out + k * PANEL + c, &unit, sizeof unit);
        }
      }
      continue;
    }
    if (columns < PANEL) __builtin_memset(out, 0, depth * PANEL * sizeof(int32_t));
    for (int64_t k = 0; k < depth; k += CHUNK) {
      const int64_t units = depth - k < CHUNK ? depth - k : CHUNK;
      for (int64_t c = 0; c < columns; ++c) {
        const T* row = a.weight + (first + c) * a.stride;
        int32_t chunk[CHUNK];
        for (int64_t v = 0; v < units * STEP; v += LANES) {
          const int64_t at = k * STEP + v;
          V::store(reinterpret_cast<To*>(chunk) + v, V::load(row + at, 1, a.inputs - at));
        }
        for (int64_t u = 0; u < units; ++u) out[(k + u) * PANEL + c] = chunk[u];
      }
    }
  }
}

template <int LANES, typename T>
FASTZS_INLINE void panels_of_floats(const Panels<T>& a) {
  take_panels<LANES, false>(a);
}
template <int LANES, typename T>
FASTZS_INLINE void panels_of_pairs(const Panels<T>& a) {
  take_panels<LANES, true>(a);
}
FASTZS_MULTIVERSION(run_floats, panels_of_floats, Panels<float>)
FASTZS_MULTIVERSION(run_floats, panels_of_floats, Panels<BFloat16>)
FASTZS_MULTIVERSION(run_pairs, panels_of_pairs, Panels<float>)
FASTZS_MULTIVERSION(run_pairs, panels_of_pairs, Panels<BFloat16>)

Tensor pack_panels(const Tensor& weight, bool turned, bool pairs) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) > 0 && weight.size(1) > 0 && weight.stride(1) == 1,
      "pack_panels: expected a matrix with dense rows and without empty dimensions, got ", describe(weight));
  const int64_t outputs = weight.size(turned), inputs = weight.size(!turned), step = pairs ? 2 : 1;
  const int64_t panels = (outputs + PANEL - 1) / PANEL;
  const ScalarType type = pairs ? ScalarType::BFloat16 : ScalarType::Float;
  Tensor out = torch::stable::new_empty(weight, {panels, (inputs + step - 1) / step, PANEL, step}, type);
  const Isa isa = cpu_isa();
  const auto fill = [&](auto* of) {
    using T = std::remove_pointer_t<decltype(of)>;
    auto* to = static_cast<int32_t*>(out.mutable_data_ptr());
    torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
      const Panels<T> a{
          static_cast<const T*>(weight.const_data_ptr()), weight.stride(0), outputs, inputs, turned, to, begin, end};
      pairs ? run_pairs(isa, a) : run_floats(isa, a);
    });
  };
  if (weight.scalar_type() == ScalarType::Float) {
    fill(static_cast<float*>(nullptr));
  } else {
    STD_TORCH_CHECK(weight.scalar_type() == ScalarType::BFloat16,
        "pack_panels: expected float32 or bfloat16 weights, got ", describe(weight));
    fill(static_cast<BFloat16*>(nullptr));
  }
  return out;
}

}  // namespace
}  // namespace fastzs

STABLE_TORCH_LIBRARY_FRAGMENT(fastzs, m) { m.def("pack_panels(Tensor weight, bool turned, bool pairs) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(fastzs, CPU, m) { m.impl("pack_panels", TORCH_BOX(&fastzs::pack_panels)); }
