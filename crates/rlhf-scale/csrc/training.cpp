// What lies between the matrix products of a model on the CPU, in f32 and bf16, recorded for backward: each a single
// pass forward and one back, where libtorch has up to eight. Forward's results are the same to the last bit with
// gradients and without.
#include "recorded.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#define KERNELS "kernels/rows.h"
#include "each_target.h"

using at::Tensor;
using rlhf::guarded;

#ifdef RLHF_KERNELS
namespace {

using namespace rlhf;

// Rows whose shares of a weight's gradient are added up first, whatever the number of threads.
constexpr int64_t kShare = 64;

// Calls `run` with the beginning and the number of elements of parts.
template <class Run>
void by_parts(int64_t count, const Run& run) {
  constexpr int64_t kPiece = 1024;
  split((count + kPiece - 1) / kPiece, kGrain / kPiece / 4, [&](int64_t begin, int64_t end) {
    run(begin * kPiece, std::min(count, end * kPiece) - begin * kPiece);
  });
}

struct RmsNormBackward : public RecordedNode {
  float epsilon;
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
    by_kind(x, [&](auto* kind) {
      using T = std::remove_pointer_t<decltype(kind)>;
      split(shares, grain(width * kShare), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin * kShare; row < std::min(rows, end * kShare); row++) {
          int64_t at = row * width;
          ON_PROCESSOR(rms_norm_grad<T>(data<T>(x) + at, data<T>(weight), data<T>(grad) + at,
                                        extra.defined() ? data<T>(extra) + at : nullptr, width, epsilon,
                                        data<T>(out) + at,
                                        sums.defined() ? data<float>(sums) + row / kShare * width : nullptr));
        }
      });
    });
    if (sums.defined()) weight_grad = sums.sum(0).to(weight.scalar_type()).view(tensors[1].sizes());
    return result(out, weight_grad);
  }

 private:
  // Both inputs of a sum have its gradient.
  variable_list result(const Tensor& grad, const Tensor& weight_grad) const {
    return has_sum ? variable_list{grad, weight_grad, grad} : variable_list{grad, weight_grad};
  }
};

Tensor rotated(const Tensor& x, const Tensor& cos, const Tensor& sin, bool back) {
  auto out = at::empty(x.sizes(), x.options());
  int64_t heads = x.size(1), d = x.size(2), turning = cos.size(2);
  by_kind(x, [&](auto* kind) {
    using T = std::remove_pointer_t<decltype(kind)>;
    split(x.size(0), grain(heads * d), [&](int64_t begin, int64_t end) {
      int64_t at = begin * heads * d, angle = begin * turning;
      ON_PROCESSOR(rotate<T>(data<T>(x) + at, data<T>(cos) + angle, data<T>(sin) + angle, data<T>(out) + at, end - begin,
                             heads, d, turning, back));
    });
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
    by_kind(gate, [&](auto* kind) {
      using T = std::remove_pointer_t<decltype(kind)>;
      by_parts(gate.numel(), [&](int64_t at, int64_t count) {
        ON_PROCESSOR(gated_grad<T>(data<T>(gate) + at, data<T>(up) + at, data<T>(grad) + at, data<T>(gate_grad) + at,
                                   data<T>(up_grad) + at, count));
      });
    });
    return {gate_grad, up_grad};
  }
};

}  // namespace
#endif

extern "C" {

bool rlhf_records(bool bf16) {
#ifdef RLHF_KERNELS
  return rlhf::wide() && (bf16 || rlhf::wanted());
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
      by_kind(*x, [&](auto* kind) {
        using T = std::remove_pointer_t<decltype(kind)>;
        split(x->numel() / width, grain(width), [&](int64_t begin, int64_t end) {
          for (int64_t row = begin; row < end; row++) {
            int64_t at = row * width;
            T* own = data<T>(total) + at;
            if (added) ON_PROCESSOR(add_row<T>(data<T>(from) + at, data<T>(more) + at, own, width));
            ON_PROCESSOR(rms_norm<T>(own, data<T>(scales), data<T>(out) + at, 1, width, static_cast<float>(epsilon)));
          }
        });
      });
    }
    bool recorded = added ? is_recorded({x, weight, added}) : is_recorded({x, weight});
    if (recorded) {
      auto node = recorded_node<RmsNormBackward>();
      node->set_next_edges(added ? edges_of({x, weight, added}) : edges_of({x, weight}));
      node->epsilon = static_cast<float>(epsilon);
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
      by_kind(*gate, [&](auto* kind) {
        using T = std::remove_pointer_t<decltype(kind)>;
        by_parts(g.numel(), [&](int64_t at, int64_t count) {
          ON_PROCESSOR(gated<T>(data<T>(g) + at, data<T>(u) + at, data<T>(out) + at, count));
        });
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
