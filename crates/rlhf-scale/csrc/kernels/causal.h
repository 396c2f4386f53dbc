// Causal attention of a segment, for some heads that share their keys.

constexpr int kSide = kRegisters == 32 ? 4 : 2;  // parts of keys or dimensions side by side
constexpr int kSixteen = 16 / kPart;             // parts that make sixteen

template <class T>
WIDE void widen_row(const T* from, float* to, int64_t d) {
  for (int64_t i = 0; i < d; i += 16) store(to + i, load(from + i));
}

// Keys or values of a segment and head in f32: as rows [L, d], and as columns [d, padded L].
template <class T>
WIDE void fill(const Rows<const T>& from, const Segment& s, int64_t head, std::vector<float>& rows,
               std::vector<float>& columns) {
  int64_t d = from.width, keys = s.keys(), stride = padded(keys);
  rows.resize(keys * d);
  columns.resize(d * stride);
  for (int64_t j = 0; j < keys; j++) widen_row(from.at(s.row(j), head), rows.data() + j * d, d);
  for (int64_t i = 0; i < d; i++) {
    float* column = columns.data() + i * stride;
    for (int64_t j = 0; j < keys; j++) column[j] = rows[j * d + i];
    for (int64_t j = keys; j < stride; j++) column[j] = 0;
  }
}

// Rounded to the kind of `to`.
template <class T>
WIDE void put_row(const float* from, T* to, int64_t d) {
  for (int64_t i = 0; i < d; i += 16) store(to + i, load(from + i));
}

WIDE inline void add_to(const float* from, float* to, int64_t d) {
  for (int64_t i = 0; i < d; i += 16) store(to + i, add(load(to + i), load(from + i)));
}

// out[r][j] = factor * x[r] . columns[:, j], for j from `begin` to `end`, both multiples of 16.
template <int R>
WIDE void dots(const float* x, const float* columns, int64_t d, int64_t stride, int64_t begin, int64_t end,
               float factor, float* out) {
  auto some = [&](auto count, int64_t j) WIDE {
    constexpr int V = decltype(count)::value;
    Part acc[R][V];
    UNROLL for (int r = 0; r < R; r++) {
      UNROLL for (int v = 0; v < V; v++) acc[r][v] = all_part(0.0f);
    }
    const float* column = columns + j;
    for (int64_t i = 0; i < d; i++, column += stride) {
      Part keys[V];
      UNROLL for (int v = 0; v < V; v++) keys[v] = load_part(column + kPart * v);
      UNROLL for (int r = 0; r < R; r++) {
        Part query = all_part(x[r * d + i]);
        UNROLL for (int v = 0; v < V; v++) acc[r][v] = fma(query, keys[v], acc[r][v]);
      }
    }
    UNROLL for (int r = 0; r < R; r++) {
      UNROLL for (int v = 0; v < V; v++) {
        store_part(out + r * stride + j + kPart * v, mul(acc[r][v], all_part(factor)));
      }
    }
  };
  int64_t j = begin;
  for (; j + kSide * kPart <= end; j += kSide * kPart) some(std::integral_constant<int, kSide>(), j);
  for (; j < end; j += 16) some(std::integral_constant<int, kSixteen>(), j);
}

// sums[r] = the sum of weights[r][j] rows[j], for j from `begin` to `end`.
template <int R>
WIDE void mix(const float* weights, const float* rows, int64_t d, int64_t stride, int64_t begin, int64_t end,
              float* sums) {
  auto some = [&](auto count, int64_t i) WIDE {
    constexpr int V = decltype(count)::value;
    Part acc[R][V];
    UNROLL for (int r = 0; r < R; r++) {
      UNROLL for (int v = 0; v < V; v++) acc[r][v] = all_part(0.0f);
    }
    for (int64_t j = begin; j < end; j++) {
      Part row[V];
      UNROLL for (int v = 0; v < V; v++) row[v] = load_part(rows + j * d + i + kPart * v);
      UNROLL for (int r = 0; r < R; r++) {
        Part weight = all_part(weights[r * stride + j]);
        UNROLL for (int v = 0; v < V; v++) acc[r][v] = fma(weight, row[v], acc[r][v]);
      }
    }
    UNROLL for (int r = 0; r < R; r++) {
      UNROLL for (int v = 0; v < V; v++) store_part(sums + r * d + i + kPart * v, acc[r][v]);
    }
  };
  int64_t i = 0;
  for (; i + kSide * kPart <= d; i += kSide * kPart) some(std::integral_constant<int, kSide>(), i);
  for (; i < d; i += 16) some(std::integral_constant<int, kSixteen>(), i);
}

// sums[j] += the sum over r of weights[r][j] x[r], for j from `begin` to `end`.
template <int R>
WIDE void spread(const float* weights, const float* x, int64_t d, int64_t stride, int64_t begin, int64_t end,
                 float* sums) {
  auto some = [&](auto count, int64_t i) WIDE {
    constexpr int V = decltype(count)::value;
    Part rows[R][V];
    UNROLL for (int r = 0; r < R; r++) {
      UNROLL for (int v = 0; v < V; v++) rows[r][v] = load_part(x + r * d + i + kPart * v);
    }
    for (int64_t j = begin; j < end; j++) {
      float* target = sums + j * d + i;
      Part acc[V];
      UNROLL for (int v = 0; v < V; v++) acc[v] = load_part(target + kPart * v);
      UNROLL for (int r = 0; r < R; r++) {
        Part weight = all_part(weights[r * stride + j]);
        UNROLL for (int v = 0; v < V; v++) acc[v] = fma(weight, rows[r][v], acc[v]);
      }
      UNROLL for (int v = 0; v < V; v++) store_part(target + kPart * v, acc[v]);
    }
  };
  int64_t i = 0;
  for (; i + kSide * kPart <= d; i += kSide * kPart) some(std::integral_constant<int, kSide>(), i);
  for (; i < d; i += 16) some(std::integral_constant<int, kSixteen>(), i);
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
    auto visible = [&](int64_t j) WIDE { return between(j, seen.low(r), seen.high(r)); };
    Lanes most = all(-INFINITY);
    for (int64_t j = begin; j < end; j += 16) most = select(visible(j), max(most, load(row + j)), most);
    Lanes base = all(largest(most)), total = zero();
    for (int64_t j = begin; j < end; j += 16) {
      Lanes e = select(visible(j), exponential(sub(load(row + j), base)), zero());
      store(row + j, e);
      total = add(total, e);
    }
    Lanes inverse = all(1.0f / sum(total));
    for (int64_t j = begin; j < end; j += 16) store(row + j, mul(load(row + j), inverse));
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
    Lanes products = zero();
    for (int64_t j = begin; j < end; j += 16) products = fma(load(p + j), load(g + j), products);
    Lanes mean = all(sum(products)), factor = all(scale);
    for (int64_t j = begin; j < end; j += 16) {
      store(g + j, mul(mul(load(p + j), sub(load(g + j), mean)), factor));
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

template <class T>
struct Forward : Attended<T> {
  Room& room;

  void run(const Segment& s, int64_t kv) {
    int64_t d = this->shape.width, stride = padded(s.keys());
    fill(this->key, s, kv, room.key_rows, room.key_columns);
    fill(this->value, s, kv, room.value_rows, room.value_columns);
    room.weights.resize(kRows * stride);
    room.x.resize(kRows * d);
    room.g.resize(kRows * d);
    for (int64_t head = kv * this->shape.group(); head < (kv + 1) * this->shape.group(); head++) {
      by_rows(s.queries(), [&](auto rows, int64_t at) { block<decltype(rows)::value>(s, head, at, stride); });
    }
  }

 private:
  template <int R>
  WIDE void block(const Segment& s, int64_t head, int64_t at, int64_t stride) {
    int64_t d = this->shape.width;
    Seen seen(s, this->shape, at, R);
    float *x = room.x.data(), *sums = room.g.data(), *weights = room.weights.data();
    for (int r = 0; r < R; r++) widen_row(this->query.at(s.start + at + r, head), x + r * d, d);
    dots<R>(x, room.key_columns.data(), d, stride, seen.begin(), padded(seen.end()), this->shape.scale, weights);
    softmax<R>(weights, stride, seen);
    mix<R>(weights, room.value_rows.data(), d, stride, seen.begin(), seen.end(), sums);
    for (int r = 0; r < R; r++) put_row(sums + r * d, this->out.at(s.start + at + r, head), d);
  }
};

template <class T>
struct Backward : AttendedGrads<T> {
  Room& room;

  void run(const Segment& s, int64_t kv) {
    int64_t d = this->shape.width, count = s.keys(), stride = padded(count);
    fill(this->key, s, kv, room.key_rows, room.key_columns);
    fill(this->value, s, kv, room.value_rows, room.value_columns);
    room.weights.resize(kRows * stride);
    room.grads.resize(kRows * stride);
    room.x.resize(kRows * d);
    room.g.resize(kRows * d);
    room.key_sums.assign(count * d, 0);
    room.value_sums.assign(count * d, 0);
    for (int64_t head = kv * this->shape.group(); head < (kv + 1) * this->shape.group(); head++) {
      by_rows(s.queries(), [&](auto rows, int64_t at) { block<decltype(rows)::value>(s, head, at, stride); });
    }
    for (int64_t j = 0; j < count; j++) {
      add_to(room.key_sums.data() + j * d, this->key_grad.at(s.row(j), kv), d);
      add_to(room.value_sums.data() + j * d, this->value_grad.at(s.row(j), kv), d);
    }
  }

 private:
  template <int R>
  WIDE void block(const Segment& s, int64_t head, int64_t at, int64_t stride) {
    int64_t d = this->shape.width;
    Seen seen(s, this->shape, at, R);
    int64_t begin = seen.begin(), end = seen.end();
    float *x = room.x.data(), *g = room.g.data(), *weights = room.weights.data(), *grads = room.grads.data();
    for (int r = 0; r < R; r++) {
      widen_row(this->query.at(s.start + at + r, head), x + r * d, d);
      widen_row(this->grad.at(s.start + at + r, head), g + r * d, d);
    }
    dots<R>(x, room.key_columns.data(), d, stride, begin, padded(end), this->shape.scale, weights);
    softmax<R>(weights, stride, seen);
    dots<R>(g, room.value_columns.data(), d, stride, begin, padded(end), 1.0f, grads);
    softmax_grad<R>(weights, grads, stride, seen, this->shape.scale);
    spread<R>(grads, x, d, stride, begin, end, room.key_sums.data());
    spread<R>(weights, g, d, stride, begin, end, room.value_sums.data());
    // The queries are not needed any more.
    mix<R>(grads, room.key_rows.data(), d, stride, begin, end, x);
    for (int r = 0; r < R; r++) put_row(x + r * d, this->query_grad.at(s.start + at + r, head), d);
  }
};

template <class T>
void attend(const Attended<T>& operands, const Segment& s, int64_t kv, Room& room) {
  Forward<T>{operands, room}.run(s, kv);
}

template <class T>
void attend_back(const AttendedGrads<T>& operands, const Segment& s, int64_t kv, Room& room) {
  Backward<T>{operands, room}.run(s, kv);
}
