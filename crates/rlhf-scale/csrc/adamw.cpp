// AdamW in one pass over each weight: what clips its gradient, the moments, the weight. At 28 bytes read and written
// for some twenty operations it is as quick as memory; every pass that is saved counts.
//
// This file is compiled without contraction to fused multiply-adds (build.rs), so that an element's result is the
// same with every instruction set, wherever in a tensor it lies, and whether its gradient was clipped before.
#include "guard.h"
#include "vectors.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_fused_adamw.h>

using at::Tensor;
using rlhf::guarded;
using rlhf::list;

namespace {

struct Options {
  double lr, beta1, beta2, weight_decay, eps, scale;
};

// Factors of one step of one tensor.
struct Factors {
  float scale, decay, keep1, take1, keep2, take2, rate, eps;

  Factors(const Options& o, double step)
      : scale(o.scale), decay(1 - o.lr * o.weight_decay), keep1(o.beta1), take1(1 - o.beta1), keep2(o.beta2),
        take2(1 - o.beta2) {
    // lr · m̂ / (√v̂ + ε), with the corrections of both moments taken out of the division.
    double correction = std::sqrt(1 - std::pow(o.beta2, step));
    rate = o.lr / (1 - std::pow(o.beta1, step)) * correction;
    eps = o.eps * correction;
  }
};

#ifdef RLHF_KERNELS

struct Stretch {
  float *weight, *exp_avg, *exp_avg_sq;
  const float* grad;             // null if it is bf16
  const uint16_t* narrow_grad;
  int64_t count;
  const Factors* factors;
};

template <class G>
INLINE void step_by(const Stretch& s, const G* __restrict grads) {
  const Factors f = *s.factors;
  float *__restrict weight = s.weight, *__restrict exp_avg = s.exp_avg, *__restrict exp_avg_sq = s.exp_avg_sq;
  for (int64_t i = 0; i < s.count; i++) {
    float grad = rlhf::get(grads + i) * f.scale;
    float m = exp_avg[i] * f.keep1 + grad * f.take1;
    float v = exp_avg_sq[i] * f.keep2 + grad * grad * f.take2;
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    weight[i] = weight[i] * f.decay - f.rate * m / (std::sqrt(v) + f.eps);
  }
}

INLINE void step_body(const Stretch& s) {
  if (s.grad) {
    step_by(s, s.grad);
  } else {
    step_by(s, s.narrow_grad);
  }
}

void step_plain(const Stretch& s) { step_body(s); }
__attribute__((target("avx2"))) void step_8(const Stretch& s) { step_body(s); }
__attribute__((target("avx512f,prefer-vector-width=512"))) void step_16(const Stretch& s) { step_body(s); }

using Step = void (*)(const Stretch&);

Step best_step() {
  switch (rlhf::processor()) {
    case rlhf::Processor::avx512: return step_16;
    case rlhf::Processor::avx2: return step_8;
    case rlhf::Processor::plain: break;
  }
  return step_plain;
}

constexpr int64_t kAtOnce = 16 << 10;  // elements, a share of work

bool applies(const std::vector<Tensor>& weights, const std::vector<Tensor>& grads) {
  auto dense = [](const Tensor& t) { return t.device().is_cpu() && t.layout() == at::kStrided; };
  auto fits = [&](const Tensor& t) { return dense(t) && t.scalar_type() == at::kFloat; };
  auto read = [&](const Tensor& t) { return fits(t) || (dense(t) && t.scalar_type() == at::kBFloat16); };
  return std::all_of(weights.begin(), weights.end(), fits) && std::all_of(grads.begin(), grads.end(), read);
}

// All tensors by all threads, each a range of elements.
void step_all(const std::vector<Tensor>& weights, const std::vector<Tensor>& grads,
              const std::vector<Tensor>& exp_avgs, const std::vector<Tensor>& exp_avg_sqs,
              const std::vector<Tensor>& steps, const Options& options) {
  static const Step step = best_step();
  std::vector<Factors> factors;
  factors.reserve(weights.size());
  std::vector<Stretch> stretches;
  auto floats = [](const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); };
  for (size_t i = 0; i < weights.size(); i++) {
    factors.emplace_back(options, steps[i].item<float>());
    // As any change in place does: a saved tensor that changed is noticed in backward.
    for (auto* changed : {&weights[i], &exp_avgs[i], &exp_avg_sqs[i]}) {
      changed->unsafeGetTensorImpl()->bump_version();
    }
    bool narrow = grads[i].scalar_type() == at::kBFloat16;
    auto* narrow_grads = static_cast<const uint16_t*>(grads[i].data_ptr());
    for (int64_t at = 0; at < weights[i].numel(); at += kAtOnce) {
      stretches.push_back({floats(weights[i]) + at, floats(exp_avgs[i]) + at, floats(exp_avg_sqs[i]) + at,
                           narrow ? nullptr : floats(grads[i]) + at, narrow ? narrow_grads + at : nullptr,
                           std::min(kAtOnce, weights[i].numel() - at), &factors[i]});
    }
  }
  rlhf::split(stretches.size(), 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) step(stretches[i]);
  });
}
#endif

}  // namespace

extern "C" {

// Whether a step of f32 weights on the CPU reads bf16 gradients.
bool rlhf_adamw_reads_bf16() {
#ifdef RLHF_KERNELS
  return true;
#else
  return false;
#endif
}

// One AdamW step for tensors of one device and kind, whose strides agree, from gradients times `scale`; `steps` are
// one-element f32 tensors, raised by one here. Gradients are not needed any more, and may have been scaled. Those of
// f32 weights on the CPU may be bf16, where such are read.
char* rlhf_adamw(Tensor* const* params, Tensor* const* grads, Tensor* const* exp_avgs, Tensor* const* exp_avg_sqs,
                 Tensor* const* steps, size_t count, double lr, double beta1, double beta2, double weight_decay,
                 double eps, double scale) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    auto weights = list(params, count), gradients = list(grads, count), counters = list(steps, count);
    at::_foreach_add_(counters, 1);
    try {
#ifdef RLHF_KERNELS
      if (applies(weights, gradients)) {
        step_all(weights, gradients, list(exp_avgs, count), list(exp_avg_sqs, count), counters,
                 {lr, beta1, beta2, weight_decay, eps, scale});
        return;
      }
#endif
      if (scale != 1) at::_foreach_mul_(gradients, scale);
      at::_fused_adamw_(weights, gradients, list(exp_avgs, count), list(exp_avg_sqs, count), /*max_exp_avg_sqs=*/{},
                        counters, lr, beta1, beta2, weight_decay, eps, /*amsgrad=*/false, /*maximize=*/false);
    } catch (...) {
      at::_foreach_add_(counters, -1);
      throw;
    }
  });
}

}  // extern "C"
