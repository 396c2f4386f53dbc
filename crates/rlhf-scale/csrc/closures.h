// What the nodes of autograd.cpp and the checkpoints of stop_early.cpp have in common: Rust closures, and the
// state that computing something again needs.
#pragma once
#include "guard.h"

#include <ATen/Context.h>
#include <ATen/SequenceNumber.h>
#include <ATen/ThreadLocalState.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/saved_variable_hooks.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_set>

extern "C" {

// Reads `inputs` (null: undefined), writes `outputs` (owned by the caller; null: undefined). `needed` is NULL or
// has a flag for each output. Returns NULL or a message made by malloc. Does not unwind.
typedef char* (*rlhf_call)(void* closure, at::Tensor* const* inputs, size_t input_count, const bool* needed,
                           at::Tensor** outputs, size_t output_count);
typedef void (*rlhf_drop)(void* closure);

}

namespace rlhf {

using at::Tensor;
using torch::autograd::AccumulateGrad;
using torch::autograd::Edge;
using torch::autograd::edge_list;
using torch::autograd::Engine;
using torch::autograd::GradMode;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
namespace impl = torch::autograd::impl;

// A Rust closure, dropped with this object.
class Closure {
 public:
  Closure(void* closure, rlhf_call call, rlhf_drop drop) : closure_(closure, drop), call_(call) {}

  variable_list operator()(const variable_list& inputs, const std::vector<bool>& needed,
                           size_t output_count) const {
    std::vector<Tensor*> in;
    in.reserve(inputs.size());
    for (const auto& input : inputs) {
      in.push_back(input.defined() ? const_cast<Tensor*>(&input) : nullptr);
    }
    std::unique_ptr<bool[]> flags(needed.empty() ? nullptr : new bool[needed.size()]);
    std::copy(needed.begin(), needed.end(), flags.get());
    std::vector<Tensor*> out(output_count, nullptr);
    char* message = call_(closure_.get(), in.data(), in.size(), flags.get(), out.data(), output_count);
    variable_list outputs(output_count);
    for (size_t i = 0; i < output_count; i++) {
      std::unique_ptr<Tensor> owned(out[i]);
      if (owned) {
        outputs[i] = *owned;
      }
    }
    if (message) {
      std::string text(message);
      free(message);
      TORCH_CHECK(false, text);
    }
    return outputs;
  }

 private:
  std::unique_ptr<void, rlhf_drop> closure_;
  rlhf_call call_;
};

inline Tensor generator_state(const at::Device& device) {
  auto generator = at::globalContext().defaultGenerator(device);
  std::lock_guard<std::mutex> lock(generator.mutex());
  return generator.get_state();
}

inline void set_generator_state(const at::Device& device, const Tensor& state) {
  auto generator = at::globalContext().defaultGenerator(device);
  std::lock_guard<std::mutex> lock(generator.mutex());
  generator.set_state(state);
}

// States of libtorch's global generators: the CPU's, and those of the given tensors' CUDA devices.
class RandomState {
 public:
  explicit RandomState(const variable_list& tensors) {
    devices_.emplace_back(at::kCPU);
    for (const auto& tensor : tensors) {
      if (tensor.is_cuda() &&
          std::find(devices_.begin(), devices_.end(), tensor.device()) == devices_.end()) {
        devices_.push_back(tensor.device());
      }
    }
    for (const auto& device : devices_) {
      states_.push_back(generator_state(device));
    }
  }

  void restore() const {
    for (size_t i = 0; i < devices_.size(); i++) {
      set_generator_state(devices_[i], states_[i]);
    }
  }

 private:
  std::vector<at::Device> devices_;
  variable_list states_;
};

// Puts the generators back where they were when this object was made.
class RandomGuard {
 public:
  explicit RandomGuard(const variable_list& tensors) : before_(tensors) {}
  ~RandomGuard() {
    try {
      before_.restore();
    } catch (...) {  // a state that was read can be written; a destructor must not throw in any case
    }
  }

 private:
  RandomState before_;
};

struct EdgeHash {
  size_t operator()(const Edge& edge) const {
    return std::hash<const void*>()(edge.function.get()) * 31 + edge.input_nr;
  }
};
using EdgeSet = std::unordered_set<Edge, EdgeHash>;

// Where on this thread's tape a sub-graph begins.
struct TapePosition {
  uint64_t sequence_number = at::sequence_number::peek();
  uint64_t thread = at::RecordFunction::currentThreadId();

  bool is_before(const Node& node) const {
    return node.thread_id() == thread && node.sequence_nr() >= sequence_number;
  }
};

// The edges that leave the sub-graph built since `start`, in the order in which a walk from `outputs` meets
// them, those of `inputs` excepted: the leaves and earlier results that a closure has captured.
inline edge_list captured_edges(const variable_list& outputs, const TapePosition& start, const EdgeSet& inputs) {
  edge_list captured;
  EdgeSet met = inputs;
  std::unordered_set<Node*> seen;
  std::vector<Node*> stack;
  auto visit = [&](const Edge& edge) {
    if (!edge.is_valid()) {
      return;
    }
    Node* node = edge.function.get();
    if (dynamic_cast<AccumulateGrad*>(node) || !start.is_before(*node)) {
      if (met.insert(edge).second) {
        captured.push_back(edge);
      }
    } else if (seen.insert(node).second) {
      stack.push_back(node);
    }
  };
  for (const auto& output : outputs) {
    if (output.defined() && output.requires_grad()) {
      visit(impl::gradient_edge(output));
    }
  }
  while (!stack.empty()) {
    Node* node = stack.back();
    stack.pop_back();
    for (const auto& edge : node->next_edges()) {
      visit(edge);
    }
  }
  return captured;
}

// The version of the leaf that an edge leads to: in-place changes raise it. 0 for results of operations,
// whose own nodes guard what they have saved.
inline uint32_t leaf_version(const Edge& edge) {
  auto* leaf = dynamic_cast<AccumulateGrad*>(edge.function.get());
  return leaf ? leaf->variable._version() : 0;
}

// An input kept until backward: as autograd keeps tensors, or as a copy in host memory.
class KeptInput {
 public:
  KeptInput(const Tensor& input, bool offload)
      : requires_grad_(input.requires_grad()), offloaded_(offload && !input.is_cpu()) {
    if (offloaded_) {
      at::NoGradGuard no_grad;
      device_ = input.device();
      host_ = input.detach().to(at::kCPU);
    } else {
      saved_ = SavedVariable(input, /*is_output=*/false);
    }
  }

  bool requires_grad() const { return requires_grad_; }

  // A leaf of its own, so that the graph built on it ends here.
  Tensor leaf() const {
    auto tensor = offloaded_ ? host_.to(device_) : saved_.unpack().detach();
    if (requires_grad_) {
      tensor.set_requires_grad(true);
    }
    return tensor;
  }

 private:
  bool requires_grad_;
  bool offloaded_;
  at::Device device_ = at::kCPU;
  Tensor host_;
  SavedVariable saved_;
};

// The tensors whose saving an early stop watches: those of a checkpoint that runs on this thread.
struct SavedTensorSource {
  virtual std::unique_ptr<torch::autograd::SavedVariableHooks> hooks() = 0;
  virtual ~SavedTensorSource() = default;
};

// Makes `source` the one that is asked when libtorch saves a tensor on this thread; null: libtorch keeps it.
// Scopes end in the reverse order, on the thread where they began.
class SourceScope {
 public:
  explicit SourceScope(SavedTensorSource* source);
  ~SourceScope();
  SourceScope(const SourceScope&) = delete;
  SourceScope& operator=(const SourceScope&) = delete;
};

}  // namespace rlhf
