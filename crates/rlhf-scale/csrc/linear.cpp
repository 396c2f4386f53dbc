// Matrix products of few rows with large matrices, without gradients, on the CPU. libtorch's are made for many
// rows; with few, the time goes into fetching the weights, and these fetch each weight once, ahead of its use,
// and multiply it with all rows while it is at hand. The weights are used as they lie in memory ([out, in]), so
// nothing is packed, kept or made stale by an update.
#include "wide.h"

#ifdef RLHF_KERNELS
namespace rlhf {

// What all products read the same rows of: [M, K] and as many weights [N, K], biases [N] or null, and results [M, N].
template <class T>
struct Products {
  const T* x;
  int64_t rows, k;
  std::vector<const T*> weights, biases;
  std::vector<T*> outputs;
  std::vector<int64_t> widths;
};

}  // namespace rlhf
#endif

#define KERNELS "kernels/few_rows.h"
#include "each_target.h"

using at::Tensor;
using rlhf::guarded;

#ifdef RLHF_KERNELS
// Where the processor's vectors multiply bf16 as such.
namespace rlhf::avx512 {

template <int M, int R>
RLHF_AVX512_BF16 INLINE void tile_bf16(const Product<uint16_t, uint16_t>& p, int64_t row, int64_t column, Pass pass) {
  __m512 acc[M][R];
  UNROLL for (int m = 0; m < M; m++) {
    UNROLL for (int r = 0; r < R; r++) acc[m][r] = _mm512_setzero_ps();
  }
  const uint16_t* x = p.x + row * p.k;
  const uint16_t* w = p.weight + column * p.k;
  int64_t k = 0, bytes = R * p.k * sizeof(uint16_t);
  Ahead ahead(w, kAhead, bytes, R * 32 * sizeof(uint16_t), pass);
  for (; k + 32 <= p.k; k += 32) {
    ahead.fetch();
    __m512bh weights[R];
    UNROLL for (int r = 0; r < R; r++) weights[r] = (__m512bh)_mm512_loadu_si512(w + r * p.k + k);
    UNROLL for (int m = 0; m < M; m++) {
      auto xs = (__m512bh)_mm512_loadu_si512(x + m * p.k + k);
      UNROLL for (int r = 0; r < R; r++) acc[m][r] = _mm512_dpbf16_ps(acc[m][r], xs, weights[r]);
    }
  }
  finish<M, R>(p, acc, row, column, k);
}
RLHF_COLUMNS(columns_bf16, RLHF_AVX512_BF16, uint16_t, uint16_t, tile_bf16)

}  // namespace rlhf::avx512

namespace {

using namespace rlhf;

constexpr int64_t kMostRows = 32;
constexpr size_t kMostProducts = 4;

template <class T>
void products(const Products<T>& all) {
  if constexpr (std::is_same_v<T, uint16_t>) {
    if (vectors_for_bf16()) return avx512::run(all, all.x, avx512::columns_bf16);
  }
  ON_PROCESSOR(products(all));
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
    if (x->dim() != 2 || x->size(0) < 1 || x->size(0) > kMostRows || x->size(1) < 1) return;
    int64_t rows = x->size(0), k = x->size(1);
    for (size_t i = 0; i < count; i++) {
      auto weight = weights[i], bias = biases[i];
      if (weight->dim() != 2 || weight->size(1) != k || (bias && bias->numel() != weight->size(0))) return;
      if (!applies({x, weight, bias})) return;
    }
    std::vector<Tensor> outs;
    for (size_t i = 0; i < count; i++) outs.push_back(at::empty({rows, weights[i]->size(0)}, x->options()));
    by_kind(*x, [&](auto* kind) {
      using T = std::remove_pointer_t<decltype(kind)>;
      Products<T> all{data<T>(*x), rows, k};
      for (size_t i = 0; i < count; i++) {
        all.weights.push_back(data<T>(*weights[i]));
        all.biases.push_back(biases[i] ? data<T>(*biases[i]) : nullptr);
        all.outputs.push_back(data<T>(outs[i]));
        all.widths.push_back(weights[i]->size(0));
      }
      products(all);
    });
    for (size_t i = 0; i < count; i++) results[i] = new Tensor(outs[i]);
#endif
  });
}

}  // extern "C"
