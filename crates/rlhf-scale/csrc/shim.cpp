// What tch leaves out of libtorch: list operations (copies, norms), writable gradients,
// backward with output gradients, and tensors over memory that Rust owns.
#include "guard.h"
#include "wide.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/stack.h>
#include <torch/csrc/autograd/autograd.h>

#include <memory>

namespace {

// Which of the two bf16 numbers around a value element `i` is rounded to: up from this share of their distance on,
// counted in 1/65536. Mixed from the index, so that the shares of many elements are spread evenly; that of the
// first is a half, as in rounding to the nearest.
inline uint32_t dither(uint32_t i) {
  uint32_t x = i * 0x9e3779b1u;
  x = (x ^ (x >> 15)) * 0x85ebca77u;
  x = x ^ (x >> 13);
  return ((x >> 16) + 0x8000u) & 0xffffu;
}

inline uint16_t dithered(float value, int64_t place) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  bool special = (bits & 0x7f800000u) == 0x7f800000u;
  uint32_t more = special ? ((bits & 0x007fffffu) ? 0x00400000u : 0u) : dither(static_cast<uint32_t>(place));
  return static_cast<uint16_t>((special ? bits | more : bits + more) >> 16);
}

}  // namespace

#define KERNELS "kernels/optimizer.h"
#include "each_target.h"

using at::Tensor;
using rlhf::guarded;
using rlhf::list;

namespace {

// `first` is the place of the first element in its parameter.
void round(const float* from, uint16_t* to, int64_t first, int64_t count) {
#ifdef RLHF_KERNELS
  if (rlhf::wide()) {
    rlhf::split(count, 65536, [&](int64_t begin, int64_t end) { ON_PROCESSOR(round(from, to, first, begin, end)); });
    return;
  }
#endif
  for (int64_t i = 0; i < count; i++) to[i] = dithered(from[i], first + i);
}

bool rounds(const Tensor& target, const Tensor& source) {
  return target.scalar_type() == at::kBFloat16 && source.scalar_type() == at::kFloat && target.device().is_cpu() &&
         source.device().is_cpu() && target.sizes() == source.sizes() && target.strides() == source.strides() &&
         target.is_non_overlapping_and_dense();
}

}  // namespace

#ifdef RLHF_KERNELS
namespace {

using namespace rlhf;

constexpr int64_t kSummed = 16 << 10;  // elements whose squares are summed in f32

// The Euclidean norm of f32 and bf16 tensors, by all threads at once; what it is does not depend on how many they are.
double length_of(const std::vector<Tensor>& tensors) {
  struct Part {
    const Tensor* tensor;
    int64_t from, count;
  };
  std::vector<Part> parts;
  for (auto& tensor : tensors) {
    for (int64_t i = 0; i < tensor.numel(); i += kSummed) {
      parts.push_back({&tensor, i, std::min(kSummed, tensor.numel() - i)});
    }
  }
  std::vector<float> sums(parts.size());
  split(parts.size(), 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const Part& part = parts[i];
      by_kind(*part.tensor, [&](auto* kind) {
        using T = std::remove_pointer_t<decltype(kind)>;
        sums[i] = ON_PROCESSOR(squares(data<T>(*part.tensor) + part.from, part.count));
      });
    }
  });
  double total = 0;
  for (float sum : sums) total += sum;
  return std::sqrt(total);
}

}  // namespace
#endif

extern "C" {

// targets[i].copy_(sources[i]), rounding to the target's kind.
char* rlhf_copy_all(Tensor* const* targets, Tensor* const* sources, size_t count) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    at::_foreach_copy_(list(targets, count), list(sources, count));
  });
}

// Makes 16-bit parameters from their masters. On the CPU a bf16 one is rounded up or down by a share that is each
// element's own, and the same at every step. `places[i]` is where targets[i] begins in its parameter.
char* rlhf_round_all(Tensor* const* targets, Tensor* const* sources, const int64_t* places, size_t count) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    std::vector<Tensor> other_targets, other_sources;
    for (size_t i = 0; i < count; i++) {
      if (rounds(*targets[i], *sources[i])) {
        // As any change in place does: a saved tensor that changed is noticed in backward.
        targets[i]->unsafeGetTensorImpl()->bump_version();
        round(static_cast<const float*>(sources[i]->data_ptr()), static_cast<uint16_t*>(targets[i]->data_ptr()),
              places[i], targets[i]->numel());
      } else {
        other_targets.push_back(*targets[i]);
        other_sources.push_back(*sources[i]);
      }
    }
    if (!other_targets.empty()) at::_foreach_copy_(other_targets, other_sources);
  });
}

// The norm of all tensors as one vector, a f32 scalar on the first tensor's device.
char* rlhf_norm(Tensor* const* tensors, size_t count, double order, Tensor** result) {
  return guarded([&] {
    at::NoGradGuard no_grad;
#ifdef RLHF_KERNELS
    auto dense = [](const Tensor* t) {
      return (all_of_kind(at::kFloat, {t}) || all_of_kind(at::kBFloat16, {t})) && t->layout() == at::kStrided;
    };
    if (order == 2 && able() && std::all_of(tensors, tensors + count, dense)) {
      *result = new Tensor(at::scalar_tensor(length_of(list(tensors, count)), at::kFloat));
      return;
    }
#endif
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
