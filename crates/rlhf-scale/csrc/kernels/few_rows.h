// Products of few rows with large matrices: a tile of sums for some rows and kTile of the weight's, side by side.
// For bf16 weights the rows come in f32, their elements of every 2 `kPart` first those at even places, then those at odd ones.

constexpr int kTile = 3;                               // weight rows that are multiplied side by side
constexpr int kTileRows = kRegisters == 32 ? 8 : 4;  // rows that are

// Bytes from weights in bf16 to those that are fetched meanwhile: half the bytes are through in half the time, so that the next
// tile would be too near.
constexpr int64_t kAhead = 16 << 10;

// X is what the rows consist of, T the weights.
template <class X, class T>
struct Product {
  const X* x;       // [M, K]
  const T* weight;  // [N, K]
  const T* bias;    // [N] or null
  T* out;           // [M, N]
  int64_t k, n;

  void store(int64_t row, int64_t column, float value) const {
    put(out + row * n + column, bias ? value + get(bias + column) : value);
  }
};

// Adds the elements from `k` on, and stores.
template <int M, int R, class X, class T>
WIDE INLINE void finish(const Product<X, T>& p, Part (&acc)[M][R], int64_t row, int64_t column, int64_t k) {
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

// One of the passes over the rows of x with the same rows of the weight.
struct Pass {
  int number, count;
};

// Fetches the weights of later tiles while one computes: as many bytes as a tile has, each pass its share, so that memory is
// never waited for by one pass and idle in the next. Past the end it is a hint for nothing.
struct Ahead {
  const char* next;
  int64_t step;
  // `distance` from the tile's weights, `bytes` of them, of which a step of the tile takes `step`.
  Ahead(const void* weights, int64_t distance, int64_t bytes, int64_t step, Pass pass)
      : next(static_cast<const char*>(weights) + distance + bytes * pass.number / pass.count), step(step / pass.count) {}
  INLINE void fetch() {
    _mm_prefetch(next, _MM_HINT_T1);
    if (step > 64) _mm_prefetch(next + 64, _MM_HINT_T1);
    if (step > 128) _mm_prefetch(next + 128, _MM_HINT_T1);
    next += step;
  }
};

template <int M, int R>
WIDE INLINE void tile(const Product<float, float>& p, int64_t row, int64_t column, Pass pass) {
  Part acc[M][R];
  UNROLL for (int m = 0; m < M; m++) {
    UNROLL for (int r = 0; r < R; r++) acc[m][r] = all_part(0.0f);
  }
  const float* x = p.x + row * p.k;
  const float* w = p.weight + column * p.k;
  int64_t k = 0, bytes = R * p.k * sizeof(float);
  Ahead ahead(w, bytes, bytes, R * 16 * sizeof(float), pass);
  for (; k + 16 <= p.k; k += 16) {
    ahead.fetch();
    UNROLL for (int part = 0; part < 16; part += kPart) {
      Part weights[R];
      UNROLL for (int r = 0; r < R; r++) weights[r] = held(load_part(w + r * p.k + k + part));
      UNROLL for (int m = 0; m < M; m++) {
        Part xs = load_part(x + m * p.k + k + part);
        UNROLL for (int r = 0; r < R; r++) acc[m][r] = fma(xs, weights[r], acc[m][r]);
      }
    }
  }
  finish<M, R>(p, acc, row, column, k);
}

// Of bf16 weights, in f32.
template <int M, int R>
WIDE INLINE void tile(const Product<float, uint16_t>& p, int64_t row, int64_t column, Pass pass) {
  constexpr int64_t kBlock = 2 * kPart;
  Part acc[M][R];
  UNROLL for (int m = 0; m < M; m++) {
    UNROLL for (int r = 0; r < R; r++) acc[m][r] = all_part(0.0f);
  }
  const float* x = p.x + row * p.k;
  const uint16_t* w = p.weight + column * p.k;
  int64_t k = 0, bytes = R * p.k * sizeof(uint16_t);
  Ahead ahead(w, kAhead, bytes, R * kBlock * sizeof(uint16_t), pass);
  for (; k + kBlock <= p.k; k += kBlock) {
    ahead.fetch();
    Part weights[R];
    UNROLL for (int r = 0; r < R; r++) weights[r] = held(load_even(w + r * p.k + k));
    UNROLL for (int m = 0; m < M; m++) {
      Part xs = load_part(x + m * p.k + k);
      UNROLL for (int r = 0; r < R; r++) acc[m][r] = fma(xs, weights[r], acc[m][r]);
    }
    UNROLL for (int r = 0; r < R; r++) weights[r] = held(load_odd(w + r * p.k + k));
    UNROLL for (int m = 0; m < M; m++) {
      Part xs = load_part(x + m * p.k + k + kPart);
      UNROLL for (int r = 0; r < R; r++) acc[m][r] = fma(xs, weights[r], acc[m][r]);
    }
  }
  finish<M, R>(p, acc, row, column, k);
}

// Tiles that so many rows of x take: as large ones as there are, then of 4, of 2 and of 1.
inline int passes(int64_t rows) {
  return static_cast<int>(rows / kTileRows) + __builtin_popcountll(rows % kTileRows);
}

// Rows in f32, in the order in which the kernel of bf16 weights reads them.
WIDE inline void arrange(const uint16_t* from, float* to, int64_t rows, int64_t k) {
  for (int64_t row = 0; row < rows; row++, from += k, to += k) {
    int64_t i = 0;
    for (; i + 2 * kPart <= k; i += 2 * kPart) {
      store_part(to + i, load_even(from + i));
      store_part(to + i + kPart, load_odd(from + i));
    }
    for (; i < k; i++) to[i] = widen(from[i]);
  }
}

// Columns begin..end of the output: `R` weight rows at a time, and all of x's rows while they are near.
#define RLHF_COLUMNS(NAME, TARGET, X, T, TILE)                                                        \
  template <int R>                                                                                    \
  TARGET void NAME##_rows(const Product<X, T>& p, int64_t rows, int64_t column) {                     \
    Pass pass{0, passes(rows)};                                                                       \
    int64_t row = 0;                                                                                  \
    for (; row + kTileRows <= rows; row += kTileRows, pass.number++) {                                \
      TILE<kTileRows, R>(p, row, column, pass);                                                       \
    }                                                                                                 \
    if (rows - row >= 4) { TILE<4, R>(p, row, column, pass); row += 4; pass.number++; }               \
    if (rows - row >= 2) { TILE<2, R>(p, row, column, pass); row += 2; pass.number++; }               \
    if (rows - row >= 1) TILE<1, R>(p, row, column, pass);                                            \
  }                                                                                                   \
  inline void NAME(const Product<X, T>& p, int64_t rows, int64_t begin, int64_t end) {                \
    int64_t column = begin;                                                                           \
    for (; column + kTile <= end; column += kTile) NAME##_rows<kTile>(p, rows, column);               \
    for (; column < end; column++) NAME##_rows<1>(p, rows, column);                                   \
  }
RLHF_COLUMNS(columns, WIDE, float, float, tile)
RLHF_COLUMNS(columns, WIDE, float, uint16_t, tile)

// Threads share them out tile by tile.
template <class X, class T, class Columns>
void run(const Products<T>& all, const X* x, const Columns& columns) {
  auto tiles = [](int64_t n) { return (n + kTile - 1) / kTile; };
  int64_t total = 0;
  for (int64_t n : all.widths) total += tiles(n);
  split(total, std::max<int64_t>(1, 8192 / (kTile * all.k)), [&](int64_t begin, int64_t end) {
    for (size_t i = 0; i < all.widths.size() && end > 0; i++) {
      int64_t n = all.widths[i], count = tiles(n);
      Product<X, T> product{x, all.weights[i], all.biases[i], all.outputs[i], all.k, n};
      if (begin < count) {
        columns(product, all.rows, std::max<int64_t>(begin, 0) * kTile, std::min(n, end * kTile));
      }
      begin -= count;
      end -= count;
    }
  });
}
template <class X, class T>
void columns_of(const Product<X, T>& p, int64_t rows, int64_t begin, int64_t end) {
  columns(p, rows, begin, end);
}

inline void products(const Products<float>& all) { run(all, all.x, columns_of<float, float>); }
inline void products(const Products<uint16_t>& all) {
  // Of libtorch, whose memory begins with a line of the cache.
  auto x = at::empty({all.rows, all.k}, at::kFloat);
  arrange(all.x, x.data_ptr<float>(), all.rows, all.k);
  run(all, x.data_ptr<float>(), columns_of<float, uint16_t>);
}
