// Linear layers of many rows, with gradients, on the CPU in f32; the products are those of gemm.h.
#include "gemm.h"
#include "wide.h"

#include <ATen/ops/sum.h>
#include <torch/csrc/autograd/custom_function.h>

using at::Tensor;
using rlhf::guarded;

#ifdef RLHF_KERNELS
namespace {

using namespace rlhf::gemm;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Rows of a tensor [m, n], of which each is contiguous.
Matrix rows_of(const Tensor& t) { return {t.data_ptr<float>(), t.stride(0), 1}; }
Matrix transposed(Matrix m) { return {m.at, m.column, m.row}; }
Tensor with_rows(const Tensor& t) { return t.stride(1) == 1 ? t : t.contiguous(); }

// A weight as it lies: [out, in], or [in, out].
struct Weight {
  const Tensor& tensor;
  bool out_first;
  int64_t outputs() const { return tensor.size(out_first ? 0 : 1); }
  // [in, out]
  Matrix forward() const { return out_first ? transposed(rows_of(tensor)) : rows_of(tensor); }
  // [out, in]
  Matrix backward() const { return transposed(forward()); }
};

// Several linear layers of the same rows: what is packed of them is packed once, and their gradients meet in one sum.
struct Linears : torch::autograd::Function<Linears> {
  // `biases` has those that there are, of the layers that `biased` says.
  static variable_list forward(AutogradContext* context, const Tensor& x, at::TensorList weights,
                               at::TensorList biases, const std::vector<bool>& biased, bool out_first) {
    context->set_materialize_grads(false);
    c10::List<bool> flags;
    for (bool flag : biased) flags.push_back(flag);
    context->saved_data["biased"] = flags;
    context->saved_data["out_first"] = out_first;
    // What no gradient needs is not kept.
    auto wanted = [](const Tensor& t) { return t.requires_grad(); };
    variable_list saved{std::any_of(weights.begin(), weights.end(), wanted) ? x : Tensor()};
    for (auto& weight : weights) saved.push_back(wanted(x) ? weight : Tensor());
    context->save_for_backward(saved);
    variable_list outputs;
    for (auto& weight : weights) {
      outputs.push_back(at::empty({x.size(0), Weight{weight, out_first}.outputs()}, x.options()));
    }
    int64_t rows = x.size(0), terms = x.size(1);
    constexpr int64_t tall = kTall * kHigh;
    for (int64_t row = 0; row < rows; row += tall) {
      Left left(rows_of(x).from(row, 0), std::min(tall, rows - row), terms);
      size_t bias = 0;
      for (size_t i = 0; i < weights.size(); i++) {
        int64_t width = outputs[i].size(1);
        Output to{outputs[i].data_ptr<float>() + row * width, width};
        if (biased[i]) to.bias = biases[bias++].data_ptr<float>();
        multiply(left, Weight{weights[i], out_first}.forward(), width, to);
      }
    }
    return outputs;
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    size_t count = grads.size();
    auto biased = context->saved_data["biased"].toBoolList();
    bool out_first = context->saved_data["out_first"].toBool();
    auto saved = context->get_saved_variables();
    const Tensor& x = saved[0];
    // x and weights; biases follow, and what has no gradient.
    variable_list results(1 + count);
    bool first = true;
    for (size_t i = 0; i < count; i++) {
      if (!grads[i].defined()) continue;
      Tensor grad = with_rows(grads[i]);
      int64_t rows = grad.size(0), outputs = grad.size(1);
      if (context->needs_input_grad(0)) {
        Weight weight{saved[1 + i], out_first};
        int64_t inputs = weight.tensor.numel() / outputs;
        if (first) results[0] = at::empty({rows, inputs}, grad.options());
        multiply(rows_of(grad), weight.backward(), rows, inputs, outputs,
                 {results[0].data_ptr<float>(), inputs, /*add=*/!first});
        first = false;
      }
      if (context->needs_input_grad(1 + i)) {
        int64_t inputs = x.size(1);
        auto left = transposed(rows_of(out_first ? grad : x));
        auto right = rows_of(out_first ? x : grad);
        int64_t m = out_first ? outputs : inputs, n = out_first ? inputs : outputs;
        results[1 + i] = at::empty({m, n}, grad.options());
        multiply(left, right, m, n, rows, {results[1 + i].data_ptr<float>(), n});
      }
    }
    for (size_t i = 0; i < count; i++) {
      if (!biased[i]) continue;
      bool needed = grads[i].defined() && context->needs_input_grad(results.size());
      results.push_back(needed ? at::sum(grads[i], {0}) : Tensor());
    }
    results.resize(results.size() + 2);
    return results;
  }
};

bool is_plain(const Tensor& t) {
  return t.device().is_cpu() && t.scalar_type() == at::kFloat && t.layout() == at::kStrided;
}

}  // namespace
#endif

extern "C" {

// x [M, K]; `count` weights, [N, K] with `out_first` and else [K, N], and biases [N], null for none: as many
// results [M, N], with gradients where they are recorded.
char* rlhf_linear(const Tensor* x, const Tensor* const* weights, const Tensor* const* biases, size_t count,
                  int out_first, Tensor** results) {
  return guarded([&] {
#ifdef RLHF_KERNELS
    using namespace rlhf;
    if (!wanted() || !able()) return;
    if (count < 1 || x->dim() != 2 || !is_plain(*x) || x->size(0) < 1 || x->size(1) < 1) return;
    variable_list all_weights, all_biases;
    std::vector<bool> biased;
    for (size_t i = 0; i < count; i++) {
      auto weight = weights[i], bias = biases[i];
      if (weight->dim() != 2 || !is_plain(*weight) || !weight->is_contiguous()) return;
      if (weight->size(out_first ? 1 : 0) != x->size(1) || weight->numel() < 1) return;
      int64_t outputs = weight->size(out_first ? 0 : 1);
      if (bias && (!is_plain(*bias) || !bias->is_contiguous() || bias->sizes() != at::IntArrayRef({outputs}))) return;
      all_weights.push_back(*weight);
      if (bias) all_biases.push_back(*bias);
      biased.push_back(bias != nullptr);
    }
    auto outputs = Linears::apply(with_rows(*x), at::TensorList(all_weights), at::TensorList(all_biases), biased,
                                  out_first != 0);
    for (size_t i = 0; i < count; i++) results[i] = new Tensor(outputs[i]);
#endif
  });
}

// Writes the product of a [m, k] and b [k, n] to out [m, n], or adds it, and says so in `*done`.
char* rlhf_multiply_into(const Tensor* out, const Tensor* a, const Tensor* b, int add, int* done) {
  return guarded([&] {
#ifdef RLHF_KERNELS
    using namespace rlhf;
    if (!wanted() || !able() || at::GradMode::is_enabled()) return;
    for (auto t : {out, a, b}) {
      if (t->dim() != 2 || !is_plain(*t)) return;
    }
    int64_t m = a->size(0), k = a->size(1), n = b->size(1);
    if (b->size(0) != k || out->size(0) != m || out->size(1) != n || k < 1 || out->stride(1) != 1) return;
    auto either = [](const Tensor& t) { return t.stride(0) == 1 || t.stride(1) == 1; };
    if (!either(*a) || !either(*b)) return;
    auto matrix = [](const Tensor& t) { return Matrix{t.data_ptr<float>(), t.stride(0), t.stride(1)}; };
    multiply(matrix(*a), matrix(*b), m, n, k, {out->data_ptr<float>(), out->stride(0), add != 0});
    *done = 1;
#endif
  });
}

// Whether those of training, and the products of many rows, run where they apply, in the whole process.
void rlhf_want_kernels(int wanted) {
#ifdef RLHF_KERNELS
  rlhf::wanted() = wanted != 0;
#endif
}

bool rlhf_trains_f32() {
#ifdef RLHF_KERNELS
  return rlhf::wanted() && rlhf::wide();
#else
  return false;
#endif
}

}  // extern "C"
