// What lies between the matrix products of a model, row by row, in f32 or bf16: forward and backward in a pass each.
// Forward rounds where the model's operations would, one after another; backward computes in f32 and rounds once.

// One over the root of a row's mean square plus epsilon.
template <class T>
WIDE INLINE float inverse_root(const T* x, int64_t width, float epsilon) {
  Lanes squares = zero();
  by_sixteen(width, [&](int64_t i, auto there) WIDE {
    Lanes value = load(x + i, there);
    squares = fma(value, value, squares);
  });
  return 1.0f / std::sqrt(sum(squares) / width + epsilon);
}

template <class T>
WIDE void rms_norm(const T* x, const T* weight, T* out, int64_t rows, int64_t width, float epsilon) {
  for (int64_t row = 0; row < rows; row++, x += width, out += width) {
    Lanes scale = all(inverse_root(x, width, epsilon));
    by_sixteen(width, [&](int64_t i, auto there) WIDE {
      // Rounded before the weight.
      store(out + i, there, mul(rounded(mul(load(x + i, there), scale), x), load(weight + i, there)));
    });
  }
}

// From the gradient of a row n = x / rms(x), times a weight w, that of x, and of the weight this row's share:
// scale * (g w - n mean(g w n)), and g n. `extra`, which may be null, is a gradient that reaches x by another way; the
// weight's sums may be null too.
template <class T>
WIDE void rms_norm_grad(const T* x, const T* weight, const T* grad, const T* extra, int64_t width, float epsilon, T* out,
                        float* weight_sums) {
  Lanes scale = all(inverse_root(x, width, epsilon)), products = zero();
  by_sixteen(width, [&](int64_t i, auto there) WIDE {
    Lanes normed = mul(load(x + i, there), scale), g = load(grad + i, there);
    products = fma(mul(g, load(weight + i, there)), normed, products);
    if (weight_sums) store(weight_sums + i, there, fma(g, rounded(normed, x), load(weight_sums + i, there)));
  });
  Lanes mean = all(sum(products) / width);
  by_sixteen(width, [&](int64_t i, auto there) WIDE {
    Lanes normed = mul(load(x + i, there), scale);
    Lanes own = fms(load(grad + i, there), load(weight + i, there), mul(normed, mean));
    store(out + i, there, extra ? fma(own, scale, load(extra + i, there)) : mul(own, scale));
  });
}

// The sum of two rows, rounded.
template <class T>
WIDE void add_row(const T* x, const T* y, T* out, int64_t width) {
  by_sixteen(width, [&](int64_t i, auto there) WIDE {
    store(out + i, there, add(load(x + i, there), load(y + i, there)));
  });
}

// Rows of `heads` vectors of width d. Of a vector's first `turning` dimensions, each is paired with the one half
// their number before or after it; the others stay. The first half of the sines is negated. Turned back, if `back`:
// what a value gave to its partner comes back with the partner's sine.
template <class T>
WIDE void rotate(const T* x, const T* cos, const T* sin, T* out, int64_t rows, int64_t heads, int64_t d,
                 int64_t turning, bool back) {
  int64_t half = turning / 2;
  for (int64_t row = 0; row < rows; row++, cos += turning, sin += turning) {
    const T *first = back ? sin + half : sin, *second = back ? sin : sin + half;
    for (int64_t head = 0; head < heads; head++, x += d, out += d) {
      by_sixteen(half, [&](int64_t i, auto there) WIDE {
        Lanes low = load(x + i, there), high = load(x + half + i, there);
        // Two products and a sum, each rounded.
        Lanes kept = rounded(mul(low, load(cos + i, there)), x);
        Lanes crossed = rounded(mul(high, load(first + i, there)), x);
        store(out + i, there, add(kept, crossed));
        kept = rounded(mul(high, load(cos + half + i, there)), x);
        crossed = rounded(mul(low, load(second + i, there)), x);
        store(out + half + i, there, add(kept, crossed));
      });
      for (int64_t i = turning; i < d; i++) out[i] = x[i];
    }
  }
}

// silu(gate) * up, silu(x) = x sigmoid(x).
template <class T>
WIDE void gated(const T* gate, const T* up, T* out, int64_t count) {
  by_sixteen(count, [&](int64_t i, auto there) WIDE {
    Lanes x = load(gate + i, there);
    Lanes e = exponential(sub(zero(), abs(x))), one = all(1.0f);
    Lanes activated = div(mul(x, select(negative(x), e, one)), add(one, e));
    store(out + i, there, mul(rounded(activated, gate), load(up + i, there)));
  });
}

template <class T>
WIDE void gated_grad(const T* gate, const T* up, const T* grad, T* gate_grad, T* up_grad, int64_t count) {
  by_sixteen(count, [&](int64_t i, auto there) WIDE {
    Lanes x = load(gate + i, there), u = load(up + i, there), g = load(grad + i, there);
    Sigmoids s = sigmoids(x);
    store(up_grad + i, there, mul(g, mul(x, s.own)));
    // silu'(x) = sigmoid(x) (1 + x sigmoid(-x)), where nothing overflows or cancels.
    store(gate_grad + i, there, mul(mul(g, u), mul(s.own, fma(x, s.opposite, all(1.0f)))));
  });
}
