// Softmax over a vocabulary that comes in blocks of columns: what follows from the logits of one block, each
// in one or two passes over a row while it is in the first cache.
//
// A function that does not apply (another device or kind, a processor without AVX2) does nothing and says
// so in `done`. A row's result depends on that row alone, not on the number of threads.
#include "wide.h"

#ifdef RLHF_KERNELS
namespace rlhf {

// What is known of a row after some blocks: its largest logit, the sum of the exponentials of the logits less
// that, of their products with those differences, and the logit of the row's token.
struct Known {
  float *maximum, *sum, *product, *chosen;
};

// What a row's gradient is made of; `entropy_grad` is 0 where there is none.
struct Coefficients {
  float maximum, log_sum, own, entropy_grad, entropy;
};

}  // namespace rlhf
#endif

#define KERNELS "kernels/softmax.h"
#include "each_target.h"

using at::Tensor;
using rlhf::guarded;

#ifdef RLHF_KERNELS
using namespace rlhf;

namespace {

// One f32 for each row, or none at all.
float* column(const Tensor* t) { return t ? static_cast<float*>(t->data_ptr()) : nullptr; }

bool is_column(const Tensor* t, int64_t rows) {
  return !t || (t->device().is_cpu() && t->scalar_type() == at::kFloat && t->is_contiguous() && t->numel() == rows);
}

bool is_block(const Tensor& t) {
  bool known = t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16;
  return wide() && known && t.device().is_cpu() && t.dim() == 2 && t.is_contiguous();
}

bool are_ids(const Tensor* t, int64_t rows) {
  return !t || (t->device().is_cpu() && t->scalar_type() == at::kLong && t->is_contiguous() && t->numel() == rows);
}

}  // namespace
#endif

extern "C" {

bool rlhf_softmax_available() {
#ifdef RLHF_KERNELS
  return wide();
#else
  return false;
#endif
}

// Adds a block of logits [M, W], whose first column is the token `first`, to what is known of M rows, each a
// contiguous f32 column; `products` may be null. Logits are multiplied by `scale`.
char* rlhf_softmax_add(const Tensor* logits, const Tensor* ids, int64_t first, double scale, const Tensor* maxima,
                       const Tensor* sums, const Tensor* products, const Tensor* chosen, bool* done) {
  return guarded([&] {
#ifdef RLHF_KERNELS
    if (!is_block(*logits)) return;
    int64_t rows = logits->size(0), width = logits->size(1);
    for (const Tensor* t : {maxima, sums, products, chosen}) {
      if (!is_column(t, rows)) return;
    }
    if (!are_ids(ids, rows)) return;
    const int64_t* tokens = static_cast<const int64_t*>(ids->data_ptr());
    float *m = column(maxima), *s = column(sums), *p = column(products), *c = column(chosen);
    by_kind(*logits, [&](auto* kind) {
      auto* from = data<std::remove_pointer_t<decltype(kind)>>(*logits);
      split(rows, grain(width), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
          Known known{m + i, s + i, p ? p + i : nullptr, c + i};
          ON_PROCESSOR(add_row(from + i * width, width, tokens[i] - first, static_cast<float>(scale), known));
        }
      });
    });
    *done = true;
#endif
  });
}

// The gradients of a block's logits into `out` of the same shape and kind, which may be the block. `ids` may
// be null: then no token is a row's own. `entropy_grads` and `entropies` may be null.
char* rlhf_softmax_grad(const Tensor* logits, const Tensor* ids, int64_t first, double scale, const Tensor* maxima,
                        const Tensor* log_sums, const Tensor* own, const Tensor* entropy_grads,
                        const Tensor* entropies, const Tensor* out, bool* done) {
  return guarded([&] {
#ifdef RLHF_KERNELS
    if (!is_block(*logits) || !is_block(*out) || out->sizes() != logits->sizes()) return;
    if (out->scalar_type() != logits->scalar_type()) return;
    int64_t rows = logits->size(0), width = logits->size(1);
    for (const Tensor* t : {maxima, log_sums, own, entropy_grads, entropies}) {
      if (!is_column(t, rows)) return;
    }
    if (!are_ids(ids, rows)) return;
    const int64_t* tokens = ids ? static_cast<const int64_t*>(ids->data_ptr()) : nullptr;
    float *m = column(maxima), *l = column(log_sums), *o = column(own);
    float *eg = column(entropies ? entropy_grads : nullptr), *e = column(entropies);
    by_kind(*logits, [&](auto* kind) {
      using T = std::remove_pointer_t<decltype(kind)>;
      T *from = data<T>(*logits), *target = data<T>(*out);
      split(rows, grain(width), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
          Coefficients c{m[i], l[i], o[i], eg ? eg[i] : 0, eg ? e[i] : 0};
          int64_t token = tokens ? tokens[i] - first : -1;
          ON_PROCESSOR(grad_row(from + i * width, target + i * width, width, token, static_cast<float>(scale), c));
        }
      });
    });
    *done = true;
#endif
  });
}

}  // extern "C"
