// Products of f32 matrices with many rows, on the CPU. libtorch's go through a library that has nothing for
// processors with AVX-512 that its maker did not make; these fill the wide registers of any.
//
// Both factors are copied into panels that lie in the order in which they are used: rows of the left one 14 at a
// time, columns of the right one 32 at a time, which makes 28 registers of sums. An element of the product is
// the sum of its terms in their order, in blocks of `kDeep`: it depends on its row and its column alone, bit for bit, not
// on how many others there are, nor on the number of threads.
#pragma once

#include "vectors.h"

#include <ATen/ops/empty.h>

#include <atomic>

#ifdef RLHF_KERNELS
namespace rlhf::gemm {

constexpr int64_t kHigh = 14;         // rows of a tile
constexpr int64_t kBroad = 32;        // columns of a tile
constexpr int64_t kDeep = 832;        // terms that are summed at once
constexpr int64_t kNear = 112 << 10;  // floats of the right factor that a thread keeps near: half of its cache
constexpr int64_t kTall = 150;        // panels of the left factor that are packed at once
constexpr int64_t kChunk = 12;        // panels of rows that packed columns are worth packing for

inline int64_t parts(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Element (i, j) is at[i * row + j * column].
struct Matrix {
  const float* at;
  int64_t row, column;
  Matrix from(int64_t i, int64_t j) const { return {at + i * row + j * column, row, column}; }
};

// A block of the terms: `kDeep` or fewer, about as many as in the others.
struct Terms {
  int64_t count, blocks;
  explicit Terms(int64_t k) : count(k), blocks(std::max<int64_t>(1, parts(k, kDeep))) {}
  int64_t begin(int64_t block) const { return count * block / blocks; }
  int64_t most() const { return parts(count, blocks); }
};

WIDE INLINE __m512 low_pairs(__m512 a, __m512 b) {
  return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}
WIDE INLINE __m512 high_pairs(__m512 a, __m512 b) {
  return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}

// So many of sixteen, none below 0.
inline __mmask16 first_of(int64_t count) {
  return static_cast<__mmask16>((1u << std::clamp<int64_t>(count, 0, 16)) - 1);
}

// Rows become columns.
WIDE INLINE void transpose(__m512 (&x)[16]) {
  __m512 y[16];
  UNROLL for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
  }
  // x[4 q + j] has column j of every four, of rows 4 q to 4 q + 3.
  UNROLL for (int q = 0; q < 16; q += 4) {
    x[q] = low_pairs(y[q], y[q + 2]);
    x[q + 1] = high_pairs(y[q], y[q + 2]);
    x[q + 2] = low_pairs(y[q + 1], y[q + 3]);
    x[q + 3] = high_pairs(y[q + 1], y[q + 3]);
  }
  UNROLL for (int j = 0; j < 4; j++) {
    y[j] = _mm512_shuffle_f32x4(x[j], x[4 + j], 0x88);
    y[4 + j] = _mm512_shuffle_f32x4(x[j], x[4 + j], 0xdd);
    y[8 + j] = _mm512_shuffle_f32x4(x[8 + j], x[12 + j], 0x88);
    y[12 + j] = _mm512_shuffle_f32x4(x[8 + j], x[12 + j], 0xdd);
  }
  UNROLL for (int j = 0; j < 4; j++) {
    x[j] = _mm512_shuffle_f32x4(y[j], y[8 + j], 0x88);
    x[8 + j] = _mm512_shuffle_f32x4(y[j], y[8 + j], 0xdd);
    x[4 + j] = _mm512_shuffle_f32x4(y[4 + j], y[12 + j], 0x88);
    x[12 + j] = _mm512_shuffle_f32x4(y[4 + j], y[12 + j], 0xdd);
  }
}

// `width` (or, of the last panel, `there`) vectors of `k` elements side by side: out[t * width + i] is element t of
// vector i, zero for those that there are not. `apart` is from one vector to the next, `along` from one element to the next.
template <int64_t width>
WIDE INLINE void pack(const float* from, int64_t apart, int64_t along, int64_t there, int64_t k, float* out) {
  if (apart == 1) {
    constexpr int64_t whole = (width + 15) / 16;
    __mmask16 masks[whole], stores[whole];
    for (int64_t v = 0; v < whole; v++) {
      masks[v] = first_of(there - 16 * v);
      stores[v] = first_of(width - 16 * v);
    }
    for (int64_t t = 0; t < k; t++, from += along, out += width) {
      UNROLL for (int64_t v = 0; v < whole; v++) {
        store(out + 16 * v, stores[v], load(from + 16 * v, masks[v]));
      }
    }
    return;
  }
  int64_t t = 0;
  if (along == 1) {
    for (; t + 16 <= k; t += 16, out += 16 * width) {
      for (int64_t i = 0; i < width; i += 16) {
        __m512 square[16];
        UNROLL for (int r = 0; r < 16; r++) {
          square[r] = i + r < there ? load(from + (i + r) * apart + t) : _mm512_setzero_ps();
        }
        transpose(square);
        __mmask16 kept = first_of(width - i);
        UNROLL for (int r = 0; r < 16; r++) store(out + r * width + i, kept, square[r]);
      }
    }
  }
  for (; t < k; t++, out += width) {
    for (int64_t i = 0; i < width; i++) out[i] = i < there ? from[i * apart + t * along] : 0.0f;
  }
}

// A tile of the product: `R` rows, of which `rows` are there, and the columns that the masks have.
template <int R>
WIDE INLINE void tile(const float* a, const float* b, int64_t k, float* c, int64_t stride, int64_t rows,
                      __mmask16 first, __mmask16 second, bool add, const float* bias) {
  __m512 acc[R][2];
  UNROLL for (int r = 0; r < R; r++) acc[r][0] = acc[r][1] = _mm512_setzero_ps();
  for (int64_t t = 0; t < k; t++, a += kHigh, b += kBroad) {
    __m512 left = _mm512_loadu_ps(b), right = _mm512_loadu_ps(b + 16);
    UNROLL for (int r = 0; r < R; r++) {
      __m512 x = _mm512_set1_ps(a[r]);
      acc[r][0] = _mm512_fmadd_ps(x, left, acc[r][0]);
      acc[r][1] = _mm512_fmadd_ps(x, right, acc[r][1]);
    }
  }
  UNROLL for (int r = 0; r < R; r++) {
    if (r < rows) {
      float* out = c + r * stride;
      if (bias) {
        acc[r][0] = _mm512_add_ps(acc[r][0], load(bias, first));
        acc[r][1] = _mm512_add_ps(acc[r][1], load(bias + 16, second));
      }
      if (add) {
        acc[r][0] = _mm512_add_ps(acc[r][0], load(out, first));
        acc[r][1] = _mm512_add_ps(acc[r][1], load(out + 16, second));
      }
      store(out, first, acc[r][0]);
      store(out + 16, second, acc[r][1]);
    }
  }
}

using Tile = void (*)(const float*, const float*, int64_t, float*, int64_t, int64_t, __mmask16, __mmask16, bool,
                      const float*);
template <int R>
WIDE void tile_of(const float* a, const float* b, int64_t k, float* c, int64_t stride, int64_t rows, __mmask16 first,
                  __mmask16 second, bool add, const float* bias) {
  tile<R>(a, b, k, c, stride, rows, first, second, add, bias);
}
inline Tile tile_for(int64_t rows) {
  static constexpr Tile tiles[] = {tile_of<2>, tile_of<4>, tile_of<6>, tile_of<8>, tile_of<10>, tile_of<12>, tile_of<14>};
  return tiles[(rows - 1) / 2];
}

// The left factor, packed: [blocks of terms][panels of rows][terms][kHigh].
class Left {
 public:
  Left(Matrix a, int64_t m, int64_t k) : m_(m), terms_(k), panels_(parts(m, kHigh)) {
    memory_ = at::empty({std::max<int64_t>(1, panels_ * kHigh * k)}, at::kFloat);
    float* to = memory_.data_ptr<float>();
    split(panels_ * terms_.blocks, std::max<int64_t>(1, 32768 / (kHigh * terms_.most() + 1)),
          [&](int64_t begin, int64_t end) WIDE {
            for (int64_t i = begin; i < end; i++) {
              int64_t block = i / panels_, panel = i % panels_, t = terms_.begin(block), row = panel * kHigh;
              pack<kHigh>(a.from(row, t).at, a.row, a.column, std::min(kHigh, m - row), terms_.begin(block + 1) - t,
                          to + place(block, panel));
            }
          });
  }
  const float* panel(int64_t block, int64_t panel) const { return memory_.data_ptr<float>() + place(block, panel); }
  int64_t rows() const { return m_; }
  int64_t panels() const { return panels_; }
  const Terms& terms() const { return terms_; }

 private:
  int64_t place(int64_t block, int64_t panel) const {
    int64_t t = terms_.begin(block);
    return kHigh * (t * panels_ + panel * (terms_.begin(block + 1) - t));
  }
  int64_t m_;
  Terms terms_;
  int64_t panels_;
  at::Tensor memory_;
};

// What is made of a product: c [m, n], rows `stride` apart.
struct Output {
  float* c;
  int64_t stride;
  bool add = false;             // to what is there
  const float* bias = nullptr;  // [n]
};

// Some columns of a factor [k, n], packed: [panels][terms][kBroad].
struct Right {
  Matrix b;
  int64_t n, term, terms;  // terms from `term` on
  WIDE void pack_into(float* near, int64_t begin, int64_t end) const {
    for (int64_t panel = begin; panel < end; panel++, near += kBroad * terms) {
      int64_t column = panel * kBroad;
      pack<kBroad>(b.from(term, column).at, b.column, b.row, std::min(kBroad, n - column), terms, near);
    }
  }
};

// A block of terms for the panels `begin` to `end` of columns, packed in `near`, and `first` to `last` of rows.
inline void tiles(const Left& a, int64_t block, const Right& b, const Output& to, const float* near, int64_t begin,
                  int64_t end, int64_t first, int64_t last) {
  bool add = to.add || block > 0;
  const float* bias = block == 0 ? to.bias : nullptr;
  for (int64_t high = first; high < last; high++) {
    int64_t row = high * kHigh, rows = std::min(kHigh, a.rows() - row);
    Tile tile = tile_for(rows);
    for (int64_t panel = begin; panel < end; panel++) {
      int64_t column = panel * kBroad, there = std::min(kBroad, b.n - column);
      tile(a.panel(block, high), near + (panel - begin) * kBroad * b.terms, b.terms, to.c + row * to.stride + column,
           to.stride, rows, first_of(there), first_of(there - 16), add, bias ? bias + column : nullptr);
    }
  }
}

// a times b, whose element (t, j) is b.at[t * b.row + j * b.column].
inline void multiply(const Left& a, Matrix b, int64_t n, const Output& to) {
  int64_t panels = parts(n, kBroad), most = at::in_parallel_region() ? 1 : at::get_num_threads();
  if (panels == 0 || a.panels() == 0) return;
  int64_t deep = std::max<int64_t>(1, a.terms().most());
  int64_t threads = std::clamp<int64_t>(panels * a.panels() * deep / 1024, 1, most);
  // Pieces of columns that a thread keeps near, and of rows: several for each thread, which takes the next when it is done
  // with one, so that none waits long for another that was held up.
  int64_t side = std::clamp<int64_t>(kNear / (kBroad * deep), 1, parts(panels, threads));
  int64_t across = parts(panels, side);
  int64_t down = std::clamp<int64_t>(parts(threads == 1 ? 1 : 4 * threads, across), 1, parts(a.panels(), kChunk));
  auto memory = at::empty({threads * side * kBroad * deep}, at::kFloat);
  float* buffers = memory.data_ptr<float>();
  for (int64_t block = 0; block < a.terms().blocks; block++) {
    int64_t term = a.terms().begin(block);
    Right right{b, n, term, a.terms().begin(block + 1) - term};
    std::atomic<int64_t> next{0};
    split(threads, 1, [&](int64_t begin, int64_t end) {
      float* near = buffers + begin * side * kBroad * deep;
      int64_t packed = -1;
      for (int64_t i = next++; i < across * down; i = next++) {
        int64_t x = i / down, y = i % down, left = x * side, past = std::min(panels, left + side);
        if (x != packed) right.pack_into(near, left, past);
        packed = x;
        tiles(a, block, right, to, near, left, past, a.panels() * y / down, a.panels() * (y + 1) / down);
      }
    });
  }
}

// The product of [m, k] with [k, n].
inline void multiply(Matrix a, Matrix b, int64_t m, int64_t n, int64_t k, const Output& to) {
  constexpr int64_t tall = kTall * kHigh;
  for (int64_t row = 0; row < m; row += tall) {
    Left left(a.from(row, 0), std::min(tall, m - row), k);
    Output part = to;
    part.c += row * to.stride;
    multiply(left, b, n, part);
  }
}

}  // namespace rlhf::gemm
#endif
