// pixel_text_logits on the CPU: scale * <f, t> / |f| and its gradient for the features.
//
// A thread owns 64 pixels of an image. It copies their features to a panel [D, 32] in fp32, which stays in its
// cache: the only read of the features from memory, whatever their dtype and strides. From the panel come the norms
// and, 12 classes at a time, the products, whose sums stay in registers; the norm divides the sums, not the features.
// Backward is the same product with the text transposed, less its part along the feature: a cosine does not change
// with the feature's length. The gradient of the text is a plain matrix product and left to BLAS.
#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu.h"
#include "simd.h"

namespace fastzs {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int PIXELS = 64;
constexpr int ROWS = 12;     // of the product, which a block of packed text holds
constexpr int DEPTH = 256;   // terms of a sum in registers before it is added to what there is: shorter sums round less
constexpr float SMALLEST_NORM = 1e-12f;  // see reference.py

// A tensor [images, channels, height, width] of any strides.
struct Map {
  const void* data;
  ScalarType type;
  int64_t image, channel, row, column;  // strides
};

struct Job {
  Map features;
  Map grad;              // [B, C, h, w], backward only
  void* out;             // [B, C, h * w], or in backward [B, D, h * w]
  ScalarType out_type;
  const float* text;     // packed: [blocks of classes, D, ROWS], or in backward [blocks of channels, C, ROWS]
  int64_t C, D, w, pixels;
  float scale;
};

struct Tile {
  const Job* job;
  int64_t image, first;  // the pixels first .. first + PIXELS
  float* panel;          // [D, PIXELS]
  float* grad_panel;     // [C, PIXELS], backward only
  float* straight;       // [D rounded up to ROWS, PIXELS], backward only
};

// As the loads and stores of Simd, of any dtype.
template <int LANES>
FASTZS_INLINE typename Simd<LANES>::F read_lanes(const Map& map, int64_t at, int64_t step, int64_t count) {
  switch (map.type) {
    case ScalarType::BFloat16: return Simd<LANES>::load(static_cast<const BFloat16*>(map.data) + at, step, count);
    case ScalarType::Half: return Simd<LANES>::load(static_cast<const Half*>(map.data) + at, step, count);
    default: return Simd<LANES>::load(static_cast<const float*>(map.data) + at, step, count);
  }
}

template <int LANES>
FASTZS_INLINE void write_lanes(void* data, ScalarType type, int64_t at, typename Simd<LANES>::F v, int64_t count) {
  switch (type) {
    case ScalarType::BFloat16: return Simd<LANES>::store(static_cast<BFloat16*>(data) + at, v, count);
    case ScalarType::Half: return Simd<LANES>::store(static_cast<Half*>(data) + at, v, count);
    default: return Simd<LANES>::store(static_cast<float*>(data) + at, v, count);
  }
}

// Copies the tile's pixels of all channels to panel [channels, PIXELS]; zeros behind the last pixel.
template <int LANES>
FASTZS_INLINE void fill_panel(const Map& map, const Job& job, int64_t image, int64_t first, int64_t channels, float* panel) {
  using V = Simd<LANES>;
  const int64_t left = job.pixels - first < PIXELS ? job.pixels - first : PIXELS;
  const int64_t start = image * map.image;
  if (map.column == 1 && map.row == job.w && left == PIXELS) {
    for (int64_t d = 0; d < channels; ++d) {
      for (int x = 0; x < PIXELS; x += LANES) {
        V::store(panel + d * PIXELS + x, read_lanes<LANES>(map, start + d * map.channel + first + x, 1, LANES));
      }
    }
    return;
  }
  if (left < PIXELS) __builtin_memset(panel, 0, channels * PIXELS * sizeof(float));
  // a few channels at a time, so that the part of the panel they fill stays in the nearest cache
  for (int64_t part = 0; part < channels; part += 32) {
    const int64_t end = part + 32 < channels ? part + 32 : channels;
    for (int64_t x = 0; x < left; ++x) {
      const int64_t n = first + x, at = start + n / job.w * map.row + n % job.w * map.column;
      for (int64_t d = part; d < end; d += LANES) {
        const int64_t count = end - d < LANES ? end - d : LANES;
        float values[LANES];
        V::store(values, read_lanes<LANES>(map, at + d * map.channel, map.channel, count));
        for (int64_t k = 0; k < count; ++k) panel[(d + k) * PIXELS + x] = values[k];
      }
    }
  }
}

// The R rows of packed text from `row` on, times 2 * LANES columns of the panel: out [R, PIXELS].
template <int LANES, int R>
FASTZS_INLINE void product_block(const float* text, const float* panel, int64_t depth, float* out) {
  using V = Simd<LANES>;
  using F = typename V::F;
  for (int64_t first = 0; first == 0 || first < depth; first += DEPTH) {
    const int64_t end = first + DEPTH < depth ? first + DEPTH : depth;
    F sums[R][2] = {};
    for (int64_t k = first; k < end; ++k) {
      const F left = V::load(panel + k * PIXELS), right = V::load(panel + k * PIXELS + LANES);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const float t = text[k * ROWS + r];
        sums[r][0] += t * left;
        sums[r][1] += t * right;
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      float* to = out + r * PIXELS;
      V::store(to, first == 0 ? sums[r][0] : V::load(to) + sums[r][0]);
      V::store(to + LANES, first == 0 ? sums[r][1] : V::load(to + LANES) + sums[r][1]);
    }
  }
}

// out [rows, PIXELS] = a block of packed text [depth, ROWS], transposed, times panel [depth, PIXELS]. Rows beyond
// `rows` may be written up to ROWS.
template <int LANES>
FASTZS_INLINE void product(const float* text, const float* panel, int64_t depth, int64_t rows, float* out) {
  for (int x = 0; x < PIXELS; x += 2 * LANES) {
    if (LANES == 16 && rows > 8) {
      product_block<LANES, 12>(text, panel + x, depth, out + x);
    } else if (LANES == 16 && rows > 4) {
      product_block<LANES, 8>(text, panel + x, depth, out + x);
    } else {
      // the narrower instruction sets have half the registers
      for (int64_t r = 0; r < rows; r += 4) product_block<LANES, 4>(text + r, panel + x, depth, out + r * PIXELS + x);
    }
  }
}

template <int LANES>
FASTZS_INLINE void score_tile(const Tile& a) {
  using V = Simd<LANES>;
  const Job& job = *a.job;
  fill_panel<LANES>(job.features, job, a.image, a.first, job.D, a.panel);

  float factor[PIXELS];  // scale / norm
  for (int x = 0; x < PIXELS; x += LANES) {
    typename V::F squares{};
    for (int64_t d = 0; d < job.D; ++d) {
      const typename V::F f = V::load(a.panel + d * PIXELS + x);
      squares += f * f;
    }
    V::store(factor + x, squares);
  }
  for (float& x : factor) {
    const float norm = __builtin_sqrtf(x);
    x = job.scale / (norm < SMALLEST_NORM ? SMALLEST_NORM : norm);
  }

  for (int64_t first = 0; first < job.C; first += ROWS) {
    const int64_t rows = job.C - first < ROWS ? job.C - first : ROWS;
    float dot[ROWS * PIXELS];
    product<LANES>(job.text + first * job.D, a.panel, job.D, rows, dot);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t out = (a.image * job.C + first + r) * job.pixels + a.first;
      for (int x = 0; x < PIXELS && a.first + x < job.pixels; x += LANES) {
        const typename V::F score = V::load(dot + r * PIXELS + x) * V::load(factor + x);
        write_lanes<LANES>(job.out, job.out_type, out + x, score, job.pixels - a.first - x);
      }
    }
  }
}

template <int LANES>
FASTZS_INLINE void gradient_tile(const Tile& a) {
  using V = Simd<LANES>;
  using F = typename V::F;
  const Job& job = *a.job;
  fill_panel<LANES>(job.features, job, a.image, a.first, job.D, a.panel);
  fill_panel<LANES>(job.grad, job, a.image, a.first, job.C, a.grad_panel);
  for (int64_t first = 0; first < job.D; first += ROWS) {
    const int64_t rows = job.D - first < ROWS ? job.D - first : ROWS;
    product<LANES>(job.text + first * job.C, a.grad_panel, job.C, rows, a.straight + first * PIXELS);
  }
  for (int x = 0; x < PIXELS && a.first + x < job.pixels; x += LANES) {
    F squares{}, along{};
    for (int64_t d = 0; d < job.D; ++d) {
      const F f = V::load(a.panel + d * PIXELS + x);
      squares += f * f;
      along += f * V::load(a.straight + d * PIXELS + x);
    }
    F factor, share;  // scale / norm, and how much of the feature to take away
    for (int k = 0; k < LANES; ++k) {
      const float norm = __builtin_sqrtf(squares[k]);
      const bool tiny = norm < SMALLEST_NORM;  // its norm counts as constant
      factor[k] = job.scale / (tiny ? SMALLEST_NORM : norm);
      share[k] = tiny ? 0.0f : along[k] / norm / norm;
    }
    for (int64_t d = 0; d < job.D; ++d) {
      const F f = V::load(a.panel + d * PIXELS + x), straight = V::load(a.straight + d * PIXELS + x);
      const int64_t out = (a.image * job.D + d) * job.pixels + a.first + x;
      write_lanes<LANES>(job.out, job.out_type, out, (straight - f * share) * factor, job.pixels - a.first - x);
    }
  }
}

FASTZS_MULTIVERSION(run_score_tile, score_tile, Tile)
FASTZS_MULTIVERSION(run_gradient_tile, gradient_tile, Tile)

Map map_of(const Tensor& t) {
  return {t.const_data_ptr(), t.scalar_type(), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

// [blocks of rows, columns, ROWS] in fp32; zeros behind the last row.
std::vector<float> pack(const Tensor& t, bool transposed) {
  const Map map{t.const_data_ptr(), t.scalar_type(), 0, 0, t.stride(transposed), t.stride(!transposed)};
  const int64_t rows = t.size(transposed), columns = t.size(!transposed), blocks = (rows + ROWS - 1) / ROWS;
  std::vector<float> packed(blocks * columns * ROWS);
  torch::stable::parallel_for(0, blocks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * ROWS; row < std::min(end * ROWS, rows); ++row) {
      float* out = packed.data() + row / ROWS * columns * ROWS + row % ROWS;
      for (int64_t k = 0; k < columns; k += 4) {
        const auto values = read_lanes<4>(map, row * map.row + k * map.column, map.column, columns - k);
        for (int64_t n = 0; n < std::min<int64_t>(4, columns - k); ++n) out[(k + n) * ROWS] = values[n];
      }
    }
  });
  return packed;
}

void check(const Tensor& features, const Tensor& text) {
  STD_TORCH_CHECK(features.dim() == 4 && text.dim() == 2 && features.size(1) == text.size(1) && text.size(1) > 0,
      "pixel_text_logits: expected features [B, D, h, w] and text [C, D] with the same D > 0, got ", describe(features),
      " and ", describe(text));
  for (const Tensor* t : {&features, &text}) {
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float || t->scalar_type() == ScalarType::BFloat16 ||
        t->scalar_type() == ScalarType::Half, "pixel_text_logits: expected float32, bfloat16 or float16 values, got ",
        describe(*t));
  }
}

void run_tiles(const Job& job, int64_t images, bool backward) {
  const int64_t tiles = (job.pixels + PIXELS - 1) / PIXELS;
  const Isa isa = cpu_isa();
  torch::stable::parallel_for(0, images * tiles, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> panel(job.D * PIXELS), grad_panel, straight;
    if (backward) grad_panel.resize(job.C * PIXELS), straight.resize((job.D + ROWS) * PIXELS);
    for (int64_t n = begin; n < end; ++n) {
      const Tile tile{&job, n / tiles, n % tiles * PIXELS, panel.data(), grad_panel.data(), straight.data()};
      backward ? run_gradient_tile(isa, tile) : run_score_tile(isa, tile);
    }
  });
}

Tensor pixel_text_logits(const Tensor& features, const Tensor& text, double scale) {
  check(features, text);
  const int64_t B = features.size(0), D = features.size(1), h = features.size(2), w = features.size(3);
  const int64_t C = text.size(0);
  Tensor out = torch::stable::new_empty(features, {B, C, h, w}, text.scalar_type());
  if (B * C * h * w == 0) return out;
  const std::vector<float> packed = pack(text, false);
  const Job job{map_of(features), {}, out.mutable_data_ptr(), out.scalar_type(), packed.data(), C, D, w, h * w,
      static_cast<float>(scale)};
  run_tiles(job, B, false);
  return out;
}

Tensor pixel_text_logits_backward(const Tensor& grad, const Tensor& features, const Tensor& text, double scale) {
  check(features, text);
  const int64_t B = features.size(0), D = features.size(1), h = features.size(2), w = features.size(3);
  const int64_t C = text.size(0);
  STD_TORCH_CHECK(grad.dim() == 4 && grad.size(0) == B && grad.size(1) == C && grad.size(2) == h && grad.size(3) == w &&
      grad.scalar_type() == text.scalar_type(), "pixel_text_logits: expected a gradient [B, C, h, w] in the dtype of text, got ",
      describe(grad));
  Tensor out = torch::stable::new_empty(features, {B, D, h, w}, features.scalar_type());
  if (B * h * w == 0) return out;
  const std::vector<float> packed = pack(text, true);
  const Job job{map_of(features), map_of(grad), out.mutable_data_ptr(), out.scalar_type(), packed.data(), C, D, w, h * w,
      static_cast<float>(scale)};
  run_tiles(job, B, true);
  return out;
}

}  // namespace
}  // namespace fastzs

STABLE_TORCH_LIBRARY_FRAGMENT(fastzs, m) {
  m.def("pixel_text_logits(Tensor features, Tensor text, float scale) -> Tensor");
  m.def("pixel_text_logits_backward(Tensor grad, Tensor features, Tensor text, float scale) -> Tensor grad_features");
}

STABLE_TORCH_LIBRARY_IMPL(fastzs, CPU, m) {
  m.impl("pixel_text_logits", TORCH_BOX(&fastzs::pixel_text_logits));
  m.impl("pixel_text_logits_backward", TORCH_BOX(&fastzs::pixel_text_logits_backward));
}
