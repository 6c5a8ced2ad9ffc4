// dense_attention(kind="proxy") on the CPU: attention whose weights come from another network's features.
//
// The features of the keys are unit vectors, so that no score exceeds 1 and no running maximum is needed. They are
// packed once into panels of PANEL patches; a panel serves as rows and as keys. A thread owns one panel of rows: their
// weights of a few keys are computed in registers and drawn together on the grid of the values, [n, PANEL], which is the
// transpose of interpolating the values and less work where that grid is the coarser one; then the values are
// multiplied. Rows lie along the vectors throughout.
#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu.h"
#include "simd.h"

namespace fastzs::proxy_attention {
namespace {

constexpr int PANEL = 32;

struct Job {
  const float* features;   // [D, N], unit columns
  int64_t channels, patches, height, width;  // N = height width
  const float* values;     // [n, E]
  int64_t nodes, nodes_y, nodes_x, size;     // n = nodes_y nodes_x
  const int32_t *low_y, *low_x;  // [height], [width]: the lower of the two nodes that a patch lies between
  const float *part_y, *part_x;  // weight of the higher one
  float gamma, shift;  // weights are exp(gamma (S - 1)) where S >= shift ...
  bool linear;         // ... or S itself
  float* panels;       // [panels, D, PANEL]
  float* out;          // [N, E]
};

struct Part {
  const Job* job;
  int64_t panel;  // of rows
  float* lines;   // [nodes_y, width, PANEL]
  float* mixed;   // [n, PANEL]
  float* total;   // [PANEL]
};

// Tile [ROWS, 2 vectors]: sums over i < count of a[i step_a + r step_r] times the vectors at b + i step_b.
template <int LANES, int ROWS>
FASTZS_INLINE void products(
    const float* a, int64_t step_a, int64_t step_r, const float* b, int64_t step_b, int64_t count,
    typename Simd<LANES>::F (&sums)[ROWS][2]) {
  using M = Simd<LANES>;
  for (int r = 0; r < ROWS; ++r) sums[r][0] = sums[r][1] = M::splat(0.0f);
  for (int64_t i = 0; i < count; ++i) {
    const auto x = M::load(b + i * step_b), y = M::load(b + i * step_b + LANES);
    for (int r = 0; r < ROWS; ++r) {
      const float s = a[i * step_a + r * step_r];
      sums[r][0] += s * x;
      sums[r][1] += s * y;
    }
  }
}

// Adds x times `share`, two vectors, to what lies at p.
template <int LANES>
FASTZS_INLINE void add(float* p, float share, typename Simd<LANES>::F x, typename Simd<LANES>::F y) {
  using M = Simd<LANES>;
  M::store(p, M::load(p) + share * x);
  M::store(p + LANES, M::load(p + LANES) + share * y);
}

// Weights of the panel's rows `from` on, two vectors of them, over the keys of one panel. They are drawn together on the
// values' lines at once: the transpose of interpolation, first down, then across.
template <int LANES, int KEYS>
FASTZS_INLINE void weigh(const Part& part, int64_t panel, int from) {
  using M = Simd<LANES>;
  using I = typename M::I;
  const Job& job = *part.job;
  const float* rows = job.panels + part.panel * job.channels * PANEL + from;
  const float* keys = job.panels + panel * job.channels * PANEL;
  I lane = {};
  for (int l = 0; l < LANES; ++l) lane[l] = l;
  lane += static_cast<int>(part.panel * PANEL) + from;
  for (int first = 0; first < PANEL; first += KEYS) {
    typename M::F sums[KEYS][2];
    products<LANES, KEYS>(keys + first, PANEL, 1, rows, PANEL, job.channels, sums);
    for (int k = 0; k < KEYS; ++k) {
      const int64_t key = panel * PANEL + first + k;
      if (key >= job.patches) return;
      for (int h = 0; h < 2; ++h) {
        const auto s = sums[k][h];
        auto weight = s;
        if (!job.linear) {
          const auto below = (s - 1.0f) * job.gamma;
          weight = M::exp_negative(below < 0.0f ? below : M::splat(0.0f));
        }
        // One comparison a choice: GCC takes vectors apart where two are joined.
        const auto score = lane + h * LANES == static_cast<int>(key) ? M::splat(INFINITY) : s;
        sums[k][h] = score >= job.shift ? weight : M::splat(0.0f);
      }
      add<LANES>(part.total + from, 1.0f, sums[k][0], sums[k][1]);
      const int64_t y = key / job.width, x = key % job.width, low = job.low_y[y];
      const float up = job.part_y[y];
      float* line = part.lines + (low * job.width + x) * PANEL + from;
      add<LANES>(line, 1.0f - up, sums[k][0], sums[k][1]);
      if (up > 0.0f && low + 1 < job.nodes_y) add<LANES>(line + job.width * PANEL, up, sums[k][0], sums[k][1]);
    }
  }
}

template <int LANES>
FASTZS_INLINE void attend(const Part& part) {
  using M = Simd<LANES>;
  constexpr int ROWS = LANES == 16 ? 8 : 4;  // two vectors each: as many sums as registers allow
  const Job& job = *part.job;
  const int64_t first = part.panel * PANEL, left = job.patches - first, rows = left < PANEL ? left : PANEL;
  for (int64_t i = 0; i < job.nodes_y * job.width * PANEL; ++i) part.lines[i] = 0.0f;
  for (int64_t i = 0; i < job.nodes * PANEL; ++i) part.mixed[i] = 0.0f;
  for (int64_t i = 0; i < PANEL; ++i) part.total[i] = job.linear ? 1e-6f : 0.0f;
  for (int64_t panel = 0; panel * PANEL < job.patches; ++panel)
    for (int from = 0; from < PANEL; from += 2 * LANES) weigh<LANES, ROWS>(part, panel, from);
  for (int64_t y = 0; y < job.nodes_y; ++y)
    for (int64_t x = 0; x < job.width; ++x)
      for (int from = 0; from < PANEL; from += 2 * LANES) {
        const float* line = part.lines + (y * job.width + x) * PANEL + from;
        const auto a = M::load(line), b = M::load(line + LANES);
        const int64_t low = job.low_x[x];
        const float up = job.part_x[x];
        float* to = part.mixed + (y * job.nodes_x + low) * PANEL + from;
        add<LANES>(to, 1.0f - up, a, b);
        if (up > 0.0f && low + 1 < job.nodes_x) add<LANES>(to + PANEL, up, a, b);
      }
  for (int64_t e = 0; e < job.size; e += 2 * LANES) {
    for (int64_t r = 0; r < rows; r += ROWS) {
      typename M::F sums[ROWS][2];
      products<LANES, ROWS>(part.mixed + r, PANEL, 1, job.values + e, job.size, job.nodes, sums);
      for (int64_t k = 0; k < ROWS && r + k < rows; ++k) {
        const float share = 1.0f / part.total[r + k];
        M::store(job.out + (first + r + k) * job.size + e, sums[k][0] * share);
        M::store(job.out + (first + r + k) * job.size + e + LANES, sums[k][1] * share);
      }
    }
  }
}

FASTZS_MULTIVERSION(run_attend, attend, Part)

using torch::stable::Tensor;

// features [B, D, N], values [B, n, E] with E a multiple of 32, shift [B]; all contiguous fp32.
Tensor proxy_attention(
    const Tensor& features, const Tensor& values, const Tensor& shift, int64_t height, int64_t width, int64_t nodes_y,
    int64_t nodes_x, const Tensor& low_y, const Tensor& part_y, const Tensor& low_x, const Tensor& part_x, double gamma,
    bool linear) {
  using torch::headeronly::ScalarType;
  for (const Tensor* t : {&features, &values, &shift, &part_y, &part_x}) {
    const bool right = t->scalar_type() == ScalarType::Float && t->is_contiguous();
    STD_TORCH_CHECK(right, "proxy_attention: expected contiguous float32 tensors, got ", describe(*t));
  }
  Job job{};
  const int64_t batch = features.size(0);
  job.channels = features.size(1), job.patches = features.size(2), job.height = height, job.width = width;
  job.nodes = values.size(1), job.nodes_y = nodes_y, job.nodes_x = nodes_x, job.size = values.size(2);
  STD_TORCH_CHECK(job.patches == height * width && job.nodes == nodes_y * nodes_x, "proxy_attention: grids disagree");
  STD_TORCH_CHECK(job.size % PANEL == 0, "proxy_attention: expected a multiple of 32 channels of values, got ", job.size);
  job.low_y = low_y.const_data_ptr<int32_t>(), job.low_x = low_x.const_data_ptr<int32_t>();
  job.part_y = part_y.const_data_ptr<float>(), job.part_x = part_x.const_data_ptr<float>();
  job.gamma = static_cast<float>(gamma), job.linear = linear;
  Tensor out = torch::stable::new_empty(values, {batch, job.patches, job.size});
  const Isa isa = cpu_isa();
  const int64_t panels = (job.patches + PANEL - 1) / PANEL;
  std::vector<float> packed(panels * job.channels * PANEL);
  job.panels = packed.data();
  for (int64_t b = 0; b < batch; ++b) {
    job.features = features.const_data_ptr<float>() + b * job.channels * job.patches;
    job.values = values.const_data_ptr<float>() + b * job.nodes * job.size;
    job.shift = shift.const_data_ptr<float>()[b];
    job.out = out.mutable_data_ptr<float>() + b * job.patches * job.size;
    torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t first = panel * PANEL, count = std::min<int64_t>(PANEL, job.patches - first);
        for (int64_t c = 0; c < job.channels; ++c) {
          float* to = job.panels + (panel * job.channels + c) * PANEL;
          std::copy_n(job.features + c * job.patches + first, count, to);
          std::fill(to + count, to + PANEL, 0.0f);
        }
      }
    });
    torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> lines(job.nodes_y * job.width * PANEL), mixed(job.nodes * PANEL), total(PANEL);
      for (int64_t panel = begin; panel < end; ++panel)
        run_attend(isa, Part{&job, panel, lines.data(), mixed.data(), total.data()});
    });
  }
  return out;
}

}  // namespace
}  // namespace fastzs::proxy_attention

STABLE_TORCH_LIBRARY_FRAGMENT(fastzs, m) {
  m.def(
      "proxy_attention(Tensor features, Tensor values, Tensor shift, int height, int width, int nodes_y, int nodes_x, "
      "Tensor low_y, Tensor part_y, Tensor low_x, Tensor part_x, float gamma, bool linear) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastzs, CPU, m) {
  m.impl("proxy_attention", TORCH_BOX(&fastzs::proxy_attention::proxy_attention));
}
