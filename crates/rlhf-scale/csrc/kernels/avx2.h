// Sixteen f32 side by side, on processors with AVX2: in two registers, to the same bits as avx512.h.
#pragma once

#include <immintrin.h>

#define WIDE RLHF_AVX2

namespace rlhf::avx2 {

// What one register holds.
using Part = __m256;
constexpr int kPart = 8;
constexpr int kRegisters = 16;

WIDE INLINE Part load_part(const float* p) { return _mm256_loadu_ps(p); }
WIDE INLINE __m256 widened(__m128i half) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
WIDE INLINE Part load_part(const uint16_t* p) { return widened(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
WIDE INLINE void store_part(float* p, Part x) { _mm256_storeu_ps(p, x); }
// The first `count` of a part, 1 or more. What lies behind them may be written over if `free`: stores with masks are slow.
WIDE INLINE void store_first(float* p, Part x, int64_t count, bool free) {
  if (free || count >= 8) {
    _mm256_storeu_ps(p, x);
  } else {
    float all[8];
    _mm256_storeu_ps(all, x);
    memcpy(p, all, count * sizeof(*p));
  }
}
// Of twice as many bf16 those at even places, or those at odd ones.
WIDE INLINE Part load_even(const uint16_t* p) {
  __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
}
WIDE INLINE Part load_odd(const uint16_t* p) {
  __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
}
// Kept in a register: short of those GCC would load it, or compute it, at each use.
WIDE INLINE Part held(Part x) {
  asm("" : "+x"(x));
  return x;
}
WIDE INLINE Part all_part(float x) { return _mm256_set1_ps(x); }
WIDE INLINE Part add(Part x, Part y) { return _mm256_add_ps(x, y); }
WIDE INLINE Part mul(Part x, Part y) { return _mm256_mul_ps(x, y); }
WIDE INLINE Part fma(Part x, Part y, Part z) { return _mm256_fmadd_ps(x, y, z); }

struct Lanes {
  __m256 low, high;
};
struct Mask {
  __m256 low, high;
};
// The mask of all sixteen.
struct All {};

WIDE INLINE Lanes zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
WIDE INLINE Lanes all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
#define BOTH(NAME, OPERATION) \
  WIDE INLINE Lanes NAME(Lanes x, Lanes y) { return {OPERATION(x.low, y.low), OPERATION(x.high, y.high)}; }
BOTH(add, _mm256_add_ps)
BOTH(sub, _mm256_sub_ps)
BOTH(mul, _mm256_mul_ps)
BOTH(div, _mm256_div_ps)
// The second where either is not a number.
BOTH(max, _mm256_max_ps)
#undef BOTH
WIDE INLINE Lanes abs(Lanes x) {
  __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.low), _mm256_andnot_ps(sign, x.high)};
}
// x y + z, x y - z, z - x y, rounded once.
#define BOTH(NAME, OPERATION)                                                        \
  WIDE INLINE Lanes NAME(Lanes x, Lanes y, Lanes z) {                                \
    return {OPERATION(x.low, y.low, z.low), OPERATION(x.high, y.high, z.high)};      \
  }
BOTH(fma, _mm256_fmadd_ps)
BOTH(fms, _mm256_fmsub_ps)
BOTH(fnma, _mm256_fnmadd_ps)
#undef BOTH

// Of eight places from `place` on.
WIDE INLINE __m256 below(int64_t place, int64_t high) {
  __m256i limit = _mm256_set1_epi32(static_cast<int>(std::clamp<int64_t>(high - place, 0, 8)));
  return _mm256_castsi256_ps(_mm256_cmpgt_epi32(limit, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)));
}
// So many of sixteen, none below 0.
WIDE INLINE Mask first_of(int64_t count) { return {below(0, count), below(8, count)}; }
// Those of place + 0 .. place + 15 that are at least `low` and below `high`.
WIDE INLINE Mask between(int64_t place, int64_t low, int64_t high) {
  return {_mm256_andnot_ps(below(place, low), below(place, high)),
          _mm256_andnot_ps(below(place + 8, low), below(place + 8, high))};
}
WIDE INLINE Mask negative(Lanes x) {
  auto sign = [](__m256 x) WIDE { return _mm256_castsi256_ps(_mm256_srai_epi32(_mm256_castps_si256(x), 31)); };
  return {sign(x.low), sign(x.high)};
}
// Those that are not below, what is not a number among them.
WIDE INLINE Mask not_below(Lanes x, float least) {
  __m256 limit = _mm256_set1_ps(least);
  return {_mm256_cmp_ps(x.low, limit, _CMP_NLT_UQ), _mm256_cmp_ps(x.high, limit, _CMP_NLT_UQ)};
}
WIDE INLINE Lanes select(Mask mask, Lanes yes, Lanes no) {
  return {_mm256_blendv_ps(no.low, yes.low, mask.low), _mm256_blendv_ps(no.high, yes.high, mask.high)};
}
WIDE INLINE Lanes select(All, Lanes yes, Lanes) { return yes; }

WIDE INLINE Lanes load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
WIDE INLINE Lanes load(const uint16_t* p) {
  auto halves = reinterpret_cast<const __m128i*>(p);
  return {widened(_mm_loadu_si128(halves)), widened(_mm_loadu_si128(halves + 1))};
}
// The first elements that the mask has, zeros for the others, of which no memory is touched.
WIDE INLINE Lanes load(const float* p, Mask mask) {
  return {_mm256_maskload_ps(p, _mm256_castps_si256(mask.low)),
          _mm256_maskload_ps(p + 8, _mm256_castps_si256(mask.high))};
}
WIDE INLINE int64_t count_of(Mask mask) {
  return __builtin_popcount(_mm256_movemask_ps(mask.low)) + __builtin_popcount(_mm256_movemask_ps(mask.high));
}
WIDE INLINE Lanes load(const uint16_t* p, Mask mask) {
  uint16_t some[16] = {};
  memcpy(some, p, count_of(mask) * sizeof(*p));
  return load(some);
}
WIDE INLINE void store(float* p, Lanes x) {
  _mm256_storeu_ps(p, x.low);
  _mm256_storeu_ps(p + 8, x.high);
}
WIDE INLINE void store(float* p, Mask mask, Lanes x) {
  _mm256_maskstore_ps(p, _mm256_castps_si256(mask.low), x.low);
  _mm256_maskstore_ps(p + 8, _mm256_castps_si256(mask.high), x.high);
}
// To bf16 as `put` does it, in the upper halves; what the lower ones hold is of no use.
WIDE INLINE __m256i rounded_bits(__m256 x) {
  __m256i bits = _mm256_castps_si256(x);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc00000), nan);
}
WIDE INLINE void store(uint16_t* p, Lanes x) {
  __m256i low = _mm256_srli_epi32(rounded_bits(x.low), 16), high = _mm256_srli_epi32(rounded_bits(x.high), 16);
  // Packed within the halves of registers, so the middle ones change places.
  __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), packed);
}
WIDE INLINE void store(uint16_t* p, Mask mask, Lanes x) {
  uint16_t some[16];
  store(some, x);
  memcpy(p, some, count_of(mask) * sizeof(*p));
}

WIDE INLINE Lanes rounded(Lanes x, const float*) { return x; }
WIDE INLINE Lanes rounded(Lanes x, const uint16_t*) {
  __m256i kept = _mm256_set1_epi32(static_cast<int>(0xffff0000));
  return {_mm256_castsi256_ps(_mm256_and_si256(rounded_bits(x.low), kept)),
          _mm256_castsi256_ps(_mm256_and_si256(rounded_bits(x.high), kept))};
}

// The sums of four vectors within the halves of registers: [a, b, c, d] in each.
WIDE INLINE __m256 half_sums(__m256 a, __m256 b, __m256 c, __m256 d) {
  __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
  __m256d low = _mm256_unpacklo_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd));
  __m256d high = _mm256_unpackhi_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd));
  return _mm256_add_ps(_mm256_castpd_ps(low), _mm256_castpd_ps(high));
}
// The sums of four vectors.
WIDE INLINE __m128 sums(Part a, Part b, Part c, Part d) {
  __m256 halves = half_sums(a, b, c, d);
  return _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
}
WIDE INLINE __m128 sums(Lanes a, Lanes b, Lanes c, Lanes d) {
  return _mm_add_ps(sums(a.low, b.low, c.low, d.low), sums(a.high, b.high, c.high, d.high));
}
WIDE INLINE float largest(Lanes x) {
  __m256 eight = _mm256_max_ps(x.low, x.high);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

// The whole number next to x, and x 2^n for such an n from -126 to 0.
WIDE INLINE Lanes nearest(Lanes x) {
  return {_mm256_round_ps(x.low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
          _mm256_round_ps(x.high, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
WIDE INLINE __m256 power(__m256 n) {
  __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}
WIDE INLINE Lanes times_power(Lanes x, Lanes n) {
  return {_mm256_mul_ps(x.low, power(n.low)), _mm256_mul_ps(x.high, power(n.high))};
}

// Rows become columns.
WIDE INLINE void transpose(Part (&x)[8]) {
  __m256 y[8];
  UNROLL for (int i = 0; i < 8; i += 2) {
    y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
    y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
  }
  // x[4 q + j] has column j of every four, of rows 4 q to 4 q + 3.
  UNROLL for (int q = 0; q < 8; q += 4) {
    x[q] = _mm256_shuffle_ps(y[q], y[q + 2], 0x44);
    x[q + 1] = _mm256_shuffle_ps(y[q], y[q + 2], 0xee);
    x[q + 2] = _mm256_shuffle_ps(y[q + 1], y[q + 3], 0x44);
    x[q + 3] = _mm256_shuffle_ps(y[q + 1], y[q + 3], 0xee);
  }
  UNROLL for (int j = 0; j < 4; j++) {
    y[j] = _mm256_permute2f128_ps(x[j], x[4 + j], 0x20);
    y[4 + j] = _mm256_permute2f128_ps(x[j], x[4 + j], 0x31);
  }
  UNROLL for (int j = 0; j < 8; j++) x[j] = y[j];
}

}  // namespace rlhf::avx2

#undef WIDE
