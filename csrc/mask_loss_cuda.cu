// mask_sums on CUDA: dual cells, as kernels/mask_loss/triton.py explains them.
//
// LANES threads own a cell: each takes some of its pixel columns and walks down the cell's rows, and at the end the
// threads add up what each of the cell's four corners gets. A second kernel adds the corners that meet at a logit, a
// third the sums of a class's cells. No atomics: the same bits every time.
//
// The pass that checks the labels also narrows them once, to a byte each where there are up to 255 classes, so that the
// sums read 1 byte a pixel and class whatever the target's dtype is (4 before; counted on the host by
// tests/kernels/cuda/test_mask_loss.py::test_labels_are_read_as_bytes). Its worth in time is unmeasured on a GPU.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <tuple>

#include "describe.h"

// A torch without CUDA has no such function; weakly declared, the library loads there all the same.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace fastzs {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int SUMS = 4;     // focal, prob, overlap, label
constexpr int FIELDS = 3;   // those with a gradient
constexpr int CORNERS = 4;  // top left, top right, bottom left, bottom right
constexpr int LANES = 4;    // threads of a cell
constexpr int THREADS = 128;
constexpr int64_t WORKSPACE = 64 << 20;  // bytes of cells kept at a time, see triton.py

// What a label narrowed to bytes or to 32-bit integers holds where it is ignore_index: no class.
template <class Label>
constexpr int IGNORED = static_cast<Label>(-1);
constexpr int MOST_BYTE_CLASSES = 255;

struct Problem {
  const void* logits;  // [B, C, h, w]
  const void* target;  // [B, H, W], as given
  void* labels;        // [B, H, W], contiguous: the class, or IGNORED
  float* cells;        // [SUMS + FIELDS * CORNERS, images, h + 1, C, w + 1]
  ScalarType type;
  int64_t logits_stride[4], target_stride[3];
  int64_t first_image;
  int images, C, h, w, H, W;
  float alpha, gamma;
  int ignore_index;
};

__device__ float read(const void* data, ScalarType type, int64_t at) {
  switch (type) {
    case ScalarType::BFloat16: return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[at]);
    case ScalarType::Half: return __half2float(static_cast<const __half*>(data)[at]);
    default: return static_cast<const float*>(data)[at];
  }
}

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

// log(1 + e) for e in [0, 1], relative error 4e-7.
__device__ float log1p_unit(float e) {
  float p = fmaf(e, -0.00853919842f, 0.0440895962f);
  p = fmaf(p, e, -0.107681664f);
  p = fmaf(p, e, 0.177452381f);
  p = fmaf(p, e, -0.244954616f);
  p = fmaf(p, e, 0.332754796f);
  p = fmaf(p, e, -0.499974054f);
  p = fmaf(p, e, 0.999999806f);
  return p * e;
}

// The first pixel of a cell of an axis: cell k lies between nodes k - 1 and k; exact, in integers.
__device__ int first_pixel(int cell, int nodes, int pixels) {
  if (cell == 0) return 0;
  if (cell > nodes) return pixels;
  return static_cast<int>(((2 * cell - 1) * static_cast<int64_t>(pixels) + nodes - 1) / (2 * nodes));
}

// Weight of a cell's upper node at a pixel; in the half cells at the border all weight is on the one node.
__device__ float upper_weight(int pixel, int cell, int nodes, int pixels) {
  if (cell == 0) return 1;
  if (cell == nodes) return 0;
  const int64_t at = (2 * pixel + 1) * static_cast<int64_t>(nodes) - (2 * cell - 1) * static_cast<int64_t>(pixels);
  return static_cast<float>(at) / (2.0f * pixels);
}

template <int N>
__device__ float sum_over_lanes(float value) {
  for (int step = N / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffff, value, step, N);
  return value;
}

template <class Label, bool SQUARE, bool NODES>
__global__ void __launch_bounds__(THREADS) mask_sums_fwd_kernel(Problem a) {
  constexpr float LOG2E = 1.4426950408889634f;
  const int band = blockIdx.y, image = blockIdx.z, lane = threadIdx.x % LANES;
  const int64_t b = a.first_image + image;
  const int64_t n = blockIdx.x * static_cast<int64_t>(THREADS / LANES) + threadIdx.x / LANES;  // cell of the band
  const bool exists = n < static_cast<int64_t>(a.C) * (a.w + 1);
  const int c = exists ? static_cast<int>(n / (a.w + 1)) : 0, cell = static_cast<int>(n % (a.w + 1));

  const int64_t plane = b * a.logits_stride[0] + c * a.logits_stride[1];
  const int64_t top = plane + max(band - 1, 0) * a.logits_stride[2], bottom = plane + min(band, a.h - 1) * a.logits_stride[2];
  const int64_t left = max(cell - 1, 0) * a.logits_stride[3], right = min(cell, a.w - 1) * a.logits_stride[3];
  const float top_left = read(a.logits, a.type, top + left), top_right = read(a.logits, a.type, top + right);
  const float bottom_left = read(a.logits, a.type, bottom + left), bottom_right = read(a.logits, a.type, bottom + right);

  const int y0 = first_pixel(band, a.h, a.H), y1 = first_pixel(band + 1, a.h, a.H);
  const int x1 = exists ? first_pixel(cell + 1, a.w, a.W) : 0;
  // 1 / (2 H) and the weight of the first row: the others follow by equal steps
  const float step = band == 0 || band == a.h ? 0.0f : static_cast<float>(a.h) / a.H;
  const float wy0 = upper_weight(y0, band, a.h, a.H);

  float focal = 0, prob = 0, overlap = 0, count = 0;
  float corner[FIELDS][CORNERS] = {};
  for (int x = first_pixel(cell, a.w, a.W) + lane; x < x1; x += LANES) {
    const float wx = upper_weight(x, cell, a.w, a.W);
    const float t = fmaf(wx, top_right - top_left, top_left);
    const float d = fmaf(wx, bottom_right - bottom_left, bottom_left) - t;
    const Label* label_at = static_cast<const Label*>(a.labels) + b * a.H * a.W + x;
    float g[FIELDS] = {}, g_wy[FIELDS] = {};
#pragma unroll 4
    for (int y = y0; y < y1; ++y) {
      const float wy = fmaf(static_cast<float>(y - y0), step, wy0);
      const int label = label_at[y * static_cast<int64_t>(a.W)];
      const bool hit = label == c;
      const float z = fmaf(d, wy, t), size = fabsf(z);
      const float e = exp2_fast(size * -LOG2E);
      const float high = reciprocal_fast(1 + e), low = e * high;
      const float p = z < 0 ? low : high;
      // u = -z on the class and z off it: s = sigmoid(u), softplus(u)
      const bool off = (z < 0) != hit;  // u < 0
      const float s = off ? low : high, rest = off ? high : low;
      const float log1p = log1p_unit(e);
      const float softplus = log1p + (off ? 0.0f : size);
      const float power = SQUARE ? s * s : exp2_fast(((off ? -size : 0.0f) - log1p) * (a.gamma * LOG2E));
      const float value = power * softplus;
      const float weight = hit ? a.alpha : 1 - a.alpha, dp = low * high;
      focal += weight * value;
      prob += p;
      overlap += hit ? p : 0.0f;
      count += hit ? 1.0f : 0.0f;
      if (NODES) {
        const float du = fmaf((SQUARE ? 2.0f : a.gamma) * rest, value, power * s);  // d value / d u
        const float dz = (hit ? -weight : weight) * du;
        const float dp_hit = hit ? dp : 0.0f;
        g[0] += dz;
        g_wy[0] += dz * wy;
        g[1] += dp;
        g_wy[1] += dp * wy;
        g[2] += dp_hit;
        g_wy[2] += dp_hit * wy;
      }
    }
    if (NODES) {
      for (int f = 0; f < FIELDS; ++f) {
        const float upper = g[f] - g_wy[f], lower = g_wy[f];
        corner[f][0] += upper - upper * wx;
        corner[f][1] += upper * wx;
        corner[f][2] += lower - lower * wx;
        corner[f][3] += lower * wx;
      }
    }
  }

  const int64_t cells = static_cast<int64_t>(a.images) * (a.h + 1) * a.C * (a.w + 1);
  float* out = a.cells + (static_cast<int64_t>(image) * (a.h + 1) + band) * a.C * (a.w + 1) + n;
  const bool writes = exists && lane == 0;
  const float sums[SUMS] = {focal, prob, overlap, count};
  for (int k = 0; k < SUMS; ++k) {
    const float sum = sum_over_lanes<LANES>(sums[k]);
    if (writes) out[k * cells] = sum;
  }
  if (NODES) {
    for (int k = 0; k < FIELDS * CORNERS; ++k) {
      const float sum = sum_over_lanes<LANES>(corner[k / CORNERS][k % CORNERS]);
      if (writes) out[(SUMS + k) * cells] = sum;
    }
  }
}

// Adds the corners of the four cells that meet at a logit: nodes [B, C, FIELDS, h, w].
// A class takes `blocks` blocks, so that only 32-bit numbers are divided.
__global__ void __launch_bounds__(THREADS) mask_sums_nodes_kernel(Problem a, unsigned blocks, float* nodes) {
  const unsigned c = blockIdx.x / blocks, n = blockIdx.x % blocks * THREADS + threadIdx.x;
  if (n >= static_cast<unsigned>(a.h) * a.w) return;
  const int i = n / a.w, j = n % a.w;
  const int field = blockIdx.y, image = blockIdx.z;
  const int64_t band = a.C * static_cast<int64_t>(a.w + 1), cells = a.images * band * (a.h + 1);
  const float* cell = a.cells + (SUMS + CORNERS * field) * cells + (image * (a.h + 1LL) + i) * band + c * (a.w + 1LL) + j;
  // cell (i, j) ends at node (i, j): its bottom right corner; cell (i + 1, j + 1) begins there
  const float sum = cell[3 * cells] + cell[2 * cells + 1] + cell[cells + band] + cell[band + 1];
  nodes[(((a.first_image + image) * a.C + c) * FIELDS + field) * a.h * a.w + i * static_cast<int64_t>(a.w) + j] = sum;
}

// Adds the sums of a class's cells, a block for each image and class: sums [B, C, SUMS].
__global__ void __launch_bounds__(THREADS) mask_sums_total_kernel(Problem a, float* sums) {
  const int c = blockIdx.x, image = blockIdx.y, count = (a.h + 1) * (a.w + 1);
  const int64_t band = a.C * static_cast<int64_t>(a.w + 1), cells = a.images * band * (a.h + 1);
  const float* cell = a.cells + image * (a.h + 1LL) * band + c * (a.w + 1LL);
  __shared__ float warps[SUMS][THREADS / 32];
  float total[SUMS] = {};
  for (int n = threadIdx.x; n < count; n += THREADS) {
    const int64_t at = n / (a.w + 1) * band + n % (a.w + 1);
    for (int k = 0; k < SUMS; ++k) total[k] += cell[k * cells + at];
  }
  for (int k = 0; k < SUMS; ++k) {
    const float sum = sum_over_lanes<32>(total[k]);
    if (threadIdx.x % 32 == 0) warps[k][threadIdx.x / 32] = sum;
  }
  __syncthreads();
  if (threadIdx.x < SUMS) {
    float sum = 0;
    for (int k = 0; k < THREADS / 32; ++k) sum += warps[threadIdx.x][k];
    sums[((a.first_image + image) * a.C + c) * SUMS + threadIdx.x] = sum;
  }
}

// Narrows the labels. Stops the program at one that is neither a class nor ignore_index, as PyTorch's own losses do on
// a GPU.
template <class Given, class Label>
__global__ void mask_sums_labels_kernel(Problem a, int64_t pixels) {
  for (int64_t n = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; n < pixels;
       n += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t x = n % a.W, y = n / a.W % a.H, b = n / (static_cast<int64_t>(a.W) * a.H);
    const int64_t at = b * a.target_stride[0] + y * a.target_stride[1] + x * a.target_stride[2];
    const int64_t label = static_cast<const Given*>(a.target)[at];
    if (label != a.ignore_index && (label < 0 || label >= a.C)) {
      printf("mask_loss: target holds label %lld; expected labels in [0, %d) or ignore_index=%d\n",
             static_cast<long long>(label), a.C, a.ignore_index);
      __trap();
    }
    static_cast<Label*>(a.labels)[n] = static_cast<Label>(label == a.ignore_index ? IGNORED<Label> : label);
  }
}

template <class Label, bool SQUARE>
void launch_forward(const Problem& a, bool with_nodes, cudaStream_t stream) {
  const int64_t cells = a.C * static_cast<int64_t>(a.w + 1), per_block = THREADS / LANES;
  const dim3 grid((cells + per_block - 1) / per_block, a.h + 1, a.images);
  if (with_nodes) {
    mask_sums_fwd_kernel<Label, SQUARE, true><<<grid, THREADS, 0, stream>>>(a);
  } else {
    mask_sums_fwd_kernel<Label, SQUARE, false><<<grid, THREADS, 0, stream>>>(a);
  }
}

template <class Label>
void launch_label(const Problem& a, bool with_nodes, cudaStream_t stream) {
  if (a.gamma == 2) return launch_forward<Label, true>(a, with_nodes, stream);
  launch_forward<Label, false>(a, with_nodes, stream);
}

template <class Given>
void launch_labels(const Problem& a, int64_t images, bool bytes, cudaStream_t stream) {
  const int64_t pixels = images * a.H * a.W;
  const dim3 grid(std::min<int64_t>((pixels + 1023) / 1024, 1024));
  if (bytes) {
    mask_sums_labels_kernel<Given, uint8_t><<<grid, 256, 0, stream>>>(a, pixels);
  } else {
    mask_sums_labels_kernel<Given, int32_t><<<grid, 256, 0, stream>>>(a, pixels);
  }
}

std::tuple<Tensor, Tensor> mask_sums_cuda(
    const Tensor& logits, const Tensor& target, double alpha, double gamma, int64_t ignore_index,
    bool with_nodes) {
  const int64_t B = logits.size(0), C = logits.size(1), h = logits.size(2), w = logits.size(3);
  const int64_t H = target.size(1), W = target.size(2);
  STD_TORCH_CHECK(logits.dim() == 4 && target.dim() == 3 && target.size(0) == B && B * C * h * w * H * W > 0,
      "mask_loss: expected logits [B, C, h, w] and target [B, H, W] without empty dimensions, got ", describe(logits),
      " and ", describe(target));
  STD_TORCH_CHECK(std::max({h, w, H, W}) < 65535, "mask_loss: the CUDA backend takes up to 65534 rows and columns");
  const ScalarType type = logits.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
      "mask_loss: expected float32, bfloat16 or float16 logits, got ", name_of(type));

  const torch::stable::accelerator::DeviceGuard guard(logits.get_device());
  void* raw_stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(logits.get_device(), &raw_stream));
  const cudaStream_t stream = static_cast<cudaStream_t>(raw_stream);

  const bool bytes = C <= MOST_BYTE_CLASSES;
  Tensor labels = torch::stable::new_empty(logits, {B, H, W}, bytes ? ScalarType::Byte : ScalarType::Int);
  Problem a{};
  a.type = type;
  a.C = C, a.h = h, a.w = w, a.H = H, a.W = W;
  a.alpha = alpha, a.gamma = gamma, a.ignore_index = ignore_index;
  a.logits = logits.const_data_ptr(), a.target = target.const_data_ptr(), a.labels = labels.mutable_data_ptr();
  for (int k = 0; k < 4; ++k) a.logits_stride[k] = logits.stride(k);
  for (int k = 0; k < 3; ++k) a.target_stride[k] = target.stride(k);
  switch (target.scalar_type()) {
    case ScalarType::Byte: launch_labels<uint8_t>(a, B, bytes, stream); break;
    case ScalarType::Short: launch_labels<int16_t>(a, B, bytes, stream); break;
    case ScalarType::Int: launch_labels<int32_t>(a, B, bytes, stream); break;
    case ScalarType::Long: launch_labels<int64_t>(a, B, bytes, stream); break;
    default: STD_TORCH_CHECK(false, "mask_loss: expected uint8, int16, int32 or int64 labels, got ", describe(target));
  }

  const int64_t fields = with_nodes ? SUMS + FIELDS * CORNERS : SUMS, image_cells = (h + 1) * C * (w + 1);
  const int64_t fit = WORKSPACE / (4 * fields * image_cells);
  const int64_t chunk = std::min({std::max<int64_t>(fit, 1), B, int64_t{65535}});
  Tensor sums = torch::stable::new_empty(logits, {B, C, SUMS}, ScalarType::Float);
  Tensor nodes = with_nodes ? torch::stable::new_empty(logits, {B, C, FIELDS, h, w}, ScalarType::Float)
                            : torch::stable::new_empty(logits, {B, C, FIELDS, 0, 0}, ScalarType::Float);
  Tensor cells = torch::stable::new_empty(logits, {fields, chunk, h + 1, C, w + 1}, ScalarType::Float);
  a.cells = static_cast<float*>(cells.mutable_data_ptr());
  for (int64_t first = 0; first < B; first += chunk) {
    a.first_image = first;
    a.images = std::min(chunk, B - first);
    bytes ? launch_label<uint8_t>(a, with_nodes, stream) : launch_label<int32_t>(a, with_nodes, stream);
    mask_sums_total_kernel<<<dim3(C, a.images), THREADS, 0, stream>>>(a, static_cast<float*>(sums.mutable_data_ptr()));
    if (with_nodes) {
      const unsigned blocks = (h * w + THREADS - 1) / THREADS;
      const dim3 grid(C * blocks, FIELDS, a.images);
      mask_sums_nodes_kernel<<<grid, THREADS, 0, stream>>>(a, blocks, static_cast<float*>(nodes.mutable_data_ptr()));
    }
  }
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "mask_loss: ", cudaGetErrorString(error));
  return {sums, nodes};
}

}  // namespace
}  // namespace fastzs

STABLE_TORCH_LIBRARY_IMPL(fastzs, CUDA, m) { m.impl("mask_sums", TORCH_BOX(&fastzs::mask_sums_cuda)); }
