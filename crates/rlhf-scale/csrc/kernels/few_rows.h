// Products of few rows with large matrices: a tile of sums for some rows and kTile of the weight's, side by side.
// For bf16 weights the rows come in f32, their elements in the order in which `load_pairs` brings those of the weights.

constexpr int kTile = 3;                               // weight rows that are multiplied side by side
constexpr int kTileRows = kRegisters == 32 ? 8 : 4;  // rows that are

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

template <int M, int R>
WIDE INLINE void tile(const Product<float, float>& p, int64_t row, int64_t column, bool fetch) {
  Part acc[M][R];
  UNROLL for (int m = 0; m < M; m++) {
    UNROLL for (int r = 0; r < R; r++) acc[m][r] = all_part(0.0f);
  }
  const float* x = p.x + row * p.k;
  const float* w = p.weight + column * p.k;
  int64_t k = 0;
  for (; k + 16 <= p.k; k += 16) {
    // What the next tile needs, while this one computes. Past the end it is a hint for nothing.
    if (fetch) {
      UNROLL for (int r = 0; r < R; r++) {
        _mm_prefetch(reinterpret_cast<const char*>(w + (r + R) * p.k + k), _MM_HINT_T1);
      }
    }
    UNROLL for (int part = 0; part < 16; part += kPart) {
      Part weights[R];
      UNROLL for (int r = 0; r < R; r++) weights[r] = load_part(w + r * p.k + k + part);
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
WIDE INLINE void tile(const Product<float, uint16_t>& p, int64_t row, int64_t column, bool fetch) {
  constexpr int64_t kBlock = 2 * kPart, kAhead = 16 << 10;  // elements; bytes
  Part acc[M][R];
  UNROLL for (int m = 0; m < M; m++) {
    UNROLL for (int r = 0; r < R; r++) acc[m][r] = all_part(0.0f);
  }
  const float* x = p.x + row * p.k;
  const uint16_t* w = p.weight + column * p.k;
  int64_t k = 0;
  for (; k + kBlock <= p.k; k += kBlock) {
    Part even[R], odd[R];
    UNROLL for (int r = 0; r < R; r++) {
      load_pairs(w + r * p.k + k, even[r], odd[r]);
      // Half the bytes are through in half the time, so that the next tile would be too near.
      if (fetch) _mm_prefetch(reinterpret_cast<const char*>(w) + kAhead + 2 * (k * R + kBlock * r), _MM_HINT_T1);
    }
    UNROLL for (int m = 0; m < M; m++) {
      Part xs = load_part(x + m * p.k + k);
      UNROLL for (int r = 0; r < R; r++) acc[m][r] = fma(xs, even[r], acc[m][r]);
    }
    UNROLL for (int m = 0; m < M; m++) {
      Part xs = load_part(x + m * p.k + k + kPart);
      UNROLL for (int r = 0; r < R; r++) acc[m][r] = fma(xs, odd[r], acc[m][r]);
    }
  }
  finish<M, R>(p, acc, row, column, k);
}

// Rows in f32, in the order of `load_pairs`.
inline void arrange(const uint16_t* from, float* to, int64_t rows, int64_t k) {
  for (int64_t row = 0; row < rows; row++, from += k, to += k) {
    int64_t i = 0;
    for (; i + 2 * kPart <= k; i += 2 * kPart) {
      for (int64_t j = 0; j < kPart; j++) {
        to[i + j] = widen(from[i + 2 * j]);
        to[i + kPart + j] = widen(from[i + 2 * j + 1]);
      }
    }
    for (; i < k; i++) to[i] = widen(from[i]);
  }
}

// Columns begin..end of the output: `R` weight rows at a time, and all of x's rows while they are near.
#define RLHF_COLUMNS(NAME, TARGET, X, T, TILE)                                                        \
  template <int R>                                                                                    \
  TARGET void NAME##_rows(const Product<X, T>& p, int64_t rows, int64_t column) {                     \
    int64_t row = 0;                                                                                  \
    for (; row + kTileRows <= rows; row += kTileRows) TILE<kTileRows, R>(p, row, column, row == 0);   \
    bool fetch = row == 0;                                                                            \
    if (rows - row >= 4) { TILE<4, R>(p, row, column, fetch); row += 4; fetch = false; }              \
    if (rows - row >= 2) { TILE<2, R>(p, row, column, fetch); row += 2; fetch = false; }              \
    if (rows - row >= 1) TILE<1, R>(p, row, column, fetch);                                           \
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
  std::vector<float> x(all.rows * all.k);
  arrange(all.x, x.data(), all.rows, all.k);
  run(all, x.data(), columns_of<float, uint16_t>);
}
