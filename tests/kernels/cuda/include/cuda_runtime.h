// CUDA C++ on the host, for tests: the part of the runtime that csrc/*.cu use, without a GPU.
//
// The sources come here through translate() in ../host.py, which rewrites what a C++ compiler does not read: launches,
// shared arrays and inline instructions. A block's threads are fibers on one processor. Each runs until it waits at a
// barrier or for its warp, then the next one runs; who comes first is chosen from outside (cuda_on_host_order), and a
// missing barrier shows as a result that depends on it. Every buffer ends, or begins, at a page that cannot be
// touched; a kernel that leaves its buffers raises an error that says where. Shared arrays and new tensors are full of
// NaN. What would be undefined on a GPU (a barrier that some threads pass elsewhere, a lane
// that waits for one that has left, a launch without a device guard or into another stream) is an error here.
#pragma once

#include <signal.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#define __global__
#define __device__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };

// Of the thread that runs.
static dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_host {

constexpr int WARP = 32, MOST_THREADS = 1024, PAGE = 4096, STACK = 1 << 17;

// ---- memory that may not be left --------------------------------------------------------------------------------

struct Region {
  char* base;  // one page that cannot be touched, pages that can, one that cannot
  size_t pages, bytes;
  char* data;

  char* inside() const { return base + PAGE; }
  size_t room() const { return (pages - 2) * PAGE; }
};

enum Order { FORWARD, BACKWARD, RANDOM };
static Order order = FORWARD;
static std::mt19937 shuffler;
static std::map<char*, Region> regions;  // by their data

// Memory that nobody wrote holds 0x7fffffffffffffff: NaN in every width, and one index of two leads far out.
inline unsigned char poison_at(const char* address) { return reinterpret_cast<uintptr_t>(address) % 8 == 7 ? 0x7f : 0xff; }
inline void poison(char* from, size_t bytes) {
  for (char* at = from; at < from + bytes; ++at) *at = static_cast<char>(poison_at(at));
}

// Bytes that end where touching is an error; in backward order, bytes that begin there.
inline char* allocate(size_t bytes) {
  Region r;
  r.pages = (bytes + PAGE - 1) / PAGE + 3, r.bytes = bytes;  // one page at least, so that each has its own address
  r.base = static_cast<char*>(mmap(nullptr, r.pages * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (r.base == MAP_FAILED || mprotect(r.inside(), r.room(), PROT_READ | PROT_WRITE) != 0)
    throw std::bad_alloc();
  poison(r.inside(), r.room());
  r.data = order == BACKWARD ? r.inside() : r.inside() + r.room() - bytes;
  regions[r.data] = r;
  return r.data;
}

inline void release(void* data) {
  const auto found = regions.find(static_cast<char*>(data));
  munmap(found->second.base, found->second.pages * PAGE);
  regions.erase(found);
}

// Throws if something wrote between a buffer and the far page.
inline void check_surroundings(const std::string& kernel) {
  for (const auto& [data, r] : regions) {
    for (const char* at = r.inside(); at < r.inside() + r.room(); ++at) {
      if (at == r.data) at += r.bytes;
      if (at < r.inside() + r.room() && static_cast<unsigned char>(*at) != poison_at(at))
        throw std::runtime_error(kernel + " wrote outside a buffer of " + std::to_string(r.bytes) + " bytes");
    }
  }
}

// Where an address lies, as seen from the nearest buffer.
inline std::string place_of_address(const char* address) {
  const Region* nearest = nullptr;
  size_t least = SIZE_MAX;
  for (const auto& [data, r] : regions) {
    const size_t away = address < data ? data - address : address - data;
    if (away < least) least = away, nearest = &r;
  }
  if (nearest == nullptr || least > nearest->bytes + 64 * PAGE) return "far from every buffer";
  return "at byte " + std::to_string(address - nearest->data) + " of a buffer of " + std::to_string(nearest->bytes) + " bytes";
}

// ---- threads ----------------------------------------------------------------------------------------------------

enum State { READY, AT_BARRIER, AT_WARP, DONE };

struct Fiber {
  ucontext_t context;     // for the first time; later a jump, which makes no system call
  jmp_buf jump;
  bool begun = false;
  std::unique_ptr<char[]> stack;
  State state = DONE;
  int line;               // where it waits
  unsigned mask;          // lanes it waits with
  int partner;            // the lane whose value it takes
  uint64_t sent, received;
  unsigned votes;         // lanes that sent something other than 0
};

struct Machine {
  std::deque<Fiber> fibers;  // which never move: a context points into itself
  jmp_buf scheduler;
  int current = 0, threads = 0;
  std::string kernel;
  void (*body)(const void*) = nullptr;
  const void* arguments = nullptr;
  bool trapped = false;
  sigjmp_buf escape;
  const char* fault = nullptr;
  std::map<int, std::pair<char*, size_t>> shared;  // by the line that declares it: where, how many bytes
  std::vector<int> fresh;                          // those that no thread of this block has asked for yet
};
static Machine machine;
static int guards = 0;
static cudaError_t last_error = cudaSuccess;
static char stream_token;

inline void to_scheduler() {
  if (_setjmp(machine.fibers[machine.current].jump) == 0) _longjmp(machine.scheduler, 1);
}

inline void to_fiber(Fiber& fiber) {
  if (_setjmp(machine.scheduler) != 0) return;
  if (fiber.begun) _longjmp(fiber.jump, 1);
  fiber.begun = true;
  setcontext(&fiber.context);
}

inline void fiber_main() {
  for (;;) {
    machine.body(machine.arguments);
    machine.fibers[machine.current].state = DONE;
    to_scheduler();
  }
}

inline void make_fiber(Fiber& fiber) {
  if (!fiber.stack) fiber.stack.reset(new char[STACK]);
  getcontext(&fiber.context);
  fiber.context.uc_stack = {fiber.stack.get(), 0, STACK};
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
  fiber.state = DONE, fiber.begun = false;
}

inline std::string name_of(int thread) {
  return machine.kernel + ", block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
      std::to_string(blockIdx.z) + "), thread " + std::to_string(thread);
}

// Sets the warp's waiting lanes going if all that they wait for are there.
inline bool release_warp(int warp) {
  const int first = warp * WARP, lanes = std::min(WARP, machine.threads - first);
  const auto fibers = machine.fibers.begin() + first;
  for (int lane = 0; lane < lanes; ++lane) {
    if (fibers[lane].state != AT_WARP) continue;
    const unsigned mask = fibers[lane].mask;
    if ((mask >> lane & 1) == 0) throw std::runtime_error(name_of(first + lane) + " is not in its own mask");
    bool all = true;
    for (int other = 0; other < WARP; ++other) {
      if ((mask >> other & 1) == 0) continue;
      if (other >= lanes || fibers[other].state == DONE)
        throw std::runtime_error(name_of(first + lane) + " waits for a lane that has left");
      all = all && fibers[other].state == AT_WARP && fibers[other].line == fibers[lane].line && fibers[other].mask == mask;
    }
    if (!all) continue;
    unsigned votes = 0;
    for (int other = 0; other < lanes; ++other)
      if ((mask >> other & 1) != 0 && fibers[other].sent != 0) votes |= 1u << other;
    for (int other = 0; other < lanes; ++other) {
      if ((mask >> other & 1) == 0) continue;
      fibers[other].votes = votes;
      const int from = fibers[other].partner;
      if ((mask >> from & 1) == 0) throw std::runtime_error(name_of(first + other) + " takes from a lane not in the mask");
      fibers[other].received = fibers[from].sent;
    }
    for (int other = 0; other < lanes; ++other)
      if (mask >> other & 1) fibers[other].state = READY;
    return true;
  }
  return false;
}

inline bool release_barrier() {
  int waiting = 0, line = 0;
  for (int t = 0; t < machine.threads; ++t) {
    const Fiber& fiber = machine.fibers[t];
    if (fiber.state == DONE) continue;
    if (fiber.state != AT_BARRIER || (waiting > 0 && fiber.line != line)) return false;
    line = fiber.line, ++waiting;
  }
  if (waiting == 0) return false;
  if (waiting != machine.threads) throw std::runtime_error(machine.kernel + ": a barrier that some threads never reach");
  for (int t = 0; t < machine.threads; ++t) machine.fibers[t].state = READY;
  return true;
}

inline void arrange(std::vector<int64_t>& list) {
  for (size_t i = 0; i < list.size(); ++i) list[i] = order == BACKWARD ? list.size() - 1 - i : i;
  if (order == RANDOM) std::shuffle(list.begin(), list.end(), shuffler);
}

inline void run_block() {
  machine.fresh.clear();
  for (const auto& [line, array] : machine.shared) machine.fresh.push_back(line);
  for (int t = 0; t < machine.threads; ++t) machine.fibers[t].state = READY;
  std::vector<int64_t> turns(machine.threads);
  for (;;) {
    int left = 0, ran = 0;
    arrange(turns);
    for (const int64_t t : turns) {
      Fiber& fiber = machine.fibers[t];
      if (fiber.state == READY) {
        machine.current = static_cast<int>(t);
        threadIdx = dim3(t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y);
        to_fiber(fiber);
        if (machine.trapped) throw std::runtime_error(name_of(machine.current) + " stopped the program");
        ++ran;
      }
      left += fiber.state != DONE;
    }
    if (left == 0) return;
    bool released = false;
    for (int warp = 0; warp * WARP < machine.threads; ++warp) released |= release_warp(warp);
    if (!released) released = release_barrier();
    if (!released && ran == 0) throw std::runtime_error(machine.kernel + ": threads wait for each other at different places");
  }
}

inline void on_fault(int, siginfo_t* info, void*) {
  machine.fault = static_cast<const char*>(info->si_addr);
  siglongjmp(machine.escape, 1);
}

// Catches accesses outside the buffers while it lives.
struct FaultCatcher {
  struct sigaction segv, bus;
  stack_t before;
  std::unique_ptr<char[]> stack{new char[STACK]};

  FaultCatcher() {
    stack_t own{stack.get(), 0, STACK};
    sigaltstack(&own, &before);
    struct sigaction action {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &segv);
    sigaction(SIGBUS, &action, &bus);
  }
  ~FaultCatcher() {
    sigaction(SIGSEGV, &segv, nullptr);
    sigaction(SIGBUS, &bus, nullptr);
    sigaltstack(&before, nullptr);
  }
};

inline void run_grid() {
  std::vector<int64_t> blocks(static_cast<int64_t>(gridDim.x) * gridDim.y * gridDim.z);
  arrange(blocks);
  for (const int64_t n : blocks) {
    blockIdx = dim3(n % gridDim.x, n / gridDim.x % gridDim.y, n / gridDim.x / gridDim.y);
    run_block();
  }
}

// The grid's blocks, one after the other; ends with the machine at rest whatever happens.
inline void run_kernel() {
  std::string wrong;
  {
    const FaultCatcher catcher;
    if (sigsetjmp(machine.escape, 1) == 0) {
      try {
        run_grid();
      } catch (const std::exception& error) {
        wrong = error.what();
      }
    } else {
      wrong = name_of(machine.current) + " touches memory " + place_of_address(machine.fault);
    }
  }
  if (!wrong.empty()) {  // fibers that stopped half-way begin anew
    machine.trapped = false;
    for (Fiber& fiber : machine.fibers) make_fiber(fiber);
  }
  if (wrong.empty()) {
    try {
      check_surroundings(machine.kernel);
    } catch (const std::exception& error) {
      wrong = error.what();
    }
  }
  for (const auto& [line, array] : machine.shared) release(array.first);
  machine.shared.clear();
  if (!wrong.empty()) throw std::runtime_error(wrong);
}

// kernel<<<grid, block, shared, stream>>>(arguments) is written launch("kernel", grid, block, shared, stream)(kernel, arguments).
struct Launch {
  dim3 grid, block;

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), Arguments&&... arguments) const {
    if (guards == 0) throw std::runtime_error(machine.kernel + ": launched without a device guard");
    const int64_t threads = static_cast<int64_t>(block.x) * block.y * block.z;
    const bool fits = threads > 0 && threads <= MOST_THREADS && grid.x > 0 && grid.x < 1u << 31 && grid.y > 0 &&
        grid.y < 65536 && grid.z > 0 && grid.z < 65536;
    if (!fits) {
      last_error = cudaErrorInvalidConfiguration;
      return;
    }
    using All = std::tuple<void (*)(Parameters...), std::decay_t<Parameters>...>;
    const All all(kernel, static_cast<std::decay_t<Parameters>>(arguments)...);
    machine.arguments = &all;
    machine.body = [](const void* pointer) {
      std::apply([](auto call, auto... values) { call(values...); }, *static_cast<const All*>(pointer));
    };
    gridDim = grid, blockDim = block, machine.threads = static_cast<int>(threads);
    while (machine.fibers.size() < static_cast<size_t>(threads)) make_fiber(machine.fibers.emplace_back());
    run_kernel();
  }
};

inline Launch launch(const char* kernel, dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  machine.kernel = kernel;
  if (shared != 0) throw std::runtime_error(machine.kernel + ": there is no dynamic shared memory here");
  if (static_cast<void*>(stream) != &stream_token) throw std::runtime_error(machine.kernel + ": launched into another stream");
  return {grid, block};
}

// The block's shared array that stands in this line, full of NaN when its first thread comes.
template <class Array>
Array& shared_array(int line) {
  auto& [data, bytes] = machine.shared[line];
  if (data == nullptr) data = allocate(sizeof(Array)), bytes = sizeof(Array);
  const auto found = std::find(machine.fresh.begin(), machine.fresh.end(), line);
  if (found != machine.fresh.end()) {
    poison(data, bytes);
    machine.fresh.erase(found);
  }
  return *reinterpret_cast<Array*>(data);
}

inline void wait_at_barrier(int line) {
  Fiber& fiber = machine.fibers[machine.current];
  fiber.state = AT_BARRIER, fiber.line = line;
  to_scheduler();
}

template <class T>
T value_of_lane(int line, unsigned mask, T value, int partner) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Fiber& fiber = machine.fibers[machine.current];
  fiber.state = AT_WARP, fiber.line = line, fiber.mask = mask, fiber.partner = partner;
  fiber.sent = 0;
  std::memcpy(&fiber.sent, &value, sizeof value);
  to_scheduler();
  std::memcpy(&value, &fiber.received, sizeof value);
  return value;
}

template <class T>
T value_of_xor_lane(int line, unsigned mask, T value, int change, int width) {
  const int lane = machine.current % WARP, partner = lane ^ change;
  // another group of lanes gives nothing: a thread keeps its own value
  return value_of_lane(line, mask, value, lane / width == partner / width ? partner : lane);
}

inline unsigned votes_of_lanes(int line, unsigned mask, bool vote) {
  value_of_lane(line, mask, vote, machine.current % WARP);
  return machine.fibers[machine.current].votes;
}

// ---- instructions -----------------------------------------------------------------------------------------------

inline float flushed(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }

// The approximate instructions are right to 2^-22 or so (PTX, section 9.7.3): 22 bits after the point are kept.
inline float approximate(double x) {
  float y = static_cast<float>(x);
  if (!std::isfinite(y)) return y;
  uint32_t bits;
  std::memcpy(&bits, &y, sizeof bits);
  bits = (bits + 1) & ~1u;
  std::memcpy(&y, &bits, sizeof bits);
  return flushed(y);
}

inline float ex2_approx_ftz_f32(float x) { return approximate(std::exp2(static_cast<double>(flushed(x)))); }
inline float rcp_approx_ftz_f32(float x) { return approximate(1.0 / static_cast<double>(flushed(x))); }

[[noreturn]] inline void trap() {
  std::fflush(stdout);
  machine.trapped = true;
  to_scheduler();
  __builtin_unreachable();
}

// ---- what the host's part asks PyTorch for ----------------------------------------------------------------------

struct DeviceGuard {
  explicit DeviceGuard(int32_t) { ++guards; }
  ~DeviceGuard() { --guards; }
};

using torch::headeronly::IntHeaderOnlyArrayRef;

inline torch::stable::Tensor new_empty(
    const torch::stable::Tensor& like, IntHeaderOnlyArrayRef sizes, torch::headeronly::ScalarType type) {
  const torch::stable::Tensor model = torch::stable::new_empty(like, sizes, type);  // for its strides
  char* data = allocate(model.numel() * model.element_size());
  return torch::stable::from_blob(data, model.sizes(), model.strides(), like.device(), type, &release);
}

inline torch::stable::Tensor to(const torch::stable::Tensor& tensor, torch::headeronly::ScalarType type) {
  const torch::stable::Tensor source = torch::stable::contiguous(torch::stable::to(tensor, type));
  torch::stable::Tensor copy = new_empty(source, source.sizes(), type);
  std::memcpy(copy.mutable_data_ptr(), source.const_data_ptr(), source.numel() * source.element_size());
  return copy;
}

}  // namespace cuda_on_host

#define __syncthreads() cuda_on_host::wait_at_barrier(__LINE__)
#define __shfl_xor_sync(mask, value, change, width) \
  cuda_on_host::value_of_xor_lane(__LINE__, mask, value, change, width)
#define __ballot_sync(mask, vote) cuda_on_host::votes_of_lanes(__LINE__, mask, vote)
#define __popc(bits) __builtin_popcount(bits)
#define __ffs(bits) __builtin_ffs(bits)
#define __trap() cuda_on_host::trap()

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = cuda_on_host::last_error;
  cuda_on_host::last_error = cudaSuccess;
  return error;
}
inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "invalid configuration argument"; }

extern "C" {

AOTITorchError cuda_on_host_stream(int32_t, void** stream) {
  *stream = &cuda_on_host::stream_token;
  return 0;
}

void cuda_on_host_order(int order, int seed) {
  cuda_on_host::order = static_cast<cuda_on_host::Order>(order);
  cuda_on_host::shuffler.seed(seed);
}
void* cuda_on_host_allocate(size_t bytes) { return cuda_on_host::allocate(bytes); }
void cuda_on_host_release(void* data) { cuda_on_host::release(data); }

}  // extern "C"
