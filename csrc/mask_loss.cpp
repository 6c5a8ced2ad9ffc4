// mask_sums on the CPU: per image and class, the sums that decide focal and dice loss, and their gradients.
//
// All pixel rows between low-resolution rows i and i + 1 interpolate these two rows, so per pixel column x the logit
// is t + w d with t, d fixed for all of them. One thread owns an (image, class) plane and walks it in such bands,
// vectors along x: it keeps the gradients of a band's columns as two sums in registers, g and w g, adds them to
// two low-resolution rows when the band ends, and contracts a finished row along x. The full resolution exists in
// registers only, nothing is shared between threads, and results do not depend on their number. Scales need
// not be whole numbers: they only change how many rows a band has.
//
// Focal loss with u = -z on the class and z off it, s = sigmoid(u), l = softplus(u): value a s^gamma l, derivative
// +-a s^gamma (gamma (1 - s) l + s), where a is alpha or 1 - alpha. Both need one exp and one log.
#include <atomic>
#include <cmath>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cpu.h"
#include "simd.h"

namespace fastzs {
namespace {

using torch::stable::Tensor;

constexpr int FOCAL = 0, PROB = 1, OVERLAP = 2, LABEL = 3, FIELDS = 3;
constexpr int16_t NO_CLASS = INT16_MAX;
constexpr int PAD = 16;  // rows of pixels are padded to the widest vector

// For each pixel of an axis: the lower of the two nodes it interpolates, and the weight of the upper one.
struct Axis {
  int64_t nodes;
  std::vector<int64_t> start;  // [nodes + 1]: pixels start[i] .. start[i + 1] have lower node i
  std::vector<float> weight;   // [pixels], padded

  Axis(int64_t nodes, int64_t pixels) : nodes(nodes), start(nodes + 1), weight(pixels + PAD) {
    int64_t node = 0;
    for (int64_t x = 0; x < pixels; ++x) {
      // corners are not aligned; exact where the scale is a whole number
      double at = (x + 0.5) * nodes / pixels - 0.5;
      if (at < 0) at = 0;
      int64_t lower = static_cast<int64_t>(at);
      if (lower > nodes - 1) lower = nodes - 1;
      while (node < lower) start[++node] = x;
      weight[x] = static_cast<float>(at - lower);
    }
    while (node < nodes) start[++node] = pixels;
  }
};

struct Plane {
  const float* logits;     // [h, w]
  const int16_t* label;    // [H, padded]: a class or NO_CLASS
  const Axis* rows;
  const Axis* columns;
  int64_t padded;          // W rounded up to PAD
  int64_t W;
  float* scratch;          // [2 + 2 * FIELDS, padded + PAD]
  float alpha, gamma;
  int cls;
  bool present;            // some pixel has this class
  double* sums;            // [FIELDS], out
  float* nodes;            // [FIELDS, h, w], out, zeroed; null if no gradient is wanted
};

// Interpolates a row of nodes along x.
FASTZS_INLINE void stretch(const float* row, const Axis& columns, float* out) {
  for (int64_t j = 0; j < columns.nodes; ++j) {
    float low = row[j], rise = (j + 1 < columns.nodes ? row[j + 1] : low) - low;
    for (int64_t x = columns.start[j]; x < columns.start[j + 1]; ++x) out[x] = low + columns.weight[x] * rise;
  }
}

// The adjoint of stretch: adds to a row of nodes.
template <int LANES>
FASTZS_INLINE void contract(const float* pixels, const Axis& columns, float* row) {
  using V = Simd<LANES>;
  for (int64_t j = 0; j < columns.nodes; ++j) {
    typename V::F all{}, upper{};
    int64_t end = columns.start[j + 1];
    for (int64_t x = columns.start[j]; x < end; x += LANES) {
      int left = end - x < LANES ? static_cast<int>(end - x) : LANES;
      auto g = (typename V::F)((typename V::I)V::load(pixels + x) & V::first(left));
      all += g;
      upper += g * V::load(&columns.weight[x]);
    }
    float to_upper = V::sum(upper);
    row[j] += V::sum(all) - to_upper;
    row[j + 1 < columns.nodes ? j + 1 : j] += to_upper;
  }
}

template <int LANES, bool PRESENT, bool SQUARE, bool NODES>
FASTZS_INLINE void plane_body(const Plane& a) {
  using V = Simd<LANES>;
  using F = typename V::F;
  using I = typename V::I;
  const int64_t h = a.rows->nodes, w = a.columns->nodes, stride = a.padded + PAD;
  float* top = a.scratch;
  float* bottom = top + stride;
  float* grad_top = bottom + stride;  // [FIELDS, stride]
  float* grad_bottom = grad_top + FIELDS * stride;
  constexpr int fields = PRESENT ? 3 : 2;
  const F zero{};
  double focal_sum = 0, prob_sum = 0, overlap_sum = 0;

  stretch(a.logits, *a.columns, bottom);
  if (NODES) __builtin_memset(grad_bottom, 0, FIELDS * stride * sizeof(float));
  for (int64_t i = 0; i < h; ++i) {
    float* swap = top; top = bottom; bottom = swap;
    swap = grad_top; grad_top = grad_bottom; grad_bottom = swap;
    stretch(a.logits + (i + 1 < h ? i + 1 : i) * w, *a.columns, bottom);
    const int64_t y0 = a.rows->start[i], y1 = a.rows->start[i + 1];

    F focal_band{}, prob_band{}, overlap_band{};
    for (int64_t x = 0; x < a.padded; x += LANES) {
      const F t = V::load(top + x), d = V::load(bottom + x) - t;
      F focal{}, prob{}, overlap{};
      F g0{}, g0w{}, g1{}, g1w{}, g2{}, g2w{};
      for (int64_t y = y0; y < y1; ++y) {
        const float wy = a.rows->weight[y];
        const F z = t + d * wy;
        const F size = (F)((I)z & 0x7fffffff);
        const F e = V::exp_negative(-size);
        const F high = 1.0f / (1.0f + e), low = e * high;
        const F l = V::log1p_unit(e);
        const I negative = z < zero;
        const F p = negative ? low : high;
        const F q = negative ? high : low;  // 1 - p, without cancellation
        const F slope = low * high;

        I is_class{};
        F u = z, s = p, c = q;
        if (PRESENT) {
          is_class = V::load(a.label + y * a.padded + x) == a.cls;
          u = is_class ? -z : z;
          s = is_class ? q : p;
          c = is_class ? p : q;
        }
        const F softplus = l + (u > zero ? u : zero);
        F power;  // s^gamma
        if (SQUARE) {
          power = s * s;
        } else {
          power = V::exp_negative(((u < zero ? u : zero) - l) * a.gamma);
        }
        F value = power * softplus;
        F g = (SQUARE ? 2.0f : a.gamma) * c * value + power * s;
        if (PRESENT) {
          value *= is_class ? V::splat(a.alpha) : V::splat(1 - a.alpha);
          g *= is_class ? V::splat(-a.alpha) : V::splat(1 - a.alpha);
        }
        focal += value;
        prob += p;
        if (PRESENT) overlap += is_class ? p : zero;
        if (NODES) {
          g0 += g;
          g0w += g * wy;
          g1 += slope;
          g1w += slope * wy;
          if (PRESENT) {
            const F hit = is_class ? slope : zero;
            g2 += hit;
            g2w += hit * wy;
          }
        }
      }
      if (x + LANES > a.W) {
        const I inside = V::first(static_cast<int>(a.W - x));
        focal = inside ? focal : zero;
        prob = inside ? prob : zero;
        overlap = inside ? overlap : zero;
      }
      focal_band += focal;
      prob_band += prob;
      overlap_band += overlap;
      if (NODES) {
        // The padding beyond W collects sums that contract() never reads.
        float* up = grad_top + x;
        float* down = grad_bottom + x;
        V::store(up, V::load(up) + (g0 - g0w));
        V::store(down, g0w);
        V::store(up + stride, V::load(up + stride) + (g1 - g1w));
        V::store(down + stride, g1w);
        if (PRESENT) {
          V::store(up + 2 * stride, V::load(up + 2 * stride) + (g2 - g2w));
          V::store(down + 2 * stride, g2w);
        }
      }
    }
    focal_sum += V::sum(focal_band);
    prob_sum += V::sum(prob_band);
    overlap_sum += V::sum(overlap_band);
    if (NODES) {
      for (int f = 0; f < fields; ++f) {
        float* node = a.nodes + (f * h + i) * w;
        contract<LANES>(grad_top + f * stride, *a.columns, node);
        // below the last row of nodes there is none: what leans on it belongs to the last row too
        if (i == h - 1) contract<LANES>(grad_bottom + f * stride, *a.columns, node);
      }
    }
  }

  const float negative_weight = PRESENT ? 1 : 1 - a.alpha;  // with the class present, weights are per pixel
  a.sums[FOCAL] = focal_sum * negative_weight;
  a.sums[PROB] = prob_sum;
  a.sums[OVERLAP] = overlap_sum;
  if (NODES && !PRESENT) {
    for (int64_t n = 0; n < h * w; ++n) a.nodes[n] *= negative_weight;
  }
}

template <int LANES>
FASTZS_INLINE void plane_gradients(const Plane& a) {
  if (a.gamma == 2) {
    if (a.present) return plane_body<LANES, true, true, true>(a);
    return plane_body<LANES, false, true, true>(a);
  }
  if (a.present) return plane_body<LANES, true, false, true>(a);
  return plane_body<LANES, false, false, true>(a);
}

template <int LANES>
FASTZS_INLINE void plane_values(const Plane& a) {
  if (a.gamma == 2) return plane_body<LANES, true, true, false>(a);
  return plane_body<LANES, true, false, false>(a);
}

FASTZS_MULTIVERSION(run_plane_gradients, plane_gradients, Plane)
FASTZS_MULTIVERSION(run_plane_values, plane_values, Plane)

// Fills label [B, H, padded] and counts [B, C] from the target; returns a label that is neither a class
// nor ignore_index, or ignore_index where all are right.
template <class T>
int64_t read_labels(
    const Tensor& target, int64_t C, int64_t ignore_index, int64_t padded, int16_t* label, int64_t* counts) {
  const T* data = static_cast<const T*>(target.const_data_ptr());
  const int64_t B = target.size(0), H = target.size(1), W = target.size(2);
  const int64_t sb = target.stride(0), sy = target.stride(1), sx = target.stride(2);
  std::atomic<int64_t> wrong{ignore_index};
  torch::stable::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t y = 0; y < H; ++y) {
        const T* row = data + b * sb + y * sy;
        int16_t* out = label + (b * H + y) * padded;
        for (int64_t x = 0; x < W;) {
          const int64_t value = static_cast<int64_t>(row[x * sx]);
          int64_t run = x + 1;
          while (run < W && static_cast<int64_t>(row[run * sx]) == value) ++run;
          int16_t code = NO_CLASS;
          if (value != ignore_index) {
            if (value >= 0 && value < C) {
              code = static_cast<int16_t>(value);
              counts[b * C + value] += run - x;
            } else {
              wrong = value;
            }
          }
          for (; x < run; ++x) out[x] = code;
        }
        for (int64_t x = W; x < padded; ++x) out[x] = NO_CLASS;
      }
    }
  });
  return wrong;
}

// Copies a plane to fp32; false if a value is not finite.
template <class T>
bool read_plane(const T* data, int64_t h, int64_t w, int64_t sy, int64_t sx, float* out) {
  float finite = 0;  // becomes NaN with the first infinity or NaN
  for (int64_t y = 0; y < h; ++y) {
    for (int64_t x = 0; x < w; ++x) {
      const float z = static_cast<float>(data[y * sy + x * sx]);
      out[y * w + x] = z;
      finite += z * 0.0f;
    }
  }
  return finite == 0;
}

std::tuple<Tensor, Tensor> mask_sums(
    const Tensor& logits, const Tensor& target, double alpha, double gamma, int64_t ignore_index,
    bool with_nodes) {
  const int64_t B = logits.size(0), C = logits.size(1), h = logits.size(2), w = logits.size(3);
  const int64_t H = target.size(1), W = target.size(2), padded = (W + PAD - 1) / PAD * PAD;
  STD_TORCH_CHECK(logits.dim() == 4 && target.dim() == 3 && target.size(0) == B && B * C * h * w * H * W > 0,
      "mask_loss: expected logits [B, C, h, w] and target [B, H, W] without empty dimensions, got ", describe(logits),
      " and ", describe(target));
  STD_TORCH_CHECK(C < NO_CLASS, "mask_loss: the CPU backend takes fewer than 32767 classes, got ", C);

  std::vector<int16_t> label(B * H * padded);
  std::vector<int64_t> counts(B * C);
  int64_t wrong = ignore_index;
  dispatch_integer(target, "mask_loss", [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    wrong = read_labels<T>(target, C, ignore_index, padded, label.data(), counts.data());
  });
  STD_TORCH_CHECK(wrong == ignore_index, "mask_loss: target holds label ", wrong, "; expected labels in [0, ", C,
      ") or ignore_index=", ignore_index);

  const auto float32 = torch::headeronly::ScalarType::Float;
  Tensor sums = torch::stable::new_empty(logits, {B, C, FIELDS + 1}, float32);
  Tensor nodes = with_nodes ? torch::stable::new_zeros(logits, {B, C, FIELDS, h, w}, float32)
                            : torch::stable::new_empty(logits, {B, C, FIELDS, 0, 0}, float32);
  float* sums_data = static_cast<float*>(sums.mutable_data_ptr());
  float* nodes_data = static_cast<float*>(nodes.mutable_data_ptr());

  const Axis rows(h, H), columns(w, W);
  dispatch_floating(logits, "mask_loss", [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    const T* data = static_cast<const T*>(logits.const_data_ptr());
    const int64_t sb = logits.stride(0), sc = logits.stride(1), sy = logits.stride(2), sx = logits.stride(3);
    const Isa isa = cpu_isa();
    torch::stable::parallel_for(0, B * C, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> plane_logits(h * w), scratch((2 + 2 * FIELDS) * (padded + PAD));
      for (int64_t n = begin; n < end; ++n) {
        const int64_t b = n / C, c = n % C;
        float* out = sums_data + n * (FIELDS + 1);
        float* node = with_nodes ? nodes_data + n * FIELDS * h * w : nullptr;
        out[LABEL] = static_cast<float>(counts[n]);
        if (!read_plane(data + b * sb + c * sc, h, w, sy, sx, plane_logits.data())) {
          for (int f = 0; f < FIELDS; ++f) out[f] = NAN;
          for (int64_t k = 0; node && k < FIELDS * h * w; ++k) node[k] = NAN;
          continue;
        }
        double plane_sums[FIELDS];
        const Plane plane{
            plane_logits.data(), label.data() + b * H * padded, &rows, &columns, padded, W, scratch.data(),
            static_cast<float>(alpha), static_cast<float>(gamma), static_cast<int>(c), counts[n] > 0,
            plane_sums, node};
        with_nodes ? run_plane_gradients(isa, plane) : run_plane_values(isa, plane);
        for (int f = 0; f < FIELDS; ++f) out[f] = static_cast<float>(plane_sums[f]);
      }
    });
  });
  return {sums, nodes};
}

}  // namespace
}  // namespace fastzs

STABLE_TORCH_LIBRARY_FRAGMENT(fastzs, m) {
  m.def(
      "mask_sums(Tensor logits, Tensor target, float alpha, float gamma, int ignore_index, "
      "bool with_nodes) -> (Tensor sums, Tensor nodes)");
}

STABLE_TORCH_LIBRARY_IMPL(fastzs, CPU, m) { m.impl("mask_sums", TORCH_BOX(&fastzs::mask_sums)); }
