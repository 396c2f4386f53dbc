// Attention of one token a row to the cache that holds the tokens before it, without gradients, on the CPU.
#include "wide.h"

using at::Tensor;
using rlhf::guarded;

#ifdef RLHF_KERNELS
namespace {

using namespace rlhf;

struct Step {
  int64_t heads, kv_heads, width, capacity;
  const int64_t* lengths;
  float scale, cap;
  int64_t window;
};

// Keys that are looked at side by side.
constexpr int64_t kKeys = 4;

// The products of `G` queries [G, d] with `count` keys, scaled and capped; `count` is rounded up to a multiple
// of 16 by keys that weigh nothing. Returns the greatest by query.
template <int G, class T>
WIDE INLINE void score(const Step& s, const float* query, const T* keys, int64_t count, float* scores, int64_t stride,
                       float (&most)[G]) {
  int64_t d = s.width;
  for (int g = 0; g < G; g++) most[g] = -INFINITY;
  for (int64_t t = 0; t < count; t += kKeys) {
    // The last key stands in for those that there are not.
    const T* at[kKeys];
    UNROLL for (int j = 0; j < kKeys; j++) at[j] = keys + std::min(t + j, count - 1) * d;
    __m512 products[G][kKeys];
    UNROLL for (int g = 0; g < G; g++) {
      UNROLL for (int j = 0; j < kKeys; j++) products[g][j] = _mm512_setzero_ps();
    }
    for (int64_t i = 0; i < d; i += 16) {
      UNROLL for (int j = 0; j < kKeys; j++) {
        __m512 key = load(at[j] + i);
        UNROLL for (int g = 0; g < G; g++) {
          products[g][j] = _mm512_fmadd_ps(load(query + g * d + i), key, products[g][j]);
        }
      }
    }
    UNROLL for (int g = 0; g < G; g++) {
      float four[kKeys];
      _mm_storeu_ps(four, sums(products[g][0], products[g][1], products[g][2], products[g][3]));
      for (int64_t j = 0; j < kKeys && t + j < count; j++) {
        float x = four[j] * s.scale;
        if (s.cap > 0) x = s.cap * std::tanh(x / s.cap);
        scores[g * stride + t + j] = x;
        most[g] = std::max(most[g], x);
      }
    }
  }
  for (int g = 0; g < G; g++) {
    for (int64_t t = count; t % 16 != 0; t++) scores[g * stride + t] = -INFINITY;
  }
}

// Scores to weights, in place; returns one over their sum.
WIDE INLINE float weigh(float* scores, int64_t count, float most) {
  __m512 total = _mm512_setzero_ps();
  for (int64_t t = 0; t < count; t += 16) {
    __m512 x = _mm512_sub_ps(load(scores + t), _mm512_set1_ps(most));
    __mmask16 kept = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-80.0f), _CMP_NLT_UQ);
    __m512 e = _mm512_maskz_mov_ps(kept, exponential(x));
    _mm512_storeu_ps(scores + t, e);
    total = _mm512_add_ps(total, e);
  }
  return 1.0f / sum(total);
}

// `W` vectors of the weighted sums of the values, for `G` queries.
template <int G, int W, class T>
WIDE INLINE void gather(const Step& s, const T* values, int64_t count, const float* weights, int64_t stride,
                        const float (&inverse)[G], T* out) {
  __m512 acc[G][W];
  UNROLL for (int g = 0; g < G; g++) {
    UNROLL for (int w = 0; w < W; w++) acc[g][w] = _mm512_setzero_ps();
  }
  for (int64_t t = 0; t < count; t++) {
    __m512 value[W];
    UNROLL for (int w = 0; w < W; w++) value[w] = load(values + t * s.width + 16 * w);
    UNROLL for (int g = 0; g < G; g++) {
      __m512 weight = _mm512_set1_ps(weights[g * stride + t]);
      UNROLL for (int w = 0; w < W; w++) acc[g][w] = _mm512_fmadd_ps(weight, value[w], acc[g][w]);
    }
  }
  UNROLL for (int g = 0; g < G; g++) {
    UNROLL for (int w = 0; w < W; w++) {
      store(out + g * s.width + 16 * w, _mm512_mul_ps(acc[g][w], _mm512_set1_ps(inverse[g])));
    }
  }
}

// `G` queries of one row that share their keys.
template <int G, class T>
WIDE void attend(const Step& s, const T* query, const T* keys, const T* values, int64_t count, T* out, float* scores,
                 float* wide_query) {
  int64_t d = s.width, stride = (count + 15) / 16 * 16;
  for (int64_t i = 0; i < G * d; i++) wide_query[i] = get(query + i);
  float most[G], inverse[G];
  score<G>(s, wide_query, keys, count, scores, stride, most);
  for (int g = 0; g < G; g++) inverse[g] = weigh(scores + g * stride, count, most[g]);
  int64_t i = 0;
  for (; i + 64 <= d; i += 64) gather<G, 4>(s, values + i, count, scores, stride, inverse, out + i);
  for (; i < d; i += 16) gather<G, 1>(s, values + i, count, scores, stride, inverse, out + i);
}

// One row and one head of keys, with all queries that share it.
template <class T>
void attend_row(const Step& s, int64_t row, int64_t kv, const T* query, const T* key, const T* value, T* keys,
                T* values, T* out, float* scores, float* wide_query) {
  int64_t d = s.width, at = s.lengths[row], group = s.heads / s.kv_heads;
  int64_t first = s.window > 0 ? std::max<int64_t>(0, at + 1 - s.window) : 0;
  keys += (row * s.kv_heads + kv) * s.capacity * d;
  values += (row * s.kv_heads + kv) * s.capacity * d;
  memcpy(keys + at * d, key + (row * s.kv_heads + kv) * d, d * sizeof(T));
  memcpy(values + at * d, value + (row * s.kv_heads + kv) * d, d * sizeof(T));
  keys += first * d;
  values += first * d;
  int64_t count = at + 1 - first, head = kv * group, end = head + group;
  auto some = [&](auto attend, int64_t heads) {
    int64_t place = (row * s.heads + head) * d;
    attend(s, query + place, keys, values, count, out + place, scores, wide_query);
    head += heads;
  };
  while (end - head >= 4) some(attend<4, T>, 4);
  if (end - head == 3) some(attend<3, T>, 3);
  if (end - head == 2) some(attend<2, T>, 2);
  if (end - head == 1) some(attend<1, T>, 1);
}

}  // namespace
#endif

extern "C" {

// Writes key and value [B, kv_heads, d] behind the `lengths` tokens of each row of the caches
// [>= B, kv_heads, capacity, d], and lets query [B, heads, d] look at them: [B, heads * d]. A window of 0
// is none, a cap of 0 is none.
char* rlhf_cached_attention(const Tensor* query, const Tensor* key, const Tensor* value, const Tensor* keys,
                            const Tensor* values, const int64_t* lengths, double scale, int64_t window,
                            double cap, Tensor** result) {
  return guarded([&] {
#ifdef RLHF_KERNELS
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
          attend_row<T>(step, i / kv_heads, i % kv_heads, data<T>(q), data<T>(k), data<T>(v), data<T>(*keys),
                        data<T>(*values), data<T>(out), scores.data(), wide_query.data());
        }
      });
    });
    *result = new Tensor(out);
#endif
  });
}

}  // extern "C"
