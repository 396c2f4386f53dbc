// What is made of sixteen f32, for each kind of processor: see each_target.h.

using rlhf::rounded;

// `body(place, mask)` for sixteen elements at a time, fewer of them at the end.
template <class Body>
WIDE INLINE void by_sixteen(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) body(i, All());
  if (i < count) body(i, first_of(count - i));
}
template <class T>
WIDE INLINE Lanes load(const T* p, All) {
  return load(p);
}
template <class T>
WIDE INLINE void store(T* p, All, Lanes x) {
  store(p, x);
}

WIDE INLINE float sum(Lanes x) { return _mm_cvtss_f32(sums(x, x, x, x)); }

// e^x, x at most 0, to about one unit in the last place: Cody and Waite's reduction, then Cephes' polynomial.
// Not a number stays so, since the maximum is its second operand then.
WIDE INLINE Lanes exponential(Lanes x) {
  x = max(all(-126.0f * 0.6931f), x);
  Lanes n = nearest(mul(x, all(1.44269504f)));
  Lanes r = fnma(n, all(0.693359375f), x);
  r = fnma(n, all(-2.12194440e-4f), r);
  Lanes p = all(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
    p = fma(p, r, all(c));
  }
  p = fma(p, mul(r, r), add(r, all(1.0f)));
  return times_power(p, n);
}

// Of x, and of -x: neither overflows or cancels.
struct Sigmoids {
  Lanes own, opposite;
};
WIDE INLINE Sigmoids sigmoids(Lanes x) {
  Lanes one = all(1.0f), e = exponential(sub(zero(), abs(x))), total = add(one, e);
  Mask below_zero = negative(x);
  return {div(select(below_zero, e, one), total), div(select(below_zero, one, e), total)};
}
