// Factors and results of the products in kernels/gemm.h.
#pragma once

#include "shares.h"

#include <unistd.h>

#include <ATen/ops/empty.h>

#ifdef RLHF_KERNELS
namespace rlhf {

// Element (i, j) is at[i * row + j * column]; f32, or bf16.
template <class T>
struct Matrix {
  const T* at;
  int64_t row, column;
  Matrix from(int64_t i, int64_t j) const { return {at + i * row + j * column, row, column}; }
  Matrix transposed() const { return {at, column, row}; }
};

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
