// Attention of one token a row to the cache that holds the tokens before it, without gradients, on the CPU.
#include "wide.h"

#ifdef RLHF_KERNELS
namespace rlhf {

struct Step {
  int64_t heads, kv_heads, width, capacity;
  const int64_t* lengths;
  float scale, cap;
  int64_t window;
};

}  // namespace rlhf
#endif

#define KERNELS "kernels/attention.h"
#include "each_target.h"

using at::Tensor;
using rlhf::guarded;

extern "C" {

// Writes key and value [B, kv_heads, d] behind the `lengths` tokens of each row of the caches
// [>= B, kv_heads, capacity, d], and lets query [B, heads, d] look at them: [B, heads * d]. A window of 0
// is none, a cap of 0 is none.
char* rlhf_cached_attention(const Tensor* query, const Tensor* key, const Tensor* value, const Tensor* keys,
                            const Tensor* values, const int64_t* lengths, double scale, int64_t window,
                            double cap, Tensor** result) {
  return guarded([&] {
#ifdef RLHF_KERNELS
    using namespace rlhf;
    if (query->dim() != 3 || key->dim() != 3 || keys->dim() != 4) return;
    int64_t rows = query->size(0), heads = query->size(1), d = query->size(2), kv_heads = key->size(1);
    if (rows < 1 || d % 16 != 0 || heads % kv_heads != 0) return;
    if (key->sizes() != at::IntArrayRef({rows, kv_heads, d}) || value->sizes() != key->sizes()) return;
    if (keys->size(0) < rows || keys->size(1) != kv_heads || keys->size(3) != d) return;
    if (values->sizes() != keys->sizes()) return;
    for (int64_t row = 0; row < rows; row++) {
      if (lengths[row] < 0 || lengths[row] >= keys->size(2)) return;
    }
    // Slices of one projection lie apart.
    auto q = query->contiguous(), k = key->contiguous(), v = value->contiguous();
    if (!applies({&q, &k, &v, keys, values})) return;
    auto out = at::empty({rows, heads * d}, q.options());
    Step step{heads, kv_heads, d, keys->size(2), lengths, static_cast<float>(scale), static_cast<float>(cap), window};
    int64_t longest = *std::max_element(lengths, lengths + rows) + 1;
    int64_t grain = std::max<int64_t>(1, 16384 / (longest * d));
    by_kind(q, [&](auto* kind) {
      using T = std::remove_pointer_t<decltype(kind)>;
      split(rows * kv_heads, grain, [&](int64_t begin, int64_t end) {
        std::vector<float> scores(4 * (longest + 16)), wide_query(4 * d);
        for (int64_t i = begin; i < end; i++) {
          ON_PROCESSOR(attend_row<T>(step, i / kv_heads, i % kv_heads, data<T>(q), data<T>(k), data<T>(v), data<T>(*keys),
                                     data<T>(*values), data<T>(out), scores.data(), wide_query.data()));
        }
      });
    });
    *result = new Tensor(out);
#endif
  });
}

}  // extern "C"
