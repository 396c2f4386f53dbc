// What lies between the matrix products of a model in bf16 on the CPU, recorded for backward: each a single pass
// forward and one back, where libtorch has up to eight. Forward's results are those of rows.cpp to the last bit, so
// that a model computes the same with gradients and without; backward computes in f32 and rounds once.
#include "recorded.h"
#include "rows.h"

#include <ATen/ops/empty_like.h>

using at::Tensor;
using rlhf::guarded;

#ifdef RLHF_KERNELS
namespace {

using namespace rlhf;

// Rows whose shares of a weight's gradient are added up first, whatever the number of threads.
constexpr int64_t kShare = 64;

// From the gradient of a row x / rms(x) * weight that of x, and of the weight this row's share. `extra`, which may
// be null, is a gradient that reaches x by another way.
WIDE void rms_norm_grad(const uint16_t* x, const uint16_t* weight, const uint16_t* grad, const uint16_t* extra,
                        float scale, int64_t width, uint16_t* out, float* weight_sums) {
  __m512 products = _mm512_setzero_ps(), factor = _mm512_set1_ps(scale);
  auto mask_of = [&](int64_t i) { return static_cast<__mmask16>(width - i >= 16 ? 0xffff : (1u << (width - i)) - 1); };
  for (int64_t i = 0; i < width; i += 16) {
    __mmask16 mask = mask_of(i);
    __m512 normed = _mm512_mul_ps(load(x + i, mask), factor), g = load(grad + i, mask);
    products = _mm512_fmadd_ps(_mm512_mul_ps(g, load(weight + i, mask)), normed, products);
    if (weight_sums) {
      __m512 sums = _mm512_fmadd_ps(g, rounded(normed, x), load(weight_sums + i, mask));
      store(weight_sums + i, mask, sums);
    }
  }
  __m512 mean = _mm512_set1_ps(sum(products) / width);
  for (int64_t i = 0; i < width; i += 16) {
    __mmask16 mask = mask_of(i);
    __m512 normed = _mm512_mul_ps(load(x + i, mask), factor);
    __m512 own = _mm512_fmsub_ps(load(grad + i, mask), load(weight + i, mask), _mm512_mul_ps(normed, mean));
    __m512 all = extra ? _mm512_fmadd_ps(own, factor, load(extra + i, mask)) : _mm512_mul_ps(own, factor);
    store(out + i, mask, all);
  }
}

// The sum of two rows, rounded.
WIDE void add_row(const uint16_t* x, const uint16_t* y, uint16_t* out, int64_t width) {
  int64_t i = 0;
  for (; i + 16 <= width; i += 16) store(out + i, _mm512_add_ps(load(x + i), load(y + i)));
  for (; i < width; i++) put(out + i, get(x + i) + get(y + i));
}

// Gradients of silu(gate) * up.
WIDE void gated_grad(const uint16_t* gate, const uint16_t* up, const uint16_t* grad, uint16_t* gate_grad,
                     uint16_t* up_grad, int64_t count) {
  __m512 one = _mm512_set1_ps(1.0f);
  for (int64_t i = 0; i < count; i += 16) {
    auto mask = static_cast<__mmask16>(count - i >= 16 ? 0xffff : (1u << (count - i)) - 1);
    __m512 x = load(gate + i, mask), u = load(up + i, mask), g = load(grad + i, mask);
    __m512 e = exponential(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(x)));
    __mmask16 negative = _mm512_movepi32_mask(_mm512_castps_si512(x));
    __m512 sigmoid = _mm512_div_ps(_mm512_mask_mov_ps(one, negative, e), _mm512_add_ps(one, e));
    __m512 rest = _mm512_div_ps(_mm512_mask_mov_ps(e, negative, one), _mm512_add_ps(one, e));
    __m512 activated = _mm512_mul_ps(x, sigmoid);
    // silu'(x) = sigmoid(x) (1 + x sigmoid(-x)), where nothing overflows or cancels.
    __m512 slope = _mm512_mul_ps(sigmoid, _mm512_fmadd_ps(x, rest, one));
    store(up_grad + i, mask, _mm512_mul_ps(g, activated));
    store(gate_grad + i, mask, _mm512_mul_ps(_mm512_mul_ps(g, u), slope));
  }
}

struct RmsNormBackward : public RecordedNode {
  double epsilon;
  bool has_sum;       // whether the sum of the inputs is an output, the first
  bool weight_needed;

  std::string name() const override { return "RlhfRmsNormBackward"; }

  variable_list backward(const variable_list& tensors, const variable_list& grads) override {
    auto x = tensors[0].contiguous(), weight = tensors[1].contiguous();
    const Tensor& own = grads[has_sum ? 1 : 0];
    Tensor extra = has_sum ? grads[0] : Tensor(), weight_grad;
    if (!own.defined()) return result(extra, weight_grad);
    auto grad = own.contiguous(), out = at::empty_like(x);
    if (extra.defined()) extra = extra.contiguous();
    int64_t width = weight.numel(), rows = x.numel() / width, shares = (rows + kShare - 1) / kShare;
    auto sums = weight_needed ? at::zeros({shares, width}, x.options().dtype(at::kFloat)) : Tensor();
    split(shares, std::max<int64_t>(1, kRowGrain / (width * kShare)), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin * kShare; row < std::min(rows, end * kShare); row++) {
        int64_t at = row * width;
        const uint16_t* from = data<uint16_t>(x) + at;
        rms_norm_grad(from, data<uint16_t>(weight), data<uint16_t>(grad) + at,
                      extra.defined() ? data<uint16_t>(extra) + at : nullptr, inverse(from, width), width,
                      data<uint16_t>(out) + at, sums.defined() ? data<float>(sums) + row / kShare * width : nullptr);
      }
    });
    if (sums.defined()) weight_grad = sums.sum(0).to(weight.scalar_type()).view(tensors[1].sizes());
    return result(out, weight_grad);
  }

 private:
  WIDE float inverse(const uint16_t* x, int64_t width) const { return inverse_root(x, width, epsilon); }

  // Both inputs of a sum have its gradient.
  variable_list result(const Tensor& grad, const Tensor& weight_grad) const {
    return has_sum ? variable_list{grad, weight_grad, grad} : variable_list{grad, weight_grad};
  }
};

Tensor rotated(const Tensor& x, const Tensor& cos, const Tensor& sin, bool back) {
  auto out = at::empty(x.sizes(), x.options());
  int64_t heads = x.size(1), d = x.size(2), turning = cos.size(2);
  split(x.size(0), std::max<int64_t>(1, kRowGrain / (heads * d + 1)), [&](int64_t begin, int64_t end) {
    int64_t at = begin * heads * d, angle = begin * turning;
    rotate<uint16_t>(data<uint16_t>(x) + at, data<uint16_t>(cos) + angle, data<uint16_t>(sin) + angle,
                     data<uint16_t>(out) + at, end - begin, heads, d, turning, back);
  });
  return out;
}

struct RotateBackward : public RecordedNode {
  std::string name() const override { return "RlhfRotateBackward"; }

  variable_list backward(const variable_list& tensors, const variable_list& grads) override {
    if (!grads[0].defined()) return {Tensor()};
    return {rotated(grads[0].contiguous(), tensors[0], tensors[1], /*back=*/true)};
  }
};

struct GatedBackward : public RecordedNode {
  std::string name() const override { return "RlhfGatedBackward"; }

  variable_list backward(const variable_list& tensors, const variable_list& grads) override {
    if (!grads[0].defined()) return {Tensor(), Tensor()};
    auto gate = tensors[0].contiguous(), up = tensors[1].contiguous(), grad = grads[0].contiguous();
    auto gate_grad = at::empty_like(gate), up_grad = at::empty_like(up);
    constexpr int64_t kBlock = 1024;
    int64_t count = gate.numel();
    split((count + kBlock - 1) / kBlock, kRowGrain / kBlock / 4, [&](int64_t begin, int64_t end) {
      int64_t at = begin * kBlock;
      gated_grad(data<uint16_t>(gate) + at, data<uint16_t>(up) + at, data<uint16_t>(grad) + at,
                 data<uint16_t>(gate_grad) + at, data<uint16_t>(up_grad) + at, std::min(count, end * kBlock) - at);
    });
    return {gate_grad, up_grad};
  }
};

}  // namespace
#endif

extern "C" {

bool rlhf_trains_bf16() {
#ifdef RLHF_KERNELS
  return rlhf::wide();
#else
  return false;
#endif
}

// x [.., H], with `added` of the same shape unless it is null, over the root of its mean square plus epsilon, times
// weight [H]. `sum` becomes x + added, if there is such.
char* rlhf_recorded_rms_norm(const Tensor* x, const Tensor* added, const Tensor* weight, double epsilon, Tensor** sum,
                             Tensor** result) {
  return guarded([&] {
#ifdef RLHF_KERNELS
    int64_t width = weight->numel();
    if (x->dim() < 1 || width < 1 || weight->dim() != 1 || x->size(-1) != width || x->numel() == 0) return;
    if (!trains({x, weight}) || (added && (!trains({added}) || added->sizes() != x->sizes()))) return;
    Tensor total, out;
    {
      at::NoGradGuard no_grad;
      auto from = x->contiguous(), scales = weight->contiguous(), more = added ? added->contiguous() : Tensor();
      total = added ? at::empty(x->sizes(), x->options()) : from;
      out = at::empty(x->sizes(), x->options());
      split(x->numel() / width, std::max<int64_t>(1, kRowGrain / width), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
          int64_t at = row * width;
          uint16_t* own = data<uint16_t>(total) + at;
          if (added) add_row(data<uint16_t>(from) + at, data<uint16_t>(more) + at, own, width);
          rms_norm<uint16_t>(own, data<uint16_t>(scales), data<uint16_t>(out) + at, 1, width, epsilon);
        }
      });
    }
    bool recorded = added ? is_recorded({x, weight, added}) : is_recorded({x, weight});
    if (recorded) {
      auto node = recorded_node<RmsNormBackward>();
      node->set_next_edges(added ? edges_of({x, weight, added}) : edges_of({x, weight}));
      node->epsilon = epsilon;
      node->has_sum = added != nullptr;
      node->weight_needed = weight->requires_grad();
      // The sum is saved as a value of its own: as an output of this node it would keep the node alive.
      node->saved.emplace_back(added ? total.detach() : *x, /*is_output=*/false);
      node->saved.emplace_back(*weight, /*is_output=*/false);
      if (added) torch::autograd::set_history(total, node);
      torch::autograd::set_history(out, node);
    }
    if (added) *sum = new Tensor(total);
    *result = new Tensor(out);
#endif
  });
}

// x [N, heads, d] turned by cos and sin [N, 1, width], the first half of the sines negated.
char* rlhf_recorded_rotate(const Tensor* x, const Tensor* cos, const Tensor* sin, Tensor** result) {
  return guarded([&] {
#ifdef RLHF_KERNELS
    if (x->dim() != 3 || cos->dim() != 3 || !trains({x, cos, sin})) return;
    if (!cos->is_contiguous() || !sin->is_contiguous() || cos->requires_grad() || sin->requires_grad()) return;
    int64_t rows = x->size(0), d = x->size(2), turning = cos->size(2);
    if (turning > d || turning % 2 != 0 || sin->sizes() != cos->sizes()) return;
    if (cos->sizes() != at::IntArrayRef({rows, 1, turning})) return;
    Tensor out;
    {
      at::NoGradGuard no_grad;
      out = rotated(x->contiguous(), *cos, *sin, /*back=*/false);
    }
    if (is_recorded({x})) {
      auto node = recorded_node<RotateBackward>();
      node->set_next_edges(edges_of({x}));
      for (auto* t : {cos, sin}) node->saved.emplace_back(*t, /*is_output=*/false);
      torch::autograd::set_history(out, node);
    }
    *result = new Tensor(out);
#endif
  });
}

// silu(gate) * up, of one shape.
char* rlhf_recorded_silu_gated(const Tensor* gate, const Tensor* up, Tensor** result) {
  return guarded([&] {
#ifdef RLHF_KERNELS
    if (gate->sizes() != up->sizes() || gate->numel() == 0 || !trains({gate, up})) return;
    Tensor out;
    {
      at::NoGradGuard no_grad;
      auto g = gate->contiguous(), u = up->contiguous();
      out = at::empty(gate->sizes(), gate->options());
      constexpr int64_t kBlock = 1024;
      int64_t count = g.numel();
      split((count + kBlock - 1) / kBlock, kRowGrain / kBlock / 4, [&](int64_t begin, int64_t end) {
        int64_t at = begin * kBlock;
        gated<uint16_t>(data<uint16_t>(g) + at, data<uint16_t>(u) + at, data<uint16_t>(out) + at,
                        std::min(count, end * kBlock) - at);
      });
    }
    if (is_recorded({gate, up})) {
      auto node = recorded_node<GatedBackward>();
      node->set_next_edges(edges_of({gate, up}));
      for (auto* t : {gate, up}) node->saved.emplace_back(*t, /*is_output=*/false);
      torch::autograd::set_history(out, node);
    }
    *result = new Tensor(out);
#endif
  });
}

}  // extern "C"
