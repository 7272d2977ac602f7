// A KANLinear for inference: y = act(x) * W_base + sum over j of B_j(x) * W_j.
//
// Rules of this room: float32 in and out; weights and knots are used where they lie, never copied;
// no threads, no allocation, no exceptions; nothing here knows onnxruntime.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kan {

enum class Activation : int { silu, gelu, relu, tanh, identity };

constexpr int kMinOrder = 1;
constexpr int kMaxOrder = 5;
constexpr int kMaxGridSize = 1 << 16;

// A layer as it lies in the ONNX file.
struct Layer {
  int in;                // inputs
  int out;               // outputs
  int order;             // k, from kMinOrder to kMaxOrder
  int functions;         // G + k, at least k + 1
  const float* knots;    // (functions + k + 1, in), rising along the first axis
  const float* weights;  // ((functions + 1) * in, out): a block of `in` rows for each function, the
                         // block of the base path last
  const int* block;      // (functions + 1): which block holds a function, and the base path
  float unit;            // what the functions are multiplied by; the weights hold the rest
  Activation activation;
};

// Answers some rows, at some of the outputs.
struct Task {
  const Layer* layer;
  const float* x;  // (rows, in)
  float* y;        // (rows, out)
  int rows;
  int first;  // outputs from `first`
  int last;   // to before `last`
};

// The same kernel for one set of instructions.
struct Kernel {
  const char* name;
  bool (*available)();   // on this processor
  size_t scratch_bytes;  // that `run` needs, aligned to 64
  int rows;              // at most, of a task
  void (*run)(const Task& task, void* scratch);
};

extern const Kernel kAvx512Vbmi2, kAvx512, kAvx2, kPortable;

// Those for this architecture, the best first.
constexpr const Kernel* kKernels[] = {
#if defined(__x86_64__)
    &kAvx512Vbmi2, &kAvx512, &kAvx2,
#endif
    &kPortable};

}  // namespace kan
