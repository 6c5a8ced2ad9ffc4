// label_map on CUDA: a thread for every output pixel, its best classes kept in registers.
//
// Where pixels and windows lie comes as tables from kernels/label_map/tables.py, the same that the Triton kernel reads.
// A thread takes the classes in groups; per group it adds up the scores of the windows over each grid pixel it mixes,
// so that places are worked out once for a group, and puts the mixed scores among its best. Softmax takes a
// second kernel first: the logarithm of the sum of exponentials at every pixel of every window.
//
// A block owns a tile of the output and first leaves out classes that cannot win in it, by the argument of
// label_map.cpp: the difference of two classes' logits is bilinear between node lines, so it takes its extremes at the
// tile's marks, its corners in a window and where node lines cross it. A class that is below one other class at all
// marks of all windows, by more than rounding, and is calibrated no less, is not evaluated. For K = 1; more ranks take
// all classes. Logits interpolated per output pixel, marks included, counted on the host by
// tests/kernels/cuda/test_label_map.py::test_few_classes_are_evaluated (-s prints them) for two windows, smooth maps with
// a node every 16 pixels and a second step: 120 become 36 with 20 classes, 1026 become 135 with 171, 5082 become 410 with
// 847. What that is worth in time is unmeasured on a GPU.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <optional>

#include "describe.h"

// A torch without CUDA has no such function; weakly declared, the library loads there all the same.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace fastzs {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int SIGMOID = 0, SOFTMAX = 1, NONE = 2;
constexpr int THREADS = 128;
constexpr int WARPS = THREADS / 32;
constexpr int MOST_K = 8;
constexpr int TILE_H = 8, TILE_W = 16;  // THREADS pixels
constexpr int MOST_CLASSES = 1 << 15;   // labels are int16
constexpr int MOST_COVERS = 8;          // windows over a tile, and ...
constexpr int MOST_MARKS = 64;          // ... marks in all of them; where there are more, all classes are evaluated
constexpr int RIVALS = 2 * WARPS;       // classes by which others are left out
constexpr float MARGIN = 2e-6f;         // of the largest node: above the rounding of four logits, as in label_map.cpp
constexpr unsigned ALL_LANES = 0xffffffff;
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

struct Problem {
  const void* logits;      // [windows, C, h, w]
  const float* penalty;    // [C] or null
  const int* box;          // [windows, 4]: first grid row and column, how many
  const int* row_windows;  // [out_h, most]: windows over the grid rows of each output row
  const int* row_counts;   // [out_h]: how many
  const int* rows_lo;      // [windows, span_y]: the lower node of each of a window's grid rows
  const float* rows_weight;
  const int* cols_lo;      // [windows, span_x]
  const float* cols_weight;
  const double* taps_y;    // [3, out_h]: the two grid rows of each output row, weight of the second
  const double* taps_x;    // [3, out_w]
  float* norm;             // [windows, span_y, span_x], for softmax
  void* labels;            // [top_k, out_h, out_w], int16 if wide, else uint8
  float* scores;           // [top_k, out_h, out_w] or null
  int windows, C, h, w, span_y, span_x, out_h, out_w, most, taps, top_k;
  float threshold;
  bool wide;
};

__device__ float read(const float* data, int64_t at) { return data[at]; }
__device__ float read(const __nv_bfloat16* data, int64_t at) { return __bfloat162float(data[at]); }
__device__ float read(const __half* data, int64_t at) { return __half2float(data[at]); }

__device__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A place between four nodes of a window's maps.
struct Place {
  int n00, n01, n10, n11;  // from the start of a class's map
  float wy, wx;
};

__device__ Place place_between(const Problem& a, int y0, float wy, int x0, float wx) {
  const int top = y0 * a.w, bottom = min(y0 + 1, a.h - 1) * a.w, x1 = min(x0 + 1, a.w - 1);
  return {top + x0, top + x1, bottom + x0, bottom + x1, wy, wx};
}

__device__ Place place_of(const Problem& a, int64_t row, int64_t col) {
  return place_between(a, a.rows_lo[row], a.rows_weight[row], a.cols_lo[col], a.cols_weight[col]);
}

// `size` becomes the largest magnitude of the nodes, where it was smaller.
template <class T>
__device__ float logit_at(const T* map, const Place& at, float* size = nullptr) {
  float a = read(map, at.n00), b = read(map, at.n01), c = read(map, at.n10), d = read(map, at.n11);
  if (size != nullptr) *size = fmaxf(*size, fmaxf(fmaxf(fabsf(a), fabsf(b)), fmaxf(fabsf(c), fabsf(d))));
  // x - x is NaN where x is not finite
  a += a - a, b += b - b, c += c - c, d += d - d;
  const float left = a * (1 - at.wy) + c * at.wy, right = b * (1 - at.wy) + d * at.wy;
  return left * (1 - at.wx) + right * at.wx;
}

// ---- leaving classes out --------------------------------------------------------------------------------------------

// A tile's grid rows and columns, all inclusive.
struct Tile {
  int y0, y1, x0, x1;
};

// What a window has of a tile along an axis, in rows from the window's first; marks are its ends and the node lines
// between them.
struct Stretch {
  int first, last, marks;  // marks: 0 if it has none
};

struct Mark {
  int64_t maps;  // of its window, from the start of the logits
  Place place;
};

__device__ Stretch stretch_of(int from, int to, int start, int count, const int* lo) {
  const int first = max(from - start, 0), last = min(to - start, count - 1);
  return {first, last, first > last ? 0 : lo[last] - lo[first] + 2};
}

__device__ Stretch rows_of(const Problem& a, const Tile& tile, int64_t window) {
  return stretch_of(tile.y0, tile.y1, a.box[4 * window], a.box[4 * window + 2], a.rows_lo + window * a.span_y);
}

__device__ Stretch cols_of(const Problem& a, const Tile& tile, int64_t window) {
  return stretch_of(tile.x0, tile.x1, a.box[4 * window + 1], a.box[4 * window + 3], a.cols_lo + window * a.span_x);
}

// The n-th mark of a stretch: its lower node, and the weight of the next.
__device__ int mark_node(const Stretch& s, int n, const int* lo, const float* weight, float* part) {
  if (n > 0 && n < s.marks - 1) return *part = 0, lo[s.first] + n;
  const int at = n == 0 ? s.first : s.last;
  return *part = weight[at], lo[at];
}

// A class by which others are left out.
struct Rival {
  float total;  // of its logits at the marks
  int c;
};

__device__ bool above(const Rival& one, const Rival& other) {
  return one.total > other.total || (one.total == other.total && one.c < other.c);
}

__device__ float penalty_of(const Problem& a, int c) { return a.penalty == nullptr ? 0.0f : a.penalty[c]; }

// Whether it is calibrated less, or alike and above.
__device__ bool freer(const Problem& a, const Rival& one, const Rival& other) {
  const float mine = penalty_of(a, one.c), others = penalty_of(a, other.c);
  return mine < others || (mine == others && above(one, other));
}

// What a thread or a warp knows of its classes.
struct Tally {
  float size;        // the largest magnitude of a node, infinity if one is not finite
  Rival any, least;  // the one with the largest total; the same of those calibrated least

  __device__ void add(const Problem& a, const Tally& other) {
    size = fmaxf(size, other.size);
    if (above(other.any, any)) any = other.any;
    if (freer(a, other.least, least)) least = other.least;
  }
};

__device__ Tally from_lane(const Tally& mine, int step) {
  return {__shfl_xor_sync(ALL_LANES, mine.size, step, 32),
          {__shfl_xor_sync(ALL_LANES, mine.any.total, step, 32), __shfl_xor_sync(ALL_LANES, mine.any.c, step, 32)},
          {__shfl_xor_sync(ALL_LANES, mine.least.total, step, 32), __shfl_xor_sync(ALL_LANES, mine.least.c, step, 32)}};
}

// Lists the marks of the tile; returns how many there are, 0 if too many. All threads of the block call it.
__device__ int list_marks(const Problem& a, const Tile& tile, Mark* marks) {
  __shared__ int covers[MOST_COVERS];
  __shared__ int cover_count;
  const int lane = threadIdx.x % 32;
  if (threadIdx.x < 32) {
    int count = 0;
    for (int first = 0; first < a.windows; first += 32) {
      const int window = first + lane;
      const bool over =
          window < a.windows && rows_of(a, tile, window).marks > 0 && cols_of(a, tile, window).marks > 0;
      const unsigned which = __ballot_sync(ALL_LANES, over);
      const int slot = count + __popc(which & ((1u << lane) - 1));
      if (over && slot < MOST_COVERS) covers[slot] = window;
      count += __popc(which);
    }
    if (lane == 0) cover_count = count;
  }
  __syncthreads();
  if (cover_count > MOST_COVERS) return 0;
  int total = 0;
  for (int i = 0; i < cover_count; ++i) {
    const int64_t window = covers[i];
    const Stretch rows = rows_of(a, tile, window), cols = cols_of(a, tile, window);
    const int n = static_cast<int>(threadIdx.x) - total;
    total += rows.marks * cols.marks;
    if (total > MOST_MARKS) return 0;
    if (n < 0 || n >= rows.marks * cols.marks) continue;
    float wy, wx;
    const int y = mark_node(rows, n / cols.marks, a.rows_lo + window * a.span_y, a.rows_weight + window * a.span_y, &wy);
    const int x = mark_node(cols, n % cols.marks, a.cols_lo + window * a.span_x, a.cols_weight + window * a.span_x, &wx);
    marks[threadIdx.x] = {window * a.C * a.h * a.w, place_between(a, y, wy, x, wx)};
  }
  __syncthreads();
  return total;
}

// Sets the bits of the classes that may be the best somewhere in the tile. All threads of the block call it.
template <class T>
__device__ void choose(const Problem& a, const Tile& tile, unsigned* chosen) {
  __shared__ Mark marks[MOST_MARKS];
  __shared__ float of_rival[RIVALS][MOST_MARKS];
  __shared__ Tally tallies[WARPS];
  const T* logits = static_cast<const T*>(a.logits);
  const int64_t plane = static_cast<int64_t>(a.h) * a.w;
  const int count = list_marks(a, tile, marks), lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  // A warp takes every WARPS-th class; each gives two rivals.
  Tally tally{0, {-INFINITY, 0}, {-INFINITY, 0}};
  for (int c = WARPS * lane + warp; c < a.C && count > 0; c += THREADS) {
    float total = 0, size = 0;
    for (int m = 0; m < count; ++m) total += logit_at(logits + marks[m].maps + c * plane, marks[m].place, &size);
    tally.add(a, {total == total ? size : INFINITY, {total, c}, {total, c}});
  }
  for (int step = 16; step > 0; step /= 2) tally.add(a, from_lane(tally, step));
  if (lane == 0) tallies[warp] = tally;
  __syncthreads();
  const int rivals = a.penalty == nullptr ? WARPS : RIVALS;  // without calibration the second ones are the first
  for (int n = threadIdx.x; n < rivals * count; n += THREADS) {
    const int rival = n % rivals, m = n / rivals;
    const int c = rival < WARPS ? tallies[rival].any.c : tallies[rival - WARPS].least.c;
    of_rival[rival][m] = logit_at(logits + marks[m].maps + c * plane, marks[m].place);
  }
  __syncthreads();

  float size = 0, penalties[RIVALS];
  for (int n = 0; n < WARPS; ++n) {
    size = fmaxf(size, tallies[n].size);
    penalties[n] = penalty_of(a, tallies[n].any.c), penalties[WARPS + n] = penalty_of(a, tallies[n].least.c);
  }
  for (int first = 0; first < a.C; first += THREADS) {
    const int c = first + threadIdx.x;
    bool kept = c < a.C;
    if (kept && count > 0) {
      float lead[RIVALS];  // the most by which the class is above each rival
      for (int n = 0; n < RIVALS; ++n) lead[n] = n < rivals ? -INFINITY : INFINITY;
      for (int m = 0; m < count; ++m) {
        const float z = logit_at(logits + marks[m].maps + c * plane, marks[m].place);
#pragma unroll
        for (int n = 0; n < RIVALS; ++n)
          if (n < rivals) lead[n] = fmaxf(lead[n], z - of_rival[n][m]);
      }
      const float penalty = penalty_of(a, c);
#pragma unroll
      for (int n = 0; n < RIVALS; ++n) kept = kept && !(lead[n] < -MARGIN * size && penalties[n] <= penalty);
    }
    const unsigned bits = __ballot_sync(ALL_LANES, kept);
    if (lane == 0) chosen[first / 32 + warp] = bits;
  }
}

// ---- kernels --------------------------------------------------------------------------------------------------------

// Natural logarithm of the sum over the classes of e^logit; NaN if one of them is.
template <class T>
__global__ void __launch_bounds__(THREADS) label_map_norm_kernel(Problem a) {
  const int64_t n = blockIdx.x * static_cast<int64_t>(THREADS) + threadIdx.x;
  const int64_t row = n / a.span_x, window = row / a.span_y;  // row of all windows' grid rows
  if (window >= a.windows) return;
  const int y = static_cast<int>(row % a.span_y), x = static_cast<int>(n % a.span_x);
  if (y >= a.box[4 * window + 2] || x >= a.box[4 * window + 3]) return;
  const Place place = place_of(a, row, window * a.span_x + x);
  const int64_t plane = static_cast<int64_t>(a.h) * a.w;
  const T* map = static_cast<const T*>(a.logits) + window * a.C * plane;
  float most = -INFINITY, total = 0;
  bool bad = false;
  for (int c = 0; c < a.C; ++c, map += plane) {
    const float z = logit_at(map, place);
    bad = bad || z != z;
    const float next = fmaxf(most, z);
    total = total * exp2_fast((most - next) * LOG2E) + exp2_fast((z - next) * LOG2E);
    most = next;
  }
  a.norm[n] = bad ? NAN : fmaf(log2f(total), LN2, most);
}

template <class T, int ACTIVATION, int K>
__global__ void __launch_bounds__(THREADS, 6) label_map_fwd_kernel(Problem a) {  // with 6 blocks nothing spills
  constexpr int GROUP = K == 1 ? 8 : 4;  // classes at a time, as many as fit the registers beside the best
  __shared__ unsigned chosen[MOST_CLASSES / 32];  // a bit for each class to evaluate
  const int across = (a.out_w + TILE_W - 1) / TILE_W, words = (a.C + 31) / 32;
  const int first_row = blockIdx.x / across * TILE_H, first_col = blockIdx.x % across * TILE_W;
  if (K == 1 && a.C > GROUP) {
    const int last_row = min(first_row + TILE_H, a.out_h) - 1, last_col = min(first_col + TILE_W, a.out_w) - 1;
    const Tile tile = {static_cast<int>(a.taps_y[first_row]), static_cast<int>(a.taps_y[a.out_h + last_row]),
                       static_cast<int>(a.taps_x[first_col]), static_cast<int>(a.taps_x[a.out_w + last_col])};
    choose<T>(a, tile, chosen);
  } else {
    for (int n = threadIdx.x; n < words; n += THREADS) chosen[n] = a.C - 32 * n < 32 ? (1u << (a.C - 32 * n)) - 1 : ALL_LANES;
  }
  __syncthreads();
  const int r = first_row + threadIdx.x / TILE_W, x = first_col + threadIdx.x % TILE_W;
  if (r >= a.out_h || x >= a.out_w) return;
  const int64_t pixels = static_cast<int64_t>(a.out_h) * a.out_w, n = r * static_cast<int64_t>(a.out_w) + x;
  const int64_t plane = static_cast<int64_t>(a.h) * a.w;
  const int count = a.row_counts[r];
  const int* over = a.row_windows + static_cast<int64_t>(r) * a.most;
  const float part_y = static_cast<float>(a.taps_y[2LL * a.out_h + r]);
  const float part_x = static_cast<float>(a.taps_x[2LL * a.out_w + x]);
  float best[K];
  int label[K];
  for (int j = 0; j < K; ++j) best[j] = -INFINITY, label[j] = K == 1 ? 0 : -1;  // below 0: still empty

  int word = 0;
  unsigned bits = chosen[0];
  for (;;) {
    int ids[GROUP];  // ascending; -1 past the last
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
      while (bits == 0 && word + 1 < words) bits = chosen[++word];
      ids[g] = bits == 0 ? -1 : 32 * word + __ffs(bits) - 1;
      bits &= bits - 1;
    }
    if (ids[0] < 0) break;
    float mixed[GROUP] = {};
    for (int tap = 0; tap < a.taps; ++tap) {
      const int gy = static_cast<int>(a.taps_y[(tap / 2) * static_cast<int64_t>(a.out_h) + r]);
      const int gx = static_cast<int>(a.taps_x[(tap % 2) * static_cast<int64_t>(a.out_w) + x]);
      float total[GROUP] = {};
      float visits = 0;
      for (int i = 0; i < count; ++i) {
        const int64_t window = over[i];
        const int* box = a.box + 4 * window;
        const int y = gy - box[0], u = gx - box[1];
        if (y < 0 || u < 0 || y >= box[2] || u >= box[3]) continue;
        visits += 1;
        const int64_t row = window * a.span_y + y;
        const Place place = place_of(a, row, window * a.span_x + u);
        const float norm = ACTIVATION == SOFTMAX ? a.norm[row * a.span_x + u] : 0.0f;
        const T* maps = static_cast<const T*>(a.logits) + window * a.C * plane;
#pragma unroll
        for (int g = 0; g < GROUP; ++g) {
          if (ids[g] < 0) continue;
          float z = logit_at(maps + ids[g] * plane, place);
          if (ACTIVATION == SIGMOID) z = reciprocal_fast(1 + exp2_fast(z * -LOG2E));
          if (ACTIVATION == SOFTMAX) z = exp2_fast((z - norm) * LOG2E);
          total[g] += z;
        }
      }
      float share = 1 / visits;
      if (a.taps == 4) share *= (tap / 2 ? part_y : 1 - part_y) * (tap % 2 ? part_x : 1 - part_x);
#pragma unroll
      for (int g = 0; g < GROUP; ++g) mixed[g] += total[g] * share;
    }
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
      const int c = ids[g];
      if (c < 0) continue;
      float score = a.penalty == nullptr ? mixed[g] : mixed[g] - a.penalty[c];
      score = score == score ? score : -INFINITY;  // NaN counts as -inf
      if (K == 1) {
        const bool better = score > best[0];  // of equal ones the lower class
        best[0] = better ? score : best[0];
        label[0] = better ? c : label[0];
        continue;
      }
      int id = c;
      bool better = false;
#pragma unroll
      for (int j = 0; j < K; ++j) {
        // what was moved down is a lower class than its equals there, so it moves those too
        better = better || score > best[j] || label[j] < 0;
        const float other = best[j];
        const int other_id = label[j];
        if (better) best[j] = score, label[j] = id, score = other, id = other_id;
      }
    }
  }

#pragma unroll
  for (int j = 0; j < K; ++j) {
    if (j >= a.top_k) continue;
    const int64_t at = j * pixels + n;
    const int written = best[j] < a.threshold ? a.C : label[j];
    if (a.wide) {
      static_cast<int16_t*>(a.labels)[at] = static_cast<int16_t>(written);
    } else {
      static_cast<uint8_t*>(a.labels)[at] = static_cast<uint8_t>(written);
    }
    if (a.scores != nullptr) a.scores[at] = best[j];
  }
}

unsigned blocks_for(int64_t threads) { return static_cast<unsigned>((threads + THREADS - 1) / THREADS); }

template <class T, int ACTIVATION>
void launch_forward(const Problem& a, cudaStream_t stream) {
  const unsigned blocks = (a.out_h + TILE_H - 1) / TILE_H * ((a.out_w + TILE_W - 1) / TILE_W);
  if (a.top_k == 1) {
    label_map_fwd_kernel<T, ACTIVATION, 1><<<blocks, THREADS, 0, stream>>>(a);
  } else {
    label_map_fwd_kernel<T, ACTIVATION, MOST_K><<<blocks, THREADS, 0, stream>>>(a);
  }
}

template <class T>
void launch(const Problem& a, int64_t activation, cudaStream_t stream) {
  if (activation == SIGMOID) return launch_forward<T, SIGMOID>(a, stream);
  if (activation == NONE) return launch_forward<T, NONE>(a, stream);
  const int64_t places = static_cast<int64_t>(a.windows) * a.span_y * a.span_x;
  label_map_norm_kernel<T><<<blocks_for(places), THREADS, 0, stream>>>(a);
  launch_forward<T, SOFTMAX>(a, stream);
}

void label_map_cuda(
    const Tensor& logits, const Tensor& box, const Tensor& row_windows, const Tensor& row_counts,
    const Tensor& rows_lo, const Tensor& rows_weight, const Tensor& cols_lo, const Tensor& cols_weight,
    const Tensor& taps_y, const Tensor& taps_x, bool resized, int64_t activation, const std::optional<Tensor>& penalty,
    double threshold, Tensor labels, std::optional<Tensor> scores) {
  STD_TORCH_CHECK(logits.dim() == 4 && logits.is_contiguous(), "label_map: logits must be contiguous [W, C, h, w]");
  STD_TORCH_CHECK(labels.dim() == 3 && labels.is_contiguous(), "label_map: labels must be contiguous [k, H', W']");
  STD_TORCH_CHECK(logits.size(1) <= MOST_CLASSES, "label_map: the CUDA backend takes up to ", MOST_CLASSES, " classes");
  STD_TORCH_CHECK(labels.size(0) <= MOST_K, "label_map: the CUDA backend takes top_k up to ", MOST_K);
  STD_TORCH_CHECK(logits.size(2) * logits.size(3) < (int64_t{1} << 31), "label_map: a class map has 2^31 nodes or more");
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device());
  void* raw_stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(logits.get_device(), &raw_stream));
  const cudaStream_t stream = static_cast<cudaStream_t>(raw_stream);

  Problem a{};
  a.logits = logits.const_data_ptr();
  a.windows = logits.size(0), a.C = logits.size(1), a.h = logits.size(2), a.w = logits.size(3);
  a.penalty = penalty.has_value() ? penalty->const_data_ptr<float>() : nullptr;
  a.box = box.const_data_ptr<int>();
  a.row_windows = row_windows.const_data_ptr<int>(), a.row_counts = row_counts.const_data_ptr<int>();
  a.most = row_windows.size(1);
  a.rows_lo = rows_lo.const_data_ptr<int>(), a.rows_weight = rows_weight.const_data_ptr<float>();
  a.cols_lo = cols_lo.const_data_ptr<int>(), a.cols_weight = cols_weight.const_data_ptr<float>();
  a.span_y = rows_lo.size(1), a.span_x = cols_lo.size(1);
  a.taps_y = taps_y.const_data_ptr<double>(), a.taps_x = taps_x.const_data_ptr<double>();
  a.taps = resized ? 4 : 1;
  a.labels = labels.mutable_data_ptr();
  a.wide = labels.scalar_type() == ScalarType::Short;
  a.top_k = labels.size(0), a.out_h = labels.size(1), a.out_w = labels.size(2);
  a.scores = scores.has_value() ? scores->mutable_data_ptr<float>() : nullptr;
  a.threshold = threshold;
  const int64_t places = activation == SOFTMAX ? 1 : 0;
  Tensor norm = torch::stable::new_empty(logits, {places * a.windows, a.span_y, a.span_x}, ScalarType::Float);
  a.norm = static_cast<float*>(norm.mutable_data_ptr());
  switch (logits.scalar_type()) {
    case ScalarType::Float: launch<float>(a, activation, stream); break;
    case ScalarType::BFloat16: launch<__nv_bfloat16>(a, activation, stream); break;
    case ScalarType::Half: launch<__half>(a, activation, stream); break;
    default: STD_TORCH_CHECK(false, "label_map: expected float32, bfloat16 or float16 logits, got ", describe(logits));
  }
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "label_map: ", cudaGetErrorString(error));
}

}  // namespace
}  // namespace fastzs

STABLE_TORCH_LIBRARY_FRAGMENT(fastzs, m) {
  m.def(
      "label_map_cuda(Tensor logits, Tensor box, Tensor row_windows, Tensor row_counts, Tensor rows_lo, "
      "Tensor rows_weight, Tensor cols_lo, Tensor cols_weight, Tensor taps_y, Tensor taps_x, bool resized, "
      "int activation, Tensor? penalty, float threshold, Tensor(a!) labels, Tensor(b!)? scores) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastzs, CUDA, m) { m.impl("label_map_cuda", TORCH_BOX(&fastzs::label_map_cuda)); }
