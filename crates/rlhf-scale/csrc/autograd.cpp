// Nodes of the autograd graph whose work is done by Rust closures: functions with a backward of their own,
// and checkpoints, which compute their outputs again when the gradient comes.
#include "closures.h"

#include <torch/csrc/autograd/functions/utils.h>

using namespace rlhf;

namespace {

// Up to libtorch 2.12 a shared_ptr holds a node, from 2.13 on an intrusive_ptr.
#if __has_include(<torch/csrc/autograd/node.h>)
template <class T>
c10::intrusive_ptr<T> make_node() {
  return c10::make_intrusive<T>();
}
#else
template <class T>
std::shared_ptr<T> make_node() {
  return std::shared_ptr<T>(new T(), torch::autograd::deleteNode);
}
#endif

// `tensor` as an output of `node`; a tensor that has no gradient (an integer one, say) only gets a place.
template <class NodePointer>
Tensor attach(const Tensor& tensor, const NodePointer& node, bool differentiable) {
  auto output = tensor.detach();
  if (differentiable) {
    torch::autograd::set_history(output, node);
  } else {
    node->add_input_metadata(Node::undefined_input());
  }
  return output;
}

Edge gradient_edge(const Tensor& tensor) {
  return tensor.requires_grad() ? impl::gradient_edge(tensor) : Edge();
}

// ---- a function with a backward of its own

struct FunctionBackward : public Node {
  std::optional<Closure> closure;
  size_t input_count = 0;

  std::string name() const override { return "RustFunctionBackward"; }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(closure, "backward through a custom function for the second time: what it saved is gone");
    TORCH_CHECK(!GradMode::is_enabled(), "a custom function has no second derivative");
    std::vector<bool> needed;
    for (size_t i = 0; i < input_count; i++) {
      needed.push_back(next_edge(i).is_valid() && task_should_compute_output(i));
    }
    auto result = (*closure)(grads, needed, input_count);
    for (size_t i = 0; i < input_count; i++) {
      if (!needed[i]) {
        result[i] = Tensor();
      }
    }
    return result;
  }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    closure.reset();
  }
};
// ---- checkpoints

struct CheckpointBackward : public Node {
  std::optional<Closure> closure;
  std::vector<KeptInput> inputs;
  size_t output_count = 0;
  at::ThreadLocalState thread_state;
  std::optional<RandomState> random_state;
  // The edges of this node: first those of the inputs that require gradients, then the captured ones.
  size_t input_edges = 0;
  std::vector<uint32_t> captured_versions;

  std::string name() const override { return "RustCheckpointBackward"; }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(closure, "backward through a checkpoint for the second time: what it saved is gone");
    TORCH_CHECK(!GradMode::is_enabled(), "a checkpoint has no second derivative");
    check_captured_versions();
    variable_list leaves;
    EdgeSet leaf_edges;
    edge_list targets;
    std::vector<size_t> target_slots;
    for (const auto& input : inputs) {
      leaves.push_back(input.leaf());
      if (input.requires_grad()) {
        auto edge = impl::gradient_edge(leaves.back());
        if (task_should_compute_output(leaf_edges.size())) {
          target_slots.push_back(leaf_edges.size());
          targets.push_back(edge);
        }
        leaf_edges.insert(edge);
      }
    }
    for (size_t i = input_edges; i < num_outputs(); i++) {
      if (task_should_compute_output(i)) {
        target_slots.push_back(i);
        targets.push_back(next_edge(i));
      }
    }
    variable_list result(num_outputs());
    if (targets.empty()) {
      return result;
    }
    edge_list roots;
    variable_list root_grads;
    {
      auto outputs = recompute(leaves, leaf_edges);
      for (size_t i = 0; i < output_count; i++) {
        if (i < grads.size() && grads[i].defined()) {
          check_output(i, outputs[i], grads[i]);
          roots.push_back(impl::gradient_edge(outputs[i]));
          root_grads.push_back(std::move(grads[i]));
        }
      }
    }
    if (roots.empty()) {
      return result;
    }
    auto computed = Engine::get_default_engine().execute(
        roots, root_grads, /*keep_graph=*/false, /*create_graph=*/false, /*accumulate_grad=*/false, targets);
    for (size_t i = 0; i < target_slots.size(); i++) {
      result[target_slots[i]] = std::move(computed[i]);
    }
    return result;
  }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    closure.reset();
    inputs.clear();
    random_state.reset();
  }

 private:
  variable_list recompute(const variable_list& leaves, const EdgeSet& leaf_edges) {
    at::ThreadLocalStateGuard state(thread_state);
    at::AutoGradMode with_grad(true);
    std::optional<RandomGuard> random;
    if (random_state) {
      random.emplace(leaves);
      random_state->restore();
    }
    TapePosition start;
    auto outputs = (*closure)(leaves, {}, output_count);
    auto captured = captured_edges(outputs, start, leaf_edges);
    bool same = captured.size() == num_outputs() - input_edges;
    for (size_t i = 0; same && i < captured.size(); i++) {
      same = captured[i] == next_edge(input_edges + i);
    }
    TORCH_CHECK(same, "the checkpointed closure built another graph in backward than in forward: it must ",
                "do the same each time, with the tensors it captured, on the thread that calls it");
    return outputs;
  }

  void check_captured_versions() const {
    for (size_t i = 0; i < captured_versions.size(); i++) {
      TORCH_CHECK(leaf_version(next_edge(input_edges + i)) == captured_versions[i],
                  "a parameter that a checkpointed closure uses was changed in place between forward and ",
                  "backward");
    }
  }

  static void check_output(size_t index, const Tensor& output, const Tensor& grad) {
    TORCH_CHECK(output.defined() && output.requires_grad() && output.sizes() == grad.sizes(), "output ", index,
                " of a checkpointed closure is not the tensor that it was in forward: its gradient is ",
                grad.sizes());
  }
};

// What a checkpoint notes before its closure runs.
// What a checkpoint notes before its closure runs.
struct CheckpointFrame {
  TapePosition start;
  at::ThreadLocalState thread_state;
  std::optional<RandomState> random_state;
  // What the closure saves in forward is dropped with its graph: of no interest to a checkpoint around this one.
  std::optional<SourceScope> unwatched;
};

}  // namespace

extern "C" {

bool rlhf_grad_enabled() { return GradMode::is_enabled(); }

// `outputs` were computed without gradients from `inputs`. Each is replaced by one whose gradient goes to
// `call`, which gets the outputs' gradients, whether each input needs one, and returns the inputs' gradients.
// Takes the closure in every case, failure included.
char* rlhf_attach_backward(Tensor* const* inputs, size_t input_count, Tensor** outputs, size_t output_count,
                           void* closure, rlhf_call call, rlhf_drop drop) {
  Closure owned(closure, call, drop);
  return guarded([&] {
    auto node = make_node<FunctionBackward>();
    edge_list edges;
    for (size_t i = 0; i < input_count; i++) {
      edges.push_back(gradient_edge(*inputs[i]));
    }
    node->set_next_edges(std::move(edges));
    node->closure.emplace(std::move(owned));
    node->input_count = input_count;
    for (size_t i = 0; i < output_count; i++) {
      bool differentiable = torch::autograd::isDifferentiableType(outputs[i]->scalar_type());
      *outputs[i] = attach(*outputs[i], node, differentiable);
    }
  });
}

// Begins a checkpoint: `leaves` are what the closure is to compute with, in place of `inputs`.
char* rlhf_checkpoint_begin(Tensor* const* inputs, size_t count, bool preserve_rng, Tensor** leaves,
                            void** frame) {
  return guarded([&] {
    auto tensors = list(inputs, count);
    variable_list detached;
    for (const auto& tensor : tensors) {
      auto leaf = tensor.detach();
      if (tensor.requires_grad()) {
        leaf.set_requires_grad(true);
      }
      detached.push_back(leaf);
    }
    auto begun = std::make_unique<CheckpointFrame>();
    if (preserve_rng) {
      begun->random_state.emplace(tensors);
    }
    for (size_t i = 0; i < count; i++) {
      leaves[i] = new Tensor(detached[i]);
    }
    begun->unwatched.emplace(nullptr);
    *frame = begun.release();
  });
}

void rlhf_checkpoint_abort(void* frame) { delete static_cast<CheckpointFrame*>(frame); }

// Ends a checkpoint: replaces `outputs`, which the closure computed from `leaves`, by ones that hang on a
// checkpoint and keep nothing but the inputs. Takes frame and closure in every case, failure included.
char* rlhf_checkpoint_end(void* frame, Tensor* const* inputs, Tensor* const* leaves, size_t input_count,
                          Tensor** outputs, size_t output_count, bool offload, void* closure, rlhf_call call,
                          rlhf_drop drop) {
  std::unique_ptr<CheckpointFrame> begun(static_cast<CheckpointFrame*>(frame));
  Closure owned(closure, call, drop);
  begun->unwatched.reset();
  return guarded([&] {
    auto node = make_node<CheckpointBackward>();
    edge_list edges;
    EdgeSet leaf_edges;
    for (size_t i = 0; i < input_count; i++) {
      node->inputs.emplace_back(*inputs[i], offload);
      if (inputs[i]->requires_grad()) {
        edges.push_back(impl::gradient_edge(*inputs[i]));
        leaf_edges.insert(impl::gradient_edge(*leaves[i]));
      }
    }
    node->input_edges = edges.size();
    for (auto& edge : captured_edges(list(outputs, output_count), begun->start, leaf_edges)) {
      node->captured_versions.push_back(leaf_version(edge));
      edges.push_back(std::move(edge));
    }
    node->set_next_edges(std::move(edges));
    node->closure.emplace(std::move(owned));
    node->output_count = output_count;
    node->thread_state = begun->thread_state;
    node->random_state = std::move(begun->random_state);
    for (size_t i = 0; i < output_count; i++) {
      *outputs[i] = attach(*outputs[i], node, outputs[i]->requires_grad());
    }
  });
}

// How often the tensor was changed in place.
char* rlhf_version(Tensor* tensor, uint32_t* version) {
  return guarded([&] { *version = tensor->_version(); });
}

}  // extern "C"
