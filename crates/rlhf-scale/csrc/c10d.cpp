// Process groups: libtorch's c10d (TCPStore, Gloo, NCCL) without Python. Key prefixes are those of
// torch.distributed.init_process_group, so that Python ranks and ours meet in one group.
#include "guard.h"

#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>
#ifdef USE_C10D_NCCL
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>
#endif

#include <chrono>
#include <string>

#include "c10d.h"

using at::Tensor;
using rlhf::guarded;
using rlhf::Group;
using rlhf::list;
using rlhf::Work;

namespace rlhf {

struct Store {
  c10::intrusive_ptr<c10d::TCPStore> connection;
  c10::intrusive_ptr<c10d::Store> store;  // the same, under a prefix
  std::string prefix;
};

}  // namespace rlhf

namespace {

c10d::ReduceOp reduce_op(int op) {
  switch (op) {
    case 0:
      return c10d::ReduceOp::SUM;
    case 1:
      return c10d::ReduceOp::PRODUCT;
    case 2:
      return c10d::ReduceOp::MIN;
    default:
      return c10d::ReduceOp::MAX;
  }
}

rlhf::Store* connect(const std::string& host, uint16_t port, const std::string& prefix, bool is_server,
                     std::chrono::milliseconds timeout) {
  c10d::TCPStoreOptions options;
  options.port = port;
  options.isServer = is_server;
  options.timeout = timeout;
  options.multiTenant = is_server;
  options.waitWorkers = false;  // the group's own rendezvous waits
  auto connection = c10::make_intrusive<c10d::TCPStore>(host, options);
  connection->setTimeout(timeout);
  c10::intrusive_ptr<c10d::Store> store = connection;
  if (!prefix.empty()) {
    store = c10::make_intrusive<c10d::PrefixStore>(prefix, store);
  }
  return new rlhf::Store{std::move(connection), std::move(store), prefix};
}

Work* work(c10::intrusive_ptr<c10d::Work> work, std::vector<Tensor> tensors) {
  return new Work{std::move(work), std::move(tensors)};
}

}  // namespace

extern "C" {

char* rlhf_store_new(const char* host, uint16_t port, const char* prefix, bool is_server, int64_t timeout_ms,
                     rlhf::Store** result) {
  return guarded([&] { *result = connect(host, port, prefix, is_server, std::chrono::milliseconds(timeout_ms)); });
}

// Another connection to the same store, for another thread.
char* rlhf_store_connect_again(rlhf::Store* store, rlhf::Store** result) {
  return guarded([&] {
    auto& tcp = *store->connection;
    *result = connect(tcp.getHost(), tcp.getPort(), store->prefix, /*is_server=*/false, tcp.getTimeout());
  });
}

char* rlhf_store_set(rlhf::Store* store, const char* key, const uint8_t* data, size_t bytes) {
  return guarded([&] { store->store->set(key, std::vector<uint8_t>(data, data + bytes)); });
}

// The value of a key as a string for free(); NULL where there is none, which does not wait.
char* rlhf_store_get(rlhf::Store* store, const char* key, char** result) {
  return guarded([&] {
    *result = nullptr;
    if (store->store->check({key})) {
      auto value = store->store->get(key);
      *result = strndup(reinterpret_cast<const char*>(value.data()), value.size());
    }
  });
}

void rlhf_store_free(rlhf::Store* store) noexcept {
  try {
    delete store;
  } catch (...) {
  }
}

// `name` is the group's name in torch.distributed: "0" for the first one.
char* rlhf_group_new(rlhf::Store* store, const char* name, bool nccl, int rank, int size, int64_t timeout_ms,
                     Group** result) {
  return guarded([&] {
    std::chrono::milliseconds timeout(timeout_ms);
    auto all = c10::make_intrusive<c10d::PrefixStore>("default_pg", store->store);
    auto own = c10::make_intrusive<c10d::PrefixStore>(std::string(name) + "/", all);
    auto group = c10::make_intrusive<c10d::ProcessGroup>(own, rank, size);
    if (nccl) {
#ifdef USE_C10D_NCCL
      auto prefix = c10::make_intrusive<c10d::PrefixStore>("cuda/", own);
      auto options = c10d::ProcessGroupNCCL::Options::create();
      options->timeout = timeout;
      auto backend = c10::make_intrusive<c10d::ProcessGroupNCCL>(prefix, rank, size, options);
      group->setDefaultBackend(c10d::ProcessGroup::NCCL);
      group->setBackend(c10::kCUDA, c10d::ProcessGroup::NCCL, c10::intrusive_ptr<c10d::Backend>(backend));
#else
      TORCH_CHECK(false, "built without the feature `nccl`");
#endif
    } else {
      auto prefix = c10::make_intrusive<c10d::PrefixStore>("cpu/", own);
      auto options = c10d::ProcessGroupGloo::Options::create_default(timeout);
      auto backend = c10::make_intrusive<c10d::ProcessGroupGloo>(prefix, rank, size, options);
      backend->setSequenceNumberForGroup();
      group->setDefaultBackend(c10d::ProcessGroup::GLOO);
      group->setBackend(c10::kCPU, c10d::ProcessGroup::GLOO, c10::intrusive_ptr<c10d::Backend>(backend));
    }
    group->setGroupName(name);
    *result = new Group{std::move(group)};
  });
}

void rlhf_group_free(Group* group) noexcept {
  try {
    delete group;
  } catch (...) {
  }
}

char* rlhf_all_reduce(Group* group, Tensor* tensor, int op, Work** result) {
  return guarded([&] {
    std::vector<Tensor> tensors{*tensor};
    c10d::AllreduceOptions options;
    options.reduceOp = reduce_op(op);
    *result = work(group->group->allreduce(tensors, options), tensors);
  });
}

char* rlhf_broadcast(Group* group, Tensor* tensor, int root, Work** result) {
  return guarded([&] {
    std::vector<Tensor> tensors{*tensor};
    c10d::BroadcastOptions options;
    options.rootRank = root;
    *result = work(group->group->broadcast(tensors, options), tensors);
  });
}

char* rlhf_all_gather(Group* group, Tensor* output, Tensor* input, Work** result) {
  return guarded([&] { *result = work(group->group->_allgather_base(*output, *input), {*output, *input}); });
}

char* rlhf_reduce_scatter(Group* group, Tensor* output, Tensor* input, int op, Work** result) {
  return guarded([&] {
    c10d::ReduceScatterOptions options;
    options.reduceOp = reduce_op(op);
    *result = work(group->group->_reduce_scatter_base(*output, *input, options), {*output, *input});
  });
}

// Rows to each rank and from each rank; both lists have one number a rank.
char* rlhf_all_to_all(Group* group, Tensor* output, Tensor* input, const int64_t* output_rows,
                      const int64_t* input_rows, Work** result) {
  return guarded([&] {
    size_t size = group->group->getSize();
    std::vector<int64_t> outputs(output_rows, output_rows + size), inputs(input_rows, input_rows + size);
    *result = work(group->group->alltoall_base(*output, *input, outputs, inputs), {*output, *input});
  });
}

char* rlhf_send(Group* group, Tensor* tensor, int to, int tag, Work** result) {
  return guarded([&] {
    std::vector<Tensor> tensors{*tensor};
    *result = work(group->group->send(tensors, to, tag), tensors);
  });
}

char* rlhf_recv(Group* group, Tensor* tensor, int from, int tag, Work** result) {
  return guarded([&] {
    std::vector<Tensor> tensors{*tensor};
    *result = work(group->group->recv(tensors, from, tag), tensors);
  });
}

// Waits for `slice_ms`; `done` tells whether the work has ended. An error of the work is a message.
char* rlhf_work_wait(Work* work, int64_t slice_ms, bool* done) {
  return guarded([&] {
    *done = true;
    try {
      work->work->wait(std::chrono::milliseconds(slice_ms));
    } catch (...) {
      if (work->work->isCompleted()) {
        throw;
      }
      *done = false;
    }
  });
}

// Waits to the end, which for sends and receipts may not be cut into slices: giving up one breaks its connection.
char* rlhf_work_wait_whole(Work* work) {
  return guarded([&] { work->work->wait(); });
}

void rlhf_work_free(Work* work) noexcept {
  try {
    delete work;
  } catch (...) {
  }
}

}  // extern "C"
