// Sixteen f32 side by side, on processors with AVX-512: see vectors.h.
#pragma once

#include <immintrin.h>

#define WIDE RLHF_AVX512

namespace rlhf::avx512 {

// What one register holds.
using Part = __m512;
constexpr int kPart = 16;
constexpr int kRegisters = 32;

WIDE INLINE Part load_part(const float* p) { return _mm512_loadu_ps(p); }
WIDE INLINE Part load_part(const uint16_t* p) {
  auto half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
WIDE INLINE void store_part(float* p, Part x) { _mm512_storeu_ps(p, x); }
// The first `count` of a part, 1 or more. What lies behind them may be written over if `free`.
WIDE INLINE void store_first(float* p, Part x, int64_t count, bool free) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << std::min<int64_t>(count, 16)) - 1), x);
}
// Of twice as many bf16 those at even places, or those at odd ones.
WIDE INLINE Part load_even(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16));
}
WIDE INLINE Part load_odd(const uint16_t* p) {
  __m512i odd = _mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(static_cast<int>(0xffff0000)));
  return _mm512_castsi512_ps(odd);
}
// Kept in a register, of which there are enough.
WIDE INLINE Part held(Part x) { return x; }
WIDE INLINE Part all_part(float x) { return _mm512_set1_ps(x); }

using Lanes = __m512;
using Mask = __mmask16;
// The mask of all sixteen.
struct All {};

WIDE INLINE Lanes zero() { return _mm512_setzero_ps(); }
WIDE INLINE Lanes all(float x) { return _mm512_set1_ps(x); }
WIDE INLINE Lanes add(Lanes x, Lanes y) { return _mm512_add_ps(x, y); }
WIDE INLINE Lanes sub(Lanes x, Lanes y) { return _mm512_sub_ps(x, y); }
WIDE INLINE Lanes mul(Lanes x, Lanes y) { return _mm512_mul_ps(x, y); }
WIDE INLINE Lanes div(Lanes x, Lanes y) { return _mm512_div_ps(x, y); }
// The second where either is not a number.
WIDE INLINE Lanes max(Lanes x, Lanes y) { return _mm512_max_ps(x, y); }
WIDE INLINE Lanes abs(Lanes x) { return _mm512_abs_ps(x); }
// x y + z, x y - z, z - x y, rounded once.
WIDE INLINE Lanes fma(Lanes x, Lanes y, Lanes z) { return _mm512_fmadd_ps(x, y, z); }
WIDE INLINE Lanes fms(Lanes x, Lanes y, Lanes z) { return _mm512_fmsub_ps(x, y, z); }
WIDE INLINE Lanes fnma(Lanes x, Lanes y, Lanes z) { return _mm512_fnmadd_ps(x, y, z); }

// So many of sixteen, none below 0.
WIDE INLINE Mask first_of(int64_t count) {
  return static_cast<Mask>((1u << std::clamp<int64_t>(count, 0, 16)) - 1);
}
// Those of place + 0 .. place + 15 that are at least `low` and below `high`.
WIDE INLINE Mask between(int64_t place, int64_t low, int64_t high) {
  return static_cast<Mask>(first_of(high - place) & ~first_of(low - place));
}
WIDE INLINE Mask negative(Lanes x) { return _mm512_movepi32_mask(_mm512_castps_si512(x)); }
// Those that are not below, what is not a number among them.
WIDE INLINE Mask not_below(Lanes x, float least) { return _mm512_cmp_ps_mask(x, all(least), _CMP_NLT_UQ); }
WIDE INLINE Lanes select(Mask mask, Lanes yes, Lanes no) { return _mm512_mask_mov_ps(no, mask, yes); }
WIDE INLINE Lanes select(All, Lanes yes, Lanes) { return yes; }

WIDE INLINE Lanes load(const float* p) { return _mm512_loadu_ps(p); }
WIDE INLINE Lanes load(const uint16_t* p) {
  auto half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
// The first elements that the mask has, zeros for the others, of which no memory is touched.
WIDE INLINE Lanes load(const float* p, Mask mask) { return _mm512_maskz_loadu_ps(mask, p); }
WIDE INLINE Lanes load(const uint16_t* p, Mask mask) {
  auto half = _mm256_maskz_loadu_epi16(mask, p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
WIDE INLINE void store(float* p, Mask mask, Lanes x) { _mm512_mask_storeu_ps(p, mask, x); }
// Rounded as `put` does it.
WIDE INLINE void store(uint16_t* p, Mask mask, Lanes x) {
  __m512i bits = _mm512_castps_si512(x);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  __m512i half = _mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), nan, _mm512_set1_epi32(0x7fc0));
  _mm256_mask_storeu_epi16(p, mask, _mm512_cvtepi32_epi16(half));
}
WIDE INLINE void store(float* p, Lanes x) { _mm512_storeu_ps(p, x); }
WIDE INLINE void store(uint16_t* p, Lanes x) { store(p, static_cast<Mask>(0xffff), x); }

WIDE INLINE Lanes rounded(Lanes x, const float*) { return x; }
WIDE INLINE Lanes rounded(Lanes x, const uint16_t*) {
  __m512i bits = _mm512_castps_si512(x);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  bits = _mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000)));
  bits = _mm512_mask_mov_epi32(bits, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
  return _mm512_castsi512_ps(bits);
}

// The sums of four vectors.
WIDE INLINE __m128 sums(Lanes a, Lanes b, Lanes c, Lanes d) {
  __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  __m512 all = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  __m128 first = _mm_add_ps(_mm512_extractf32x4_ps(all, 0), _mm512_extractf32x4_ps(all, 1));
  __m128 second = _mm_add_ps(_mm512_extractf32x4_ps(all, 2), _mm512_extractf32x4_ps(all, 3));
  return _mm_add_ps(first, second);
}
WIDE INLINE float largest(Lanes x) { return _mm512_reduce_max_ps(x); }

// The whole number next to x, and x 2^n for such an n.
WIDE INLINE Lanes nearest(Lanes x) { return _mm512_roundscale_ps(x, 0); }
WIDE INLINE Lanes times_power(Lanes x, Lanes n) { return _mm512_scalef_ps(x, n); }

WIDE INLINE Lanes low_pairs(Lanes a, Lanes b) {
  return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}
WIDE INLINE Lanes high_pairs(Lanes a, Lanes b) {
  return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}

// Rows become columns.
WIDE INLINE void transpose(Part (&x)[16]) {
  __m512 y[16];
  UNROLL for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
  }
  // x[4 q + j] has column j of every four, of rows 4 q to 4 q + 3.
  UNROLL for (int q = 0; q < 16; q += 4) {
    x[q] = low_pairs(y[q], y[q + 2]);
    x[q + 1] = high_pairs(y[q], y[q + 2]);
    x[q + 2] = low_pairs(y[q + 1], y[q + 3]);
    x[q + 3] = high_pairs(y[q + 1], y[q + 3]);
  }
  UNROLL for (int j = 0; j < 4; j++) {
    y[j] = _mm512_shuffle_f32x4(x[j], x[4 + j], 0x88);
    y[4 + j] = _mm512_shuffle_f32x4(x[j], x[4 + j], 0xdd);
    y[8 + j] = _mm512_shuffle_f32x4(x[8 + j], x[12 + j], 0x88);
    y[12 + j] = _mm512_shuffle_f32x4(x[8 + j], x[12 + j], 0xdd);
  }
  UNROLL for (int j = 0; j < 4; j++) {
    x[j] = _mm512_shuffle_f32x4(y[j], y[8 + j], 0x88);
    x[8 + j] = _mm512_shuffle_f32x4(y[j], y[8 + j], 0xdd);
    x[4 + j] = _mm512_shuffle_f32x4(y[4 + j], y[12 + j], 0x88);
    x[12 + j] = _mm512_shuffle_f32x4(y[4 + j], y[12 + j], 0xdd);
  }
}

}  // namespace rlhf::avx512

#undef WIDE
