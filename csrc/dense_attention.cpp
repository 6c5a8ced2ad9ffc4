// dense_attention on the CPU, forward: patches are rows, the class token is only a key, and near patches see each other
// more.
#include "attention.h"

namespace fastzs {
namespace {

using torch::stable::Tensor;

// out alone: it has no gradient.
Tensor dense_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, int64_t h, int64_t w, double scale, double std) {
  const int64_t prefix = (q.dim() == 4 ? q.size(2) : 0) - h * w;
  const attention::Call call{"dense_attention", q, k, v, {}, {}, {prefix, h, w, 0, 0}, scale, prefix, std};
  return std::get<0>(attention::forward(call));
}

}  // namespace
}  // namespace fastzs

STABLE_TORCH_LIBRARY_FRAGMENT(fastzs, m) {
  m.def("dense_attention(Tensor q, Tensor k, Tensor v, int h, int w, float scale, float std) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastzs, CPU, m) {
  m.impl("dense_attention", TORCH_BOX(&fastzs::dense_attention));
}
