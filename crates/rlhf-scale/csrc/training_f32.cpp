// What lies between the matrix products of a model in training, on the CPU in f32: forward and backward in a pass each,
// where libtorch has several and keeps a tensor for every one. Sums over rows are over blocks of a fixed size, so that they
// do not depend on the number of threads.
#include "wide.h"

#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

using at::Tensor;
using rlhf::guarded;

#ifdef RLHF_KERNELS
namespace {

using namespace rlhf;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int64_t kGrain = 16384;  // elements that a thread is worth its start for
constexpr int64_t kBlock = 64;     // rows that are summed at once

int64_t grain(int64_t width) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width)); }

// Sixteen elements at a time, fewer of them at the end.
template <class Body>
WIDE INLINE void by_sixteen(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) body(i, static_cast<__mmask16>(0xffff));
  if (i < count) body(i, static_cast<__mmask16>((1u << (count - i)) - 1));
}

WIDE void norm_row(const float* x, const float* weight, float* out, float* scale, int64_t width, float epsilon) {
  __m512 squares = _mm512_setzero_ps();
  by_sixteen(width, [&](int64_t i, __mmask16 there) WIDE {
    __m512 value = load(x + i, there);
    squares = _mm512_fmadd_ps(value, value, squares);
  });
  *scale = 1.0f / std::sqrt(sum(squares) / width + epsilon);
  __m512 scales = _mm512_set1_ps(*scale);
  by_sixteen(width, [&](int64_t i, __mmask16 there) WIDE {
    store(out + i, there, _mm512_mul_ps(_mm512_mul_ps(load(x + i, there), scales), load(weight + i, there)));
  });
}

// With n = scale * x: the gradient of x is scale * (g w - n mean(g w n)), that of the weight is g n, summed over rows.
WIDE void norm_row_backward(const float* x, const float* weight, const float* grad, float scale, float* to,
                            float* to_weight, int64_t width) {
  __m512 scales = _mm512_set1_ps(scale), products = _mm512_setzero_ps();
  by_sixteen(width, [&](int64_t i, __mmask16 there) WIDE {
    __m512 g = load(grad + i, there), n = _mm512_mul_ps(load(x + i, there), scales);
    __m512 gn = _mm512_mul_ps(g, n);
    products = _mm512_fmadd_ps(gn, load(weight + i, there), products);
    if (to_weight) store(to_weight + i, there, _mm512_add_ps(load(to_weight + i, there), gn));
  });
  if (!to) return;
  __m512 mean = _mm512_set1_ps(sum(products) / width);
  by_sixteen(width, [&](int64_t i, __mmask16 there) WIDE {
    __m512 n = _mm512_mul_ps(load(x + i, there), scales);
    __m512 gw = _mm512_mul_ps(load(grad + i, there), load(weight + i, there));
    store(to + i, there, _mm512_mul_ps(_mm512_fnmadd_ps(n, mean, gw), scales));
  });
}

struct RmsNorm : torch::autograd::Function<RmsNorm> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& weight, double epsilon) {
    int64_t width = weight.numel(), rows = x.numel() / width;
    auto out = at::empty(x.sizes(), x.options()), scales = at::empty({rows}, x.options());
    split(rows, grain(width), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++) {
        int64_t at = row * width;
        norm_row(data<float>(x) + at, data<float>(weight), data<float>(out) + at, data<float>(scales) + row, width,
                 static_cast<float>(epsilon));
      }
    });
    context->save_for_backward({x, weight, scales});
    return out;
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    auto saved = context->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1], &scales = saved[2];
    auto grad = grads[0].contiguous();
    int64_t width = weight.numel(), rows = scales.numel(), blocks = (rows + kBlock - 1) / kBlock;
    Tensor to, sums;
    if (context->needs_input_grad(0)) to = at::empty(x.sizes(), x.options());
    if (context->needs_input_grad(1)) sums = at::zeros({blocks, width}, x.options());
    split(blocks, std::max<int64_t>(1, grain(width) / kBlock), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin * kBlock; row < std::min(rows, end * kBlock); row++) {
        int64_t at = row * width;
        norm_row_backward(data<float>(x) + at, data<float>(weight), data<float>(grad) + at, data<float>(scales)[row],
                          to.defined() ? data<float>(to) + at : nullptr,
                          sums.defined() ? data<float>(sums) + row / kBlock * width : nullptr, width);
      }
    });
    return {to, sums.defined() ? at::sum(sums, {0}) : Tensor(), Tensor()};
  }
};

// Of a vector's first `turning` dimensions each is paired with the one half their number away; the others stay.
// `back` is the gradient.
WIDE void turn_rows(const float* x, const float* cos, const float* sin, bool back, float* out, int64_t begin, int64_t end,
                    int64_t heads, int64_t d, int64_t turning) {
  int64_t half = turning / 2;
  for (int64_t row = begin; row < end; row++) {
    const float *c = cos + row * turning, *s = sin + row * turning;
    // What a value gave to its partner comes back with the partner's sine.
    const float *first = back ? s + half : s, *second = back ? s : s + half;
    for (int64_t head = 0; head < heads; head++) {
      int64_t at = (row * heads + head) * d;
      const float *low = x + at, *high = low + half;
      float *to = out + at, *to_high = to + half;
      by_sixteen(half, [&](int64_t i, __mmask16 there) WIDE {
        __m512 a = load(low + i, there), b = load(high + i, there);
        // Two products and a sum, each rounded, as libtorch's operations do it.
        __m512 kept = _mm512_mul_ps(a, load(c + i, there)), crossed = _mm512_mul_ps(b, load(first + i, there));
        store(to + i, there, _mm512_add_ps(kept, crossed));
        kept = _mm512_mul_ps(b, load(c + half + i, there));
        crossed = _mm512_mul_ps(a, load(second + i, there));
        store(to_high + i, there, _mm512_add_ps(kept, crossed));
      });
      for (int64_t i = turning; i < d; i++) to[i] = low[i];
    }
  }
}

Tensor turned(const Tensor& x, const Tensor& cos, const Tensor& sin, bool back) {
  int64_t rows = x.size(0), heads = x.size(1), d = x.size(2), turning = cos.size(2);
  auto out = at::empty(x.sizes(), x.options());
  split(rows, grain(heads * d), [&](int64_t begin, int64_t end) {
    turn_rows(data<float>(x), data<float>(cos), data<float>(sin), back, data<float>(out), begin, end, heads, d, turning);
  });
  return out;
}

struct Rotate : torch::autograd::Function<Rotate> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& cos, const Tensor& sin) {
    context->save_for_backward({cos, sin});
    return turned(x, cos, sin, false);
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    auto saved = context->get_saved_variables();
    return {turned(grads[0].contiguous(), saved[0], saved[1], true), Tensor(), Tensor()};
  }
};

WIDE INLINE __m512 sigmoid(__m512 x) {
  __m512 e = exponential(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(x)));
  __mmask16 negative = _mm512_movepi32_mask(_mm512_castps_si512(x));
  __m512 one = _mm512_set1_ps(1.0f);
  return _mm512_div_ps(_mm512_mask_mov_ps(one, negative, e), _mm512_add_ps(one, e));
}

WIDE void gate_part(const float* gate, const float* up, float* out, int64_t begin, int64_t end) {
  by_sixteen(end - begin, [&](int64_t i, __mmask16 there) WIDE {
    __m512 x = load(gate + begin + i, there);
    store(out + begin + i, there, _mm512_mul_ps(_mm512_mul_ps(x, sigmoid(x)), load(up + begin + i, there)));
  });
}

// With s = sigmoid(x): silu'(x) = s (1 + x (1 - s)).
WIDE void gate_part_backward(const float* gate, const float* up, const float* grad, float* to_gate, float* to_up,
                             int64_t begin, int64_t end) {
  __m512 one = _mm512_set1_ps(1.0f);
  by_sixteen(end - begin, [&](int64_t i, __mmask16 there) WIDE {
    __m512 x = load(gate + begin + i, there), g = load(grad + begin + i, there), s = sigmoid(x);
    store(to_up + begin + i, there, _mm512_mul_ps(g, _mm512_mul_ps(x, s)));
    __m512 slope = _mm512_mul_ps(s, _mm512_fmadd_ps(x, _mm512_sub_ps(one, s), one));
    store(to_gate + begin + i, there, _mm512_mul_ps(_mm512_mul_ps(g, load(up + begin + i, there)), slope));
  });
}

struct Gate : torch::autograd::Function<Gate> {
  static Tensor forward(AutogradContext* context, const Tensor& gate, const Tensor& up) {
    context->save_for_backward({gate, up});
    auto out = at::empty(gate.sizes(), gate.options());
    split(gate.numel(), kGrain / 4, [&](int64_t begin, int64_t end) {
      gate_part(data<float>(gate), data<float>(up), data<float>(out), begin, end);
    });
    return out;
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    auto saved = context->get_saved_variables();
    const Tensor &gate = saved[0], &up = saved[1];
    auto grad = grads[0].contiguous();
    auto to_gate = at::empty(gate.sizes(), gate.options()), to_up = at::empty(up.sizes(), up.options());
    split(gate.numel(), kGrain / 4, [&](int64_t begin, int64_t end) {
      gate_part_backward(data<float>(gate), data<float>(up), data<float>(grad), data<float>(to_gate), data<float>(to_up),
                         begin, end);
    });
    return {to_gate, to_up};
  }
};

}  // namespace
#endif

extern "C" {

// x [.., H] over the root of its mean square plus epsilon, times weight [H]; with gradients.
char* rlhf_trained_rms_norm(const Tensor* x, const Tensor* weight, double epsilon, Tensor** result) {
  return guarded([&] {
#ifdef RLHF_KERNELS
    int64_t width = weight->numel();
    if (x->dim() < 1 || width < 1 || x->size(-1) != width || !trains_f32({x, weight})) return;
    *result = new Tensor(RmsNorm::apply(*x, *weight, epsilon));
#endif
  });
}

// x [N, heads, d] turned by cos and sin [N, 1, width], the first half of the sines negated; with x's gradient.
char* rlhf_trained_rotate(const Tensor* x, const Tensor* cos, const Tensor* sin, Tensor** result) {
  return guarded([&] {
#ifdef RLHF_KERNELS
    if (x->dim() != 3 || cos->dim() != 3 || !trains_f32({x, cos, sin})) return;
    int64_t turning = cos->size(2);
    if (turning > x->size(2) || turning % 2 != 0 || sin->sizes() != cos->sizes()) return;
    if (cos->sizes() != at::IntArrayRef({x->size(0), 1, turning})) return;
    if (cos->requires_grad() || sin->requires_grad()) return;
    *result = new Tensor(Rotate::apply(*x, *cos, *sin));
#endif
  });
}

// silu(gate) * up, of one shape; with gradients.
char* rlhf_trained_silu_gated(const Tensor* gate, const Tensor* up, Tensor** result) {
  return guarded([&] {
#ifdef RLHF_KERNELS
    if (gate->sizes() != up->sizes() || !trains_f32({gate, up})) return;
    *result = new Tensor(Gate::apply(*gate, *up));
#endif
  });
}

}  // extern "C"
