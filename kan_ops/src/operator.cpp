// KANLinear as an operator of onnxruntime: takes tensors apart, and gives rows to its threads.
//
//   y = kanserve.KANLinear1(x, knots, weight)
//
//   x       (rows, in)
//   knots   (G + 2k + 1 or more, in), rising along the first axis; what is beyond is not looked at
//   weight  ((G + k + 1) * in, out): a block of `in` rows for each function, in the order that
//           `groups` tells, then one for the base path
//   y       (rows, out)
//
//   order       k
//   grid_size   G
//   groups      the blocks hold the functions 0, groups, 2 groups, ..., then 1, 1 + groups, ...
//   scale       the weights of functions were multiplied by this; the functions are divided by it
//   activation  of the base path: silu, gelu, relu, tanh or identity
//
// The name carries the version: onnxruntime takes a registered operator for any version of its
// domain, so what another library means must have another name.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "kernel.h"
#include "ort_api.h"

namespace {

constexpr const char* kDomain = "kanserve";
constexpr const char* kName = "KANLinear1";
constexpr const char* kActivations[] = {"silu", "gelu", "relu", "tanh", "identity"};

// Entries of a session's configuration.
constexpr const char* kThreadsKey = "kan_ops.threads";            // of the session
constexpr const char* kInstructionsKey = "kan_ops.instructions";  // the name of a kernel

// How a call is parted, as measured on two cores with AVX-512.
constexpr double kWorthATask = 4e5;  // multiplications that take as long as handing work over
constexpr int kEvaluation = 48;      // outputs that cost as much as the functions of an input
constexpr int kWide = 256;           // from so many outputs on, rather part those than rows
constexpr int kRowsATask = 32;       // of wide layers
constexpr int kColumns = 32;         // of which tasks take whole multiples
constexpr int kRowMultiple = 16;     // likewise of rows

#define KAN_RETURN_IF_ERROR(expression) \
  if (ort::Status* status = (expression)) return status

struct Tensor {
  float* data;
  int64_t rows, columns;
};

// The scratch of a thread, made when it first needs one.
void* scratch(size_t bytes) {
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local size_t size = 0;
  if (size < bytes) {
    memory.reset(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
    size = memory ? bytes : 0;
  }
  return memory.get();
}

// The best kernel for this processor, or the one of that name, or none.
const kan::Kernel* choose_kernel(const char* name) {
  for (const kan::Kernel* kernel : kan::kKernels)
    if (kernel->available() && (!name || !std::strcmp(name, kernel->name))) return kernel;
  return nullptr;
}

// Parts the answers of one call into tasks: tiles of rows, and of columns where that pays.
class Plan {
 public:
  Plan(const kan::Layer& layer, const kan::Kernel& kernel, int threads, const float* x, float* y,
       int64_t rows)
      : layer_(layer), kernel_(kernel), x_(x), y_(y), rows_(rows) {
    const double work =
        static_cast<double>(rows) * layer.in * (layer.out + kEvaluation) * (layer.order + 2);
    const int64_t useful = static_cast<int64_t>(std::min<double>(threads, 1 + work / kWorthATask));
    // Rows that share weights are worth more than functions that are computed once.
    const int64_t row_parts =
        layer.out < kWide ? std::min<int64_t>(useful, (rows + kRowMultiple - 1) / kRowMultiple)
                          : std::clamp<int64_t>(rows / kRowsATask, 1, useful);
    const int64_t share = (rows + row_parts - 1) / row_parts;
    tile_ =
        std::min<int64_t>(kernel.rows, (share + kRowMultiple - 1) / kRowMultiple * kRowMultiple);
    const int64_t units = (int64_t{layer.out} + kColumns - 1) / kColumns;
    const int64_t column_parts = std::min(units, useful / row_parts);
    columns_ = (units + column_parts - 1) / column_parts * kColumns;
    column_tiles_ = (layer.out + columns_ - 1) / columns_;
  }

  size_t tasks() const { return static_cast<size_t>((rows_ + tile_ - 1) / tile_ * column_tiles_); }
  bool failed() const { return failed_; }

  static void run(void* plan, size_t task) { static_cast<Plan*>(plan)->run(task); }

  void run(size_t task) {
    void* memory = scratch(kernel_.scratch_bytes);
    if (!memory) {
      failed_ = true;
      return;
    }
    const int64_t row = static_cast<int64_t>(task) / column_tiles_ * tile_;
    const int64_t column = static_cast<int64_t>(task) % column_tiles_ * columns_;
    kernel_.run({&layer_, x_ + row * layer_.in, y_ + row * layer_.out,
                 static_cast<int>(std::min(tile_, rows_ - row)), static_cast<int>(column),
                 static_cast<int>(std::min<int64_t>(column + columns_, layer_.out))},
                memory);
  }

 private:
  const kan::Layer& layer_;
  const kan::Kernel& kernel_;
  const float* x_;
  float* y_;
  int64_t rows_;
  int64_t tile_;     // rows of a task
  int64_t columns_;  // of a task
  int64_t column_tiles_;
  std::atomic<bool> failed_ = false;
};

struct Operator : ort::CustomOp {
  const kan::Kernel* kernel;
  int threads;
};

class KANLinear {
 public:
  KANLinear(const ort::Api& api, const Operator& op) : api_(api), op_(op) {}

  ort::Status* read(const ort::KernelInfo* info) {
    int64_t order = 0, grid_size = 0, groups = 0;
    char activation[16] = {};
    size_t size = sizeof activation;
    KAN_RETURN_IF_ERROR(api_.KernelInfoGetAttribute_int64(info, "order", &order));
    KAN_RETURN_IF_ERROR(api_.KernelInfoGetAttribute_int64(info, "grid_size", &grid_size));
    KAN_RETURN_IF_ERROR(api_.KernelInfoGetAttribute_int64(info, "groups", &groups));
    KAN_RETURN_IF_ERROR(api_.KernelInfoGetAttribute_float(info, "scale", &scale_));
    if (ort::Status* status =
            api_.KernelInfoGetAttribute_string(info, "activation", activation, &size)) {
      api_.ReleaseStatus(status);  // it is longer than any that is known
      activation[0] = 0;
    }
    const auto found =
        std::find_if(std::begin(kActivations), std::end(kActivations),
                     [&](const char* name) { return !std::strcmp(name, activation); });
    if (order < kan::kMinOrder || order > kan::kMaxOrder || grid_size < 1 ||
        grid_size > kan::kMaxGridSize || groups < 1 || groups > grid_size + order ||
        !std::isnormal(scale_) || found == std::end(kActivations))
      return refuse("an attribute has a value that this version of kan_ops does not know");
    order_ = static_cast<int>(order);
    activation_ = static_cast<kan::Activation>(found - std::begin(kActivations));
    const int64_t functions = grid_size + order;
    block_.resize(static_cast<size_t>(functions) + 1);
    int place = 0;
    for (int64_t group = 0; group < groups; ++group)
      for (int64_t function = group; function < functions; function += groups)
        block_[static_cast<size_t>(function)] = place++;
    block_.back() = place;
    return nullptr;
  }

  ort::Status* run(ort::KernelContext* context) const {
    Tensor x, knots, weight;
    KAN_RETURN_IF_ERROR(input(context, 0, &x));
    KAN_RETURN_IF_ERROR(input(context, 1, &knots));
    KAN_RETURN_IF_ERROR(input(context, 2, &weight));
    const int64_t blocks = static_cast<int64_t>(block_.size());
    if (x.columns < 1 || weight.columns < 1 || knots.columns != x.columns ||
        knots.rows < blocks + order_ || weight.rows != x.columns * blocks)
      return refuse("x, knots and weight have shapes that do not fit each other");
    if (weight.rows > INT32_MAX || knots.rows * knots.columns > INT32_MAX ||
        weight.columns > INT32_MAX - kColumns)
      return refuse("expected fewer than 2^31 rows of weights, outputs and knots");
    const int64_t shape[] = {x.rows, weight.columns};
    ort::Value* value = nullptr;
    KAN_RETURN_IF_ERROR(api_.KernelContext_GetOutput(context, 0, shape, 2, &value));
    if (x.rows == 0) return nullptr;
    void* y = nullptr;
    KAN_RETURN_IF_ERROR(api_.GetTensorMutableData(value, &y));
    const kan::Layer layer{static_cast<int>(x.columns),
                           static_cast<int>(weight.columns),
                           order_,
                           static_cast<int>(blocks) - 1,
                           knots.data,
                           weight.data,
                           block_.data(),
                           1 / scale_,
                           activation_};
    Plan plan(layer, *op_.kernel, op_.threads, x.data, static_cast<float*>(y), x.rows);
    if (plan.tasks() == 1) {
      plan.run(0);
    } else {
      KAN_RETURN_IF_ERROR(
          api_.KernelContext_ParallelFor(context, Plan::run, plan.tasks(), 0, &plan));
    }
    return plan.failed() ? api_.CreateStatus(ort::kFail, "kan_ops: out of memory") : nullptr;
  }

 private:
  ort::Status* refuse(const char* why) const {
    char message[160];
    std::snprintf(message, sizeof message, "%s: %s", kName, why);
    return api_.CreateStatus(ort::kInvalidArgument, message);
  }

  ort::Status* input(const ort::KernelContext* context, size_t index, Tensor* tensor) const {
    const ort::Value* value = nullptr;
    KAN_RETURN_IF_ERROR(api_.KernelContext_GetInput(context, index, &value));
    ort::ShapeInfo* info = nullptr;
    KAN_RETURN_IF_ERROR(api_.GetTensorTypeAndShape(value, &info));
    size_t count = 0;
    int64_t shape[2] = {};
    ort::Status* status = api_.GetDimensionsCount(info, &count);
    if (!status && count == 2) status = api_.GetDimensions(info, shape, 2);
    api_.ReleaseShapeInfo(info);
    if (status) return status;
    if (count != 2) return refuse("expected tensors of two dimensions");
    void* data = nullptr;
    KAN_RETURN_IF_ERROR(api_.GetTensorMutableData(const_cast<ort::Value*>(value), &data));
    *tensor = {static_cast<float*>(data), shape[0], shape[1]};
    return nullptr;
  }

  const ort::Api& api_;
  const Operator& op_;
  int order_ = 0;
  float scale_ = 0;
  kan::Activation activation_ = kan::Activation::silu;
  std::vector<int> block_;  // of each function, then of the base path
};

ort::Status* create(const ort::CustomOp* op, const ort::Api* api, const ort::KernelInfo* info,
                    void** kernel) {
  try {
    auto made = std::make_unique<KANLinear>(*api, *static_cast<const Operator*>(op));
    KAN_RETURN_IF_ERROR(made->read(info));
    *kernel = made.release();
    return nullptr;
  } catch (const std::bad_alloc&) {
    return api->CreateStatus(ort::kFail, "kan_ops: out of memory");
  }
}

std::unique_ptr<Operator> make_operator(const kan::Kernel* kernel, int threads) {
  auto op = std::make_unique<Operator>();
  op->version = ort::kApiVersion;
  op->GetName = [](const ort::CustomOp*) { return kName; };
  op->GetExecutionProviderType = [](const ort::CustomOp*) { return "CPUExecutionProvider"; };
  op->GetInputType = [](const ort::CustomOp*, size_t) { return ort::kFloat; };
  op->GetInputTypeCount = [](const ort::CustomOp*) -> size_t { return 3; };
  op->GetOutputType = [](const ort::CustomOp*, size_t) { return ort::kFloat; };
  op->GetOutputTypeCount = [](const ort::CustomOp*) -> size_t { return 1; };
  op->GetInputCharacteristic = [](const ort::CustomOp*, size_t) { return ort::kRequired; };
  op->GetOutputCharacteristic = [](const ort::CustomOp*, size_t) { return ort::kRequired; };
  op->GetInputMemoryType = [](const ort::CustomOp*, size_t) { return ort::kDefaultMemory; };
  op->GetVariadicInputMinArity = [](const ort::CustomOp*) { return 0; };
  op->GetVariadicInputHomogeneity = [](const ort::CustomOp*) { return 0; };
  op->GetVariadicOutputMinArity = [](const ort::CustomOp*) { return 0; };
  op->GetVariadicOutputHomogeneity = [](const ort::CustomOp*) { return 0; };
  op->GetStartVersion = [](const ort::CustomOp*) { return 1; };
  op->GetEndVersion = [](const ort::CustomOp*) { return INT32_MAX; };
  op->CreateKernelV2 = create;
  op->KernelComputeV2 = [](void* kernel, ort::KernelContext* context) {
    return static_cast<KANLinear*>(kernel)->run(context);
  };
  op->KernelDestroy = [](void* kernel) { delete static_cast<KANLinear*>(kernel); };
  op->kernel = kernel;
  op->threads = threads;
  return op;
}

// An operator, and the domain that onnxruntime knows it by.
struct Registered {
  std::unique_ptr<Operator> op;
  ort::Domain* domain;
};

// Finds the domain for an operator, made when it is first asked for. Both live as long as the
// library, because sessions keep pointers to them.
ort::Status* find_domain(const ort::Api& api, const kan::Kernel* kernel, int threads,
                         ort::Domain** found) {
  static std::mutex mutex;
  static std::vector<Registered> all;
  const std::lock_guard<std::mutex> lock(mutex);
  for (const Registered& one : all) {
    if (one.op->kernel == kernel && one.op->threads == threads) {
      *found = one.domain;
      return nullptr;
    }
  }
  Registered made{make_operator(kernel, threads), nullptr};
  KAN_RETURN_IF_ERROR(api.CreateCustomOpDomain(kDomain, &made.domain));
  KAN_RETURN_IF_ERROR(api.CustomOpDomain_Add(made.domain, made.op.get()));
  *found = made.domain;
  all.push_back(std::move(made));
  return nullptr;
}

// A short entry of the configuration; empty if there is none, and cut off if it is long.
template <size_t N>
void read_entry(const ort::Api& api, const ort::SessionOptions* options, const char* key,
                char (&value)[N]) {
  size_t size = 0;
  value[0] = 0;
  ort::Status* status = api.GetSessionConfigEntry(options, key, nullptr, &size);
  if (!status && size > 0) {
    std::string whole(size, 0);
    status = api.GetSessionConfigEntry(options, key, whole.data(), &size);
    if (!status) std::snprintf(value, N, "%s", whole.c_str());
  }
  if (status) api.ReleaseStatus(status);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) ort::Status* RegisterCustomOps(
    ort::SessionOptions* options, const ort::ApiBase* base) {
  const ort::Api* api = base->GetApi(ort::kApiVersion);
  if (!api)
    return base->GetApi(1)->CreateStatus(ort::kFail, "kan_ops needs onnxruntime 1.17 or newer");
  try {
    char text[16], name[16];
    read_entry(*api, options, kThreadsKey, text);
    read_entry(*api, options, kInstructionsKey, name);
    int threads = std::atoi(text);
    if (threads < 1) threads = static_cast<int>(std::thread::hardware_concurrency());
    const kan::Kernel* kernel = choose_kernel(name[0] ? name : nullptr);
    if (!kernel)
      return api->CreateStatus(ort::kInvalidArgument,
                               "kan_ops.instructions: expected avx512vbmi2, avx512, avx2 or "
                               "portable, and what this processor has");
    ort::Domain* domain = nullptr;
    KAN_RETURN_IF_ERROR(find_domain(*api, kernel, std::max(threads, 1), &domain));
    return api->AddCustomOpDomain(options, domain);
  } catch (const std::exception&) {
    return api->CreateStatus(ort::kFail, "kan_ops: out of memory");
  }
}
