// What tch leaves out of libtorch: list operations (fused AdamW, foreach norms), writable gradients,
// backward with output gradients, and tensors over memory that Rust owns.
#include "guard.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/stack.h>
#include <torch/csrc/autograd/autograd.h>

#include <memory>

using at::Tensor;
using rlhf::guarded;
using rlhf::list;

extern "C" {

// One AdamW step for tensors of one device and kind; `steps` are one-element f32 tensors, raised by one here.
char* rlhf_fused_adamw(Tensor* const* params, Tensor* const* grads, Tensor* const* exp_avgs,
                       Tensor* const* exp_avg_sqs, Tensor* const* steps, size_t count, double lr,
                       double beta1, double beta2, double weight_decay, double eps) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    auto counters = list(steps, count);
    at::_foreach_add_(counters, 1);
    try {
      at::_fused_adamw_(list(params, count), list(grads, count), list(exp_avgs, count),
                        list(exp_avg_sqs, count), /*max_exp_avg_sqs=*/{}, counters, lr, beta1,
                        beta2, weight_decay, eps, /*amsgrad=*/false, /*maximize=*/false);
    } catch (...) {
      at::_foreach_add_(counters, -1);
      throw;
    }
  });
}

// targets[i].copy_(sources[i]), rounding to the target's kind.
char* rlhf_copy_all(Tensor* const* targets, Tensor* const* sources, size_t count) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    at::_foreach_copy_(list(targets, count), list(sources, count));
  });
}

// The norm of all tensors as one vector, a f32 scalar on the first tensor's device.
char* rlhf_norm(Tensor* const* tensors, size_t count, double order, Tensor** result) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    auto norms = at::_foreach_norm(list(tensors, count), order, at::kFloat);
    for (auto& norm : norms) {
      norm = norm.to(norms.front().device());
    }
    *result = new Tensor(at::linalg_vector_norm(at::stack(norms), order));
  });
}

// tensors[i] *= factor
char* rlhf_scale_all(Tensor* const* tensors, size_t count, double factor) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    at::_foreach_mul_(list(tensors, count), factor);
  });
}

// A null `grad` clears.
char* rlhf_set_grad(Tensor* param, Tensor* grad) {
  return guarded([&] { param->mutable_grad() = grad ? *grad : Tensor(); });
}

char* rlhf_clear_grads(Tensor* const* params, size_t count) {
  return guarded([&] {
    for (size_t i = 0; i < count; i++) {
      params[i]->mutable_grad() = Tensor();
    }
  });
}

// Accumulates into the leaves' gradients.
char* rlhf_backward(Tensor* const* outputs, Tensor* const* grad_outputs, size_t count) {
  return guarded(
      [&] { torch::autograd::backward(list(outputs, count), list(grad_outputs, count)); });
}

// A contiguous CPU tensor over `data`. Takes `owner` in every case, failure included, and passes it to
// `drop` exactly once, when the last view of the storage is gone.
char* rlhf_from_owner(void* data, const int64_t* shape, size_t dims, int kind, void* owner,
                      void (*drop)(void*), Tensor** result) {
  return guarded([&] {
    std::shared_ptr<void> held(owner, drop);
    auto options =
        at::TensorOptions().dtype(static_cast<at::ScalarType>(kind)).device(at::kCPU);
    *result = new Tensor(at::from_blob(
        data, at::IntArrayRef(shape, dims), [held](void*) {}, options, at::Device(at::kCPU)));
  });
}

}  // extern "C"
