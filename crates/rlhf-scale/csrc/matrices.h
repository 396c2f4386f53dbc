// Factors and results of the products in kernels/gemm.h.
#pragma once

#include "shares.h"

#include <unistd.h>

#include <ATen/ops/empty.h>

#ifdef RLHF_KERNELS
namespace rlhf {

// What products sum along: rows of a left factor, or columns of a right one. Element t of vector i is
// at[i * apart + t * along]; f32, or bf16.
template <class T>
struct Vectors {
  const T* at;
  int64_t apart, along, count;
  Vectors part(int64_t first, int64_t some) const { return {at + first * apart, apart, along, some}; }
  Vectors after(int64_t first) const { return part(first, count - first); }
};

template <class T>
std::vector<Vectors<T>> from_term(std::vector<Vectors<T>> factors, int64_t term) {
  for (auto& factor : factors) factor.at += term * factor.along;
  return factors;
}

// Some vectors of one of several factors.
struct Panel {
  int64_t factor, first, count;
};

// All of theirs, `width` to a panel; the last of a factor has what is left.
template <class T>
std::vector<Panel> panels_of(const std::vector<Vectors<T>>& factors, int64_t width) {
  std::vector<Panel> panels;
  for (size_t i = 0; i < factors.size(); i++) {
    for (int64_t first = 0; first < factors[i].count; first += width) {
      panels.push_back({static_cast<int64_t>(i), first, std::min(width, factors[i].count - first)});
    }
  }
  return panels;
}

// Whether tiles read rows where they lie: f32 side by side, in rows that do not all begin at the same place of a page, for then
// the first cache would hold few of them at once.
template <class T>
bool all_lie(const std::vector<Vectors<T>>& rows) {
  constexpr int64_t kPage = 4096;
  return std::is_same_v<T, float> && std::all_of(rows.begin(), rows.end(), [](const Vectors<T>& factor) {
    return factor.along == 1 && factor.apart * static_cast<int64_t>(sizeof(T)) % kPage != 0;
  });
}

// What is made of a product: c [m, n], rows `stride` apart.
template <class T>
struct Output {
  T* c;
  int64_t stride;
  bool add = false;         // to what is there
  const T* bias = nullptr;  // [n]
  Output from(int64_t row) const { return {c + row * stride, stride, add, bias}; }
};

constexpr int64_t kDeep = 832;   // terms that are summed at once
constexpr int64_t kTall = 1050;  // rows of the left factor that are packed at once
constexpr int64_t kChunk = 168;  // rows that columns are worth packing for once more
constexpr int64_t kWorth = 84;   // rows that a thread has left if another packs columns to help it

inline int64_t parts(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Floats of the right factor that a thread keeps near: half of its second cache.
inline int64_t near_floats() {
  static const int64_t floats = [] {
    int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
    return std::clamp<int64_t>(bytes, 256 << 10, 2 << 20) / 2 / 4 * 7 / 8;
  }();
  return floats;
}

// A block of the terms: `kDeep` or fewer, about as many as in the others.
struct Terms {
  int64_t count, blocks;
  explicit Terms(int64_t k) : count(k), blocks(std::max<int64_t>(1, parts(k, kDeep))) {}
  int64_t begin(int64_t block) const { return count * block / blocks; }
  int64_t most() const { return parts(count, blocks); }
};

}  // namespace rlhf
#endif
