// Attention of one token to a cache.

constexpr int64_t kKeys = 4;                              // keys that are looked at side by side
constexpr int kQueries = kRegisters == 32 ? 4 : 3;  // queries that are
constexpr int kValues = kRegisters == 32 ? 4 : 1;   // sixteens of dimensions that are summed side by side

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
    Part products[G][kKeys];
    UNROLL for (int g = 0; g < G; g++) {
      UNROLL for (int j = 0; j < kKeys; j++) products[g][j] = all_part(0.0f);
    }
    for (int64_t i = 0; i < d; i += kPart) {
      UNROLL for (int j = 0; j < kKeys; j++) {
        Part key = load_part(at[j] + i);
        UNROLL for (int g = 0; g < G; g++) products[g][j] = fma(load_part(query + g * d + i), key, products[g][j]);
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
  Lanes total = zero();
  for (int64_t t = 0; t < count; t += 16) {
    Lanes x = sub(load(scores + t), all(most));
    Lanes e = select(not_below(x, -80.0f), exponential(x), zero());
    store(scores + t, e);
    total = add(total, e);
  }
  return 1.0f / sum(total);
}

// `W` times sixteen dimensions of the weighted sums of the values, for `G` queries.
template <int G, int W, class T>
WIDE INLINE void gather(const Step& s, const T* values, int64_t count, const float* weights, int64_t stride,
                        const float (&inverse)[G], T* out) {
  Lanes acc[G][W];
  UNROLL for (int g = 0; g < G; g++) {
    UNROLL for (int w = 0; w < W; w++) acc[g][w] = zero();
  }
  for (int64_t t = 0; t < count; t++) {
    Lanes value[W];
    UNROLL for (int w = 0; w < W; w++) value[w] = load(values + t * s.width + 16 * w);
    UNROLL for (int g = 0; g < G; g++) {
      Lanes weight = all(weights[g * stride + t]);
      UNROLL for (int w = 0; w < W; w++) acc[g][w] = fma(weight, value[w], acc[g][w]);
    }
  }
  UNROLL for (int g = 0; g < G; g++) {
    UNROLL for (int w = 0; w < W; w++) {
      store(out + g * s.width + 16 * w, mul(acc[g][w], all(inverse[g])));
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
  for (; i + 16 * kValues <= d; i += 16 * kValues) gather<G, kValues>(s, values + i, count, scores, stride, inverse, out + i);
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
  while (end - head >= kQueries) some(attend<kQueries, T>, kQueries);
  if (end - head == 3) some(attend<3, T>, 3);
  if (end - head == 2) some(attend<2, T>, 2);
  if (end - head == 1) some(attend<1, T>, 1);
}
