// What lies between the matrix products of a model, without gradients, on the CPU: each a single pass where
// libtorch has several, and rounded where the model's operations would round one after another.
#include "wide.h"

using at::Tensor;
using rlhf::guarded;

#ifdef RLHF_KERNELS
namespace {

using namespace rlhf;

// Elements that a thread is worth its start for.
constexpr int64_t kGrain = 32768;

template <class T>
WIDE void rms_norm(const T* x, const T* weight, T* out, int64_t rows, int64_t width, double epsilon) {
  for (int64_t row = 0; row < rows; row++, x += width, out += width) {
    __m512 squares = _mm512_setzero_ps();
    int64_t i = 0;
    for (; i + 16 <= width; i += 16) squares = _mm512_fmadd_ps(load(x + i), load(x + i), squares);
    float total = sum(squares);
    for (; i < width; i++) total += get(x + i) * get(x + i);
    float scale = 1.0f / std::sqrt(total / width + static_cast<float>(epsilon));
    // Rounded before the weight.
    for (i = 0; i + 16 <= width; i += 16) {
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
template <class T>
WIDE void rotate(const T* x, const T* cos, const T* sin, T* out, int64_t rows, int64_t heads, int64_t d,
                 int64_t turning) {
  int64_t half = turning / 2;
  for (int64_t row = 0; row < rows; row++, cos += turning, sin += turning) {
    for (int64_t head = 0; head < heads; head++, x += d, out += d) {
      turn(x, x + half, cos, sin, out, half);
      turn(x + half, x, cos + half, sin + half, out + half, half);
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

}  // namespace
#endif

extern "C" {

// x [.., H] over the root of its mean square plus epsilon, times weight [H].
char* rlhf_rms_norm(const Tensor* x, const Tensor* weight, double epsilon, Tensor** result) {
  return guarded([&] {
#ifdef RLHF_KERNELS
    int64_t width = weight->numel();
    if (x->dim() < 1 || width < 1 || x->size(-1) != width || !applies({x, weight})) return;
    auto out = at::empty(x->sizes(), x->options());
    by_kind(*x, [&](auto* kind) {
      using T = std::remove_pointer_t<decltype(kind)>;
      split(x->numel() / width, std::max<int64_t>(1, kGrain / width), [&](int64_t begin, int64_t end) {
        int64_t at = begin * width;
        rms_norm<T>(data<T>(*x) + at, data<T>(*weight), data<T>(out) + at, end - begin, width, epsilon);
      });
    });
    *result = new Tensor(out);
#endif
  });
}

// x [N, heads, d] turned by cos and sin [N, 1, width], the first half of the sines negated.
char* rlhf_rotate(const Tensor* x, const Tensor* cos, const Tensor* sin, Tensor** result) {
  return guarded([&] {
#ifdef RLHF_KERNELS
    if (x->dim() != 3 || cos->dim() != 3 || !applies({x, cos, sin})) return;
    int64_t rows = x->size(0), heads = x->size(1), d = x->size(2), turning = cos->size(2);
    if (turning > d || turning % 2 != 0 || sin->sizes() != cos->sizes()) return;
    if (cos->sizes() != at::IntArrayRef({rows, 1, turning})) return;
    auto out = at::empty(x->sizes(), x->options());
    by_kind(*x, [&](auto* kind) {
      using T = std::remove_pointer_t<decltype(kind)>;
      split(rows, std::max<int64_t>(1, kGrain / (heads * d + 1)), [&](int64_t begin, int64_t end) {
        int64_t at = begin * heads * d, angle = begin * turning;
        rotate<T>(data<T>(*x) + at, data<T>(*cos) + angle, data<T>(*sin) + angle, data<T>(out) + at, end - begin, heads,
                  d, turning);
      });
    });
    *result = new Tensor(out);
#endif
  });
}

// silu(gate) * up, of one shape.
char* rlhf_silu_gated(const Tensor* gate, const Tensor* up, Tensor** result) {
  return guarded([&] {
#ifdef RLHF_KERNELS
    if (gate->sizes() != up->sizes() || !applies({gate, up})) return;
    auto out = at::empty(gate->sizes(), gate->options());
    by_kind(*gate, [&](auto* kind) {
      using T = std::remove_pointer_t<decltype(kind)>;
      constexpr int64_t kBlock = 1024;
      int64_t count = gate->numel();
      split((count + kBlock - 1) / kBlock, kGrain / kBlock / 4, [&](int64_t begin, int64_t end) {
        int64_t at = begin * kBlock;
        gated<T>(data<T>(*gate) + at, data<T>(*up) + at, data<T>(out) + at, std::min(count, end * kBlock) - at);
      });
    });
    *result = new Tensor(out);
#endif
  });
}

}  // extern "C"
