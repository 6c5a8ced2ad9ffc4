// dropout_attention on the CPU, forward and backward: attention of queries over other tokens, weights dropped.
#include "attention.h"

namespace fastzs {
namespace {

using torch::stable::Tensor;

// The queries are the tokens of a layout without a bridge, the keys its prompts.
attention::Call dropped(
    const Tensor& q, const Tensor& k, const Tensor& v, double scale, double rate, const Tensor& seed) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && k.size(0) == q.size(0) && v.size(0) == q.size(0),
      "dropout_attention: expected q [B, H, Q, d], k and v [B, H, N, d], got ", describe(q), ", ", describe(k), " and ",
      describe(v));
  STD_TORCH_CHECK(k.size(2) > 0, "dropout_attention: there are no keys");
  const Dropout dropout = dropout_of("dropout_attention", rate, seed);
  return {"dropout_attention", q, q, q, k, v, {0, 1, q.size(2), 0, 0}, scale, 0, 0, true, dropout};
}

std::tuple<Tensor, Tensor> dropout_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, double scale, double rate, const Tensor& seed) {
  return attention::forward(dropped(q, k, v, scale, rate, seed));
}

std::tuple<Tensor, Tensor, Tensor> dropout_attention_backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
    double scale, double rate, const Tensor& seed) {
  const auto [dq, dk, dv, none_k, none_v] = attention::backward(dropped(q, k, v, scale, rate, seed), grad, out, lse);
  return {dq, dk, dv};
}

}  // namespace
}  // namespace fastzs

STABLE_TORCH_LIBRARY_FRAGMENT(fastzs, m) {
  m.def(
      "dropout_attention(Tensor q, Tensor k, Tensor v, float scale, float dropout, Tensor seed) "
      "-> (Tensor out, Tensor lse)");
  m.def(
      "dropout_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale, "
      "float dropout, Tensor seed) -> (Tensor dq, Tensor dk, Tensor dv)");
}

STABLE_TORCH_LIBRARY_IMPL(fastzs, CPU, m) {
  m.impl("dropout_attention", TORCH_BOX(&fastzs::dropout_attention));
  m.impl("dropout_attention_backward", TORCH_BOX(&fastzs::dropout_attention_backward));
}
