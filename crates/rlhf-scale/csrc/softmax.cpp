// Softmax over a vocabulary that comes in blocks of columns: what follows from the logits of one block, each
// in one or two passes over a row while it is in the first cache.
//
// A function that does not apply (another device or kind, a processor without AVX-512) does nothing and says
// so in `done`. A row's result depends on that row alone, not on the number of threads.
#include "guard.h"
#include "vectors.h"

#include <cmath>

using at::Tensor;
using rlhf::guarded;

#ifdef RLHF_KERNELS
using namespace rlhf;

namespace {

INLINE __mmask16 first_of(int64_t count) {
  return count >= 16 ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << count) - 1);
}

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

// What is known of a row after some blocks: its largest logit, the sum of the exponentials of the logits less
// that, of their products with those differences, and the logit of the row's token.
struct Known {
  float *maximum, *sum, *product, *chosen;
};

template <class T>
WIDE void add_row(const T* logits, int64_t width, int64_t token, float scale, const Known& known) {
  __m512 factor = _mm512_set1_ps(scale), largest = _mm512_set1_ps(-INFINITY);
  int64_t i = 0;
  for (; i + 16 <= width; i += 16) largest = _mm512_max_ps(largest, load(logits + i));
  if (i < width) {
    __mmask16 mask = first_of(width - i);
    largest = _mm512_mask_max_ps(largest, mask, largest, load(logits + i, mask));
  }
  float maximum = std::max(*known.maximum, _mm512_reduce_max_ps(largest) * scale);
  __m512 base = _mm512_set1_ps(maximum), total = _mm512_setzero_ps(), products = _mm512_setzero_ps();
  for (i = 0; i < width; i += 16) {
    __mmask16 mask = first_of(width - i);
    __m512 below = _mm512_fmsub_ps(load(logits + i, mask), factor, base);
    __m512 e = _mm512_maskz_mov_ps(mask, exponential(below));
    total = _mm512_add_ps(total, e);
    if (known.product) products = _mm512_mask3_fmadd_ps(e, below, products, mask);
  }
  float lower = *known.maximum - maximum, shrink = std::exp(lower);
  if (known.product) *known.product = (*known.product + lower * *known.sum) * shrink + sum(products);
  *known.sum = *known.sum * shrink + sum(total);
  *known.maximum = maximum;
  if (token >= 0 && token < width) *known.chosen = get(logits + token) * scale;
}

// What a row's gradient is made of; `entropy_grad` is 0 where there is none.
struct Coefficients {
  float maximum, log_sum, own, entropy_grad, entropy;
};

// p (-own - entropy_grad (log p + entropy)), and `own` more where the token is. May run in place.
template <class T>
WIDE void grad_row(const T* logits, T* out, int64_t width, int64_t token, float scale, const Coefficients& c) {
  bool here = token >= 0 && token < width;
  float logit = here ? get(logits + token) : 0;
  __m512 factor = _mm512_set1_ps(scale), base = _mm512_set1_ps(c.maximum), log_sum = _mm512_set1_ps(c.log_sum);
  // -own - entropy_grad * entropy, and the part that log p multiplies.
  __m512 fixed = _mm512_set1_ps(-c.own - c.entropy_grad * c.entropy);
  __m512 varied = _mm512_set1_ps(-c.entropy_grad);
  for (int64_t i = 0; i < width; i += 16) {
    __mmask16 mask = first_of(width - i);
    __m512 logprob = _mm512_sub_ps(_mm512_fmsub_ps(load(logits + i, mask), factor, base), log_sum);
    __m512 grad = _mm512_mul_ps(exponential(logprob), _mm512_fmadd_ps(varied, logprob, fixed));
    store(out + i, mask, grad);
  }
  if (here) {
    float logprob = std::fma(logit, scale, -c.maximum) - c.log_sum;
    float grad = std::exp(logprob) * (-c.own - c.entropy_grad * (logprob + c.entropy));
    put(out + token, grad + c.own);
  }
}

// `body(T*)` for the kind of the block.
template <class Body>
void by_kind(const Tensor& block, const Body& body) {
  if (block.scalar_type() == at::kFloat) body(static_cast<float*>(block.data_ptr()));
  else body(static_cast<uint16_t*>(block.data_ptr()));
}

int64_t grain(int64_t width) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, width)); }

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
    by_kind(*logits, [&](auto* data) {
      split(rows, grain(width), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
          Known known{m + i, s + i, p ? p + i : nullptr, c + i};
          add_row(data + i * width, width, tokens[i] - first, static_cast<float>(scale), known);
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
    by_kind(*logits, [&](auto* data) {
      auto* target = static_cast<decltype(data)>(out->data_ptr());
      split(rows, grain(width), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
          Coefficients c{m[i], l[i], o[i], eg ? eg[i] : 0, eg ? e[i] : 0};
          int64_t token = tokens ? tokens[i] - first : -1;
          grad_row(data + i * width, target + i * width, width, token, static_cast<float>(scale), c);
        }
      });
    });
    *done = true;
#endif
  });
}

}  // extern "C"
