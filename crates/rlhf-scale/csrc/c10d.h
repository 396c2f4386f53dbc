// What the files about process groups share.
#pragma once

#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <vector>

namespace rlhf {

struct Group {
  c10::intrusive_ptr<c10d::ProcessGroup> group;
};

// An operation under way, and the tensors that it reads and writes.
struct Work {
  c10::intrusive_ptr<c10d::Work> work;
  std::vector<at::Tensor> tensors;
};

}  // namespace rlhf
