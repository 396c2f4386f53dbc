// Causal attention over the segments of a packed run, for training in bf16 on the CPU. libtorch's cuts a head into
// tiles and calls a library for the product of each, which for texts of some hundred tokens takes longer than the
// products; and a run of many lengths needs a call for each. Here one node does all segments, in f32, from queries,
// keys and values as they lie. Nothing else is kept for backward, which computes the weights again.
#include "recorded.h"

using at::Tensor;
using rlhf::guarded;

#ifdef RLHF_KERNELS
namespace {

using namespace rlhf;

constexpr int64_t kRows = 4;  // queries side by side

// Rows start..end of a run, which look at rows first..last of an earlier segment, and at themselves.
struct Segment {
  int64_t start, end, first, last;
  int64_t queries() const { return end - start; }
  int64_t before() const { return last - first; }
  int64_t keys() const { return before() + queries(); }
  // The run's row that key `j` is.
  int64_t row(int64_t j) const { return j < before() ? first + j : start + j - before(); }
};

// Rows of heads, side by side within a row.
template <class T>
struct Rows {
  T* data;
  int64_t stride, width;
  T* at(int64_t row, int64_t head) const { return data + row * stride + head * width; }
};

struct Shape {
  int64_t heads, kv_heads, width, window;
  float scale;
  int64_t group() const { return heads / kv_heads; }
};

int64_t padded(int64_t count) { return (count + 15) / 16 * 16; }

// Keys or values of a segment and head in f32: as rows [L, d], and as columns [d, padded L].
struct Wide {
  std::vector<float> rows, columns;

  void fill(const Rows<const uint16_t>& from, const Segment& s, int64_t head) {
    int64_t d = from.width, keys = s.keys(), stride = padded(keys);
    rows.resize(keys * d);
    columns.resize(d * stride);
    for (int64_t j = 0; j < keys; j++) {
      const uint16_t* x = from.at(s.row(j), head);
      for (int64_t i = 0; i < d; i++) rows[j * d + i] = get(x + i);
    }
    for (int64_t i = 0; i < d; i++) {
      float* column = columns.data() + i * stride;
      for (int64_t j = 0; j < keys; j++) column[j] = rows[j * d + i];
      for (int64_t j = keys; j < stride; j++) column[j] = 0;
    }
  }
};

WIDE void widen_row(const uint16_t* from, float* to, int64_t d) {
  for (int64_t i = 0; i < d; i += 16) _mm512_storeu_ps(to + i, load(from + i));
}

// out[r][j] = factor * x[r] . columns[:, j], for j from `begin` to `end`, both multiples of 16.
template <int R>
WIDE void dots(const float* x, const float* columns, int64_t d, int64_t stride, int64_t begin, int64_t end,
               float factor, float* out) {
  auto some = [&](auto count, int64_t j) WIDE {
    constexpr int V = decltype(count)::value;
    __m512 acc[R][V];
    UNROLL for (int r = 0; r < R; r++) {
      UNROLL for (int v = 0; v < V; v++) acc[r][v] = _mm512_setzero_ps();
    }
    const float* column = columns + j;
    for (int64_t i = 0; i < d; i++, column += stride) {
      __m512 keys[V];
      UNROLL for (int v = 0; v < V; v++) keys[v] = load(column + 16 * v);
      UNROLL for (int r = 0; r < R; r++) {
        __m512 query = _mm512_set1_ps(x[r * d + i]);
        UNROLL for (int v = 0; v < V; v++) acc[r][v] = _mm512_fmadd_ps(query, keys[v], acc[r][v]);
      }
    }
    UNROLL for (int r = 0; r < R; r++) {
      UNROLL for (int v = 0; v < V; v++) {
        _mm512_storeu_ps(out + r * stride + j + 16 * v, _mm512_mul_ps(acc[r][v], _mm512_set1_ps(factor)));
      }
    }
  };
  int64_t j = begin;
  for (; j + 64 <= end; j += 64) some(std::integral_constant<int, 4>(), j);
  for (; j < end; j += 16) some(std::integral_constant<int, 1>(), j);
}

// out[r] = the sum of weights[r][j] rows[j], for j from `begin` to `end`.
template <int R, class Store>
WIDE INLINE void mix(const float* weights, const float* rows, int64_t d, int64_t stride, int64_t begin, int64_t end,
              const Store& write) {
  auto some = [&](auto count, int64_t i) WIDE {
    constexpr int V = decltype(count)::value;
    __m512 acc[R][V];
    UNROLL for (int r = 0; r < R; r++) {
      UNROLL for (int v = 0; v < V; v++) acc[r][v] = _mm512_setzero_ps();
    }
    for (int64_t j = begin; j < end; j++) {
      __m512 row[V];
      UNROLL for (int v = 0; v < V; v++) row[v] = load(rows + j * d + i + 16 * v);
      UNROLL for (int r = 0; r < R; r++) {
        __m512 weight = _mm512_set1_ps(weights[r * stride + j]);
        UNROLL for (int v = 0; v < V; v++) acc[r][v] = _mm512_fmadd_ps(weight, row[v], acc[r][v]);
      }
    }
    UNROLL for (int r = 0; r < R; r++) {
      UNROLL for (int v = 0; v < V; v++) write(r, i + 16 * v, acc[r][v]);
    }
  };
  int64_t i = 0;
  for (; i + 64 <= d; i += 64) some(std::integral_constant<int, 4>(), i);
  for (; i < d; i += 16) some(std::integral_constant<int, 1>(), i);
}

// sums[j] += the sum over r of weights[r][j] x[r], for j from `begin` to `end`.
template <int R>
WIDE void spread(const float* weights, const float* x, int64_t d, int64_t stride, int64_t begin, int64_t end,
                 float* sums) {
  auto some = [&](auto count, int64_t i) WIDE {
    constexpr int V = decltype(count)::value;
    __m512 rows[R][V];
    UNROLL for (int r = 0; r < R; r++) {
      UNROLL for (int v = 0; v < V; v++) rows[r][v] = load(x + r * d + i + 16 * v);
    }
    for (int64_t j = begin; j < end; j++) {
      float* target = sums + j * d + i;
      __m512 acc[V];
      UNROLL for (int v = 0; v < V; v++) acc[v] = load(target + 16 * v);
      UNROLL for (int r = 0; r < R; r++) {
        __m512 weight = _mm512_set1_ps(weights[r * stride + j]);
        UNROLL for (int v = 0; v < V; v++) acc[v] = _mm512_fmadd_ps(weight, rows[r][v], acc[v]);
      }
      UNROLL for (int v = 0; v < V; v++) _mm512_storeu_ps(target + 16 * v, acc[v]);
    }
  };
  int64_t i = 0;
  for (; i + 64 <= d; i += 64) some(std::integral_constant<int, 4>(), i);
  for (; i < d; i += 16) some(std::integral_constant<int, 1>(), i);
}

// The keys that some queries look at: begin..end, of which query `r` sees those from low(r) to high(r).
struct Seen {
  int64_t first, window, count;
  // Of queries from `query` on, of a segment.
  Seen(const Segment& s, const Shape& shape, int64_t query, int64_t rows)
      : first(s.before() + query), window(shape.window), count(rows) {}
  int64_t high(int64_t r) const { return first + r + 1; }
  int64_t low(int64_t r) const { return window > 0 ? std::max<int64_t>(0, high(r) - window) : 0; }
  int64_t begin() const { return low(0) / 16 * 16; }
  int64_t end() const { return high(count - 1); }
};

// Scores to weights that sum to 1; those out of sight are 0.
template <int R>
WIDE void softmax(float* scores, int64_t stride, const Seen& seen) {
  int64_t begin = seen.begin(), end = padded(seen.end());
  for (int r = 0; r < R; r++) {
    float* row = scores + r * stride;
    __m512i low = _mm512_set1_epi32(static_cast<int>(seen.low(r))), high = _mm512_set1_epi32(static_cast<int>(seen.high(r)));
    __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    auto visible = [&](int64_t j) WIDE {
      __m512i at = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(j)), lanes);
      return static_cast<__mmask16>(_mm512_cmpge_epi32_mask(at, low) & _mm512_cmplt_epi32_mask(at, high));
    };
    __m512 most = _mm512_set1_ps(-INFINITY);
    for (int64_t j = begin; j < end; j += 16) most = _mm512_mask_max_ps(most, visible(j), most, load(row + j));
    __m512 largest = _mm512_set1_ps(_mm512_reduce_max_ps(most)), total = _mm512_setzero_ps();
    for (int64_t j = begin; j < end; j += 16) {
      __m512 e = _mm512_maskz_mov_ps(visible(j), exponential(_mm512_sub_ps(load(row + j), largest)));
      _mm512_storeu_ps(row + j, e);
      total = _mm512_add_ps(total, e);
    }
    __m512 inverse = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(total));
    for (int64_t j = begin; j < end; j += 16) _mm512_storeu_ps(row + j, _mm512_mul_ps(load(row + j), inverse));
  }
}

// Weights p and the gradients of the attended values' products with the values: those of the scores, in place of
// the latter. d score = p (d p - the sum of p d p), times the scale.
template <int R>
WIDE void softmax_grad(const float* weights, float* grads, int64_t stride, const Seen& seen, float scale) {
  int64_t begin = seen.begin(), end = padded(seen.end());
  for (int r = 0; r < R; r++) {
    const float* p = weights + r * stride;
    float* g = grads + r * stride;
    __m512 sum = _mm512_setzero_ps();
    for (int64_t j = begin; j < end; j += 16) sum = _mm512_fmadd_ps(load(p + j), load(g + j), sum);
    __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum)), factor = _mm512_set1_ps(scale);
    for (int64_t j = begin; j < end; j += 16) {
      __m512 grad = _mm512_mul_ps(load(p + j), _mm512_sub_ps(load(g + j), mean));
      _mm512_storeu_ps(g + j, _mm512_mul_ps(grad, factor));
    }
  }
}

// Calls `body` with the number of rows, as a constant, and the first query, for all of a segment.
template <class Body>
void by_rows(int64_t queries, const Body& body) {
  int64_t query = 0;
  for (; query + kRows <= queries; query += kRows) body(std::integral_constant<int, kRows>(), query);
  for (; query < queries; query++) body(std::integral_constant<int, 1>(), query);
}

struct Forward {
  Shape shape;
  Rows<const uint16_t> query, key, value;
  Rows<uint16_t> out;
  Wide keys, values;
  std::vector<float> scores, x;

  void run(const Segment& s, int64_t kv) {
    int64_t d = shape.width, stride = padded(s.keys());
    keys.fill(key, s, kv);
    values.fill(value, s, kv);
    scores.resize(kRows * stride);
    x.resize(kRows * d);
    for (int64_t head = kv * shape.group(); head < (kv + 1) * shape.group(); head++) {
      by_rows(s.queries(), [&](auto rows, int64_t at) { block<decltype(rows)::value>(s, head, at, stride); });
    }
  }

 private:
  template <int R>
  WIDE void block(const Segment& s, int64_t head, int64_t at, int64_t stride) {
    int64_t d = shape.width;
    Seen seen(s, shape, at, R);
    for (int r = 0; r < R; r++) widen_row(query.at(s.start + at + r, head), x.data() + r * d, d);
    dots<R>(x.data(), keys.columns.data(), d, stride, seen.begin(), padded(seen.end()), shape.scale, scores.data());
    softmax<R>(scores.data(), stride, seen);
    mix<R>(scores.data(), values.rows.data(), d, stride, seen.begin(), seen.end(), [&](int r, int64_t i, __m512 sum) WIDE {
      store(out.at(s.start + at + r, head) + i, sum);
    });
  }
};

struct Backward {
  Shape shape;
  Rows<const uint16_t> query, key, value, grad;
  Rows<uint16_t> query_grad;
  // Sums over segments, [N, kv_heads, d].
  Rows<float> key_grad, value_grad;
  Wide keys, values;
  std::vector<float> weights, grads, x, g, key_sums, value_sums;

  void run(const Segment& s, int64_t kv) {
    int64_t d = shape.width, count = s.keys(), stride = padded(count);
    keys.fill(key, s, kv);
    values.fill(value, s, kv);
    weights.resize(kRows * stride);
    grads.resize(kRows * stride);
    x.resize(kRows * d);
    g.resize(kRows * d);
    key_sums.assign(count * d, 0);
    value_sums.assign(count * d, 0);
    for (int64_t head = kv * shape.group(); head < (kv + 1) * shape.group(); head++) {
      by_rows(s.queries(), [&](auto rows, int64_t at) { block<decltype(rows)::value>(s, head, at, stride); });
    }
    for (int64_t j = 0; j < count; j++) {
      float *k = key_grad.at(s.row(j), kv), *v = value_grad.at(s.row(j), kv);
      for (int64_t i = 0; i < d; i++) {
        k[i] += key_sums[j * d + i];
        v[i] += value_sums[j * d + i];
      }
    }
  }

 private:
  template <int R>
  WIDE void block(const Segment& s, int64_t head, int64_t at, int64_t stride) {
    int64_t d = shape.width;
    Seen seen(s, shape, at, R);
    int64_t begin = seen.begin(), end = seen.end();
    for (int r = 0; r < R; r++) {
      widen_row(query.at(s.start + at + r, head), x.data() + r * d, d);
      widen_row(grad.at(s.start + at + r, head), g.data() + r * d, d);
    }
    dots<R>(x.data(), keys.columns.data(), d, stride, begin, padded(end), shape.scale, weights.data());
    softmax<R>(weights.data(), stride, seen);
    dots<R>(g.data(), values.columns.data(), d, stride, begin, padded(end), 1.0f, grads.data());
    softmax_grad<R>(weights.data(), grads.data(), stride, seen, shape.scale);
    mix<R>(grads.data(), keys.rows.data(), d, stride, begin, end, [&](int r, int64_t i, __m512 sum) WIDE {
      store(query_grad.at(s.start + at + r, head) + i, sum);
    });
    spread<R>(grads.data(), x.data(), d, stride, begin, end, key_sums.data());
    spread<R>(weights.data(), g.data(), d, stride, begin, end, value_sums.data());
  }
};

// Segments in groups: one, and those that look at rows of it. What a group writes no other group does.
std::vector<std::vector<Segment>> families(const std::vector<Segment>& segments) {
  std::vector<std::vector<Segment>> all;
  std::vector<size_t> family;
  for (const auto& s : segments) {
    size_t own = all.size();
    for (size_t i = 0; s.before() > 0 && i < family.size(); i++) {
      if (s.first >= segments[i].start && s.first < segments[i].end) own = family[i];
    }
    if (own == all.size()) all.emplace_back();
    all[own].push_back(s);
    family.push_back(own);
  }
  return all;
}

// `run(segment, head of keys)` for all, a worker a thread; what groups of segments share is one thread's.
template <class Worker>
void attend(const std::vector<Segment>& segments, const Worker& model) {
  auto groups = families(segments);
  int64_t kv_heads = model.shape.kv_heads;
  split(static_cast<int64_t>(groups.size()) * kv_heads, 1, [&](int64_t begin, int64_t end) {
    Worker worker = model;
    for (int64_t i = begin; i < end; i++) {
      for (const auto& segment : groups[i / kv_heads]) worker.run(segment, i % kv_heads);
    }
  });
}

template <class T>
Rows<T> rows_of(const Tensor& t) {
  return {static_cast<T*>(t.data_ptr()), t.stride(0), t.size(2)};
}

// As the kernel reads it: parts of a wider product may stay where they are.
Tensor laid_out(const Tensor& t) {
  bool side_by_side = t.stride(2) == 1 && (t.size(1) == 1 || t.stride(1) == t.size(2));
  return side_by_side ? t : t.contiguous();
}

struct CausalAttentionBackward : public RecordedNode {
  std::vector<Segment> segments;
  Shape shape;

  std::string name() const override { return "RlhfCausalAttentionBackward"; }

  variable_list backward(const variable_list& tensors, const variable_list& grads) override {
    if (!grads[0].defined()) return {Tensor(), Tensor(), Tensor()};
    auto query = laid_out(tensors[0]), key = laid_out(tensors[1]), value = laid_out(tensors[2]);
    auto grad = grads[0].to(at::kBFloat16).contiguous().view(query.sizes());
    auto query_grad = at::empty(query.sizes(), query.options());
    auto wide = key.options().dtype(at::kFloat);
    auto key_grad = at::zeros(key.sizes(), wide), value_grad = at::zeros(key.sizes(), wide);
    attend(segments, Backward{shape, rows_of<const uint16_t>(query), rows_of<const uint16_t>(key),
                              rows_of<const uint16_t>(value), rows_of<const uint16_t>(grad),
                              rows_of<uint16_t>(query_grad), rows_of<float>(key_grad), rows_of<float>(value_grad)});
    return {query_grad, key_grad.to(at::kBFloat16), value_grad.to(at::kBFloat16)};
  }
};

}  // namespace
#endif

extern "C" {

// query [N, heads, d], key and value [N, kv_heads, d], bf16; `segments` are `count` times the rows start..end of
// the run and the rows first..last that they look at besides. They cover 0..N once, in order, and look at earlier
// rows. A window of 0 is none. Returns [N, heads * d].
char* rlhf_causal_attention(const Tensor* query, const Tensor* key, const Tensor* value, const int64_t* segments,
                            size_t count, double scale, int64_t window, Tensor** result) {
  return guarded([&] {
#ifdef RLHF_KERNELS
    if (query->dim() != 3 || key->dim() != 3 || key->sizes() != value->sizes()) return;
    int64_t rows = query->size(0), heads = query->size(1), d = query->size(2), kv_heads = key->size(1);
    if (rows < 1 || rows > (1 << 30) || key->size(0) != rows || key->size(2) != d || d < 16 || d % 16 != 0) return;
    if (kv_heads < 1 || heads % kv_heads != 0 || !trains({query, key, value})) return;
    std::vector<Segment> list;
    int64_t next = 0;
    for (size_t i = 0; i < count; i++) {
      const int64_t* s = segments + 4 * i;
      list.push_back({s[0], s[1], s[2], s[3]});
      if (s[0] != next || s[1] <= s[0] || s[2] < 0 || s[3] < s[2]) return;
      // A prefix is part of one earlier segment.
      bool whole = s[2] == s[3] || std::any_of(list.begin(), list.end() - 1, [&](const Segment& other) {
        return s[2] >= other.start && s[3] <= other.end;
      });
      if (!whole) return;
      next = s[1];
    }
    if (next != rows) return;
    Shape shape{heads, kv_heads, d, window, static_cast<float>(scale)};
    Tensor out;
    {
      at::NoGradGuard no_grad;
      auto q = laid_out(*query), k = laid_out(*key), v = laid_out(*value);
      out = at::empty({rows, heads * d}, query->options());
      attend(list, Forward{shape, rows_of<const uint16_t>(q), rows_of<const uint16_t>(k), rows_of<const uint16_t>(v),
                           rows_of<uint16_t>(out.view(query->sizes()))});
    }
    if (is_recorded({query, key, value})) {
      auto node = recorded_node<CausalAttentionBackward>();
      node->set_next_edges(edges_of({query, key, value}));
      node->segments = std::move(list);
      node->shape = shape;
      for (auto* t : {query, key, value}) node->saved.emplace_back(*t, /*is_output=*/false);
      torch::autograd::set_history(out, node);
    }
    *result = new Tensor(out);
#endif
  });
}

}  // extern "C"
