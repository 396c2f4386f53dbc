// What the kernels of decoding have in common.
//
// Their functions return without a result (`*result` stays null) where they do not apply: another device or
// kind, gradients, a processor without AVX2. A row's result depends on that row alone, bit for bit: not on
// how many rows there are, nor on the number of threads.
#pragma once

#include "guard.h"
#include "vectors.h"

#include <atomic>

#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>

#ifdef RLHF_KERNELS
namespace rlhf {

template <class T>
T* data(const at::Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// Elements that a thread is worth its start for, and rows of such a width.
constexpr int64_t kGrain = 32768;
inline int64_t grain(int64_t width) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width)); }

// Whether the kernels of training are wanted, and the products of many rows.
inline std::atomic<bool>& wanted() {
  static std::atomic<bool> flag{true};
  return flag;
}

// Whether this processor and what surrounds the call let kernels run at all.
inline bool able() {
  return wide() && !at::autocast::is_autocast_enabled(at::kCPU) && (at::get_num_threads() <= 1 || team().usable());
}

inline bool all_of_kind(at::ScalarType kind, std::initializer_list<const at::Tensor*> tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [&](const at::Tensor* t) {
    return !t || (t->device().is_cpu() && t->scalar_type() == kind && t->is_contiguous());
  });
}

// Whether all are contiguous f32 or bf16 of the CPU, of one kind, and nobody wants gradients.
inline bool applies(std::initializer_list<const at::Tensor*> tensors) {
  if (!able() || at::GradMode::is_enabled()) return false;
  auto kind = (*tensors.begin())->scalar_type();
  return (kind == at::kFloat || kind == at::kBFloat16) && all_of_kind(kind, tensors);
}

// Whether all are contiguous f32 of the CPU; gradients are recorded.
inline bool trains_f32(std::initializer_list<const at::Tensor*> tensors) {
  return wanted() && able() && at::GradMode::is_enabled() && all_of_kind(at::kFloat, tensors);
}

// `run` with a null pointer of the tensor's kind.
template <class Run>
void by_kind(const at::Tensor& tensor, const Run& run) {
  if (tensor.scalar_type() == at::kFloat) {
    run(static_cast<float*>(nullptr));
  } else {
    run(static_cast<uint16_t*>(nullptr));
  }
}

}  // namespace rlhf
#endif
