// refine on the CPU: labels from class maps that are first smoothed along the picture's own edges (PAMR).
//
// Every class is smoothed by the same weights, so nothing needs all classes at once. The weights of every pixel's
// neighbours are computed once. Then a few classes at a time are interpolated to the picture, smoothed, and compared
// with the best so far; a running sum of exponentials gives the best one's probability. Memory beyond inputs and
// outputs is the weights, 8 |D| numbers a pixel, and two buffers of CHUNK maps.
//
// Maps and picture lie in rows that are padded by their own ends, so that a neighbour beyond the left or right border
// is read like any other; beyond the upper and lower border another row is read. A weight is loaded once for all the
// maps of a chunk. Threads share the rows of a picture, never a pixel, and classes come in order: results do not depend
// on the number of threads.
#include <algorithm>
#include <optional>
#include <vector>

#include "cpu.h"
#include "simd.h"

namespace fastzs::refine {
namespace {

constexpr int CHUNK = 4;   // maps smoothed together; with two vectors of pixels each, sums fill half the registers
constexpr int GROUP = 16;  // pixels whose weights lie together: [W / GROUP, 8 |D|, GROUP] a row
constexpr int STEP = 2 * GROUP;  // rows are a multiple of it wide

// Places of the 8 neighbours, row by row.
constexpr int DOWN[8] = {-1, -1, -1, 0, 0, 1, 1, 1}, RIGHT[8] = {-1, 0, 1, -1, 1, -1, 0, 1};

struct Job {
  Isa isa;
  const float* nodes;  // [C, I, J]: all windows' maps, side by side
  int64_t classes, node_rows, node_cols;
  const int32_t *row_index, *col_index;  // [H, row_taps], [W, col_taps]: the nodes that a pixel mixes
  const float *row_weight, *col_weight;
  int64_t row_taps, col_taps;
  int64_t h, w, wide, pad, pitch;  // pitch = pad + wide + pad
  const float* image;              // [K, H, W]
  int64_t channels;
  const int64_t* dilations;
  int64_t dilation_count;
  bool wants_probability;
  float scale;
  float* padded;         // [K, H, pitch]
  float* weights;        // [H, wide / GROUP, 8 |D|, GROUP]
  float* spread;         // [CHUNK, I, W]: nodes interpolated along rows
  float *source, *target;  // [H, CHUNK, pitch]
  int64_t first, count;  // classes of this chunk
  int32_t* labels;       // [H, W]
  float* scores;         // [H, W]
  float* total;          // [H, W]: sum of exp(scale (score - best)); in the end the best one's probability
  float* maps;           // [C, H, W], or null

  int64_t neighbours() const { return 8 * dilation_count; }
};

struct Rows {
  const Job* job;
  int64_t begin, end;
};

FASTZS_INLINE int64_t inside(int64_t i, int64_t n) { return i < 0 ? 0 : i < n ? i : n - 1; }

// Columns are padded by at most the picture's width: from there on every neighbour is the border.
FASTZS_INLINE int64_t across(const Job& job, int64_t dilation) { return dilation < job.w ? dilation : job.w - 1; }

// Beyond both ends of a padded row, its first and last pixel.
FASTZS_INLINE void fill_ends(const Job& job, float* row) {
  const float left = row[job.pad], right = row[job.pad + job.w - 1];
  for (int64_t i = 0; i < job.pad; ++i) row[i] = left;
  for (int64_t i = job.pad + job.w; i < job.pitch; ++i) row[i] = right;
}

// Where neighbour n of the pixels of row y starts, in numbers, in a buffer [H, rows, pitch].
FASTZS_INLINE int64_t start_of(const Job& job, int64_t y, int64_t n, int64_t rows) {
  const int64_t d = job.dilations[n / 8];
  const int64_t row = inside(y + DOWN[n % 8] * d, job.h);
  return row * rows * job.pitch + job.pad + RIGHT[n % 8] * across(job, d);
}

// ---- weights --------------------------------------------------------------------------------------------------------

template <int LANES>
struct Math : Simd<LANES> {
  using F = typename Simd<LANES>::F;
  using I = typename Simd<LANES>::I;

  static FASTZS_INLINE F magnitude(F x) { return (F)((I)x & 0x7fffffff); }

  // By three steps of Newton for 1 / sqrt(x); 0 for 0.
  static FASTZS_INLINE F root(F x) {
    F y = (F)(0x5f375a86 - ((I)x >> 1));
    for (int k = 0; k < 3; ++k) y = y * (1.5f - 0.5f * x * y * y);
    return x * y;
  }
};

// Of one vector of pixels. Deviations are summed as differences from the centre, which are small where the deviation
// is, so that nothing cancels.
template <int LANES>
FASTZS_INLINE void weights_at(const Job& job, const int64_t* starts, int64_t y, int64_t x, float* out) {
  using M = Math<LANES>;
  const int64_t neighbours = job.neighbours();
  const float values = 9.0f * static_cast<float>(job.dilation_count);
  for (int64_t k = 0; k < job.channels; ++k) {
    const float* plane = job.padded + k * job.h * job.pitch + x;
    const auto centre = M::load(plane + y * job.pitch + job.pad);
    auto sum = M::splat(0.0f), squares = M::splat(0.0f);
    for (int64_t n = 0; n < neighbours; ++n) {
      const auto d = M::load(plane + starts[n]) - centre;
      sum += d;
      squares += d * d;
    }
    auto variance = (squares - sum * sum * (1.0f / values)) * (1.0f / (values - 1.0f));
    variance = variance > 0.0f ? variance : M::splat(0.0f);
    const auto share = 1.0f / ((1e-8f + 0.1f * M::root(variance)) * static_cast<float>(job.channels));
    for (int64_t n = 0; n < neighbours; ++n) {
      const auto a = M::magnitude(M::load(plane + starts[n]) - centre) * share;
      M::store(out + n * GROUP, k == 0 ? a : M::load(out + n * GROUP) + a);
    }
  }
  auto least = M::load(out);
  for (int64_t n = 1; n < neighbours; ++n) {
    const auto a = M::load(out + n * GROUP);
    least = a < least ? a : least;
  }
  auto total = M::splat(0.0f);
  for (int64_t n = 0; n < neighbours; ++n) {
    const auto e = M::exp_negative(least - M::load(out + n * GROUP));
    total += e;
    M::store(out + n * GROUP, e);
  }
  const auto part = 1.0f / total;
  for (int64_t n = 0; n < neighbours; ++n) M::store(out + n * GROUP, M::load(out + n * GROUP) * part);
}

template <int LANES>
FASTZS_INLINE void weight_rows(const Rows& rows) {
  const Job& job = *rows.job;
  const int64_t neighbours = job.neighbours();
  int64_t starts[8 * 16];
  for (int64_t y = rows.begin; y < rows.end; ++y) {
    for (int64_t n = 0; n < neighbours; ++n) starts[n] = start_of(job, y, n, 1);
    float* row = job.weights + y * job.wide * neighbours;
    for (int64_t x = 0; x < job.wide; x += LANES) {
      weights_at<LANES>(job, starts, y, x, row + x / GROUP * GROUP * neighbours + x % GROUP);
    }
  }
}

// ---- maps -----------------------------------------------------------------------------------------------------------

// Rows of [count, I]: what the pixels' columns mix of a row of nodes.
template <int LANES>
FASTZS_INLINE void spread_rows(const Rows& rows) {
  const Job& job = *rows.job;
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    const float* nodes = job.nodes + (job.first * job.node_rows + i) * job.node_cols;
    float* out = job.spread + i * job.w;
    const int32_t* index = job.col_index;
    const float* weight = job.col_weight;
    for (int64_t x = 0; x < job.w; ++x, index += job.col_taps, weight += job.col_taps) {
      float sum = 0.0f;
      for (int64_t t = 0; t < job.col_taps; ++t) sum += weight[t] * nodes[index[t]];
      out[x] = sum;
    }
  }
}

// The chunk's maps at the pixels of some rows.
template <int LANES>
FASTZS_INLINE void map_rows(const Rows& rows) {
  using M = Simd<LANES>;
  const Job& job = *rows.job;
  for (int64_t y = rows.begin; y < rows.end; ++y) {
    const int32_t* index = job.row_index + y * job.row_taps;
    const float* weight = job.row_weight + y * job.row_taps;
    for (int64_t k = 0; k < job.count; ++k) {
      const float* from = job.spread + k * job.node_rows * job.w;
      float* row = job.source + (y * job.count + k) * job.pitch;
      for (int64_t x = 0; x < job.w; x += LANES) {
        auto sum = M::splat(0.0f);
        for (int64_t t = 0; t < job.row_taps; ++t)
          sum += weight[t] * M::load(from + index[t] * job.w + x, 1, job.w - x);
        M::store(row + job.pad + x, sum);
      }
      fill_ends(job, row);
    }
  }
}

// One iteration over some rows of K maps: from source to target.
template <int LANES, int K>
FASTZS_INLINE void smooth_rows_of(const Rows& rows) {
  using M = Simd<LANES>;
  const Job& job = *rows.job;
  const int64_t neighbours = job.neighbours(), pitch = job.pitch;
  int64_t starts[8 * 16];
  for (int64_t y = rows.begin; y < rows.end; ++y) {
    for (int64_t n = 0; n < neighbours; ++n) starts[n] = start_of(job, y, n, K);
    const float* weights = job.weights + y * job.wide * neighbours;
    float* out = job.target + y * K * pitch;
    for (int64_t x = 0; x < job.wide; x += 2 * LANES) {
      const float* w0 = weights + x / GROUP * GROUP * neighbours + x % GROUP;
      const int64_t next = x + LANES;
      const float* w1 = weights + next / GROUP * GROUP * neighbours + next % GROUP;
      typename M::F sums[K][2];
      for (int k = 0; k < K; ++k) sums[k][0] = sums[k][1] = M::splat(0.0f);
      for (int64_t n = 0; n < neighbours; ++n) {
        const float* from = job.source + starts[n] + x;
        const auto a = M::load(w0 + n * GROUP), b = M::load(w1 + n * GROUP);
        for (int k = 0; k < K; ++k) {
          sums[k][0] += a * M::load(from + k * pitch);
          sums[k][1] += b * M::load(from + k * pitch + LANES);
        }
      }
      for (int k = 0; k < K; ++k) {
        M::store(out + k * pitch + job.pad + x, sums[k][0]);
        M::store(out + k * pitch + job.pad + x + LANES, sums[k][1]);
      }
    }
    for (int k = 0; k < K; ++k) fill_ends(job, out + k * pitch);
  }
}

template <int LANES>
FASTZS_INLINE void smooth_rows(const Rows& rows) {
  switch (rows.job->count) {
    case 1: return smooth_rows_of<LANES, 1>(rows);
    case 2: return smooth_rows_of<LANES, 2>(rows);
    case 3: return smooth_rows_of<LANES, 3>(rows);
    default: return smooth_rows_of<LANES, 4>(rows);
  }
}

// ---- labels ---------------------------------------------------------------------------------------------------------

// Takes the chunk's maps, which lie in source, into the best so far. Of equal scores the lower class stays.
template <int LANES>
FASTZS_INLINE void take_rows(const Rows& rows) {
  using M = Simd<LANES>;
  using I = typename M::I;
  const Job& job = *rows.job;
  for (int64_t y = rows.begin; y < rows.end; ++y) {
    for (int64_t x = 0; x < job.w; x += LANES) {
      const int64_t at = y * job.w + x, left = job.w - x;
      const int64_t have = left < LANES ? left : LANES;
      auto best = job.first == 0 ? M::splat(-__builtin_inff()) : M::load(job.scores + at, 1, left);
      auto total = M::splat(0.0f);
      if (job.first > 0 && job.wants_probability) total = M::load(job.total + at, 1, left);
      I label = {};
      if (job.first > 0) __builtin_memcpy(&label, job.labels + at, have * sizeof(int32_t));
      for (int64_t k = 0; k < job.count; ++k) {
        const auto score = M::load(job.source + (y * job.count + k) * job.pitch + job.pad + x);
        const auto better = score > best;
        if (job.wants_probability) {
          const auto gap = (better ? best - score : score - best) * job.scale;
          const auto e = M::exp_negative(gap);
          total = better ? total * e + 1.0f : total + e;
        }
        best = better ? score : best;
        label = better ? I{} + static_cast<int32_t>(job.first + k) : label;
        if (job.maps != nullptr) M::store(job.maps + (job.first + k) * job.h * job.w + at, score, left);
      }
      M::store(job.scores + at, best, left);
      if (job.wants_probability) {
        if (job.first + job.count == job.classes) total = 1.0f / total;
        M::store(job.total + at, total, left);
      }
      __builtin_memcpy(job.labels + at, &label, have * sizeof(int32_t));
    }
  }
}

FASTZS_MULTIVERSION(run_weights, weight_rows, Rows)
FASTZS_MULTIVERSION(run_spread, spread_rows, Rows)
FASTZS_MULTIVERSION(run_maps, map_rows, Rows)
FASTZS_MULTIVERSION(run_smooth, smooth_rows, Rows)
FASTZS_MULTIVERSION(run_take, take_rows, Rows)

void in_parallel(void (*run)(Isa, const Rows&), const Job& job, int64_t rows) {
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) { run(job.isa, Rows{&job, begin, end}); });
}

int64_t whole(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const float* floats_of(const Tensor& t, const char* name) {
  const bool right = t.scalar_type() == ScalarType::Float && t.is_contiguous();
  STD_TORCH_CHECK(right, "refine: expected contiguous fp32 ", name);
  return t.const_data_ptr<float>();
}

void refine_cpu(
    const Tensor& nodes, const Tensor& row_index, const Tensor& row_weight, const Tensor& col_index,
    const Tensor& col_weight, const std::optional<Tensor>& image, const std::vector<int64_t>& dilations,
    int64_t iterations, std::optional<double> scale, Tensor labels, Tensor scores, std::optional<Tensor> probabilities,
    std::optional<Tensor> maps) {
  STD_TORCH_CHECK(dilations.size() <= 16, "refine: expected at most 16 dilations, got ", dilations.size());
  Job job{};
  job.isa = cpu_isa();
  job.nodes = floats_of(nodes, "nodes");
  job.classes = nodes.size(0), job.node_rows = nodes.size(1), job.node_cols = nodes.size(2);
  job.row_index = row_index.const_data_ptr<int32_t>(), job.row_taps = row_index.size(1);
  job.col_index = col_index.const_data_ptr<int32_t>(), job.col_taps = col_index.size(1);
  job.row_weight = floats_of(row_weight, "row_weight"), job.col_weight = floats_of(col_weight, "col_weight");
  job.h = row_index.size(0), job.w = col_index.size(0);
  job.wide = whole(job.w, STEP);
  job.dilations = dilations.data(), job.dilation_count = static_cast<int64_t>(dilations.size());
  for (int64_t d : dilations) job.pad = std::max(job.pad, whole(across(job, d), GROUP));
  job.pitch = job.pad + job.wide + job.pad;
  job.wants_probability = scale.has_value();
  job.scale = static_cast<float>(scale.value_or(0.0));
  job.labels = labels.mutable_data_ptr<int32_t>(), job.scores = scores.mutable_data_ptr<float>();
  if (probabilities.has_value()) job.total = probabilities->mutable_data_ptr<float>();
  if (maps.has_value()) job.maps = maps->mutable_data_ptr<float>();
  std::vector<float> weights;
  if (iterations > 0) {
    job.image = floats_of(*image, "image"), job.channels = image->size(0);
    weights.resize(job.h * job.wide * job.neighbours());
    std::vector<float> padded(job.channels * job.h * job.pitch);
    for (int64_t i = 0; i < job.channels * job.h; ++i) {
      float* row = padded.data() + i * job.pitch;
      std::copy(job.image + i * job.w, job.image + (i + 1) * job.w, row + job.pad);
      fill_ends(job, row);
    }
    job.weights = weights.data(), job.padded = padded.data();
    in_parallel(run_weights, job, job.h);
  }
  // Chunks of equal size, at most CHUNK.
  const int64_t chunks = (job.classes + CHUNK - 1) / CHUNK, largest = (job.classes + chunks - 1) / chunks;
  std::vector<float> spread(largest * job.node_rows * job.w + GROUP);
  std::vector<float> first(job.h * largest * job.pitch), second(iterations > 0 ? first.size() : 0);
  job.spread = spread.data(), job.source = first.data(), job.target = second.data();
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    job.first = chunk * job.classes / chunks;
    job.count = (chunk + 1) * job.classes / chunks - job.first;
    in_parallel(run_spread, job, job.count * job.node_rows);
    in_parallel(run_maps, job, job.h);
    for (int64_t i = 0; i < iterations; ++i) {
      in_parallel(run_smooth, job, job.h);
      std::swap(job.source, job.target);
    }
    in_parallel(run_take, job, job.h);
  }
}

}  // namespace
}  // namespace fastzs::refine

STABLE_TORCH_LIBRARY_FRAGMENT(fastzs, m) {
  m.def(
      "refine_cpu(Tensor nodes, Tensor row_index, Tensor row_weight, Tensor col_index, Tensor col_weight, "
      "Tensor? image, int[] dilations, int iterations, float? scale, Tensor(a!) labels, Tensor(b!) scores, "
      "Tensor(c!)? probabilities, Tensor(d!)? maps) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastzs, CPU, m) { m.impl("refine_cpu", TORCH_BOX(&fastzs::refine::refine_cpu)); }
