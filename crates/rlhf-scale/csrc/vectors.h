// Where processors have AVX-512 or AVX2, the kernels of this folder use it: what they have in common.
//
// A kernel is written once, on sixteen f32 side by side, and compiled for both (each_target.h, kernels/).
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>

#define RLHF_KERNELS 1
#ifndef RLHF_AVX512  // emulated/avx512.cpp has its own
#define RLHF_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#define RLHF_AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")))
#endif
#define RLHF_AVX2 __attribute__((target("avx2,fma")))
#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

namespace rlhf {

enum class Processor { plain, avx2, avx512 };

// What is used of this one: all that it has, or less if RLHF_KERNELS says so (none, avx2, avx512).
inline Processor processor() {
  static const Processor found = [] {
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const char* most = std::getenv("RLHF_KERNELS");
    auto allows = [&](const char* name) { return !most || !*most || strcmp(most, name) == 0; };
    if (avx512 && allows("avx512")) return Processor::avx512;
    if (avx2 && (allows("avx2") || allows("avx512"))) return Processor::avx2;
    return Processor::plain;
  }();
  return found;
}

inline bool wide() { return processor() != Processor::plain; }

// Whether its vectors multiply bf16 quicker than f32. Intel's do not: vdpbf16ps sums twice the terms of an f32 one, but takes
// four times as long (Emerald Rapids: 86 and 174 GFLOP/s a core), for these processors have matrix units. On AMD's (Zen 4) it
// takes the same time.
inline bool vectors_for_bf16() {
  static const bool has =
      processor() == Processor::avx512 && __builtin_cpu_supports("avx512bf16") && !__builtin_cpu_is("intel");
  return has;
}

// Whether it has matrix units for bf16, which libtorch uses: AMX, that the system lets be used. An RLHF_KERNELS that bounds
// what is used bounds only what this library does.
inline bool matrices_for_bf16() {
  static const bool has = [] {
    unsigned a = 0, b = 0, c = 0, d = 0, low = 0, high = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return false;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    constexpr unsigned kTiles = 3u << 17, kAmxTile = 1u << 24, kAmxBf16 = 1u << 22;
    if ((low & kTiles) != kTiles || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    return (d & kAmxTile) && (d & kAmxBf16);
  }();
  return has;
}

// Calls a function of the namespace of this processor, which has kernels.
#define ON_PROCESSOR(...) \
  (rlhf::processor() == rlhf::Processor::avx512 ? rlhf::avx512::__VA_ARGS__ : rlhf::avx2::__VA_ARGS__)

// The thread team of the OpenMP that libtorch itself uses, found at run time: linking with one would bring
// in a second, whose threads would fight with libtorch's for the processor.
struct Team {
  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
  using Number = int (*)();
  Parallel parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  Number thread = reinterpret_cast<Number>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
  Number threads = reinterpret_cast<Number>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
  bool usable() const { return parallel && thread && threads; }
};

inline const Team& team() {
  static const Team found;
  return found;
}

// `body(begin, end)` over parts of 0..count, of at least `grain` each.
template <class Body>
void split(int64_t count, int64_t grain, const Body& body) {
  int64_t threads = std::min<int64_t>(at::get_num_threads(), (count + grain - 1) / grain);
  if (threads <= 1 || at::in_parallel_region() || !team().usable()) {
    body(0, count);
    return;
  }
  struct Work {
    const Body& body;
    int64_t count;
  } work{body, count};
  auto part = [](void* data) {
    auto& work = *static_cast<Work*>(data);
    int64_t thread = team().thread(), threads = team().threads();
    work.body(work.count * thread / threads, work.count * (thread + 1) / threads);
  };
  team().parallel(part, &work, static_cast<unsigned>(threads), 0);
}

INLINE float widen(uint16_t bits) {
  uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}
INLINE float get(const float* p) { return *p; }
INLINE float get(const uint16_t* p) { return widen(*p); }
INLINE void put(float* p, float value) { *p = value; }
// To the nearest, ties to even, as libtorch rounds.
INLINE void put(uint16_t* p, float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  *p = std::isnan(value) ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
INLINE float rounded(float value, const float*) { return value; }
INLINE float rounded(float value, const uint16_t*) {
  uint16_t bits;
  put(&bits, value);
  return widen(bits);
}

}  // namespace rlhf

#include "kernels/avx2.h"
#include "kernels/avx512.h"
#define KERNELS "kernels/functions.h"
#include "each_target.h"
#endif
