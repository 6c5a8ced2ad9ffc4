// pixel_text_logits on CUDA: product and squared norms from one read of the features, as kernels/pixel_text_logits/
// triton.py does it, but in fp32 units only: what tensor cores can win is Triton's part.
//
// A block of 256 threads owns 64 classes times 64 pixels and walks the channels 16 at a time through shared memory; a
// thread owns 4 x 4 of the sums. Whoever loads a feature also squares it, so each pixel's norm is four partial sums,
// added in a fixed order. No atomics: the same bits every time.
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

#include "describe.h"

// A torch without CUDA has no such function; weakly declared, the library loads there all the same.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace fastzs {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int TILE = 64;      // classes, and pixels, of a block
constexpr int CHANNELS = 16;  // of a step
constexpr int THREADS = 256;
constexpr int SHARE = 4;      // sums of a thread along each side of the tile
constexpr float SMALLEST_NORM = 1e-12f;  // see reference.py

struct Problem {
  const void* features;  // [B, D, h, w]
  const void* text;      // [C, D]
  void* out;             // [B, C, h * w], dtype of the text
  ScalarType features_type, text_type;
  int64_t features_stride[4], text_stride[2];
  int64_t C, D, w, pixels;
  float scale;
};

__device__ float read(const void* data, ScalarType type, int64_t at) {
  switch (type) {
    case ScalarType::BFloat16: return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[at]);
    case ScalarType::Half: return __half2float(static_cast<const __half*>(data)[at]);
    default: return static_cast<const float*>(data)[at];
  }
}

__device__ void write(void* data, ScalarType type, int64_t at, float value) {
  switch (type) {
    case ScalarType::BFloat16: static_cast<__nv_bfloat16*>(data)[at] = __float2bfloat16(value); break;
    case ScalarType::Half: static_cast<__half*>(data)[at] = __float2half(value); break;
    default: static_cast<float*>(data)[at] = value;
  }
}

__global__ void __launch_bounds__(THREADS) pixel_text_logits_fwd_kernel(Problem a) {
  __shared__ float text[CHANNELS][TILE + 4];  // the padding spreads the columns over the banks
  __shared__ float features[CHANNELS][TILE];
  __shared__ float squares[THREADS / TILE][TILE];
  const int64_t b = blockIdx.z, first_class = blockIdx.x * int64_t{TILE}, first_pixel = blockIdx.y * int64_t{TILE};

  // loads features: always the same pixel, every fourth channel of a step
  const int my_pixel = threadIdx.x % TILE, my_channel = threadIdx.x / TILE;
  const int64_t pixel = first_pixel + my_pixel;
  const int64_t pixel_at = b * a.features_stride[0] + pixel / a.w * a.features_stride[2] + pixel % a.w * a.features_stride[3];
  // loads text: one channel of every 16th class
  const int text_channel = threadIdx.x % CHANNELS, text_class = threadIdx.x / CHANNELS;
  // multiplies: 4 neighbouring classes, 4 neighbouring pixels
  const int row = threadIdx.x / (TILE / SHARE) * SHARE, column = threadIdx.x % (TILE / SHARE) * SHARE;

  float my_squares = 0;
  float sums[SHARE][SHARE] = {};
  for (int64_t start = 0; start < a.D; start += CHANNELS) {
    for (int k = my_channel; k < CHANNELS; k += THREADS / TILE) {
      const int64_t d = start + k;
      const float f = pixel < a.pixels && d < a.D ? read(a.features, a.features_type, pixel_at + d * a.features_stride[1]) : 0.0f;
      features[k][my_pixel] = f;
      my_squares = fmaf(f, f, my_squares);
    }
    for (int r = text_class; r < TILE; r += THREADS / CHANNELS) {
      const int64_t c = first_class + r, d = start + text_channel;
      text[text_channel][r] =
          c < a.C && d < a.D ? read(a.text, a.text_type, c * a.text_stride[0] + d * a.text_stride[1]) : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < CHANNELS; ++k) {
      float t[SHARE], f[SHARE];
      for (int n = 0; n < SHARE; ++n) t[n] = text[k][row + n], f[n] = features[k][column + n];
      for (int r = 0; r < SHARE; ++r) {
        for (int n = 0; n < SHARE; ++n) sums[r][n] = fmaf(t[r], f[n], sums[r][n]);
      }
    }
    __syncthreads();
  }

  squares[my_channel][my_pixel] = my_squares;
  __syncthreads();
  for (int n = 0; n < SHARE; ++n) {
    const int64_t x = first_pixel + column + n;
    if (x >= a.pixels) break;
    float square = 0;
    for (int k = 0; k < THREADS / TILE; ++k) square += squares[k][column + n];
    const float norm = sqrtf(square);
    // not fmaxf, which would drop a NaN
    const float factor = a.scale / (norm < SMALLEST_NORM ? SMALLEST_NORM : norm);
    for (int r = 0; r < SHARE; ++r) {
      const int64_t c = first_class + row + r;
      if (c < a.C) write(a.out, a.text_type, (b * a.C + c) * a.pixels + x, sums[r][n] * factor);
    }
  }
}

Tensor pixel_text_logits_cuda(const Tensor& features, const Tensor& text, double scale) {
  STD_TORCH_CHECK(features.dim() == 4 && text.dim() == 2 && features.size(1) == text.size(1) && text.size(1) > 0,
      "pixel_text_logits: expected features [B, D, h, w] and text [C, D] with the same D > 0, got ", describe(features),
      " and ", describe(text));
  for (const Tensor* t : {&features, &text}) {
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float || t->scalar_type() == ScalarType::BFloat16 ||
        t->scalar_type() == ScalarType::Half, "pixel_text_logits: expected float32, bfloat16 or float16 values, got ",
        describe(*t));
  }
  STD_TORCH_CHECK(features.get_device() == text.get_device(), "pixel_text_logits: expected both tensors on one GPU, got ",
      features.get_device(), " and ", text.get_device());
  const int64_t B = features.size(0), h = features.size(2), w = features.size(3), C = text.size(0);
  const int64_t class_tiles = (C + TILE - 1) / TILE, pixel_tiles = (h * w + TILE - 1) / TILE;
  STD_TORCH_CHECK(B < 65536 && pixel_tiles < 65536, "pixel_text_logits: the CUDA backend takes up to 65535 images of ",
      65535 * TILE, " pixels");

  const torch::stable::accelerator::DeviceGuard guard(features.get_device());
  void* raw_stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(features.get_device(), &raw_stream));
  Tensor out = torch::stable::new_empty(features, {B, C, h, w}, text.scalar_type());
  if (B * C * h * w == 0) return out;

  Problem a{};
  a.features = features.const_data_ptr(), a.text = text.const_data_ptr(), a.out = out.mutable_data_ptr();
  a.features_type = features.scalar_type(), a.text_type = text.scalar_type();
  for (int k = 0; k < 4; ++k) a.features_stride[k] = features.stride(k);
  for (int k = 0; k < 2; ++k) a.text_stride[k] = text.stride(k);
  a.C = C, a.D = features.size(1), a.w = w, a.pixels = h * w;
  a.scale = static_cast<float>(scale);
  pixel_text_logits_fwd_kernel<<<dim3(class_tiles, pixel_tiles, B), THREADS, 0, static_cast<cudaStream_t>(raw_stream)>>>(a);
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "pixel_text_logits: ", cudaGetErrorString(error));
  return out;
}

}  // namespace
}  // namespace fastzs

STABLE_TORCH_LIBRARY_IMPL(fastzs, CUDA, m) { m.impl("pixel_text_logits", TORCH_BOX(&fastzs::pixel_text_logits_cuda)); }
