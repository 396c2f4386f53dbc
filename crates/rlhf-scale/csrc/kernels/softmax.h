// The rows of a block of logits.

template <class T>
WIDE void add_row(const T* logits, int64_t width, int64_t token, float scale, const Known& known) {
  Lanes factor = all(scale), most = all(-INFINITY);
  by_sixteen(width, [&](int64_t i, auto there) WIDE {
    most = select(there, max(most, load(logits + i, there)), most);
  });
  float maximum = std::max(*known.maximum, largest(most) * scale);
  Lanes base = all(maximum), total = zero(), products = zero();
  by_sixteen(width, [&](int64_t i, auto there) WIDE {
    Lanes below = fms(load(logits + i, there), factor, base);
    Lanes e = select(there, exponential(below), zero());
    total = add(total, e);
    if (known.product) products = select(there, fma(e, below, products), products);
  });
  float lower = *known.maximum - maximum, shrink = std::exp(lower);
  if (known.product) *known.product = (*known.product + lower * *known.sum) * shrink + sum(products);
  *known.sum = *known.sum * shrink + sum(total);
  *known.maximum = maximum;
  if (token >= 0 && token < width) *known.chosen = get(logits + token) * scale;
}


// p (-own - entropy_grad (log p + entropy)), and `own` more where the token is. May run in place.
template <class T>
WIDE void grad_row(const T* logits, T* out, int64_t width, int64_t token, float scale, const Coefficients& c) {
  bool here = token >= 0 && token < width;
  float logit = here ? get(logits + token) : 0;
  Lanes factor = all(scale), base = all(c.maximum), log_sum = all(c.log_sum);
  // -own - entropy_grad * entropy, and the part that log p multiplies.
  Lanes fixed = all(-c.own - c.entropy_grad * c.entropy), varied = all(-c.entropy_grad);
  by_sixteen(width, [&](int64_t i, auto there) WIDE {
    Lanes logprob = sub(fms(load(logits + i, there), factor, base), log_sum);
    store(out + i, there, mul(exponential(logprob), fma(varied, logprob, fixed)));
  });
  if (here) {
    float logprob = std::fma(logit, scale, -c.maximum) - c.log_sum;
    float grad = std::exp(logprob) * (-c.own - c.entropy_grad * (logprob + c.entropy));
    put(out + token, grad + c.own);
  }
}
