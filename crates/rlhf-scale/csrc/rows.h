// What lies between the matrix products of a model, row by row: what rows.cpp does without gradients and training.cpp
// with them. Rounded where the model's operations would round one after another.
#pragma once

#include "wide.h"

#ifdef RLHF_KERNELS
namespace rlhf {

// Elements that a thread is worth its start for.
constexpr int64_t kRowGrain = 32768;

// One over the root of a row's mean square plus epsilon.
template <class T>
WIDE INLINE float inverse_root(const T* x, int64_t width, double epsilon) {
  __m512 squares = _mm512_setzero_ps();
  int64_t i = 0;
  for (; i + 16 <= width; i += 16) squares = _mm512_fmadd_ps(load(x + i), load(x + i), squares);
  float total = sum(squares);
  for (; i < width; i++) total += get(x + i) * get(x + i);
  return 1.0f / std::sqrt(total / width + static_cast<float>(epsilon));
}

template <class T>
WIDE void rms_norm(const T* x, const T* weight, T* out, int64_t rows, int64_t width, double epsilon) {
  for (int64_t row = 0; row < rows; row++, x += width, out += width) {
    float scale = inverse_root(x, width, epsilon);
    // Rounded before the weight.
    int64_t i = 0;
    for (; i + 16 <= width; i += 16) {
      __m512 normed = rounded(_mm512_mul_ps(load(x + i), _mm512_set1_ps(scale)), x);
      store(out + i, _mm512_mul_ps(normed, load(weight + i)));
    }
    for (; i < width; i++) put(out + i, rounded(get(x + i) * scale, x) * get(weight + i));
  }
}

// Half of the dimensions that turn: `x` of their own, `other` of their partners.
template <class T>
WIDE INLINE void turn(const T* x, const T* other, const T* cos, const T* sin, T* out, int64_t half) {
  for (int64_t i = 0; i < half; i++) {
    float kept = rounded(get(x + i) * get(cos + i), x);
    float crossed = rounded(get(other + i) * get(sin + i), x);
    put(out + i, kept + crossed);
  }
}

// Rows of `heads` vectors of width d. Of a vector's first `turning` dimensions, each is paired with the one half
// their number before or after it; the others stay.
// Turned back, if `back`: of gradients.
template <class T>
WIDE void rotate(const T* x, const T* cos, const T* sin, T* out, int64_t rows, int64_t heads, int64_t d,
                 int64_t turning, bool back = false) {
  int64_t half = turning / 2;
  for (int64_t row = 0; row < rows; row++, cos += turning, sin += turning) {
    const T *first = back ? sin + half : sin, *second = back ? sin : sin + half;
    for (int64_t head = 0; head < heads; head++, x += d, out += d) {
      turn(x, x + half, cos, first, out, half);
      turn(x + half, x, cos + half, second, out + half, half);
      for (int64_t i = turning; i < d; i++) out[i] = x[i];
    }
  }
}

WIDE INLINE __m512 silu(__m512 x) {
  __m512 e = exponential(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(x)));
  __mmask16 negative = _mm512_movepi32_mask(_mm512_castps_si512(x));
  __m512 numerator = _mm512_mask_mov_ps(_mm512_set1_ps(1.0f), negative, e);
  return _mm512_div_ps(_mm512_mul_ps(x, numerator), _mm512_add_ps(_mm512_set1_ps(1.0f), e));
}

// silu(gate) * up.
template <class T>
WIDE void gated(const T* gate, const T* up, T* out, int64_t count) {
  auto sixteen = [](const T* gate, const T* up, T* out) WIDE {
    store(out, _mm512_mul_ps(rounded(silu(load(gate)), gate), load(up)));
  };
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) sixteen(gate + i, up + i, out + i);
  if (size_t rest = (count - i) * sizeof(T)) {
    T last[3][16] = {};
    memcpy(last[0], gate + i, rest);
    memcpy(last[1], up + i, rest);
    sixteen(last[0], last[1], last[2]);
    memcpy(out + i, last[2], rest);
  }
}

}  // namespace rlhf
#endif
