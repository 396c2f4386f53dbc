// Causal attention over the segments of a packed run, for training in f32 and bf16 on the CPU. libtorch's cuts a head into
// tiles and calls a library for the product of each, which for texts of some hundred tokens takes longer than the
// products; and a run of many lengths needs a call for each. Here one node does all segments, in f32, from queries,
// keys and values as they lie. Nothing else is kept for backward, which computes the weights again.
#include "recorded.h"
#include "shares.h"

#include <ATen/ops/zeros.h>

#ifdef RLHF_KERNELS
namespace rlhf {

// Queries side by side.
constexpr int64_t kRows = 4;

// Rows start..end of a run, which look at rows first..last of an earlier segment, and at themselves.
struct Segment {
  int64_t start, end, first, last;
  int64_t queries() const { return end - start; }
  int64_t before() const { return last - first; }
  int64_t keys() const { return before() + queries(); }
  // The run's row that key `j` is.
  int64_t row(int64_t j) const { return j < before() ? first + j : start + j - before(); }
};

// Rows of heads, side by side within a row.
template <class T>
struct Rows {
  T* data;
  int64_t stride, width;
  T* at(int64_t row, int64_t head) const { return data + row * stride + head * width; }
};

struct Shape {
  int64_t heads, kv_heads, width, window;
  float scale;
  int64_t group() const { return heads / kv_heads; }
};

inline int64_t padded(int64_t count) { return (count + 15) / 16 * 16; }

// What a thread computes with.
struct Room {
  std::vector<float> key_rows, key_columns, value_rows, value_columns, weights, grads, x, g, key_sums, value_sums;
};

// The operands of attention, and of its gradients; T is their kind.
template <class T>
struct Attended {
  Shape shape;
  Rows<const T> query, key, value;
  Rows<T> out;
};

template <class T>
struct AttendedGrads {
  Shape shape;
  Rows<const T> query, key, value, grad;
  Rows<T> query_grad;
  // Sums over segments, [N, kv_heads, d].
  Rows<float> key_grad, value_grad;
};

}  // namespace rlhf
#endif

#define KERNELS "kernels/causal.h"
#include "each_target.h"

using at::Tensor;
using rlhf::guarded;

#ifdef RLHF_KERNELS
namespace {

using namespace rlhf;

// Segments in groups: one, and those that look at rows of it. What a group writes no other group does.
std::vector<std::vector<Segment>> families(const std::vector<Segment>& segments) {
  std::vector<std::vector<Segment>> all;
  std::vector<size_t> family;
  for (const auto& s : segments) {
    size_t own = all.size();
    for (size_t i = 0; s.before() > 0 && i < family.size(); i++) {
      if (s.first >= segments[i].start && s.first < segments[i].end) own = family[i];
    }
    if (own == all.size()) all.emplace_back();
    all[own].push_back(s);
    family.push_back(own);
  }
  return all;
}

// `run(segment, head of keys, room)` for all; what groups of segments share is one thread's.
template <class Run>
void attend(const std::vector<Segment>& segments, int64_t kv_heads, const Run& run) {
  auto groups = families(segments);
  int64_t tasks = static_cast<int64_t>(groups.size()) * kv_heads, threads = std::min(tasks, most_threads());
  std::vector<Room> rooms(threads);
  share_out(tasks, threads, 1, 1, [&](int64_t thread, Shares::Range task) {
    const auto& group = groups[task.begin / kv_heads];
    for (const auto& segment : group) run(segment, task.begin % kv_heads, rooms[thread]);
  });
}

template <class T>
Rows<T> rows_of(const Tensor& t) {
  return {static_cast<T*>(t.data_ptr()), t.stride(0), t.size(2)};
}

// As the kernel reads it: parts of a wider product may stay where they are.
Tensor laid_out(const Tensor& t) {
  bool side_by_side = t.stride(2) == 1 && (t.size(1) == 1 || t.stride(1) == t.size(2));
  return side_by_side ? t : t.contiguous();
}

struct CausalAttentionBackward : public RecordedNode {
  std::vector<Segment> segments;
  Shape shape;

  std::string name() const override { return "RlhfCausalAttentionBackward"; }

  variable_list backward(const variable_list& tensors, const variable_list& grads) override {
    if (!grads[0].defined()) return {Tensor(), Tensor(), Tensor()};
    auto query = laid_out(tensors[0]), key = laid_out(tensors[1]), value = laid_out(tensors[2]);
    auto kind = query.scalar_type();
    auto grad = grads[0].to(kind).contiguous().view(query.sizes());
    auto query_grad = at::empty(query.sizes(), query.options());
    auto wide = key.options().dtype(at::kFloat);
    auto key_grad = at::zeros(key.sizes(), wide), value_grad = at::zeros(key.sizes(), wide);
    by_kind(query, [&](auto* kind) {
      using T = std::remove_pointer_t<decltype(kind)>;
      AttendedGrads<T> operands{shape, rows_of<const T>(query), rows_of<const T>(key), rows_of<const T>(value),
                                rows_of<const T>(grad), rows_of<T>(query_grad), rows_of<float>(key_grad),
                                rows_of<float>(value_grad)};
      attend(segments, shape.kv_heads, [&](const Segment& segment, int64_t kv, Room& room) {
        ON_PROCESSOR(attend_back<T>(operands, segment, kv, room));
      });
    });
    return {query_grad, key_grad.to(kind), value_grad.to(kind)};
  }
};

}  // namespace
#endif

extern "C" {

// query [N, heads, d], key and value [N, kv_heads, d], of one kind; `segments` are `count` times the rows start..end of
// the run and the rows first..last that they look at besides. They cover 0..N once, in order, and look at earlier
// rows. A window of 0 is none. Returns [N, heads * d].
char* rlhf_causal_attention(const Tensor* query, const Tensor* key, const Tensor* value, const int64_t* segments,
                            size_t count, double scale, int64_t window, Tensor** result) {
  return guarded([&] {
#ifdef RLHF_KERNELS
    if (query->dim() != 3 || key->dim() != 3 || key->sizes() != value->sizes()) return;
    int64_t rows = query->size(0), heads = query->size(1), d = query->size(2), kv_heads = key->size(1);
    if (rows < 1 || rows > (1 << 30) || key->size(0) != rows || key->size(2) != d || d < 16 || d % 16 != 0) return;
    if (kv_heads < 1 || heads % kv_heads != 0 || !trains({query, key, value})) return;
    std::vector<Segment> list;
    int64_t next = 0;
    for (size_t i = 0; i < count; i++) {
      const int64_t* s = segments + 4 * i;
      list.push_back({s[0], s[1], s[2], s[3]});
      if (s[0] != next || s[1] <= s[0] || s[2] < 0 || s[3] < s[2]) return;
      // A prefix is part of one earlier segment.
      bool whole = s[2] == s[3] || std::any_of(list.begin(), list.end() - 1, [&](const Segment& other) {
        return s[2] >= other.start && s[3] <= other.end;
      });
      if (!whole) return;
      next = s[1];
    }
    if (next != rows) return;
    Shape shape{heads, kv_heads, d, window, static_cast<float>(scale)};
    Tensor out;
    {
      at::NoGradGuard no_grad;
      auto q = laid_out(*query), k = laid_out(*key), v = laid_out(*value);
      out = at::empty({rows, heads * d}, query->options());
      by_kind(q, [&](auto* kind) {
        using T = std::remove_pointer_t<decltype(kind)>;
        Attended<T> operands{shape, rows_of<const T>(q), rows_of<const T>(k), rows_of<const T>(v),
                             rows_of<T>(out.view(query->sizes()))};
        attend(list, kv_heads, [&](const Segment& segment, int64_t kv, Room& room) {
          ON_PROCESSOR(attend<T>(operands, segment, kv, room));
        });
      });
    }
    if (is_recorded({query, key, value})) {
      auto node = recorded_node<CausalAttentionBackward>();
      node->set_next_edges(edges_of({query, key, value}));
      node->segments = std::move(list);
      node->shape = shape;
      for (auto* t : {query, key, value}) node->saved.emplace_back(*t, /*is_output=*/false);
      torch::autograd::set_history(out, node);
    }
    *result = new Tensor(out);
#endif
  });
}

}  // extern "C"
