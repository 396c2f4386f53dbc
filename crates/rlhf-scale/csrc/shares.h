// Work that threads share out among themselves while they do it.
#pragma once

#include "vectors.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace rlhf {

// Items 0..count, fewer than 2^32: each thread goes through a range of its own, and when it is done with that takes half of
// what another has left. Threads that are equally quick end together, having disturbed nobody; none waits long for a slow one.
class Shares {
 public:
  struct Range {
    int64_t begin, end;
    int64_t count() const { return end - begin; }
  };

  Shares(int64_t count, int64_t threads) : all_(threads) {
    for (int64_t i = 0; i < threads; i++) all_[i].left = pack(count * i / threads, count * (i + 1) / threads);
  }

  // The next `most` of a thread's own range, or what is left of it; empty if nothing is.
  Range take(int64_t thread, int64_t most) {
    auto& own = all_[thread].left;
    uint64_t seen = own;
    while (true) {
      Range left = unpack(seen), taken{left.begin, std::min(left.end, left.begin + most)};
      if (taken.count() == 0 || own.compare_exchange_weak(seen, pack(taken.end, left.end))) return taken;
    }
  }

  // Gives a thread that has nothing left the later half of the longest range, and says whether one had `least` items.
  bool take_over(int64_t thread, int64_t least) {
    while (true) {
      Share* longest = &all_[0];
      for (auto& share : all_) {
        if (unpack(share.left).count() > unpack(longest->left).count()) longest = &share;
      }
      uint64_t seen = longest->left;
      Range left = unpack(seen);
      if (left.count() < least) return false;
      int64_t middle = left.begin + left.count() / 2;
      if (!longest->left.compare_exchange_strong(seen, pack(left.begin, middle))) continue;
      all_[thread].left = pack(middle, left.end);
      return true;
    }
  }

 private:
  // On a cache line of its own. Both ends change at once; as an item is taken once, equal ends mean the same items.
  struct alignas(64) Share {
    std::atomic<uint64_t> left{0};
  };
  static uint64_t pack(int64_t begin, int64_t end) {
    return static_cast<uint64_t>(begin) << 32 | static_cast<uint64_t>(end);
  }
  static Range unpack(uint64_t ends) {
    return {static_cast<int64_t>(ends >> 32), static_cast<int64_t>(ends & 0xffffffff)};
  }
  std::vector<Share> all_;
};

// Threads that may be had.
inline int64_t most_threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

// `body(thread, range)` for ranges of at most `most` of `count` items, by up to `threads` threads; `least` is what is worth being
// taken over.
template <class Body>
void share_out(int64_t count, int64_t threads, int64_t most, int64_t least, const Body& body) {
  if (count < 1) return;
  Shares shares(count, threads);
  split(threads, 1, [&](int64_t begin, int64_t end) {
    auto finish = [&](int64_t share) {
      for (auto range = shares.take(share, most); range.count() > 0; range = shares.take(share, most)) body(begin, range);
    };
    // Several where fewer threads came.
    for (int64_t share = begin; share < end; share++) finish(share);
    while (shares.take_over(begin, least)) finish(begin);
  });
}

}  // namespace rlhf
