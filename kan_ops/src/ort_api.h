// The part of onnxruntime's C API that an operator needs, declared by hand: the headers are in no
// Python package, and only these few entries of a table of functions are used.
//
// The table is append-only: an entry keeps its place for ever, so a library that uses the first 275
// runs on every onnxruntime from API version 17 (1.17, January 2024) on. Places and signatures are
// those of onnxruntime_c_api.h, MIT licence, Microsoft Corporation; the two structures of callbacks
// are laid out as they were in that version.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ort {

constexpr uint32_t kApiVersion = 17;

struct Status;
struct Value;
struct ShapeInfo;
struct KernelInfo;
struct KernelContext;
struct SessionOptions;
struct Domain;

enum ErrorCode : int { kFail = 1, kInvalidArgument = 2 };
enum ElementType : int { kFloat = 1 };
enum Characteristic : int { kRequired = 0, kOptional = 1, kVariadic = 2 };
enum MemoryType : int { kDefaultMemory = 0 };

// The table of functions; `get` takes an entry by its place.
struct Api {
  void* entries[275];

  template <typename Function>
  Function get(size_t place) const {
    return reinterpret_cast<Function>(entries[place]);
  }

  Status* CreateStatus(ErrorCode code, const char* message) const {
    return get<Status* (*)(ErrorCode, const char*)>(0)(code, message);
  }
  Status* CreateCustomOpDomain(const char* name, Domain** out) const {
    return get<Status* (*)(const char*, Domain**)>(26)(name, out);
  }
  Status* CustomOpDomain_Add(Domain* domain, const struct CustomOp* op) const {
    return get<Status* (*)(Domain*, const CustomOp*)>(27)(domain, op);
  }
  Status* AddCustomOpDomain(SessionOptions* options, Domain* domain) const {
    return get<Status* (*)(SessionOptions*, Domain*)>(28)(options, domain);
  }
  Status* GetTensorMutableData(Value* value, void** out) const {
    return get<Status* (*)(Value*, void**)>(51)(value, out);
  }
  Status* GetDimensionsCount(const ShapeInfo* info, size_t* out) const {
    return get<Status* (*)(const ShapeInfo*, size_t*)>(61)(info, out);
  }
  Status* GetDimensions(const ShapeInfo* info, int64_t* out, size_t count) const {
    return get<Status* (*)(const ShapeInfo*, int64_t*, size_t)>(62)(info, out, count);
  }
  Status* GetTensorTypeAndShape(const Value* value, ShapeInfo** out) const {
    return get<Status* (*)(const Value*, ShapeInfo**)>(65)(value, out);
  }
  Status* KernelInfoGetAttribute_float(const KernelInfo* info, const char* name, float* out) const {
    return get<Status* (*)(const KernelInfo*, const char*, float*)>(85)(info, name, out);
  }
  Status* KernelInfoGetAttribute_int64(const KernelInfo* info, const char* name,
                                       int64_t* out) const {
    return get<Status* (*)(const KernelInfo*, const char*, int64_t*)>(86)(info, name, out);
  }
  Status* KernelInfoGetAttribute_string(const KernelInfo* info, const char* name, char* out,
                                        size_t* size) const {
    return get<Status* (*)(const KernelInfo*, const char*, char*, size_t*)>(87)(info, name, out,
                                                                                size);
  }
  Status* KernelContext_GetInput(const KernelContext* context, size_t index,
                                 const Value** out) const {
    return get<Status* (*)(const KernelContext*, size_t, const Value**)>(90)(context, index, out);
  }
  Status* KernelContext_GetOutput(KernelContext* context, size_t index, const int64_t* dimensions,
                                  size_t count, Value** out) const {
    return get<Status* (*)(KernelContext*, size_t, const int64_t*, size_t, Value**)>(91)(
        context, index, dimensions, count, out);
  }
  void ReleaseStatus(Status* status) const { get<void (*)(Status*)>(93)(status); }
  void ReleaseShapeInfo(ShapeInfo* info) const { get<void (*)(ShapeInfo*)>(99)(info); }
  Status* GetSessionConfigEntry(const SessionOptions* options, const char* key, char* out,
                                size_t* size) const {
    return get<Status* (*)(const SessionOptions*, const char*, char*, size_t*)>(238)(options, key,
                                                                                     out, size);
  }
  Status* KernelContext_ParallelFor(const KernelContext* context, void (*run)(void*, size_t),
                                    size_t total, size_t batches, void* data) const {
    return get<Status* (*)(const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*)>(
        274)(context, run, total, batches, data);
  }
};

struct ApiBase {
  const Api* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

// What onnxruntime calls; all of it, in order, as of version 17.
struct CustomOp {
  uint32_t version;
  void* (*CreateKernel)(const CustomOp*, const Api*, const KernelInfo*);
  const char* (*GetName)(const CustomOp*);
  const char* (*GetExecutionProviderType)(const CustomOp*);
  ElementType (*GetInputType)(const CustomOp*, size_t);
  size_t (*GetInputTypeCount)(const CustomOp*);
  ElementType (*GetOutputType)(const CustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const CustomOp*);
  void (*KernelCompute)(void*, KernelContext*);
  void (*KernelDestroy)(void*);
  Characteristic (*GetInputCharacteristic)(const CustomOp*, size_t);
  Characteristic (*GetOutputCharacteristic)(const CustomOp*, size_t);
  MemoryType (*GetInputMemoryType)(const CustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const CustomOp*);
  int (*GetVariadicInputHomogeneity)(const CustomOp*);
  int (*GetVariadicOutputMinArity)(const CustomOp*);
  int (*GetVariadicOutputHomogeneity)(const CustomOp*);
  Status* (*CreateKernelV2)(const CustomOp*, const Api*, const KernelInfo*, void**);
  Status* (*KernelComputeV2)(void*, KernelContext*);
  Status* (*InferOutputShapeFn)(const CustomOp*, struct ShapeInferContext*);
  int (*GetStartVersion)(const CustomOp*);
  int (*GetEndVersion)(const CustomOp*);
};

}  // namespace ort
