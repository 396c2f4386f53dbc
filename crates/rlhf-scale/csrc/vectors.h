// Where processors have AVX-512, the kernels of this folder use it through these.
#pragma once

#include <ATen/Parallel.h>
#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__)
#include <immintrin.h>
#define RLHF_KERNELS 1
#define WIDE __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#define WIDE_BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")))
#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

namespace rlhf {

inline bool wide() {
  static const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return has;
}

inline bool wide_bf16() {
  static const bool has = wide() && __builtin_cpu_supports("avx512bf16");
  return has;
}

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

WIDE INLINE __m512 load(const float* p) { return _mm512_loadu_ps(p); }
WIDE INLINE __m512 load(const uint16_t* p) {
  auto half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// The first elements that the mask has, zeros for the others, of which no memory is touched.
WIDE INLINE __m512 load(const float* p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }
WIDE INLINE __m512 load(const uint16_t* p, __mmask16 mask) {
  auto half = _mm256_maskz_loadu_epi16(mask, p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
WIDE INLINE void store(float* p, __mmask16 mask, __m512 x) { _mm512_mask_storeu_ps(p, mask, x); }
// Rounded as `put` does it.
WIDE INLINE void store(uint16_t* p, __mmask16 mask, __m512 x) {
  __m512i bits = _mm512_castps_si512(x);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  __m512i half = _mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), nan, _mm512_set1_epi32(0x7fc0));
  _mm256_mask_storeu_epi16(p, mask, _mm512_cvtepi32_epi16(half));
}

// The sums of four vectors.
WIDE INLINE __m128 sums(__m512 a, __m512 b, __m512 c, __m512 d) {
  __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  __m512 all = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  __m128 first = _mm_add_ps(_mm512_extractf32x4_ps(all, 0), _mm512_extractf32x4_ps(all, 1));
  __m128 second = _mm_add_ps(_mm512_extractf32x4_ps(all, 2), _mm512_extractf32x4_ps(all, 3));
  return _mm_add_ps(first, second);
}

WIDE INLINE float sum(__m512 a) { return _mm_cvtss_f32(sums(a, a, a, a)); }

// e^x, x at most 0, to about one unit in the last place: Cody and Waite's reduction, then Cephes' polynomial.
// Not a number stays so, since the maximum is its second operand then.
WIDE INLINE __m512 exponential(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-126.0f * 0.6931f), x);
  __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  }
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_scalef_ps(p, n);
}

}  // namespace rlhf
#endif
