// An allocator of libtorch's CPU tensors that keeps the memory of all but small ones for the next.
//
// malloc gives large blocks back to the system when they are freed, and the system clears every page of them
// when they are asked for again: of a training step on the CPU that is a fifth. Blocks of some hundred KiB it
// keeps, and between weights that stay and activations of other sizes at every step its heap is soon half
// holes. Here both are cut from segments that stay, in pages of 2 MiB where the system has such. Small
// tensors are libtorch's own business.
//
// Holes come about here as well. So there is a bound to what is resident: as much as tensors have needed at
// some time, and a little. Where a tensor gets pages beyond it, others that are free go back to the system.
#include "guard.h"

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#ifdef __linux__
#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <set>
#include <vector>

namespace {

constexpr size_t kSmallest = 64 << 10;  // of what is cut from segments
constexpr size_t kUnit = 16 << 10;      // sizes of blocks are multiples of it
constexpr size_t kPage = 2 << 20;       // a huge page
constexpr size_t kSegment = 128 << 20;  // the smallest segment
constexpr size_t kSpare = 32 << 20;     // of free pages, at least so much stays

constexpr size_t up(size_t n, size_t to) { return (n + to - 1) / to * to; }

// Memory in segments, cut into blocks that know their neighbours: freed neighbours become one.
class Segments {
 public:
  // Null where the system has no more.
  void* take(size_t bytes) {
    bytes = up(bytes, kUnit);
    std::lock_guard<std::mutex> lock(mutex_);
    size_t most = std::max(most_, used_ + bytes);
    auto found = free_.lower_bound({bytes, nullptr});
    if (found == free_.end()) {
      // Segments that are wholly unused did not fit. They stay for others while all together are no more than
      // twice what tensors have needed at some time: addresses, most of them without memory behind.
      if (mapped_ + bytes > 2 * most) release_unused();
      if (!grow(std::max(up(bytes, kPage), kSegment)) && !(release_unused(), grow(up(bytes, kPage)))) {
        return nullptr;
      }
      found = free_.lower_bound({bytes, nullptr});
    }
    used_ += bytes;
    most_ = most;
    char* start = found->second;
    free_.erase(found);
    Block& block = blocks_.at(start);
    block.free = false;
    if (block.bytes > bytes) {
      blocks_[start + bytes] = Block{block.bytes - bytes, block.segment, true};
      free_.insert({block.bytes - bytes, start + bytes});
      block.bytes = bytes;
    }
    make_resident(start, block);
    return start;
  }

  bool holds(void* pointer) {
    std::lock_guard<std::mutex> lock(mutex_);
    return blocks_.count(static_cast<char*>(pointer)) > 0;
  }

  void give_back(void* pointer) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto block = blocks_.find(static_cast<char*>(pointer));
    used_ -= block->second.bytes;
    auto next = std::next(block);
    if (next != blocks_.end() && joins(*block, *next)) {
      free_.erase({next->second.bytes, next->first});
      block->second.bytes += next->second.bytes;
      blocks_.erase(next);
    }
    if (block != blocks_.begin() && joins(*std::prev(block), *block)) {
      auto before = std::prev(block);
      free_.erase({before->second.bytes, before->first});
      before->second.bytes += block->second.bytes;
      blocks_.erase(block);
      block = before;
    }
    block->second.free = true;
    free_.insert({block->second.bytes, block->first});
  }

  void release() {
    std::lock_guard<std::mutex> lock(mutex_);
    release_unused();
    give_up_pages(resident_);
    most_ = used_;
  }

 private:
  struct Block {
    size_t bytes;
    char* segment;
    bool free;
  };

  struct Segment {
    size_t bytes;
    std::vector<bool> resident;  // for each page
  };

  // Whether one is free and lies, in the same segment, beside the other, which is being freed.
  static bool joins(const std::pair<char* const, Block>& a, const std::pair<char* const, Block>& b) {
    return a.second.segment == b.second.segment && (a.second.free || b.second.free);
  }

  bool grow(size_t bytes) {
    void* mapped = mmap(nullptr, bytes + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) return false;
    char* first = static_cast<char*>(mapped);
    char* start = reinterpret_cast<char*>(up(reinterpret_cast<size_t>(first), kPage));
    if (start > first) munmap(first, start - first);
    if (size_t after = first + kPage - start) munmap(start + bytes, after);
    // Without huge pages it is memory all the same.
    madvise(start, bytes, MADV_HUGEPAGE);
    blocks_[start] = Block{bytes, start, true};
    free_.insert({bytes, start});
    segments_[start] = Segment{bytes, std::vector<bool>(bytes / kPage)};
    mapped_ += bytes;
    return true;
  }

  // The pages of a block that has been taken are there as soon as it is written to. Where that is more than is
  // to stay, as many others go, of blocks that are free.
  void make_resident(char* start, const Block& block) {
    auto& resident = segments_.at(block.segment).resident;
    size_t first = (start - block.segment) / kPage, end = up(start + block.bytes - block.segment, kPage) / kPage;
    for (size_t page = first; page < end; page++) {
      if (resident[page]) continue;
      resident[page] = true;
      resident_ += kPage;
    }
    size_t limit = most_ + std::max(most_ / 64, kSpare);
    if (resident_ > limit) give_up_pages(resident_ - limit);
  }

  // Of the largest free blocks first: they have the most whole pages.
  void give_up_pages(size_t bytes) {
    size_t aim = resident_ - std::min(bytes, resident_);
    for (auto block = free_.rbegin(); block != free_.rend() && block->first >= kPage && resident_ > aim; ++block) {
      char* segment = blocks_.at(block->second).segment;
      auto& resident = segments_.at(segment).resident;
      size_t page = up(block->second - segment, kPage) / kPage;
      size_t end = (block->second + block->first - segment) / kPage;
      while (page < end && resident_ > aim) {
        size_t first = page;
        for (; page < end && resident[page] && resident_ > aim; page++) {
          resident[page] = false;
          resident_ -= kPage;
        }
        if (page > first) madvise(segment + first * kPage, (page - first) * kPage, MADV_DONTNEED);
        else page++;
      }
    }
  }

  void release_unused() {
    for (auto segment = segments_.begin(); segment != segments_.end();) {
      auto block = blocks_.find(segment->first);
      auto& [bytes, resident] = segment->second;
      if (block->second.free && block->second.bytes == bytes) {
        free_.erase({bytes, segment->first});
        blocks_.erase(block);
        munmap(segment->first, bytes);
        mapped_ -= bytes;
        resident_ -= kPage * std::count(resident.begin(), resident.end(), true);
        segment = segments_.erase(segment);
      } else {
        ++segment;
      }
    }
  }

  std::mutex mutex_;
  std::map<char*, Block> blocks_;
  std::set<std::pair<size_t, char*>> free_;  // the smallest that fits comes first
  std::map<char*, Segment> segments_;
  size_t mapped_ = 0, resident_ = 0, used_ = 0, most_ = 0;
};

// Never destroyed: tensors of other statics may outlive it.
Segments& segments() {
  static auto* all = new Segments();
  return *all;
}

class ReusingAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes < kSmallest) return c10::GetDefaultCPUAllocator()->allocate(bytes);
    void* data = segments().take(bytes);
    if (!data) {
      c10::profiledCPUMemoryReporter().OutOfMemory(bytes);
      TORCH_CHECK(false, "not enough memory: you tried to allocate ", bytes, " bytes");
    }
    // Profilers, and our meter, hear of it as of any other.
    c10::profiledCPUMemoryReporter().New(data, bytes);
    return {data, data, &free, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &free; }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

 private:
  static void free(void* data) {
    if (!data) return;
    // Reported first: once it is free, another thread may be given the same place.
    if (small(data)) return c10::GetDefaultCPUAllocator()->raw_deleter()(data);
    c10::profiledCPUMemoryReporter().Delete(data);
    segments().give_back(data);
  }

  // Blocks begin at multiples of their unit, and so may small ones by chance.
  static bool small(void* data) {
    return reinterpret_cast<size_t>(data) % kUnit != 0 || !segments().holds(data);
  }
};

}  // namespace
#endif

extern "C" {

// From now on. Whatever was allocated before is freed by those who allocated it.
char* rlhf_reuse_memory() {
  return rlhf::guarded([] {
#ifdef __linux__
    static auto* allocator = new ReusingAllocator();
    c10::SetCPUAllocator(allocator);
#endif
  });
}

// Gives what no tensor uses back to the system.
char* rlhf_release_memory() {
  return rlhf::guarded([] {
#ifdef __linux__
    segments().release();
#endif
  });
}

}  // extern "C"
