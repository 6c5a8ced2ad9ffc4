// What the CPU ops share: the choice of instruction set at run time, and reading a tensor of any dtype.
//
// One library runs on every CPU of its architecture. A loop that should use wide vectors is written once, as an
// always-inlined function, and FASTZS_MULTIVERSION compiles it three times. Everything else in a source file,
// the standard library's inline functions above all, is compiled for the oldest CPU: a linker keeps one copy of
// such a function, and a copy compiled for AVX-512 would end programs on machines without it.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "describe.h"

#define FASTZS_INLINE inline __attribute__((always_inline))
#define FASTZS_INLINE_LAMBDA __attribute__((always_inline))  // behind a lambda's parameters

// Whether an inline function may name an instruction: GCC wants the instruction set where the function ends up, clang
// already where it is written.
#if defined(__x86_64__) && !defined(__clang__)
#define FASTZS_X86_ASM 1
#define FASTZS_AVX_VNNI __builtin_cpu_supports("avxvnni")
#else
#define FASTZS_X86_ASM 0
#define FASTZS_AVX_VNNI false
#endif

namespace fastzs {

// The target of functions with the instruction that multiplies pairs of bf16 numbers.
#if FASTZS_X86_ASM
#define FASTZS_BF16_PAIRS __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")))
#endif

// In the order of their widths; each x86 set but portable is asked for by itself, since processors leave some out.
enum class Isa { portable, avx2, avx2_vnni, avx512, avx512_vnni, avx512_bf16 };

// The last instruction set this CPU has and FASTZS_CPU_ISA (the name of one, or none) allows.
// An op asks once, before its threads start: getenv must not meet a write to the environment.
inline Isa cpu_isa() {
#if defined(__x86_64__)
  const char* const names[] = {"portable", "avx2", "avx2_vnni", "avx512", "avx512_vnni", "avx512_bf16"};
  const char* limit = std::getenv("FASTZS_CPU_ISA");
  int last = static_cast<int>(Isa::avx512_bf16);
  for (int i = 0; limit != nullptr && i < last; ++i)
    if (std::strcmp(limit, names[i]) == 0) last = i;
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  const bool has[] = {
      true, avx2, avx2 && FASTZS_AVX_VNNI, avx512, vnni, vnni && __builtin_cpu_supports("avx512bf16")};
  while (!has[last]) --last;
  return static_cast<Isa>(last);
#else
  return Isa::portable;
#endif
}

inline bool has_pairs(Isa isa) { return FASTZS_X86_ASM && isa == Isa::avx512_bf16; }

// FASTZS_MULTIVERSION(name, body, Arguments) defines void name(Isa, const Arguments&), which calls
// body<LANES>(arguments) compiled for that instruction set: 16 lanes with AVX-512, 8 with AVX2, else 4 (SSE2, NEON).
// The body and all it calls must be FASTZS_INLINE, and it must call nothing of the standard library.
#if defined(__x86_64__)
#define FASTZS_MULTIVERSION(name, body, Arguments)                                                               \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))) void name##_avx512(const Arguments& a) { \
    body<16>(a);                                                                                                 \
  }                                                                                                              \
  __attribute__((target("avx2,fma"))) void name##_avx2(const Arguments& a) { body<8>(a); }                       \
  void name##_portable(const Arguments& a) { body<4>(a); }                                                       \
  void name(::fastzs::Isa isa, const Arguments& a) {                                                             \
    switch (isa) {                                                                                               \
      case ::fastzs::Isa::avx512_bf16:                                                                           \
      case ::fastzs::Isa::avx512_vnni:                                                                           \
      case ::fastzs::Isa::avx512: return name##_avx512(a);                                                       \
      case ::fastzs::Isa::avx2_vnni:                                                                             \
      case ::fastzs::Isa::avx2: return name##_avx2(a);                                                           \
      case ::fastzs::Isa::portable: return name##_portable(a);                                                   \
    }                                                                                                            \
  }
#else
#define FASTZS_MULTIVERSION(name, body, Arguments) \
  void name(::fastzs::Isa, const Arguments& a) { body<4>(a); }
#endif

// Calls f with a null pointer of the tensor's element type: fp32, bf16 or fp16.
template <class F>
void dispatch_floating(const torch::stable::Tensor& t, const char* op, F&& f) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Float: return f(static_cast<const float*>(nullptr));
    case ScalarType::BFloat16: return f(static_cast<const torch::headeronly::BFloat16*>(nullptr));
    case ScalarType::Half: return f(static_cast<const torch::headeronly::Half*>(nullptr));
    default: STD_TORCH_CHECK(false, op, ": expected float32, bfloat16 or float16 values, got ", describe(t));
  }
}

// Calls f with a null pointer of the tensor's element type: uint8, int16, int32 or int64.
template <class F>
void dispatch_integer(const torch::stable::Tensor& t, const char* op, F&& f) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Byte: return f(static_cast<const uint8_t*>(nullptr));
    case ScalarType::Short: return f(static_cast<const int16_t*>(nullptr));
    case ScalarType::Int: return f(static_cast<const int32_t*>(nullptr));
    case ScalarType::Long: return f(static_cast<const int64_t*>(nullptr));
    default: STD_TORCH_CHECK(false, op, ": expected uint8, int16, int32 or int64 labels, got ", describe(t));
  }
}

}  // namespace fastzs
