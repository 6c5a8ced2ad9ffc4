// Attention on the CPU: what an operator hands to the code that all of them share. An operator's own file says how its
// arguments become a Call; attention_forward.cpp and attention_backward.cpp compute.
#pragma once

#include "attention_tiles.h"
#include "dropout.h"

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

namespace fastzs::attention {

using torch::stable::Tensor;

template <typename T>
struct Inputs {
  Operand<T> q, k, v, prompt_k, prompt_v;
  Layout layout;
  int64_t batch, heads, prompts;
  int d;
  float scale;
  int64_t first;           // of the tokens that have a row; 0 in bridged_attention, the first patch in dense_attention
  const float* near_rows;  // [h]: what patches n rows apart add to a score, times ...
  const float* near_columns;  // [2 w - 1]: ... that of columns, from w - 1 to the left to as many to the right; or null
  bool apart;              // the tokens see the prompts only: those are the keys of dropout_attention
  Dropout dropout;

  int64_t rows() const { return layout.length() - first; }
  // That a shared row sees, but for the bridge.
  int64_t keys() const { return prompts + (apart ? 0 : layout.shared()); }
  FASTZS_INLINE RowBits bits(int64_t b, int64_t h, int64_t token) const {
    return {dropout.seed, static_cast<uint64_t>((b * heads + h) * layout.length() + token)};
  }
  Tokens<T> keys_of(int64_t b, int64_t h) const { return {prompt_k, k, b, h, prompts, keys()}; }
  Tokens<T> values_of(int64_t b, int64_t h) const { return {prompt_v, v, b, h, prompts, keys()}; }
};

template <typename T>
Operand<T> operand(const Tensor& t) {
  const int64_t batch = t.size(0) == 1 ? 0 : t.stride(0);
  return {static_cast<const T*>(t.const_data_ptr()), batch, t.stride(1), t.stride(2), t.stride(3)};
}

// What the operators take; std is that of dense_attention's nearness, 0 without it.
struct __attribute__((visibility("hidden"))) Call {  // as Tensor is
  const char* op;
  const Tensor &q, &k, &v;
  std::optional<Tensor> prompt_k, prompt_v;
  Layout layout;
  double scale;
  int64_t first = 0;
  double std = 0;
  bool apart = false;  // see Inputs; k and v are not used then
  Dropout dropout = {0, 0, 1.0f};

  int64_t rows() const { return layout.length() - first; }

  void check() const {
    const int64_t d = q.dim() == 4 ? q.size(3) : 0;
    STD_TORCH_CHECK(d > 0 && d <= MAX_D && d % 8 == 0, op, ": expected q [B, H, L, d], d a multiple of 8 up to ", MAX_D,
        ", got ", describe(q));
    STD_TORCH_CHECK(layout.prefix >= 0 && layout.h > 0 && (layout.w > 0 || apart) && layout.rh >= 0 && layout.rh <= layout.h &&
        layout.rw >= 0 && layout.rw <= layout.w && (layout.rh == 0) == (layout.rw == 0), op, ": no such layout");
    fits(k, q.size(0), layout.length());
    fits(v, q.size(0), layout.length());
    fits(q, q.size(0), layout.length());
    STD_TORCH_CHECK(prompt_k.has_value() == prompt_v.has_value(), op, ": prompt keys or values are missing");
    if (!prompt_k.has_value()) return;
    for (const Tensor* p : {&*prompt_k, &*prompt_v}) fits(*p, p->size(0) == 1 ? 1 : q.size(0), prompt_k->size(2));
  }

  void fits(const Tensor& t, int64_t batch, int64_t tokens) const {
    STD_TORCH_CHECK(t.scalar_type() == q.scalar_type(),
        op, ": expected ", name_of(q.scalar_type()), " as q is, got ", describe(t));
    STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == batch && t.size(1) == q.size(1) && t.size(2) == tokens &&
        t.size(3) == q.size(3), op, ": expected [", batch, ", ", q.size(1), ", ", tokens, ", ", q.size(3), "], got ",
        describe(t));
  }

  // near_rows [h], then near_columns [2 w - 1] of Inputs.
  std::vector<float> nearness() const {
    std::vector<float> near;
    if (std == 0) return near;
    const auto at = [&](int64_t n) { return static_cast<float>(std::exp(-0.5 * (n / std) * (n / std))); };
    for (int64_t n = 0; n < layout.h; ++n) near.push_back(at(n));
    for (int64_t n = 1 - layout.w; n < layout.w; ++n) near.push_back(at(n));
    return near;
  }

  template <typename T>
  Inputs<T> inputs(const std::vector<float>& near) const {
    Inputs<T> in{};
    in.q = operand<T>(q), in.k = operand<T>(k), in.v = operand<T>(v);
    if (prompt_k.has_value()) {
      in.prompt_k = operand<T>(*prompt_k), in.prompt_v = operand<T>(*prompt_v);
      in.prompts = prompt_k->size(2);
    }
    in.layout = layout;
    in.batch = q.size(0), in.heads = q.size(1), in.d = static_cast<int>(q.size(3));
    in.scale = static_cast<float>(scale), in.first = first;
    in.apart = apart, in.dropout = dropout;
    if (!near.empty()) in.near_rows = near.data(), in.near_columns = near.data() + layout.h;
    return in;
  }
};

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Output [B, H, rows, d] and log-sum-exps [B, H, rows].
std::tuple<Tensor, Tensor> forward(const Call& call);

// The gradients dq, dk, dv [B, H, ., d] and, where the prompts are not the keys, dprompt_k and dprompt_v [B, H, P, d].
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Call& call, const Tensor& grad, const Tensor& out, const Tensor& lse);

}  // namespace fastzs::attention
