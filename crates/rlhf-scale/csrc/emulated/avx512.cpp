// The kernels for AVX-512 on a processor that has AVX2 only: SIMDe emulates every instruction, and what each kernel computes
// is compared with what its twin for AVX2 does, which the tests compare with libtorch. scripts/emulate-avx512 runs it.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <dlfcn.h>
#include <immintrin.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>

#include <simde/x86/avx512.h>

// What SIMDe leaves out.
#define LANE for (int i = 0; i < 16; i++)
inline simde__m512i emulated_cvtepu16_epi32(__m256i half) {
  uint16_t from[16];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(from), half);
  simde__m512i_private to;
  LANE to.i32[i] = from[i];
  return simde__m512i_from_private(to);
}
inline __m256i emulated_cvtepi32_epi16(simde__m512i x) {
  auto from = simde__m512i_to_private(x);
  uint16_t to[16];
  LANE to[i] = static_cast<uint16_t>(from.i32[i]);
  return _mm256_loadu_si256(reinterpret_cast<__m256i*>(to));
}
inline __m256i emulated_maskz_loadu_epi16(uint16_t mask, const void* p) {
  uint16_t to[16] = {};
  LANE if (mask >> i & 1) to[i] = static_cast<const uint16_t*>(p)[i];
  return _mm256_loadu_si256(reinterpret_cast<__m256i*>(to));
}
inline void emulated_mask_storeu_epi16(void* p, uint16_t mask, __m256i x) {
  uint16_t from[16];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(from), x);
  LANE if (mask >> i & 1) static_cast<uint16_t*>(p)[i] = from[i];
}
inline void emulated_mask_storeu_ps(float* p, uint16_t mask, simde__m512 x) {
  auto from = simde__m512_to_private(x);
  LANE if (mask >> i & 1) p[i] = from.f32[i];
}
inline simde__m512 emulated_maskz_loadu_ps(uint16_t mask, const float* p) {
  simde__m512_private to;
  LANE to.f32[i] = mask >> i & 1 ? p[i] : 0.0f;
  return simde__m512_from_private(to);
}
inline float emulated_reduce_max_ps(simde__m512 x) {
  auto from = simde__m512_to_private(x);
  float most = from.f32[0];
  LANE most = std::max<float>(most, from.f32[i]);
  return most;
}
#undef LANE
#define _mm512_cvtepu16_epi32 emulated_cvtepu16_epi32
#define _mm512_cvtepi32_epi16 emulated_cvtepi32_epi16
#define _mm256_maskz_loadu_epi16 emulated_maskz_loadu_epi16
#define _mm256_mask_storeu_epi16 emulated_mask_storeu_epi16
#define _mm512_mask_storeu_ps emulated_mask_storeu_ps
#define _mm512_maskz_loadu_ps emulated_maskz_loadu_ps
#define _mm512_reduce_max_ps emulated_reduce_max_ps
#define _mm512_shuffle_f32x4 simde_mm512_shuffle_f32x4

#define RLHF_AVX512 __attribute__((target("avx2,fma")))
#define RLHF_AVX512_BF16 RLHF_AVX512
// Each file has its kernels and the functions that call them.
#include "../attention.cpp"
#include "../causal.cpp"
#include "../gemm.cpp"
#include "../linear.cpp"
#include "../softmax.cpp"
#include "../training.cpp"

namespace {

int failures = 0;

void expect(bool holds, const char* what, const char* kind) {
  if (!holds) {
    printf("%s, %s: not the same\n", what, kind);
    failures++;
  }
}

template <class T>
constexpr const char* name() {
  return std::is_same_v<T, float> ? "f32" : "bf16";
}

template <class T>
std::vector<T> random_values(int64_t count, float scale = 1.0f) {
  static std::mt19937 generator(1);
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<T> values(count);
  for (auto& value : values) put(&value, normal(generator));
  return values;
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

// Sums in another order.
template <class T>
bool close(const std::vector<T>& a, const std::vector<T>& b) {
  float most = 0, off = 0;
  for (size_t i = 0; i < a.size(); i++) {
    most = std::max(most, std::abs(get(&a[i])));
    off = std::max(off, std::abs(get(&a[i]) - get(&b[i])));
  }
  return most > 0 && off <= (std::is_same_v<T, float> ? 2e-6f : 1e-2f) * most;
}

// Whether `run` fills a buffer alike on both.
#define SAME(WHAT, T, COUNT, COMPARE, ...)                                  \
  {                                                                         \
    std::vector<T> got(COUNT), want(COUNT);                                 \
    {                                                                       \
      namespace on = rlhf::avx512;                                          \
      T* out = got.data();                                                  \
      __VA_ARGS__;                                                          \
    }                                                                       \
    {                                                                       \
      namespace on = rlhf::avx2;                                            \
      T* out = want.data();                                                 \
      __VA_ARGS__;                                                          \
    }                                                                       \
    expect(COMPARE(got, want), WHAT, name<T>());                            \
  }

template <class T>
void rows() {
  for (int64_t width : {1, 16, 45, 64, 577}) {
    auto x = random_values<T>(3 * width), w = random_values<T>(width), g = random_values<T>(3 * width),
         more = random_values<T>(3 * width);
    SAME("norm", T, 3 * width, same_bits, on::rms_norm<T>(x.data(), w.data(), out, 3, width, 1e-5f));
    SAME("norm's gradient", T, width, same_bits,
         on::rms_norm_grad<T>(x.data(), w.data(), g.data(), more.data(), width, 1e-5f, out, nullptr));
    SAME("norm's weight", float, width, same_bits, {
      std::vector<T> grad(width);
      on::rms_norm_grad<T>(x.data(), w.data(), g.data(), nullptr, width, 1e-5f, grad.data(), out);
    });
    SAME("sum", T, 3 * width, same_bits, on::add_row<T>(x.data(), g.data(), out, 3 * width));
    auto gate = random_values<T>(3 * width, 30.0f);
    SAME("gate", T, 3 * width, same_bits, on::gated<T>(gate.data(), g.data(), out, 3 * width));
    SAME("gate's gradients", T, 6 * width, same_bits,
         on::gated_grad<T>(gate.data(), g.data(), more.data(), out, out + 3 * width, 3 * width));
  }
  for (int64_t turning : {10, 32, 64}) {
    auto x = random_values<T>(5 * 3 * 64), c = random_values<T>(5 * turning), s = random_values<T>(5 * turning);
    for (bool back : {false, true}) {
      SAME("rotation", T, x.size(), same_bits,
           on::rotate<T>(x.data(), c.data(), s.data(), out, 5, 3, 64, turning, back));
    }
  }
}

template <class T>
void products() {
  for (auto [m, k, n] : {std::array<int64_t, 3>{1, 1, 1}, {5, 3, 7}, {33, 40, 70}, {29, 1700, 65}, {130, 64, 96}}) {
    auto a = random_values<T>(m * k), b = random_values<T>(k * n), bias = random_values<T>(n);
    for (bool a_turned : {false, true}) {
      for (bool b_turned : {false, true}) {
        Vectors<T> left{a.data(), a_turned ? 1 : k, a_turned ? m : 1, m};
        Vectors<T> right{b.data(), b_turned ? k : 1, b_turned ? 1 : n, n};
        SAME("product", T, m * n, same_bits, {
          Output<T> to{out, n, false, bias.data()};
          on::multiply_all<T, T>({left}, {right}, k, {to});
          to = {out, n, true};
          on::multiply_all<T, T>({left}, {right}, k, {to});
        });
      }
    }
    int64_t few = std::min<int64_t>(m, 32);
    SAME("product of few rows", T, few * n, close, {
      Products<T> all{a.data(), few, k, {b.data()}, {bias.data()}, {out}, {n}};
      on::products(all);
    });
  }
}

void bf16_units() {
  auto x = random_values<uint16_t>(11 * 70), w = random_values<uint16_t>(50 * 70);
  std::vector<uint16_t> got(11 * 50), want(11 * 50);
  Products<uint16_t> all{x.data(), 11, 70, {w.data()}, {nullptr}, {got.data()}, {50}};
  rlhf::avx512::run(all, all.x, rlhf::avx512::columns_bf16);
  all.outputs = {want.data()};
  rlhf::avx2::products(all);
  expect(close(got, want), "product of few rows by bf16 instructions", "bf16");
}

template <class T>
void attention() {
  int64_t lengths[] = {0, 1, 15, 16, 37};
  for (int64_t heads : {2, 4, 6, 8, 14}) {
    auto q = random_values<T>(5 * heads * 32), k = random_values<T>(5 * 2 * 32), v = random_values<T>(5 * 2 * 32),
         keys = random_values<T>(5 * 2 * 40 * 32), values = random_values<T>(5 * 2 * 40 * 32);
    for (float cap : {0.0f, 3.0f}) {
      Step step{heads, 2, 32, 40, lengths, 0.3f, cap, cap > 0 ? 20 : 0};
      SAME("attention to a cache", T, q.size(), close, {
        std::vector<float> scores(4 * 64), query(4 * 32);
        for (int64_t row = 0; row < 5; row++) {
          for (int64_t kv = 0; kv < 2; kv++) {
            on::attend_row<T>(step, row, kv, q.data(), k.data(), v.data(), keys.data(), values.data(), out,
                              scores.data(), query.data());
          }
        }
      });
    }
  }
  int64_t n = 53, heads = 6, kv_heads = 2, d = 48;
  auto q = random_values<T>(n * heads * d), k = random_values<T>(n * kv_heads * d), v = random_values<T>(n * kv_heads * d),
       g = random_values<T>(n * heads * d);
  for (int64_t window : {0, 7, 20}) {
    Shape shape{heads, kv_heads, d, window, 0.2f};
    Segment segments[] = {{0, 33, 0, 0}, {33, 53, 3, 20}};
    auto rows = [&](const std::vector<T>& x, int64_t heads) { return Rows<const T>{x.data(), heads * d, d}; };
    SAME("causal attention", T, q.size(), same_bits, {
      Room room;
      Attended<T> operands{shape, rows(q, heads), rows(k, kv_heads), rows(v, kv_heads), {out, heads * d, d}};
      for (auto& s : segments) {
        for (int64_t kv = 0; kv < kv_heads; kv++) on::attend<T>(operands, s, kv, room);
      }
    });
    SAME("causal attention's gradients", float, n * (heads + 2 * kv_heads) * d, same_bits, {
      Room room;
      std::vector<T> query_grad(q.size());
      float* sums = out + q.size();
      AttendedGrads<T> operands{shape, rows(q, heads), rows(k, kv_heads), rows(v, kv_heads), rows(g, heads),
                                {query_grad.data(), heads * d, d}, {sums, kv_heads * d, d},
                                {sums + n * kv_heads * d, kv_heads * d, d}};
      for (auto& s : segments) {
        for (int64_t kv = 0; kv < kv_heads; kv++) on::attend_back<T>(operands, s, kv, room);
      }
      for (size_t i = 0; i < query_grad.size(); i++) out[i] = get(&query_grad[i]);
    });
  }
}

template <class T>
void vocabulary() {
  for (int64_t width : {1, 16, 45, 600}) {
    auto logits = random_values<T>(width, 5.0f);
    SAME("sums of a softmax", float, 4, same_bits, {
      out[0] = -INFINITY;
      Known known{out, out + 1, out + 2, out + 3};
      on::add_row(logits.data(), width, width / 2, 0.7f, known);
      on::add_row(logits.data(), width, -1, 0.7f, known);
    });
    Coefficients c{20.0f, 3.0f, 0.4f, 0.1f, 2.0f};
    SAME("gradients of a softmax", T, width, same_bits, on::grad_row(logits.data(), out, width, width / 2, 0.7f, c));
  }
}

template <class T>
void all() {
  rows<T>();
  ::products<T>();
  attention<T>();
  vocabulary<T>();
}

}  // namespace

int main() {
  all<float>();
  all<uint16_t>();
  bf16_units();
  printf(failures ? "%d differences\n" : "every kernel computes the same with both\n", failures);
  return failures != 0;
}
