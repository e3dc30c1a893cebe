// The part of ONNX Runtime's C API that a library of operators needs. No package registry has the
// published header, onnxruntime_c_api.h, so the library compiles without it. Where a copy is at
// hand, `mmvision build-plugins --cpu
// --onnxruntime-include DIR` has the compiler compare every line of this table with it
// (onnxruntime_table_check.cpp).
//
// The API is a table of functions whose order never changes, and to which later versions append
// (https://onnxruntime.ai/docs/reference/compatibility.html#c-api); the numbers below are places in
// it, those of struct OrtApi in onnxruntime_c_api.h. An operator is a table the other way around,
// struct OrtCustomOp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

// In a namespace of its own, so that one file can compare it with the published header's.
namespace mmvision::amx::ort {

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

constexpr std::uint32_t kApiVersion = 17;  // the first with KernelContext_ParallelFor

enum ElementType : int { kFloat = 1, kInt32 = 6 };
enum Characteristic : int { kRequired = 0, kOptional = 1 };
enum ErrorCode : int { kFail = 1, kInvalidArgument = 2 };
enum AllocatorType : int { kArenaAllocator = 1 };
enum MemoryType : int { kDefaultMemory = 0 };

template <int place, class... Arguments>
struct Function {
    static constexpr std::size_t kPlace = place;
    using Signature = OrtStatus*(Arguments...);

    OrtStatus* operator()(OrtApi* api, Arguments... arguments) const {
        OrtStatus* (*function)(Arguments...) = nullptr;
        std::memcpy(&function, api + place, sizeof function);
        return function(arguments...);
    }
};

constexpr Function<0, int, const char*> kCreateStatus;
constexpr Function<26, const char*, OrtCustomOpDomain**> kCreateCustomOpDomain;
constexpr Function<27, OrtCustomOpDomain*, const OrtCustomOp*> kCustomOpDomain_Add;
constexpr Function<28, OrtSessionOptions*, OrtCustomOpDomain*> kAddCustomOpDomain;
constexpr Function<51, OrtValue*, void**> kGetTensorMutableData;
constexpr Function<61, const OrtTensorTypeAndShapeInfo*, std::size_t*> kGetDimensionsCount;
constexpr Function<62, const OrtTensorTypeAndShapeInfo*, std::int64_t*, std::size_t> kGetDimensions;
constexpr Function<65, const OrtValue*, OrtTensorTypeAndShapeInfo**> kGetTensorTypeAndShape;
constexpr Function<69, int, int, OrtMemoryInfo**> kCreateCpuMemoryInfo;
constexpr Function<85, const OrtKernelInfo*, const char*, float*> kKernelInfoGetAttribute_float;
constexpr Function<88, const OrtKernelContext*, std::size_t*> kKernelContext_GetInputCount;
constexpr Function<90, const OrtKernelContext*, std::size_t, const OrtValue**>
    kKernelContext_GetInput;
constexpr Function<91, OrtKernelContext*, std::size_t, const std::int64_t*, std::size_t, OrtValue**>
    kKernelContext_GetOutput;
constexpr Function<253, const OrtKernelContext*, const OrtMemoryInfo*, OrtAllocator**>
    kKernelContext_GetAllocator;
constexpr Function<274, const OrtKernelContext*, void (*)(void*, std::size_t), std::size_t,
                   std::size_t, void*>
    kKernelContext_ParallelFor;

// These return nothing.
template <int place, class Argument>
struct Release {
    static constexpr std::size_t kPlace = place;
    using Signature = void(Argument*);

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

}  // namespace mmvision::amx::ort
