// Decoding on the CPU: few rows through large matrices, without gradients. libtorch's matrix products are
// made for many rows; with few, the time goes into fetching the weights, and these kernels fetch each weight
// once, ahead of its use, and multiply it with all rows while it is at hand. The weights are used as they
// lie in memory ([out, in]), so nothing is packed, kept or made stale by an update.
//
// Every function returns without a result (`*result` stays null) where it does not apply: another device or
// kind, gradients, too many rows, a processor without AVX-512. A row's result depends on that row alone, bit
// for bit: not on how many rows there are, nor on the number of threads.
#include "guard.h"
#include "vectors.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>

using at::Tensor;
using rlhf::guarded;

#ifdef RLHF_KERNELS
using namespace rlhf;

namespace {

constexpr int64_t kMostRows = 32;
constexpr int kTile = 3;  // weight rows that are multiplied side by side

// ---- linear ------------------------------------------------------------------------------------------

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
      if (fetch) _mm_prefetch(reinterpret_cast<const char*>(w + (r + R) * p.k + k), _MM_HINT_T1);
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

// ---- attention ---------------------------------------------------------------------------------------

struct Step {
  int64_t heads, kv_heads, width, capacity;
  const int64_t* lengths;
  double scale, cap;
  int64_t window;
};

// One row and one head of keys, with all queries that share it. `scores` holds a number for each key.
template <class T>
WIDE void attend(const Step& s, int64_t row, int64_t kv, const T* query, const T* key, const T* value,
                 T* keys, T* values, T* out, float* scores, float* wide_query) {
  int64_t d = s.width, at = s.lengths[row], group = s.heads / s.kv_heads;
  int64_t first = s.window > 0 ? std::max<int64_t>(0, at + 1 - s.window) : 0;
  keys += (row * s.kv_heads + kv) * s.capacity * d;
  values += (row * s.kv_heads + kv) * s.capacity * d;
  memcpy(keys + at * d, key + (row * s.kv_heads + kv) * d, d * sizeof(T));
  memcpy(values + at * d, value + (row * s.kv_heads + kv) * d, d * sizeof(T));
  for (int64_t head = kv * group; head < (kv + 1) * group; head++) {
    const T* q = query + (row * s.heads + head) * d;
    for (int64_t i = 0; i < d; i++) wide_query[i] = get(q + i);
    float most = -INFINITY;
    for (int64_t t = first; t <= at; t++) {
      __m512 product = _mm512_setzero_ps();
      for (int64_t i = 0; i < d; i += 16) {
        product = _mm512_fmadd_ps(load(wide_query + i), load(keys + t * d + i), product);
      }
      float score = sum(product) * static_cast<float>(s.scale);
      if (s.cap > 0) score = static_cast<float>(s.cap * std::tanh(score / s.cap));
      scores[t - first] = score;
      most = std::max(most, score);
    }
    int64_t count = at + 1 - first;
    // The buffer has room for a whole last vector, of which what is too much weighs nothing.
    for (int64_t t = count; t % 16 != 0; t++) scores[t] = -INFINITY;
    __m512 total = _mm512_setzero_ps();
    for (int64_t t = 0; t < count; t += 16) {
      __m512 x = _mm512_sub_ps(load(scores + t), _mm512_set1_ps(most));
      __mmask16 kept = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-80.0f), _CMP_NLT_UQ);
      __m512 e = _mm512_maskz_mov_ps(kept, exponential(x));
      _mm512_storeu_ps(scores + t, e);
      total = _mm512_add_ps(total, e);
    }
    float inverse = 1.0f / sum(total);
    for (int64_t i = 0; i < d; i += 16) {
      __m512 acc = _mm512_setzero_ps();
      for (int64_t t = 0; t < count; t++) {
        acc = _mm512_fmadd_ps(_mm512_set1_ps(scores[t]), load(values + (first + t) * d + i), acc);
      }
      float weighted[16];
      _mm512_storeu_ps(weighted, _mm512_mul_ps(acc, _mm512_set1_ps(inverse)));
      for (int j = 0; j < 16; j++) put(out + (row * s.heads + head) * d + i + j, weighted[j]);
    }
  }
}

template <class T>
void attend_all(const Step& s, int64_t rows, const Tensor& query, const Tensor& key, const Tensor& value,
                const Tensor& keys, const Tensor& values, const Tensor& out) {
  auto data = [](const Tensor& t) { return static_cast<T*>(t.data_ptr()); };
  int64_t longest = *std::max_element(s.lengths, s.lengths + rows) + 1;
  int64_t grain = std::max<int64_t>(1, 16384 / (longest * s.width));
  split(rows * s.kv_heads, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> scores(longest + 16), wide_query(s.width);
    for (int64_t i = begin; i < end; i++) {
      attend(s, i / s.kv_heads, i % s.kv_heads, data(query), data(key), data(value), data(keys),
             data(values), data(out), scores.data(), wide_query.data());
    }
  });
}

// ---- norm --------------------------------------------------------------------------------------------

template <class T>
WIDE void rms_norm(const T* x, const T* weight, T* out, int64_t rows, int64_t width, double epsilon) {
  for (int64_t row = 0; row < rows; row++, x += width, out += width) {
    __m512 squares = _mm512_setzero_ps();
    int64_t i = 0;
    for (; i + 16 <= width; i += 16) squares = _mm512_fmadd_ps(load(x + i), load(x + i), squares);
    float total = sum(squares);
    for (; i < width; i++) total += get(x + i) * get(x + i);
    float scale = 1.0f / std::sqrt(total / width + static_cast<float>(epsilon));
    // Rounded before the weight, as the model does it one operation after another.
    for (i = 0; i < width; i++) put(out + i, rounded(get(x + i) * scale, x) * get(weight + i));
  }
}

bool applies(std::initializer_list<const Tensor*> tensors) {
  if (!wide() || at::GradMode::is_enabled() || at::autocast::is_autocast_enabled(at::kCPU)) return false;
  if (at::get_num_threads() > 1 && !team().usable()) return false;
  auto kind = (*tensors.begin())->scalar_type();
  if (kind != at::kFloat && kind != at::kBFloat16) return false;
  return std::all_of(tensors.begin(), tensors.end(), [&](const Tensor* t) {
    return !t || (t->device().is_cpu() && t->scalar_type() == kind && t->is_contiguous());
  });
}

}  // namespace
#endif

extern "C" {

// x [M, K], weight [N, K], bias [N] or null: [M, N].
char* rlhf_few_rows_linear(const Tensor* x, const Tensor* weight, const Tensor* bias, Tensor** result) {
  return guarded([&] {
#ifdef RLHF_KERNELS
    if (x->dim() != 2 || weight->dim() != 2 || x->size(0) < 1 || x->size(0) > kMostRows) return;
    if (x->size(1) != weight->size(1) || (bias && bias->numel() != weight->size(0))) return;
    bool bf16 = x->scalar_type() == at::kBFloat16;
    if (!applies({x, weight, bias}) || (bf16 && !wide_bf16())) return;
    int64_t rows = x->size(0), n = weight->size(0), k = x->size(1);
    auto out = at::empty({rows, n}, x->options());
    // Threads begin at multiples of a tile.
    int64_t tiles = (n + kTile - 1) / kTile, grain = std::max<int64_t>(1, 8192 / (kTile * k));
    auto columns = [&](auto kernel, auto product) {
      split(tiles, grain, [&](int64_t begin, int64_t end) {
        kernel(product, rows, begin * kTile, std::min(n, end * kTile));
      });
    };
    auto product = [&](auto* kind) {
      using T = std::remove_pointer_t<decltype(kind)>;
      auto data = [](const Tensor* t) { return t ? static_cast<T*>(t->data_ptr()) : nullptr; };
      return Product<T>{data(x), data(weight), data(bias), data(&out), k, n};
    };
    if (bf16) {
      columns(columns_bf16, product(static_cast<uint16_t*>(nullptr)));
    } else {
      columns(columns_f32, product(static_cast<float*>(nullptr)));
    }
    *result = new Tensor(out);
#endif
  });
}

// x [M, H] over the root of its mean square plus epsilon, times weight [H].
char* rlhf_few_rows_rms_norm(const Tensor* x, const Tensor* weight, double epsilon, Tensor** result) {
  return guarded([&] {
#ifdef RLHF_KERNELS
    if (x->dim() != 2 || x->size(0) > kMostRows || weight->numel() != x->size(1)) return;
    if (!applies({x, weight})) return;
    auto out = at::empty_like(*x);
    auto run = [&](auto* kind) {
      using T = std::remove_pointer_t<decltype(kind)>;
      auto data = [](const Tensor& t) { return static_cast<T*>(t.data_ptr()); };
      rms_norm<T>(data(*x), data(*weight), data(out), x->size(0), x->size(1), epsilon);
    };
    if (x->scalar_type() == at::kFloat) run(static_cast<float*>(nullptr));
    else run(static_cast<uint16_t*>(nullptr));
    *result = new Tensor(out);
#endif
  });
}

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
    Step step{heads, kv_heads, d, keys->size(2), lengths, scale, cap, window};
    if (q.scalar_type() == at::kFloat) {
      attend_all<float>(step, rows, q, k, v, *keys, *values, out);
    } else {
      attend_all<uint16_t>(step, rows, q, k, v, *keys, *values, out);
    }
    *result = new Tensor(out);
#endif
  });
}

}  // extern "C"
