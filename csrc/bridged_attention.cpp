// bridged_attention on the CPU, forward and backward: attention in which tokens see prompts and bridge tokens.
#include "attention.h"

namespace fastzs {
namespace {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> bridged_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& prompt_k,
    const std::optional<Tensor>& prompt_v, int64_t prefix, int64_t h, int64_t w, int64_t rh, int64_t rw, double scale) {
  const attention::Call call{"bridged_attention", q, k, v, prompt_k, prompt_v, {prefix, h, w, rh, rw}, scale};
  return attention::forward(call);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bridged_attention_backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& prompt_k,
    const std::optional<Tensor>& prompt_v, const Tensor& out, const Tensor& lse, int64_t prefix, int64_t h, int64_t w,
    int64_t rh, int64_t rw, double scale) {
  const attention::Call call{"bridged_attention", q, k, v, prompt_k, prompt_v, {prefix, h, w, rh, rw}, scale};
  return attention::backward(call, grad, out, lse);
}

}  // namespace
}  // namespace fastzs

STABLE_TORCH_LIBRARY_FRAGMENT(fastzs, m) {
  m.def(
      "bridged_attention(Tensor q, Tensor k, Tensor v, Tensor? prompt_k, Tensor? prompt_v, int prefix, int h, int w, "
      "int rh, int rw, float scale) -> (Tensor out, Tensor lse)");
  m.def(
      "bridged_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? prompt_k, Tensor? prompt_v, "
      "Tensor out, Tensor lse, int prefix, int h, int w, int rh, int rw, float scale) "
      "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dprompt_k, Tensor dprompt_v)");
}

STABLE_TORCH_LIBRARY_IMPL(fastzs, CPU, m) {
  m.impl("bridged_attention", TORCH_BOX(&fastzs::bridged_attention));
  m.impl("bridged_attention_backward", TORCH_BOX(&fastzs::bridged_attention_backward));
}
