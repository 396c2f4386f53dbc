// Products of matrices with many rows, in f32 or of bf16 that are widened. libtorch's f32 ones go through a library that
// has nothing for processors with AVX-512 that its maker did not make, and its bf16 ones are slow where the processor has
// nothing that multiplies them quicker than f32; these fill the registers of any.
//
// Both factors are copied into panels that lie in the order in which they are used: rows of the left one `kHigh` at a
// time, columns of the right one `kBroad` at a time, which makes a tile of sums that fits the registers. An element of the
// product is the sum of its terms in their order, in blocks of `kDeep`: it depends on its row and its column alone, bit for
// bit, not on how many others there are, nor on the number of threads or the width of registers.

constexpr int64_t kHigh = kRegisters == 32 ? 14 : 6;  // rows of a tile
constexpr int64_t kBroad = 2 * kPart;                 // columns of a tile

// `width` vectors of `k` elements side by side: out[t * width + i] is element t of vector i, zero for those behind the
// `left` that there are. `apart` is from one vector to the next, `along` from one element to the next.
template <int64_t width, class T>
WIDE void pack(const T* from, int64_t apart, int64_t along, int64_t left, int64_t k, float* out) {
  constexpr int64_t whole = (width + kPart - 1) / kPart * kPart;
  int64_t t = 0;
  if (apart == 1 && left >= whole) {
    for (; t < k; t++, from += along, out += width) {
      UNROLL for (int64_t i = 0; i < width; i += kPart) {
        store_first(out + i, load_part(from + i), width - i, t + 1 < k);
      }
    }
    return;
  }
  if (along == 1) {
    for (; t + kPart <= k; t += kPart, out += kPart * width) {
      for (int64_t i = 0; i < width; i += kPart) {
        Part square[kPart];
        UNROLL for (int r = 0; r < kPart; r++) {
          square[r] = i + r < std::min(width, left) ? load_part(from + (i + r) * apart + t) : all_part(0.0f);
        }
        transpose(square);
        UNROLL for (int r = 0; r < kPart; r++) {
          store_first(out + r * width + i, square[r], width - i, r + 1 < kPart);
        }
      }
    }
  }
  for (; t < k; t++, out += width) {
    for (int64_t i = 0; i < width; i++) out[i] = i < left ? get(from + i * apart + t * along) : 0.0f;
  }
}

// `panels` of them, one after another. Where the vectors' elements lie side by side, `kFew` of each vector at a time: a row is
// then read as far as all panels have it before the next, which is in another page of memory.
template <int64_t width, class T>
WIDE INLINE void pack_panels(const T* from, int64_t apart, int64_t along, int64_t left, int64_t k, int64_t panels,
                             float* out) {
  constexpr int64_t kFew = 16;
  int64_t step = apart == 1 ? kFew : k;
  for (int64_t t = 0; t < k; t += step) {
    for (int64_t p = 0; p < panels; p++) {
      pack<width>(from + p * width * apart + t * along, apart, along, left - p * width, std::min(step, k - t),
                  out + (p * k + t) * width);
    }
  }
}

// What a tile is finished with.
template <class C>
struct Finish {
  C* c;
  int64_t stride, rows, columns;  // that are there
  bool add;
  const C* bias;
};

// A tile of the product, of `R` rows.
template <int R, class C>
WIDE void tile(const float* a, const float* b, int64_t k, const Finish<C>& to) {
  Part acc[R][2];
  UNROLL for (int r = 0; r < R; r++) acc[r][0] = acc[r][1] = all_part(0.0f);
  // What the sums are written or added to is fetched meanwhile.
  UNROLL for (int r = 0; r < R; r++) {
    const C* out = to.c + std::min<int64_t>(r, to.rows - 1) * to.stride;
    __builtin_prefetch(out, 1);
    __builtin_prefetch(out + kBroad - 1, 1);
  }
  for (int64_t t = 0; t < k; t++, a += kHigh, b += kBroad) {
    Part left = load_part(b), right = load_part(b + kPart);
    UNROLL for (int r = 0; r < R; r++) {
      Part x = all_part(a[r]);
      acc[r][0] = fma(x, left, acc[r][0]);
      acc[r][1] = fma(x, right, acc[r][1]);
    }
  }
  bool whole = to.columns >= kBroad && std::is_same_v<C, float>;
  UNROLL for (int r = 0; r < R; r++) {
    if (r < to.rows) {
      C* out = to.c + r * to.stride;
      if (whole) {
        UNROLL for (int v = 0; v < 2; v++) {
          if (to.bias) acc[r][v] = add(acc[r][v], load_part(to.bias + v * kPart));
          if (to.add) acc[r][v] = add(acc[r][v], load_part(out + v * kPart));
          if constexpr (std::is_same_v<C, float>) store_part(out + v * kPart, acc[r][v]);
        }
      } else {
        float sums[kBroad];
        store_part(sums, acc[r][0]);
        store_part(sums + kPart, acc[r][1]);
        for (int64_t i = 0; i < std::min(to.columns, kBroad); i++) {
          if (to.bias) sums[i] += get(to.bias + i);
          if (to.add) sums[i] += get(out + i);
          put(out + i, sums[i]);
        }
      }
    }
  }
}

template <class C>
using Tile = void (*)(const float*, const float*, int64_t, const Finish<C>&);

template <class C>
Tile<C> tile_for(int64_t rows) {
  constexpr int most = kHigh;
  static constexpr Tile<C> tiles[] = {tile<2, C>,  tile<4, C>, tile<6, C>, tile<std::min(8, most), C>,
                                      tile<std::min(10, most), C>, tile<std::min(12, most), C>, tile<most, C>};
  return tiles[(rows - 1) / 2];
}

// A block of terms of rows of the left factor, packed: [panels][terms][kHigh]. No more is packed at once: what the tiles
// read again for each piece of columns stays in the last cache. The rows are in groups of the same size, one for each thread
// that has enough to do with it; the last panel of a group has what is left of its rows.
class Left {
 public:
  template <class T>
  Left(Matrix<T> a, int64_t rows, int64_t terms)
      : rows_(rows), terms_(terms), groups_(std::clamp<int64_t>(rows / kChunk, 1, most_threads())),
        group_rows_(parts(rows, groups_)), tall_(parts(group_rows_, kHigh)),
        memory_(at::empty({panels() * kHigh * terms}, at::kFloat)) {
    float* to = memory_.data_ptr<float>();
    packed_ = to;  // asked for once: libtorch checks each time
    split(panels(), std::max<int64_t>(1, 16384 / (kHigh * std::max<int64_t>(1, terms))),
          [&](int64_t begin, int64_t end) { fill(a, begin, end, to); });
  }
  const float* panel(int64_t panel) const { return packed_ + panel * kHigh * terms_; }
  // The first row of a panel, and how many it has: none, perhaps, at the end of the last group.
  int64_t row(int64_t panel) const { return panel / tall_ * group_rows_ + panel % tall_ * kHigh; }
  int64_t rows(int64_t panel) const {
    int64_t end = std::min(rows_, (panel / tall_ + 1) * group_rows_);
    return std::clamp<int64_t>(end - row(panel), 0, kHigh);
  }
  int64_t terms() const { return terms_; }
  int64_t groups() const { return groups_; }
  int64_t panels() const { return groups_ * tall_; }

 private:
  template <class T>
  WIDE void fill(Matrix<T> a, int64_t begin, int64_t end, float* to) const {
    while (begin < end) {
      int64_t group = begin / tall_, past = std::min(end, (group + 1) * tall_), first = row(begin);
      int64_t left = std::min(rows_, (group + 1) * group_rows_) - first;
      int64_t panels = std::clamp<int64_t>(parts(left, kHigh), 0, past - begin);
      pack_panels<kHigh>(a.from(first, 0).at, a.row, a.column, left, terms_, panels, to + begin * kHigh * terms_);
      begin = past;
    }
  }
  int64_t rows_, terms_, groups_, group_rows_, tall_;
  at::Tensor memory_;
  const float* packed_;
};

// Columns of a block of terms of the right factor, packed: [panels][terms][kBroad].
template <class T>
struct Right {
  Matrix<T> b;
  int64_t n, terms;
  WIDE void pack_into(float* near, int64_t begin, int64_t end) const {
    int64_t column = begin * kBroad;
    pack_panels<kBroad>(b.from(0, column).at, b.column, b.row, n - column, terms, end - begin, near);
  }
};

// The panels `begin` to `end` of columns, packed in `near`, and `first` to `last` of rows.
template <class C>
void tiles(const Left& a, int64_t n, const Output<C>& to, const float* near, int64_t begin, int64_t end, int64_t first,
           int64_t last) {
  for (int64_t high = first; high < last; high++) {
    int64_t row = a.row(high), rows = a.rows(high);
    if (rows == 0) continue;
    Tile<C> tile = tile_for<C>(rows);
    for (int64_t panel = begin; panel < end; panel++) {
      int64_t column = panel * kBroad;
      const C* bias = to.bias ? to.bias + column : nullptr;
      Finish<C> finish{to.c + row * to.stride + column, to.stride, rows, n - column, to.add, bias};
      tile(a.panel(high), near + (panel - begin) * kBroad * a.terms(), a.terms(), finish);
    }
  }
}

// A block of terms times the same of b, [terms, n].
template <class T, class C>
void multiply_block(const Left& a, Matrix<T> b, int64_t n, const Output<C>& to) {
  int64_t panels = parts(n, kBroad);
  if (panels == 0 || a.panels() == 0) return;
  Right<T> right{b, n, a.terms()};
  int64_t deep = std::max<int64_t>(1, a.terms());
  int64_t threads = std::clamp<int64_t>(panels * a.panels() * deep * kHigh * kBroad >> 19, 1, most_threads());
  // Pieces of columns that a thread keeps near. Where they are few, each is packed for every group of rows, which a thread
  // then has for all of them: it has packed about those rows itself.
  int64_t across = parts(panels, std::max<int64_t>(1, near_floats() / (kBroad * deep)));
  int64_t groups = threads == 1 || across >= 4 * threads ? 1 : a.groups(), tall = a.panels() / groups;
  int64_t side = parts(panels, std::min(panels, std::max(across, parts(threads, groups))));
  across = parts(panels, side);
  auto memory = at::empty({threads * side * kBroad * deep}, at::kFloat);
  float* buffers = memory.data_ptr<float>();
  std::vector<int64_t> packed(threads, -1);
  // An item is a panel of rows of a piece. With a group each, threads are about the same piece, and help one another to the end;
  // else the one that helps packs a piece first.
  int64_t worth = groups > 1 ? 2 : parts(kWorth, kHigh);
  share_out(groups * across * tall, threads, 2, worth, [&](int64_t thread, Shares::Range items) {
    float* near = buffers + thread * side * kBroad * deep;
    while (items.count() > 0) {
      int64_t piece = items.begin / tall % across, begin = piece * side, end = std::min(panels, begin + side);
      int64_t rest = items.begin % tall, first = items.begin / (tall * across) * tall + rest;
      int64_t rows = std::min(items.count(), tall - rest);
      if (piece != packed[thread]) right.pack_into(near, begin, end);
      packed[thread] = piece;
      tiles(a, n, to, near, begin, end, first, first + rows);
      items.begin += rows;
    }
  });
}

// The products of `a` [m, k] with each of the right factors [k, n]. What is packed of `a` is packed once.
template <class T, class C>
void multiply_rows(Matrix<T> a, int64_t m, int64_t k, const std::vector<Matrix<T>>& factors,
                   const std::vector<int64_t>& columns, const std::vector<Output<C>>& outputs) {
  Terms terms(k);
  for (int64_t block = 0; block < terms.blocks; block++) {
    int64_t term = terms.begin(block);
    Left left(a.from(0, term), m, terms.begin(block + 1) - term);
    for (size_t i = 0; i < factors.size(); i++) {
      Output<C> to = outputs[i];
      if (block > 0) to.add = true, to.bias = nullptr;
      multiply_block(left, factors[i].from(term, 0), columns[i], to);
    }
  }
}

template <class T>
WIDE void round_rows(const float* from, const Output<T>& to, int64_t width, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    T* out = to.c + row * to.stride;
    by_sixteen(width, [&](int64_t i, auto there) WIDE {
      Lanes sum = load(from + row * width + i, there);
      if (to.bias) sum = add(sum, load(to.bias + i, there));
      if (to.add) sum = add(sum, load(out + i, there));
      store(out + i, there, sum);
    });
  }
}

// `multiply_rows`, of any number of rows, each result rounded once: by way of f32 where there are several blocks of terms.
template <class T, class C>
void multiply_all(Matrix<T> a, int64_t m, int64_t k, const std::vector<Matrix<T>>& factors,
                  const std::vector<int64_t>& columns, const std::vector<Output<C>>& outputs) {
  bool in_f32 = !std::is_same_v<C, float> && Terms(k).blocks > 1;
  // About as many rows at a time, in whole panels.
  int64_t tall = parts(parts(m, std::max<int64_t>(1, parts(m, kTall))), kHigh) * kHigh;
  for (int64_t row = 0; row < m; row += tall) {
    int64_t rows = std::min(tall, m - row);
    std::vector<Output<C>> to;
    for (auto& output : outputs) to.push_back(output.from(row));
    if (!in_f32) {
      multiply_rows(a.from(row, 0), rows, k, factors, columns, to);
      continue;
    }
    std::vector<at::Tensor> memory;
    std::vector<Output<float>> sums;
    for (int64_t n : columns) {
      memory.push_back(at::empty({rows, n}, at::kFloat));
      sums.push_back({memory.back().data_ptr<float>(), n});
    }
    multiply_rows(a.from(row, 0), rows, k, factors, columns, sums);
    for (size_t i = 0; i < sums.size(); i++) {
      int64_t n = columns[i];
      split(rows, std::max<int64_t>(1, 32768 / std::max<int64_t>(1, n)),
            [&](int64_t begin, int64_t end) { round_rows(sums[i].c, to[i], n, begin, end); });
    }
  }
}
