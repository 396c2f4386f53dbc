// Products of matrices with many rows, in f32 or of bf16 that are widened. libtorch's f32 ones go through a library that
// has nothing for processors with AVX-512 that its maker did not make, and its bf16 ones are slow where the processor has
// nothing that multiplies them quicker than f32; these fill the registers of any.
//
// A tile of sums that fits the registers is made of a panel of `kHigh` rows of the left factor and one of `kBroad` columns of
// the right one. Panels are copied to lie in the order in which they are used, but for rows that can be read where they are.
// An element of the product is the sum of its terms in their order, in blocks of `kDeep`: it depends on its row and its column
// alone, bit for bit, not on how many others there are, nor on the number of threads or the width of registers.

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
WIDE INLINE void pack_panels(const Vectors<T>& from, int64_t k, int64_t panels, float* out) {
  constexpr int64_t kFew = 16;
  int64_t step = from.apart == 1 ? kFew : k;
  for (int64_t t = 0; t < k; t += step) {
    for (int64_t p = 0; p < panels; p++) {
      pack<width>(from.at + p * width * from.apart + t * from.along, from.apart, from.along, from.count - p * width,
                  std::min(step, k - t), out + (p * k + t) * width);
    }
  }
}

// The panels `begin` to `end` of several factors, of k terms.
template <int64_t width, class T>
WIDE void pack_factors(const std::vector<Vectors<T>>& factors, const std::vector<Panel>& panels, int64_t begin, int64_t end,
                       int64_t k, float* out) {
  while (begin < end) {
    const Panel& panel = panels[begin];
    int64_t past = begin + 1;
    while (past < end && panels[past].factor == panel.factor) past++;
    pack_panels<width>(factors[panel.factor].after(panel.first), k, past - begin, out);
    out += (past - begin) * width * k;
    begin = past;
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

// Of a tile that is not whole, or not f32.
template <class C>
void finish_some(float (*sums)[kBroad], const Finish<C>& to) {
  for (int64_t r = 0; r < to.rows; r++) {
    C* out = to.c + r * to.stride;
    for (int64_t i = 0; i < to.columns; i++) {
      float sum = sums[r][i];
      if (to.bias) sum += get(to.bias + i);
      if (to.add) sum += get(out + i);
      put(out + i, sum);
    }
  }
}

// A tile of the product, of `R` rows or one less. Element t of row r is a[r * apart + t], or, packed, a[t * kHigh + r].
template <int R, bool packed, class C>
WIDE void tile(const float* a, int64_t apart, const float* b, int64_t k, const Finish<C>& to) {
  Part acc[R][2];
  UNROLL for (int r = 0; r < R; r++) acc[r][0] = acc[r][1] = all_part(0.0f);
  // What the sums are written or added to is fetched meanwhile.
  UNROLL for (int r = 0; r < R; r++) {
    const C* out = to.c + std::min<int64_t>(r, to.rows - 1) * to.stride;
    __builtin_prefetch(out, 1);
    __builtin_prefetch(out + kBroad - 1, 1);
  }
  // Every third row has a pointer, the others are one or two rows further: as many as there are registers for. The last may not
  // be there, and is then the one before.
  const float* thirds[(R + 2) / 3];
  UNROLL for (int i = 0; i < (R + 2) / 3; i++) thirds[i] = a + 3 * i * apart;
  const float* last = a + (to.rows - 1) * apart;
  for (int64_t t = 0; t < k; t++, b += kBroad) {
    Part left = load_part(b), right = load_part(b + kPart);
    UNROLL for (int r = 0; r < R; r++) {
      Part x = all_part(packed ? a[t * kHigh + r] : r + 1 == R ? last[t] : thirds[r / 3][r % 3 * apart + t]);
      acc[r][0] = fma(x, left, acc[r][0]);
      acc[r][1] = fma(x, right, acc[r][1]);
    }
  }
  if constexpr (std::is_same_v<C, float>) {
    if (to.columns == kBroad) {
      UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int v = 0; v < 2 && r < to.rows; v++) {
          float* out = to.c + r * to.stride + v * kPart;
          if (to.bias) acc[r][v] = add(acc[r][v], load_part(to.bias + v * kPart));
          if (to.add) acc[r][v] = add(acc[r][v], load_part(out));
          store_part(out, acc[r][v]);
        }
      }
      return;
    }
  }
  float sums[R][kBroad];
  UNROLL for (int r = 0; r < R; r++) {
    store_part(sums[r], acc[r][0]);
    store_part(sums[r] + kPart, acc[r][1]);
  }
  finish_some(sums, to);
}

template <class C>
using Tile = void (*)(const float*, int64_t, const float*, int64_t, const Finish<C>&);

template <bool packed, class C>
Tile<C> tile_for(int64_t rows) {
  constexpr int most = kHigh;
  static constexpr Tile<C> tiles[] = {tile<2, packed, C>,
                                      tile<4, packed, C>,
                                      tile<6, packed, C>,
                                      tile<std::min(8, most), packed, C>,
                                      tile<std::min(10, most), packed, C>,
                                      tile<std::min(12, most), packed, C>,
                                      tile<most, packed, C>};
  return tiles[(rows - 1) / 2];
}

// Panels of rows of the left factors, of k terms: where they lie, or packed, [panels][terms][kHigh].
template <class T>
class Lefts {
 public:
  Lefts(const std::vector<Vectors<T>>& factors, int64_t k)
      : factors_(factors), panels_(panels_of(factors, kHigh)), terms_(k), lie_(all_lie(factors)) {
    if (lie_) return;
    memory_ = at::empty({count() * kHigh * k}, at::kFloat);
    packed_ = memory_.data_ptr<float>();
    split(count(), std::max<int64_t>(1, 16384 / (kHigh * std::max<int64_t>(1, k))), [&](int64_t begin, int64_t end) {
      pack_factors<kHigh>(factors_, panels_, begin, end, k, packed_ + begin * kHigh * k);
    });
  }
  int64_t count() const { return panels_.size(); }
  int64_t terms() const { return terms_; }
  bool lie() const { return lie_; }
  const Panel& panel(int64_t i) const { return panels_[i]; }
  // The tile of a panel with one of columns, packed at `b`.
  template <class C>
  void multiply(int64_t i, const float* b, const Finish<C>& to) const {
    const Panel& panel = panels_[i];
    if constexpr (std::is_same_v<T, float>) {
      if (lie_) {
        auto rows = factors_[panel.factor].after(panel.first);
        tile_for<false, C>(panel.count)(rows.at, rows.apart, b, terms_, to);
        return;
      }
    }
    tile_for<true, C>(panel.count)(packed_ + i * kHigh * terms_, 0, b, terms_, to);
  }

 private:
  const std::vector<Vectors<T>>& factors_;
  std::vector<Panel> panels_;
  int64_t terms_;
  bool lie_;
  at::Tensor memory_;
  float* packed_ = nullptr;
};

// A block of terms of the products, left by left.
template <class T, class C>
void multiply_block(const Lefts<T>& rows, const std::vector<Vectors<T>>& rights, const std::vector<Output<C>>& outputs) {
  auto columns = panels_of(rights, kBroad);
  int64_t panels = columns.size(), deep = std::max<int64_t>(1, rows.terms());
  if (panels == 0 || rows.count() == 0) return;
  int64_t threads = std::clamp<int64_t>(panels * rows.count() * deep * kHigh * kBroad >> 19, 1, most_threads());
  // Pieces of columns that a thread keeps near. Where they are few, each is packed for every group of rows, which a thread then
  // has for all of them, if it has packed about those rows itself.
  int64_t across = parts(panels, std::max<int64_t>(1, near_floats() / (kBroad * deep)));
  bool grouped = threads > 1 && !rows.lie() && across < 4 * threads;
  int64_t groups = grouped ? std::clamp<int64_t>(rows.count() * kHigh / kChunk, 1, threads) : 1;
  int64_t tall = parts(rows.count(), groups);
  if (groups < threads) across = parts(across, threads) * threads;
  int64_t side = parts(panels, std::min(panels, across));
  across = parts(panels, side);
  auto memory = at::empty({threads * side * kBroad * deep}, at::kFloat);
  float* buffers = memory.data_ptr<float>();
  std::vector<int64_t> packed(threads, -1);
  // An item is a panel of rows of a piece. With a group each, threads are about the same piece, and help one another to the end;
  // else the one that helps packs a piece first.
  int64_t worth = groups > 1 ? 2 : parts(kWorth, kHigh);
  share_out(groups * across * tall, threads, 2, worth, [&](int64_t thread, Shares::Range items) {
    float* near = buffers + thread * side * kBroad * deep;
    for (int64_t item = items.begin; item < items.end; item++) {
      int64_t high = item / (tall * across) * tall + item % tall;
      if (high >= rows.count()) continue;
      int64_t piece = item / tall % across, begin = piece * side, end = std::min(panels, begin + side);
      if (piece != packed[thread]) pack_factors<kBroad>(rights, columns, begin, end, rows.terms(), near);
      packed[thread] = piece;
      const Panel& row = rows.panel(high);
      for (int64_t i = begin; i < end; i++) {
        const Panel& column = columns[i];
        auto& to = outputs[row.factor * rights.size() + column.factor];
        const C* bias = to.bias ? to.bias + column.first : nullptr;
        Finish<C> finish{to.c + row.first * to.stride + column.first, to.stride, row.count, column.count, to.add, bias};
        rows.multiply(high, near + (i - begin) * kBroad * deep, finish);
      }
    }
  });
}

template <class T, class C>
void multiply_blocks(const std::vector<Vectors<T>>& lefts, const std::vector<Vectors<T>>& rights, int64_t k,
                     std::vector<Output<C>> outputs) {
  Terms terms(k);
  for (int64_t block = 0; block < terms.blocks; block++) {
    int64_t term = terms.begin(block);
    auto from = from_term(lefts, term), to = from_term(rights, term);
    multiply_block(Lefts<T>(from, terms.begin(block + 1) - term), to, outputs);
    for (auto& output : outputs) output.add = true, output.bias = nullptr;
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

// Each result rounded once: by way of f32 where there are several blocks of terms.
template <class T, class C>
void multiply_rounded(const std::vector<Vectors<T>>& lefts, const std::vector<Vectors<T>>& rights, int64_t k,
                      const std::vector<Output<C>>& outputs) {
  if (std::is_same_v<C, float> || Terms(k).blocks == 1) return multiply_blocks(lefts, rights, k, outputs);
  std::vector<at::Tensor> memory;
  std::vector<Output<float>> sums;
  for (auto& left : lefts) {
    for (auto& right : rights) {
      memory.push_back(at::empty({left.count, right.count}, at::kFloat));
      sums.push_back({memory.back().data_ptr<float>(), right.count});
    }
  }
  multiply_blocks(lefts, rights, k, sums);
  for (size_t i = 0; i < sums.size(); i++) {
    int64_t m = lefts[i / rights.size()].count, n = rights[i % rights.size()].count;
    split(m, std::max<int64_t>(1, 32768 / std::max<int64_t>(1, n)),
          [&](int64_t begin, int64_t end) { round_rows(sums[i].c, outputs[i], n, begin, end); });
  }
}

// The products of each left factor with each right one, of k terms: `outputs` has those of the first left one first.
template <class T, class C>
void multiply_all(const std::vector<Vectors<T>>& lefts, const std::vector<Vectors<T>>& rights, int64_t k,
                  const std::vector<Output<C>>& outputs) {
  if (all_lie(lefts)) return multiply_rounded(lefts, rights, k, outputs);
  // Of rows that are packed about as many at a time, in whole panels.
  int64_t rows = 0;
  for (auto& left : lefts) rows += left.count;
  int64_t tall = parts(parts(rows, std::max<int64_t>(1, parts(rows, kTall))), kHigh) * kHigh, row = 0;
  for (size_t i = 0; i < lefts.size();) {
    std::vector<Vectors<T>> some;
    std::vector<Output<C>> to;
    for (int64_t room = tall; room > 0 && i < lefts.size();) {
      int64_t count = std::min(room, lefts[i].count - row);
      some.push_back(lefts[i].part(row, count));
      for (size_t j = 0; j < rights.size(); j++) to.push_back(outputs[i * rights.size() + j].from(row));
      room -= count;
      row += count;
      if (row == lefts[i].count) i++, row = 0;
    }
    multiply_rounded(some, rights, k, to);
  }
}
