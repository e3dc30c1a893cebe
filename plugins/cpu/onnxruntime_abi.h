// The part of ONNX Runtime's C API that a library of operators needs, so that it compiles without ONNX Runtime's headers,
// which are in no Python package.
//
// The API is a table of functions whose order never changes, and to which later versions append
// (https://onnxruntime.ai/docs/reference/compatibility.html#c-api); the numbers below are places in it, those of
// struct OrtApi in onnxruntime_c_api.h. An operator is a table the other way around, struct OrtCustomOp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

extern "C" {
struct OrtStatus;
struct OrtValue;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtTensorTypeAndShapeInfo;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtMemoryInfo;
using OrtApi = const void* const;  // the first place of the table

struct OrtApiBase {
    OrtApi* (*GetApi)(std::uint32_t version);
    const char* (*GetVersionString)();
};

struct OrtAllocator {
    std::uint32_t version;
    void* (*Alloc)(OrtAllocator*, std::size_t);
    void (*Free)(OrtAllocator*, void*);
};

struct OrtCustomOp {
    std::uint32_t version;  // of the API that this table is of: later ones have more below
    void* (*CreateKernel)(const OrtCustomOp*, OrtApi*, const OrtKernelInfo*);
    const char* (*GetName)(const OrtCustomOp*);
    const char* (*GetExecutionProviderType)(const OrtCustomOp*);
    int (*GetInputType)(const OrtCustomOp*, std::size_t);
    std::size_t (*GetInputTypeCount)(const OrtCustomOp*);
    int (*GetOutputType)(const OrtCustomOp*, std::size_t);
    std::size_t (*GetOutputTypeCount)(const OrtCustomOp*);
    void (*KernelCompute)(void*, OrtKernelContext*);
    void (*KernelDestroy)(void*);
    int (*GetInputCharacteristic)(const OrtCustomOp*, std::size_t);
    int (*GetOutputCharacteristic)(const OrtCustomOp*, std::size_t);
    int (*GetInputMemoryType)(const OrtCustomOp*, std::size_t);
    int (*GetVariadicInputMinArity)(const OrtCustomOp*);
    int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
    int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
    int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
    OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, OrtApi*, const OrtKernelInfo*, void**);
    OrtStatus* (*KernelComputeV2)(void*, OrtKernelContext*);
    OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, void*);
    int (*GetStartVersion)(const OrtCustomOp*);
    int (*GetEndVersion)(const OrtCustomOp*);
};
}

namespace mmvision::cpu::ort {

constexpr std::uint32_t kApiVersion = 17;  // the first with KernelContext_ParallelFor

enum ElementType : int { kFloat = 1, kInt32 = 6 };
enum Characteristic : int { kRequired = 0, kOptional = 1 };
enum ErrorCode : int { kFail = 1, kInvalidArgument = 2 };

template <int place, class... Arguments>
struct Function {
    OrtStatus* operator()(OrtApi* api, Arguments... arguments) const {
        OrtStatus* (*function)(Arguments...) = nullptr;
        std::memcpy(&function, api + place, sizeof function);
        return function(arguments...);
    }
};

constexpr Function<0, int, const char*> kCreateStatus;
constexpr Function<26, const char*, OrtCustomOpDomain**> kCreateCustomOpDomain;
constexpr Function<27, OrtCustomOpDomain*, const OrtCustomOp*> kCustomOpDomainAdd;
constexpr Function<28, OrtSessionOptions*, OrtCustomOpDomain*> kAddCustomOpDomain;
constexpr Function<51, OrtValue*, void**> kGetTensorMutableData;
constexpr Function<61, const OrtTensorTypeAndShapeInfo*, std::size_t*> kGetDimensionsCount;
constexpr Function<62, const OrtTensorTypeAndShapeInfo*, std::int64_t*, std::size_t> kGetDimensions;
constexpr Function<65, const OrtValue*, OrtTensorTypeAndShapeInfo**> kGetTensorTypeAndShape;
constexpr Function<69, int, int, OrtMemoryInfo**> kCreateCpuMemoryInfo;
constexpr Function<85, const OrtKernelInfo*, const char*, float*> kKernelInfoGetAttributeFloat;
constexpr Function<88, const OrtKernelContext*, std::size_t*> kKernelContextGetInputCount;
constexpr Function<90, const OrtKernelContext*, std::size_t, const OrtValue**> kKernelContextGetInput;
constexpr Function<91, OrtKernelContext*, std::size_t, const std::int64_t*, std::size_t, OrtValue**>
    kKernelContextGetOutput;
constexpr Function<253, const OrtKernelContext*, const OrtMemoryInfo*, OrtAllocator**> kKernelContextGetAllocator;
constexpr Function<274, const OrtKernelContext*, void (*)(void*, std::size_t), std::size_t, std::size_t, void*>
    kKernelContextParallelFor;

// These return nothing.
template <int place, class Argument>
struct Release {
    void operator()(OrtApi* api, Argument* argument) const {
        void (*function)(Argument*) = nullptr;
        std::memcpy(&function, api + place, sizeof function);
        function(argument);
    }
};

constexpr Release<94, OrtMemoryInfo> kReleaseMemoryInfo;
constexpr Release<99, OrtTensorTypeAndShapeInfo> kReleaseTensorTypeAndShapeInfo;
constexpr Release<101, OrtCustomOpDomain> kReleaseCustomOpDomain;
constexpr Release<132, OrtAllocator> kReleaseAllocator;

}  // namespace mmvision::cpu::ort
