// Counts the bytes of the tensors that a piece of code makes, as libtorch's allocators report them to a profiler.
#include "guard.h"

#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <unordered_map>

namespace {

class Meter : public c10::MemoryReportingInfoBase {
 public:
  explicit Meter(std::shared_ptr<Meter> outer) : outer_(std::move(outer)) {}

  void reportMemoryUsage(void* block, int64_t change, size_t, size_t, c10::Device) override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (change > 0) {
        blocks_[block] = change;
        live_ += change;
        peak_ = std::max(peak_, live_);
      } else if (auto known = blocks_.find(block); known != blocks_.end()) {
        live_ -= known->second;
        blocks_.erase(known);
      }
    }
    // libtorch reports to the innermost meter only.
    if (outer_) {
      outer_->reportMemoryUsage(block, change, 0, 0, c10::Device(c10::kCPU));
    }
  }

  bool memoryProfilingEnabled() const override { return true; }

  void read(uint64_t* peak, uint64_t* live) {
    std::lock_guard<std::mutex> lock(mutex_);
    *peak = static_cast<uint64_t>(peak_);
    *live = static_cast<uint64_t>(live_);
  }

 private:
  std::mutex mutex_;
  // Only what was allocated since the meter began; what was there before is not its business.
  std::unordered_map<void*, int64_t> blocks_;
  int64_t live_ = 0;
  int64_t peak_ = 0;
  std::shared_ptr<Meter> outer_;
};

thread_local std::shared_ptr<Meter> innermost;

// A meter that this thread's allocations are reported to for as long as this lives.
struct Measurement {
  std::shared_ptr<Meter> meter = std::make_shared<Meter>(innermost);
  std::shared_ptr<Meter> before = innermost;
  c10::DebugInfoGuard guard{c10::DebugInfoKind::PROFILER_STATE, meter};

  Measurement() { innermost = meter; }
  ~Measurement() { innermost = before; }
};

}  // namespace

extern "C" {

char* rlhf_meter_begin(void** measurement) {
  return rlhf::guarded([&] { *measurement = new Measurement(); });
}

// On the thread that began it, the last one first.
void rlhf_meter_read(void* measurement, uint64_t* peak, uint64_t* live) {
  static_cast<Measurement*>(measurement)->meter->read(peak, live);
}

void rlhf_meter_end(void* measurement) { delete static_cast<Measurement*>(measurement); }

}  // extern "C"
