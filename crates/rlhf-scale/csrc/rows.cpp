// What lies between the matrix products of a model, without gradients, on the CPU: each a single pass where
// libtorch has several, and rounded where the model's operations would round one after another.
#include "rows.h"

using at::Tensor;
using rlhf::guarded;

#ifdef RLHF_KERNELS
using namespace rlhf;
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
      split(x->numel() / width, std::max<int64_t>(1, kRowGrain / width), [&](int64_t begin, int64_t end) {
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
      split(rows, std::max<int64_t>(1, kRowGrain / (heads * d + 1)), [&](int64_t begin, int64_t end) {
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
      split((count + kBlock - 1) / kBlock, kRowGrain / kBlock / 4, [&](int64_t begin, int64_t end) {
        int64_t at = begin * kBlock;
        gated<T>(data<T>(*gate) + at, data<T>(*up) + at, data<T>(out) + at, std::min(count, end * kBlock) - at);
      });
    });
    *result = new Tensor(out);
#endif
  });
}

}  // extern "C"
