// Kernels that are right, and kernels with one fault each, for test_host.py: does running on the host notice?
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <optional>

extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace fastzs {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int THREADS = 64;

// Turns every block's values round, times `factor`.
template <bool BARRIER>
__global__ void __launch_bounds__(THREADS) reverse_kernel(const float* in, float* out, int factor) {
  __shared__ float values[THREADS];
  const int at = blockIdx.x * THREADS + threadIdx.x;
  values[threadIdx.x] = in[at];
  if (BARRIER) __syncthreads();
  out[at] = values[THREADS - 1 - threadIdx.x] * factor;
}

__global__ void group_sum_kernel(const float* in, float* out, int width) {
  float sum = in[threadIdx.x];
  for (int step = width / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffff, sum, step, width);
  out[threadIdx.x] = sum;
}

__global__ void vote_kernel(const float* in, float* out) {
  const unsigned votes = __ballot_sync(0xffffffff, in[threadIdx.x] < 40);
  out[threadIdx.x] = __popc(votes) + 100 * __ffs(votes);
}

__global__ void offset_kernel(const float* in, float* out, int read, int write) {
  out[static_cast<int>(threadIdx.x) + write] = in[static_cast<int>(threadIdx.x) + read];
}

__global__ void divergent_barrier_kernel(const float* in, float* out) {
  if (threadIdx.x < 32) __syncthreads();
  out[threadIdx.x] = in[threadIdx.x];
}

__global__ void two_barriers_kernel(const float* in, float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = in[threadIdx.x];
}

__global__ void lost_lane_kernel(const float* in, float* out) {
  if (threadIdx.x == 5) return;
  out[threadIdx.x] = __shfl_xor_sync(0xffffffff, in[threadIdx.x], 1, 32);
}

__global__ void shared_past_the_end_kernel(const float* in, float* out) {
  __shared__ float values[THREADS];
  values[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x + 1];
}

__global__ void shared_of_the_block_before_kernel(const float* in, float* out) {
  __shared__ float values[THREADS];
  if (blockIdx.x == 0) values[threadIdx.x] = in[threadIdx.x];
  out[blockIdx.x * THREADS + threadIdx.x] = values[threadIdx.x];
}

__global__ void block_reads_block_kernel(const float* in, float* out) {
  const int at = blockIdx.x * THREADS + threadIdx.x;
  out[at] = in[at];
  if (blockIdx.x == 0) out[threadIdx.x] += out[THREADS + threadIdx.x] == out[THREADS + threadIdx.x] ? 1.0f : 0.0f;
}

__global__ void forgetful_kernel(const float* in, float* out) {
  if (threadIdx.x != 7) out[threadIdx.x] = in[threadIdx.x];
}

__global__ void stopping_kernel(const float* in, float* out) {
  out[threadIdx.x] = in[threadIdx.x];
  if (threadIdx.x == 9) {
    printf("stopped at %d\n", static_cast<int>(threadIdx.x));
    __trap();
  }
}

Tensor run_on_host(const Tensor& x, int64_t which) {
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  if (which != 20) guard.emplace(x.get_device());
  void* raw_stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device(), &raw_stream));
  const cudaStream_t stream = static_cast<cudaStream_t>(raw_stream);
  Tensor result = torch::stable::new_empty(x, {x.numel()}, ScalarType::Float);
  const float* in = x.const_data_ptr<float>();
  float* out = result.mutable_data_ptr<float>();
  const int blocks = x.numel() / THREADS;
  switch (which) {
    case 0: reverse_kernel<true><<<blocks, THREADS, 0, stream>>>(in, out, 2); break;
    case 1: group_sum_kernel<<<1, THREADS, 0, stream>>>(in, out, 32); break;
    case 2: group_sum_kernel<<<1, THREADS, 0, stream>>>(in, out, 4); break;
    case 3: offset_kernel<<<1, THREADS, 0, stream>>>(in, out, 0, 0); break;
    case 4: reverse_kernel<false><<<blocks, THREADS, 0, stream>>>(in, out, 2); break;
    case 5: offset_kernel<<<1, THREADS, 0, stream>>>(in, out, 1, 0); break;
    case 6: offset_kernel<<<1, THREADS, 0, stream>>>(in, out, -1, 0); break;
    case 7: offset_kernel<<<1, THREADS, 0, stream>>>(in, out, 0, 1); break;
    case 8: offset_kernel<<<1, THREADS, 0, stream>>>(in, out, 0, -1); break;
    case 9: divergent_barrier_kernel<<<1, THREADS, 0, stream>>>(in, out); break;
    case 10: two_barriers_kernel<<<1, THREADS, 0, stream>>>(in, out); break;
    case 11: lost_lane_kernel<<<1, THREADS, 0, stream>>>(in, out); break;
    case 12: shared_past_the_end_kernel<<<1, THREADS, 0, stream>>>(in, out); break;
    case 13: shared_of_the_block_before_kernel<<<blocks, THREADS, 0, stream>>>(in, out); break;
    case 14: block_reads_block_kernel<<<blocks, THREADS, 0, stream>>>(in, out); break;
    case 15: forgetful_kernel<<<1, THREADS, 0, stream>>>(in, out); break;
    case 16: stopping_kernel<<<1, THREADS, 0, stream>>>(in, out); break;
    case 17: reverse_kernel<true><<<dim3(1, 65536), THREADS, 0, stream>>>(in, out, 2); break;
    case 18: reverse_kernel<true><<<0, THREADS, 0, stream>>>(in, out, 2); break;
    case 19: reverse_kernel<true><<<blocks, THREADS, 0, nullptr>>>(in, out, 2); break;
    case 21: vote_kernel<<<1, THREADS, 0, stream>>>(in, out); break;
    case 20: reverse_kernel<true><<<blocks, THREADS, 0, stream>>>(in, out, 2); break;
  }
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "run_on_host: ", cudaGetErrorString(error));
  return result;
}

}  // namespace
}  // namespace fastzs

STABLE_TORCH_LIBRARY_FRAGMENT(fastzs, m) { m.def("run_on_host(Tensor x, int which) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(fastzs, CUDA, m) { m.impl("run_on_host", TORCH_BOX(&fastzs::run_on_host)); }
