// c10d::Reducer, which sums gradients over processes in buckets while backward goes on. Two things are added: it
// sums (c10d's own default takes means), and parameters that backward did not reach are filled in with zeros, so
// that ranks whose losses use different parameters, or that have no loss at all, end the reduction alike.
#include "guard.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/sum.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/utils/lambda_post_hook.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/distributed/c10d/reducer.hpp>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>

#include "c10d.h"

using at::Tensor;
using rlhf::Group;
using rlhf::guarded;
using rlhf::list;

namespace {

int64_t now() {
  auto since = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(since).count();
}

struct Event {
  int64_t bytes, started, ended;
};

struct Trace {
  std::mutex mutex;
  std::vector<Event> events;

  size_t begin(int64_t bytes) {
    std::lock_guard<std::mutex> lock(mutex);
    events.push_back({bytes, now(), 0});
    return events.size() - 1;
  }

  void end(size_t index) {
    std::lock_guard<std::mutex> lock(mutex);
    if (index < events.size()) {
      events[index].ended = now();
    }
  }
};

class SumHook : public c10d::CommHookInterface {
 public:
  SumHook(c10::intrusive_ptr<c10d::ProcessGroup> group, std::shared_ptr<Trace> trace)
      : group_(std::move(group)), trace_(std::move(trace)) {}

  c10::intrusive_ptr<c10::ivalue::Future> runHook(c10d::GradBucket& bucket) override {
    std::vector<Tensor> tensors{bucket.getBufferRef()};
    auto index = trace_->begin(static_cast<int64_t>(tensors[0].nbytes()));
    auto future = group_->allreduce(tensors)->getFuture();
    future->addCallback([trace = trace_, index](c10::ivalue::Future&) { trace->end(index); });
    return future;
  }

  Tensor parseHookResult(const c10::IValue& result) override {
    return c10d::detail::parseCppCommHookResult(result);
  }

 private:
  c10::intrusive_ptr<c10d::ProcessGroup> group_;
  std::shared_ptr<Trace> trace_;
};

using Flags = std::vector<std::atomic<bool>>;

struct Reducer {
  std::vector<Tensor> params;
  // Which parameters the backward under way has reached.
  std::shared_ptr<Flags> reached;
  std::vector<decltype(torch::autograd::impl::grad_accumulator(std::declval<const Tensor&>()))> accumulators;
  std::vector<uintptr_t> hooks;
  std::shared_ptr<Trace> trace;
  std::unique_ptr<c10d::Reducer> reducer;
  bool armed = false;

  ~Reducer() {
    for (size_t i = 0; i < accumulators.size(); i++) {
      accumulators[i]->del_post_hook(hooks[i]);
    }
  }

  void arm() {
    for (auto& flag : *reached) {
      flag = false;
    }
    {
      std::lock_guard<std::mutex> lock(trace->mutex);
      trace->events.clear();
    }
    reducer->prepare_for_forward();
    reducer->prepare_for_backward({});
    armed = true;
  }
};

}  // namespace

extern "C" {

char* rlhf_reducer_new(Group* group, Tensor* const* params, size_t count, int64_t bucket_bytes, Reducer** result) {
  return guarded([&] {
    auto made = std::make_unique<Reducer>();
    made->params = list(params, count);
    made->trace = std::make_shared<Trace>();
    made->reached = std::make_shared<Flags>(count);
    c10d::verify_params_across_processes(group->group, made->params, std::nullopt);
    std::vector<bool> sparse(count, false);
    // A first bucket of 1 MB starts the traffic early, as in DistributedDataParallel.
    size_t cap = bucket_bytes, first = std::min<size_t>(cap, c10d::kDefaultFirstBucketBytes);
    auto buckets = std::get<0>(c10d::compute_bucket_assignment_by_size(made->params, {first, cap}, sparse));
    std::reverse(buckets.begin(), buckets.end());
    std::unordered_map<size_t, std::string> names;
    made->reducer = std::make_unique<c10d::Reducer>(
        made->params, buckets, group->group, sparse, bucket_bytes, /*find_unused_parameters=*/false,
        /*gradient_as_bucket_view=*/true, names, static_cast<int64_t>(first), /*skip_all_reduce_unused_params=*/false,
        /*use_python_reducer=*/false, std::vector<int64_t>{});
    made->reducer->register_comm_hook(std::make_unique<SumHook>(group->group, made->trace));
    for (size_t i = 0; i < count; i++) {
      auto accumulator = torch::autograd::impl::grad_accumulator(made->params[i]);
      auto note = [reached = made->reached, i](const torch::autograd::variable_list& outputs,
                                               const torch::autograd::variable_list&) {
        (*reached)[i] = true;
        return outputs;
      };
      made->hooks.push_back(
          accumulator->add_post_hook(std::make_unique<torch::autograd::utils::LambdaPostHook>(note)));
      made->accumulators.push_back(std::move(accumulator));
    }
    *result = made.release();
  });
}

void rlhf_reducer_free(Reducer* reducer) noexcept {
  try {
    delete reducer;
  } catch (...) {
  }
}

// The backward that follows reduces. Buckets follow the order in which gradients came in the first one.
char* rlhf_reducer_arm(Reducer* reducer) {
  return guarded([&] {
    reducer->reducer->rebuild_buckets();
    reducer->arm();
  });
}

// Waits for the sums, with zeros for the parameters that no backward has reached.
char* rlhf_reducer_complete(Reducer* reducer) {
  return guarded([&] {
    if (!reducer->armed) {
      reducer->reducer->rebuild_buckets();
      reducer->arm();
    }
    reducer->armed = false;
    at::AutoGradMode with_gradients(true);
    Tensor nothing;
    for (size_t i = 0; i < reducer->params.size(); i++) {
      if (!(*reducer->reached)[i]) {
        auto zero = reducer->params[i].sum() * 0;
        nothing = nothing.defined() ? nothing + zero.to(nothing.dtype()) : zero;
      }
    }
    if (nothing.defined()) {
      torch::autograd::backward({nothing}, {at::ones_like(nothing)});
    }
  });
}

// Bytes, start and end (ns, of one clock) of each bucket of the last reduction; at most `most` of them.
size_t rlhf_reducer_trace(Reducer* reducer, int64_t* numbers, size_t most) noexcept {
  std::lock_guard<std::mutex> lock(reducer->trace->mutex);
  auto& events = reducer->trace->events;
  for (size_t i = 0; i < std::min(most, events.size()); i++) {
    numbers[3 * i] = events[i].bytes;
    numbers[3 * i + 1] = events[i].started;
    numbers[3 * i + 2] = events[i].ended;
  }
  return events.size();
}

int64_t rlhf_reducer_now() noexcept { return now(); }

}  // extern "C"
