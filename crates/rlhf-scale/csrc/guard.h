// What every function of the shim has in common. Each returns NULL, or a message that the caller frees
// with free(): no exception crosses into Rust.
// torch/torch.h is avoided on purpose: it multiplies the compile time.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstring>
#include <exception>
#include <vector>

namespace rlhf {

template <class Body>
char* guarded(Body&& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const c10::Error& error) {
    return strdup(error.what_without_backtrace());
  } catch (const std::exception& error) {
    return strdup(error.what());
  } catch (...) {
    return strdup("unknown C++ exception");
  }
}

// A null pointer becomes an undefined tensor.
inline std::vector<at::Tensor> list(at::Tensor* const* tensors, size_t count) {
  std::vector<at::Tensor> result;
  result.reserve(count);
  for (size_t i = 0; i < count; i++) {
    result.push_back(tensors[i] ? *tensors[i] : at::Tensor());
  }
  return result;
}

}  // namespace rlhf
