// Matrix products of few rows with large matrices, without gradients, on the CPU. libtorch's are made for many
// rows; with few, the time goes into fetching the weights, and these fetch each weight once, ahead of its use,
// and multiply it with all rows while it is at hand. The weights are used as they lie in memory ([out, in]), so
// nothing is packed, kept or made stale by an update.
#include "wide.h"

using at::Tensor;
using rlhf::guarded;

#ifdef RLHF_KERNELS
namespace {

using namespace rlhf;

constexpr int64_t kMostRows = 32;
constexpr int64_t kMostProducts = 4;
constexpr int kTile = 3;             // weight rows that are multiplied side by side
constexpr int64_t kAhead = 16 << 10;  // bytes that 16-bit weights are fetched ahead

template <class T>
struct Product {
  const T* x;       // [M, K]
  const T* weight;  // [N, K]
  const T* bias;    // [N] or null
  T* out;           // [M, N]
  int64_t k, n;

  void store(int64_t row, int64_t column, float value) const {
    put(out + row * n + column, bias ? value + get(bias + column) : value);
  }
};

template <int M, int R, class T>
WIDE INLINE void finish(const Product<T>& p, __m512 (&acc)[M][R], int64_t row, int64_t column, int64_t k) {
  UNROLL for (int r = 0; r < R; r++) {
    UNROLL for (int m = 0; m < M; m += 4) {
      constexpr int last = M - 1;
      __m128 four = sums(acc[m][r], acc[std::min(m + 1, last)][r], acc[std::min(m + 2, last)][r],
                         acc[std::min(m + 3, last)][r]);
      float values[4];
      _mm_storeu_ps(values, four);
      for (int j = 0; j < 4 && m + j < M; j++) {
        float tail = 0;
        for (int64_t rest = k; rest < p.k; rest++) {
          tail += get(p.x + (row + m + j) * p.k + rest) * get(p.weight + (column + r) * p.k + rest);
        }
        p.store(row + m + j, column + r, values[j] + tail);
      }
    }
  }
}

template <int M, int R, class T>
WIDE INLINE void tile(const Product<T>& p, int64_t row, int64_t column, bool fetch) {
  __m512 acc[M][R];
  UNROLL for (int m = 0; m < M; m++) {
    UNROLL for (int r = 0; r < R; r++) acc[m][r] = _mm512_setzero_ps();
  }
  const T* x = p.x + row * p.k;
  const T* w = p.weight + column * p.k;
  int64_t k = 0;
  for (; k + 16 <= p.k; k += 16) {
    __m512 weights[R];
    UNROLL for (int r = 0; r < R; r++) {
      weights[r] = load(w + r * p.k + k);
      // What the next tile needs, while this one computes. Past the end it is a hint for nothing.
      if (fetch) _mm_prefetch(reinterpret_cast<const char*>(w + (r + R) * p.k + k), _MM_HINT_T1);
    }
    UNROLL for (int m = 0; m < M; m++) {
      __m512 xs = load(x + m * p.k + k);
      UNROLL for (int r = 0; r < R; r++) acc[m][r] = _mm512_fmadd_ps(xs, weights[r], acc[m][r]);
    }
  }
  finish<M, R>(p, acc, row, column, k);
}

template <int M, int R>
WIDE_BF16 INLINE void tile_bf16(const Product<uint16_t>& p, int64_t row, int64_t column, bool fetch) {
  __m512 acc[M][R];
  UNROLL for (int m = 0; m < M; m++) {
    UNROLL for (int r = 0; r < R; r++) acc[m][r] = _mm512_setzero_ps();
  }
  const uint16_t* x = p.x + row * p.k;
  const uint16_t* w = p.weight + column * p.k;
  int64_t k = 0;
  for (; k + 32 <= p.k; k += 32) {
    __m512bh weights[R];
    UNROLL for (int r = 0; r < R; r++) {
      weights[r] = (__m512bh)_mm512_loadu_si512(w + r * p.k + k);
      // Half the bytes are through in half the time, so that the next tile would be too near.
      if (fetch) _mm_prefetch(reinterpret_cast<const char*>(w) + kAhead + (2 * k * R + 64 * r), _MM_HINT_T1);
    }
    UNROLL for (int m = 0; m < M; m++) {
      auto xs = (__m512bh)_mm512_loadu_si512(x + m * p.k + k);
      UNROLL for (int r = 0; r < R; r++) acc[m][r] = _mm512_dpbf16_ps(acc[m][r], xs, weights[r]);
    }
  }
  finish<M, R>(p, acc, row, column, k);
}

// Columns begin..end of the output: `R` weight rows at a time, and all of x's rows while they are near.
#define COLUMNS(NAME, TARGET, TYPE, TILE)                                                     \
  template <int R>                                                                            \
  TARGET void NAME##_rows(const Product<TYPE>& p, int64_t rows, int64_t column) {             \
    int64_t row = 0;                                                                          \
    for (; row + 8 <= rows; row += 8) TILE<8, R>(p, row, column, row == 0);                   \
    bool fetch = row == 0;                                                                    \
    if (rows - row >= 4) { TILE<4, R>(p, row, column, fetch); row += 4; fetch = false; }      \
    if (rows - row >= 2) { TILE<2, R>(p, row, column, fetch); row += 2; fetch = false; }      \
    if (rows - row >= 1) TILE<1, R>(p, row, column, fetch);                                   \
  }                                                                                           \
  void NAME(const Product<TYPE>& p, int64_t rows, int64_t begin, int64_t end) {               \
    int64_t column = begin;                                                                   \
    for (; column + kTile <= end; column += kTile) NAME##_rows<kTile>(p, rows, column);       \
    for (; column < end; column++) NAME##_rows<1>(p, rows, column);                           \
  }
COLUMNS(columns_f32, WIDE, float, tile)
COLUMNS(columns_bf16, WIDE_BF16, uint16_t, tile_bf16)

// All products read the same rows. Threads share them out tile by tile.
template <class T, class Columns>
void products(const Product<T>* list, int64_t count, int64_t rows, const Columns& columns) {
  auto tiles = [](const Product<T>& p) { return (p.n + kTile - 1) / kTile; };
  int64_t total = 0;
  for (int64_t i = 0; i < count; i++) total += tiles(list[i]);
  split(total, std::max<int64_t>(1, 8192 / (kTile * list[0].k)), [&](int64_t begin, int64_t end) {
    for (int64_t i = 0; i < count && end > 0; i++) {
      int64_t n = tiles(list[i]);
      if (begin < n) columns(list[i], rows, std::max<int64_t>(begin, 0) * kTile, std::min(list[i].n, end * kTile));
      begin -= n;
      end -= n;
    }
  });
}

}  // namespace
#endif

extern "C" {

// x [M, K]; `count` weights [N, K] and biases [N], null for none: as many results [M, N].
char* rlhf_few_rows_linear(const Tensor* x, const Tensor* const* weights, const Tensor* const* biases, size_t count,
                           Tensor** results) {
  return guarded([&] {
#ifdef RLHF_KERNELS
    if (count < 1 || count > kMostProducts) return;
    if (x->dim() != 2 || x->size(0) < 1 || x->size(0) > kMostRows) return;
    int64_t rows = x->size(0), k = x->size(1);
    bool bf16 = x->scalar_type() == at::kBFloat16;
    if (bf16 && !wide_bf16()) return;
    for (size_t i = 0; i < count; i++) {
      auto weight = weights[i], bias = biases[i];
      if (weight->dim() != 2 || weight->size(1) != k || (bias && bias->numel() != weight->size(0))) return;
      if (!applies({x, weight, bias})) return;
    }
    std::vector<Tensor> outs;
    for (size_t i = 0; i < count; i++) outs.push_back(at::empty({rows, weights[i]->size(0)}, x->options()));
    by_kind(*x, [&](auto* kind) {
      using T = std::remove_pointer_t<decltype(kind)>;
      Product<T> list[kMostProducts];
      for (size_t i = 0; i < count; i++) {
        list[i] = {data<T>(*x), data<T>(*weights[i]), biases[i] ? data<T>(*biases[i]) : nullptr, data<T>(outs[i]), k,
                   weights[i]->size(0)};
      }
      if constexpr (std::is_same_v<T, float>) {
        products(list, count, rows, columns_f32);
      } else {
        products(list, count, rows, columns_bf16);
      }
    });
    for (size_t i = 0; i < count; i++) results[i] = new Tensor(outs[i]);
#endif
  });
}

}  // extern "C"
