// What follows the gradients.

// `first` is the place of the first element in its parameter.
WIDE inline void round(const float* from, uint16_t* to, int64_t first, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++) to[i] = dithered(from[i], first + i);
}

template <class T>
WIDE inline float squares(const T* x, int64_t count) {
  Lanes sums[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + 64 <= count; i += 64) {
    UNROLL for (int j = 0; j < 4; j++) {
      Lanes value = load(x + i + 16 * j);
      sums[j] = fma(value, value, sums[j]);
    }
  }
  float total = sum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
  for (; i < count; i++) total += get(x + i) * get(x + i);
  return total;
}
