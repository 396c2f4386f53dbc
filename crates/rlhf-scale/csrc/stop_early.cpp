// Checkpoints whose recomputation stops as soon as it has what backward needs. The graph of forward stays, with a
// number in place of every tensor that it saved; backward, when it asks for the first of them, computes them
// again. What the closure does after the last of them, a matrix product as a rule, is not done a second time.
#include "closures.h"

#include <deque>
#include <typeinfo>
#include <unordered_map>

using namespace rlhf;
using torch::autograd::SavedVariableHooks;

namespace {

thread_local std::vector<SavedTensorSource*> sources;

// libtorch asks its engine what to do with a tensor that a node saves; this one asks this thread's innermost
// checkpoint.
class WatchingEngine : public Engine {
 public:
  std::unique_ptr<SavedVariableHooks> get_default_saved_variable_hooks() override {
    return sources.empty() || !sources.back() ? nullptr : sources.back()->hooks();
  }
};

// Never destroyed: threads may outlive statics.
Engine& watching_engine() {
  static auto* engine = new WatchingEngine();
  return *engine;
}

// Whether saved tensors are watched. Where libtorch's own engine is not in use (Python has another), it stays.
bool watch() {
  static std::mutex mutex;
  std::lock_guard<std::mutex> lock(mutex);
  auto& engine = Engine::get_default_engine();
  if (typeid(engine) == typeid(Engine)) {
    torch::autograd::set_default_engine_stub(watching_engine);
  }
  return &Engine::get_default_engine() == &watching_engine();
}

// Leaves a closure from inside an operation. The text is for those who see it: a closure that panics on errors.
struct Stop : public std::exception {
  const char* what() const noexcept override {
    return "the recomputation of a checkpoint has all that it needs and stops here; a closure that returns "
           "libtorch's errors (f_ methods) stops in silence";
  }
};

using InputNumbers = std::unordered_map<Edge, size_t, EdgeHash>;

// What a saved tensor is and where it comes from: the same in forward and in backward if the closure is.
class Description {
 public:
  Description(const Tensor& tensor, const TapePosition& start, const InputNumbers& inputs)
      : kind_(tensor.scalar_type()), device_(tensor.device()), sizes_(tensor.sizes().vec()) {
    origin_.push_back(at::sequence_number::peek() - start.sequence_number);
    if (!tensor.requires_grad()) {
      return;
    }
    auto edge = impl::gradient_edge(tensor);
    if (place(edge, start, inputs)) {
      origin_.push_back(typeid(*edge.function).hash_code());
      for (const auto& next : edge.function->next_edges()) {
        if (next.is_valid()) {
          place(next, start, inputs);
        }
      }
    }
  }

  bool operator==(const Description& other) const {
    return kind_ == other.kind_ && device_ == other.device_ && sizes_ == other.sizes_ &&
           origin_ == other.origin_;
  }

 private:
  // Adds the number of an input, the address of what is outside the checkpoint, or the position of what is in
  // it. True for the last.
  bool place(const Edge& edge, const TapePosition& start, const InputNumbers& inputs) {
    auto input = inputs.find(edge);
    auto* node = edge.function.get();
    bool inside = input == inputs.end() && !dynamic_cast<AccumulateGrad*>(node) && start.is_before(*node);
    if (input != inputs.end()) {
      origin_.insert(origin_.end(), {0, input->second});
    } else if (inside) {
      origin_.insert(origin_.end(), {1, node->sequence_nr() - start.sequence_number, edge.input_nr});
    } else {
      origin_.insert(origin_.end(), {2, reinterpret_cast<uintptr_t>(node), edge.input_nr});
    }
    return inside;
  }

  at::ScalarType kind_;
  at::Device device_;
  std::vector<int64_t> sizes_;
  std::vector<uint64_t> origin_;
};

// A tensor that the graph of forward saved.
struct Slot {
  explicit Slot(Description what) : description(std::move(what)) {}

  Description description;
  // Until the graph lets go of it.
  std::atomic<bool> wanted{true};
  Tensor tensor;
  uint32_t version = 0;
};

// A checkpoint: what its closure needs to run again, and the tensors that its graph saved.
class StoppingCheckpoint : public std::enable_shared_from_this<StoppingCheckpoint> {
 public:
  StoppingCheckpoint(const variable_list& inputs, bool preserve_rng, bool offload) {
    for (size_t i = 0; i < inputs.size(); i++) {
      inputs_.emplace_back(inputs[i], offload);
      if (inputs[i].requires_grad()) {
        auto edge = impl::gradient_edge(inputs[i]);
        input_numbers_.push_back(input_edges_.emplace(edge, i).first->second);
      } else {
        input_numbers_.push_back(i);
      }
    }
    if (preserve_rng) {
      random_state_.emplace(inputs);
    }
  }

  size_t note(const Tensor& tensor, const TapePosition& start) {
    slots_.emplace_back(Description(tensor, start, input_edges_));
    return slots_.size() - 1;
  }

  void release(size_t index) noexcept { slots_[index].wanted = false; }

  // Forward is over.
  void finish(const variable_list& outputs, const TapePosition& start, Closure&& closure) {
    EdgeSet inputs;
    for (const auto& [edge, number] : input_edges_) {
      inputs.insert(edge);
    }
    for (auto& edge : captured_edges(outputs, start, inputs)) {
      if (dynamic_cast<AccumulateGrad*>(edge.function.get())) {
        captured_versions_.push_back(leaf_version(edge));
        captured_.push_back(std::move(edge));
      }
    }
    output_count_ = outputs.size();
    closure_.emplace(std::move(closure));
  }

  Tensor take(size_t index) {
    std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(closure_, "backward through a checkpoint that is not complete: its closure must not run ",
                "backward itself");
    TORCH_CHECK(!GradMode::is_enabled(), "a checkpoint has no second derivative");
    auto& slot = slots_[index];
    if (!slot.tensor.defined()) {
      try {
        recompute();
      } catch (...) {
        for (auto& each : slots_) {
          each.tensor.reset();
        }
        throw;
      }
    }
    TORCH_CHECK(slot.tensor._version() == slot.version, "a tensor that backward needs was modified by an ",
                "inplace operation in the checkpointed closure");
    return std::move(slot.tensor);
  }

 private:
  class Refill;

  void recompute();

  std::mutex mutex_;
  std::optional<Closure> closure_;
  size_t output_count_ = 0;
  std::vector<KeptInput> inputs_;
  InputNumbers input_edges_;
  // Of each input; one that is given twice has one number.
  std::vector<size_t> input_numbers_;
  edge_list captured_;
  std::vector<uint32_t> captured_versions_;
  at::ThreadLocalState thread_state_;
  std::optional<RandomState> random_state_;
  std::deque<Slot> slots_;
};

// Forward: a number for every tensor that is saved.
class Recorder : public SavedTensorSource {
 public:
  explicit Recorder(std::shared_ptr<StoppingCheckpoint> of) : checkpoint(std::move(of)) {}

  std::unique_ptr<SavedVariableHooks> hooks() override {
    return std::make_unique<Number>(checkpoint, start);
  }

  const std::shared_ptr<StoppingCheckpoint> checkpoint;
  const TapePosition start;

 private:
  class Number : public SavedVariableHooks {
   public:
    Number(std::shared_ptr<StoppingCheckpoint> checkpoint, const TapePosition& start)
        : checkpoint_(std::move(checkpoint)), start_(start) {}
    ~Number() override {
      if (index_) {
        checkpoint_->release(*index_);
      }
    }
    void call_pack_hook(const Tensor& tensor) override { index_ = checkpoint_->note(tensor, start_); }
    Tensor call_unpack_hook() override {
      TORCH_CHECK(index_, "a saved tensor without a number");
      return checkpoint_->take(*index_);
    }

   private:
    std::shared_ptr<StoppingCheckpoint> checkpoint_;
    TapePosition start_;
    std::optional<size_t> index_;
  };
};

// Backward: the tensors of the slots in the order of forward, until no later one is wanted.
class StoppingCheckpoint::Refill : public SavedTensorSource {
 public:
  Refill(std::deque<Slot>& slots, const InputNumbers& inputs) : slots_(slots), inputs_(inputs) {
    for (size_t i = 0; i < slots.size(); i++) {
      if (slots[i].wanted && !slots[i].tensor.defined()) {
        end_ = i + 1;
      }
    }
  }

  bool is_done() const { return next_ >= end_; }
  // Whether a saved tensor was not that of forward.
  bool differs() const { return differs_; }

  std::unique_ptr<SavedVariableHooks> hooks() override { return std::make_unique<Value>(*this); }

 private:
  // Of the graph that recomputation builds and drops.
  class Value : public SavedVariableHooks {
   public:
    explicit Value(Refill& refill) : refill_(&refill) {}
    void call_pack_hook(const Tensor& tensor) override { refill_->accept(tensor); }
    Tensor call_unpack_hook() override {
      TORCH_CHECK(false, "a checkpointed closure must not run backward itself");
    }

   private:
    Refill* refill_;
  };

  void accept(const Tensor& tensor) {
    if (differs_ || is_done()) {
      throw Stop();
    }
    auto& slot = slots_[next_];
    if (!(Description(tensor, start_, inputs_) == slot.description)) {
      differs_ = true;
      throw Stop();
    }
    if (slot.wanted && !slot.tensor.defined()) {
      slot.tensor = tensor.detach();
      slot.version = slot.tensor._version();
    }
    next_++;
    if (is_done()) {
      throw Stop();
    }
  }

  std::deque<Slot>& slots_;
  const InputNumbers& inputs_;
  const TapePosition start_;
  size_t next_ = 0;
  size_t end_ = 0;
  bool differs_ = false;
};

void StoppingCheckpoint::recompute() {
  for (size_t i = 0; i < captured_.size(); i++) {
    TORCH_CHECK(leaf_version(captured_[i]) == captured_versions_[i],
                "a parameter that a checkpointed closure uses was changed in place between forward and ",
                "backward");
  }
  variable_list leaves;
  // The closure may have captured what is an input, too.
  InputNumbers inputs = input_edges_;
  for (size_t i = 0; i < inputs_.size(); i++) {
    leaves.push_back(inputs_[i].leaf());
    if (leaves.back().requires_grad()) {
      inputs.emplace(impl::gradient_edge(leaves.back()), input_numbers_[i]);
    }
  }
  at::ThreadLocalStateGuard state(thread_state_);
  at::AutoGradMode with_grad(true);
  std::optional<RandomGuard> random;
  if (random_state_) {
    random.emplace(leaves);
    random_state_->restore();
  }
  Refill refill(slots_, inputs);
  try {
    SourceScope scope(&refill);
    (*closure_)(leaves, {}, output_count_);
  } catch (...) {
    // The closure reports that it was stopped as it reports any error, or panics.
    if (!refill.is_done() && !refill.differs()) {
      throw;
    }
  }
  TORCH_CHECK(refill.is_done() && !refill.differs(),
              "the checkpointed closure built another graph in backward than in forward: it must do the same ",
              "each time, with the tensors it captured, on the thread that calls it");
}

// A checkpoint whose closure is running in forward.
struct StoppingFrame {
  explicit StoppingFrame(std::shared_ptr<StoppingCheckpoint> checkpoint)
      : recorder(std::move(checkpoint)), scope(std::in_place, &recorder) {}

  Recorder recorder;
  std::optional<SourceScope> scope;
};

}  // namespace

namespace rlhf {

SourceScope::SourceScope(SavedTensorSource* source) { sources.push_back(source); }

SourceScope::~SourceScope() { sources.pop_back(); }

}  // namespace rlhf

extern "C" {

// Begins a checkpoint whose closure computes with the inputs themselves. `*frame` is null where saved tensors
// cannot be watched.
char* rlhf_stopping_begin(Tensor* const* inputs, size_t count, bool preserve_rng, bool offload, void** frame) {
  return guarded([&] {
    *frame = nullptr;
    if (watch()) {
      auto checkpoint = std::make_shared<StoppingCheckpoint>(list(inputs, count), preserve_rng, offload);
      *frame = new StoppingFrame(std::move(checkpoint));
    }
  });
}

void rlhf_stopping_abort(void* frame) { delete static_cast<StoppingFrame*>(frame); }

// Takes frame and closure in every case, failure included.
char* rlhf_stopping_end(void* frame, Tensor* const* outputs, size_t output_count, void* closure, rlhf_call call,
                        rlhf_drop drop) {
  std::unique_ptr<StoppingFrame> begun(static_cast<StoppingFrame*>(frame));
  Closure owned(closure, call, drop);
  begun->scope.reset();
  return guarded([&] {
    auto& recorder = begun->recorder;
    recorder.checkpoint->finish(list(outputs, output_count), recorder.start, std::move(owned));
  });
}

}  // extern "C"
