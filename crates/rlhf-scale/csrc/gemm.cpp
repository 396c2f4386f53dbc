// Linear layers of many rows, with gradients, on the CPU; the products are those of kernels/gemm.h: in f32, and in bf16
// where the processor does not do it quicker than f32.
#include "matrices.h"
#include "wide.h"

#include <ATen/ops/sum.h>
#include <torch/csrc/autograd/custom_function.h>

#define KERNELS "kernels/gemm.h"
#include "each_target.h"

using at::Tensor;
using rlhf::guarded;

#ifdef RLHF_KERNELS
namespace {

using namespace rlhf;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Of a tensor [m, n].
template <class T>
Vectors<T> rows(const Tensor& t) {
  return {data<T>(t), t.stride(0), t.stride(1), t.size(0)};
}
template <class T>
Vectors<T> columns(const Tensor& t) {
  return {data<T>(t), t.stride(1), t.stride(0), t.size(1)};
}
template <class T>
Output<T> output(const Tensor& t, bool add = false) {
  return {data<T>(t), t.stride(0), add};
}
Tensor with_rows(const Tensor& t) { return t.stride(1) == 1 ? t : t.contiguous(); }

template <class T, class C>
void multiply(const std::vector<Vectors<T>>& lefts, const std::vector<Vectors<T>>& rights, int64_t k,
              const std::vector<Output<C>>& outputs) {
  ON_PROCESSOR(multiply_all<T, C>(lefts, rights, k, outputs));
}

// A weight as it lies: [out, in], or [in, out].
struct Weight {
  const Tensor& tensor;
  bool out_first;
  int64_t outputs() const { return tensor.size(out_first ? 0 : 1); }
  int64_t inputs() const { return tensor.size(out_first ? 1 : 0); }
  // A vector for each output, or for each input.
  template <class T>
  Vectors<T> by_output() const {
    return out_first ? rows<T>(tensor) : columns<T>(tensor);
  }
  template <class T>
  Vectors<T> by_input() const {
    return out_first ? columns<T>(tensor) : rows<T>(tensor);
  }
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
    by_kind(x, [&](auto* kind) {
      using T = std::remove_pointer_t<decltype(kind)>;
      std::vector<Vectors<T>> factors;
      std::vector<Output<T>> to;
      size_t bias = 0;
      for (size_t i = 0; i < weights.size(); i++) {
        factors.push_back(Weight{weights[i], out_first}.by_output<T>());
        to.push_back(output<T>(outputs[i]));
        if (biased[i]) to.back().bias = data<T>(biases[bias++]);
      }
      multiply<T, T>({rows<T>(x)}, factors, x.size(1), to);
    });
    return outputs;
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    size_t count = grads.size();
    auto biased = context->saved_data["biased"].toBoolList();
    bool out_first = context->saved_data["out_first"].toBool();
    auto saved = context->get_saved_variables();
    const Tensor& x = saved[0];
    // Of x and the weights; those of biases follow, and what has no gradient.
    variable_list results(1 + count);
    std::vector<size_t> defined, weights;
    for (size_t i = 0; i < count; i++) {
      if (!grads[i].defined()) continue;
      grads[i] = with_rows(grads[i]);
      defined.push_back(i);
      if (context->needs_input_grad(1 + i)) weights.push_back(i);
    }
    if (!defined.empty()) {
      by_kind(grads[defined[0]], [&](auto* kind) {
        using T = std::remove_pointer_t<decltype(kind)>;
        if (context->needs_input_grad(0)) {
          for (size_t i : defined) add_input_grad<T>(grads[i], Weight{saved[1 + i], out_first}, count, results[0]);
          results[0] = results[0].to(grads[defined[0]].scalar_type());
        }
        if (!weights.empty()) weight_grads<T>(weights, grads, x, out_first, results);
      });
    }
    for (size_t i = 0; i < count; i++) {
      if (!biased[i]) continue;
      bool needed = grads[i].defined() && context->needs_input_grad(results.size());
      results.push_back(needed ? at::sum(grads[i], {0}) : Tensor());
    }
    results.resize(results.size() + 2);
    return results;
  }

 private:
  // The gradient of what all layers read, summed in f32 if there are several.
  template <class T>
  static void add_input_grad(const Tensor& grad, const Weight& weight, size_t layers, Tensor& sum) {
    bool add = sum.defined();
    auto kind = layers > 1 ? at::kFloat : grad.scalar_type();
    if (!add) sum = at::empty({grad.size(0), weight.inputs()}, grad.options().dtype(kind));
    if (kind == at::kFloat) {
      multiply<T, float>({rows<T>(grad)}, {weight.by_input<T>()}, weight.outputs(), {output<float>(sum, add)});
    } else {
      multiply<T, T>({rows<T>(grad)}, {weight.by_input<T>()}, weight.outputs(), {output<T>(sum)});
    }
  }

  // Those of some weights, in one product.
  template <class T>
  static void weight_grads(const std::vector<size_t>& weights, const variable_list& grads, const Tensor& x,
                           bool out_first, variable_list& results) {
    std::vector<Vectors<T>> inputs{columns<T>(x)}, outputs;
    std::vector<Output<T>> to;
    for (size_t i : weights) {
      int64_t in = x.size(1), out = grads[i].size(1);
      auto& result = results[1 + i] = at::empty({out_first ? out : in, out_first ? in : out}, grads[i].options());
      outputs.push_back(columns<T>(grads[i]));
      to.push_back(output<T>(result));
    }
    multiply(out_first ? outputs : inputs, out_first ? inputs : outputs, x.size(0), to);
  }
};

// libtorch's products of bf16 use what the processor has for them, which these do not.
bool leaves_bf16() { return vectors_for_bf16() || matrices_for_bf16(); }

// Whether all are tensors of the CPU, of one kind that these products are the best for.
bool is_multiplied(std::initializer_list<const Tensor*> tensors) {
  if (!wanted() || !able()) return false;
  auto kind = (*tensors.begin())->scalar_type();
  if (kind != at::kFloat && (kind != at::kBFloat16 || leaves_bf16())) return false;
  return std::all_of(tensors.begin(), tensors.end(), [&](const Tensor* t) {
    return t->device().is_cpu() && t->scalar_type() == kind && t->layout() == at::kStrided;
  });
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
    if (count < 1 || x->dim() != 2 || x->size(0) < 1 || x->size(1) < 1) return;
    variable_list all_weights, all_biases;
    std::vector<bool> biased;
    for (size_t i = 0; i < count; i++) {
      auto weight = weights[i], bias = biases[i];
      if (weight->dim() != 2 || !is_multiplied({x, weight}) || !weight->is_contiguous()) return;
      if (weight->size(out_first ? 1 : 0) != x->size(1) || weight->numel() < 1) return;
      int64_t outputs = weight->size(out_first ? 0 : 1);
      if (bias && !is_multiplied({x, bias})) return;
      if (bias && (!bias->is_contiguous() || bias->sizes() != at::IntArrayRef({outputs}))) return;
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

// Writes the product of a [m, k] and b [k, n] to out [m, n], of their kind or f32, or adds it, and says so in `*done`.
char* rlhf_multiply_into(const Tensor* out, const Tensor* a, const Tensor* b, int add, int* done) {
  return guarded([&] {
#ifdef RLHF_KERNELS
    using namespace rlhf;
    if (at::GradMode::is_enabled() || !is_multiplied({a, b})) return;
    bool in_f32 = out->scalar_type() == at::kFloat;
    if (!out->device().is_cpu() || out->layout() != at::kStrided) return;
    if (!in_f32 && out->scalar_type() != a->scalar_type()) return;
    if (out->dim() != 2 || a->dim() != 2 || b->dim() != 2) return;
    int64_t m = a->size(0), k = a->size(1), n = b->size(1);
    if (b->size(0) != k || out->size(0) != m || out->size(1) != n || k < 1 || out->stride(1) != 1) return;
    auto either = [](const Tensor& t) { return t.stride(0) == 1 || t.stride(1) == 1; };
    if (!either(*a) || !either(*b)) return;
    by_kind(*a, [&](auto* kind) {
      using T = std::remove_pointer_t<decltype(kind)>;
      if (in_f32) {
        multiply<T, float>({rows<T>(*a)}, {columns<T>(*b)}, k, {output<float>(*out, add != 0)});
      } else {
        multiply<T, T>({rows<T>(*a)}, {columns<T>(*b)}, k, {output<T>(*out, add != 0)});
      }
    });
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

bool rlhf_multiplies(bool bf16) {
#ifdef RLHF_KERNELS
  return rlhf::wanted() && rlhf::wide() && (!bf16 || !leaves_bf16());
#else
  return false;
#endif
}

}  // extern "C"
