// What the nodes of training.cpp and causal.cpp have in common: operations in f32 and bf16 on the CPU with a
// forward and a backward of their own, each a single pass. They compute in f32 and round results only.
#pragma once

#include "wide.h"

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <memory>
#include <vector>

#ifdef RLHF_KERNELS
namespace rlhf {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// Up to libtorch 2.12 a shared_ptr holds a node, from 2.13 on an intrusive_ptr.
#if __has_include(<torch/csrc/autograd/node.h>)
template <class T>
c10::intrusive_ptr<T> recorded_node() {
  return c10::make_intrusive<T>();
}
#else
template <class T>
std::shared_ptr<T> recorded_node() {
  return std::shared_ptr<T>(new T(), torch::autograd::deleteNode);
}
#endif

// A node with saved tensors, which those who watch what is saved (checkpoints) see as they see libtorch's own.
struct RecordedNode : public torch::autograd::Node {
  std::vector<SavedVariable> saved;

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!at::GradMode::is_enabled(), name(), " has no second derivative");
    variable_list tensors;
    for (auto& variable : saved) tensors.push_back(variable.unpack());
    return backward(tensors, grads);
  }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& variable : saved) variable.reset_data();
  }

  virtual variable_list backward(const variable_list& tensors, const variable_list& grads) = 0;
};

// Whether the result of an operation on these is recorded.
inline bool is_recorded(std::initializer_list<const at::Tensor*> inputs) {
  return at::GradMode::is_enabled() &&
         std::any_of(inputs.begin(), inputs.end(), [](const at::Tensor* t) { return t->requires_grad(); });
}

// Edges from a node to what it was computed from.
inline torch::autograd::edge_list edges_of(std::initializer_list<const at::Tensor*> inputs) {
  torch::autograd::edge_list edges;
  for (auto* input : inputs) {
    edges.push_back(input->requires_grad() ? torch::autograd::impl::gradient_edge(*input) : torch::autograd::Edge());
  }
  return edges;
}

// Whether all are f32, or all bf16, of the CPU, outside autocast, on a processor that has the kernels, which are wanted.
inline bool trains(std::initializer_list<const at::Tensor*> tensors) {
  auto kind = (*tensors.begin())->scalar_type();
  if (!(kind == at::kBFloat16 || (kind == at::kFloat && wanted())) || !able()) return false;
  return std::all_of(tensors.begin(), tensors.end(), [&](const at::Tensor* t) {
    return t->device().is_cpu() && t->scalar_type() == kind && t->layout() == at::kStrided;
  });
}

}  // namespace rlhf
#endif
