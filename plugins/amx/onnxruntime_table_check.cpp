// Compares onnxruntime_table.h with ONNX Runtime's published header, at compile time: each
// function's place and the kinds of its arguments, the layout of the tables, and the numbers.
// Compiled only where that header is at hand.
#include <onnxruntime_c_api.h>

#include <array>
#include <cstddef>
#include <type_traits>

#include "amx/onnxruntime_table.h"

namespace mmvision::amx {

namespace {

// What two types must share to be passed alike: being a pointer, or a float or an integer of a
// size.
template <class Type>
constexpr std::size_t kind() {
    constexpr std::size_t kPointer = 100;
    constexpr std::size_t kFloating = 200;
    if constexpr (std::is_void_v<Type>) {
        return 0;
    } else if constexpr (std::is_pointer_v<Type>) {
        return kPointer;
    } else {
        return sizeof(Type) + (std::is_floating_point_v<Type> ? kFloating : 0);
    }
}

// A function's result and arguments; of what is no function, the kind.
template <class Type>
struct Shape {
    static constexpr std::array<std::size_t, 1> kKinds{kind<Type>()};
};
template <class Result, class... Arguments>
struct Shape<Result(Arguments...)> {
    static constexpr std::array<std::size_t, 1 + sizeof...(Arguments)> kKinds{kind<Result>(),
                                                                              kind<Arguments>()...};
};
template <class Result, class... Arguments>
struct Shape<Result(Arguments...) noexcept> : Shape<Result(Arguments...)> {};
template <class Type>
struct Shape<Type*> : Shape<std::conditional_t<std::is_function_v<Type>, Type, void>> {};

template <class One, class Other>
constexpr bool alike() {
    constexpr auto& one = Shape<One>::kKinds;
    constexpr auto& other = Shape<Other>::kKinds;
    if constexpr (one.size() != other.size()) {
        return false;
    } else {
        for (std::size_t i = 0; i < one.size(); ++i) {
            if (one[i] != other[i]) {
                return false;
            }
        }
        return true;
    }
}

#define MMVISION_SAME_FUNCTION(name)                                                          \
    static_assert(offsetof(::OrtApi, name) == decltype(ort::k##name)::kPlace * sizeof(void*), \
                  "OrtApi::" #name);                                                          \
    static_assert(alike<decltype(::OrtApi::name), decltype(ort::k##name)::Signature>(),       \
                  "OrtApi::" #name)

MMVISION_SAME_FUNCTION(CreateStatus);
MMVISION_SAME_FUNCTION(CreateCustomOpDomain);
MMVISION_SAME_FUNCTION(CustomOpDomain_Add);
MMVISION_SAME_FUNCTION(AddCustomOpDomain);
MMVISION_SAME_FUNCTION(GetTensorMutableData);
MMVISION_SAME_FUNCTION(GetDimensionsCount);
MMVISION_SAME_FUNCTION(GetDimensions);
MMVISION_SAME_FUNCTION(GetTensorTypeAndShape);
MMVISION_SAME_FUNCTION(CreateCpuMemoryInfo);
MMVISION_SAME_FUNCTION(KernelInfoGetAttribute_float);
MMVISION_SAME_FUNCTION(KernelContext_GetInputCount);
MMVISION_SAME_FUNCTION(KernelContext_GetInput);
MMVISION_SAME_FUNCTION(KernelContext_GetOutput);
MMVISION_SAME_FUNCTION(KernelContext_GetAllocator);
MMVISION_SAME_FUNCTION(KernelContext_ParallelFor);
MMVISION_SAME_FUNCTION(ReleaseMemoryInfo);
MMVISION_SAME_FUNCTION(ReleaseTensorTypeAndShapeInfo);
MMVISION_SAME_FUNCTION(ReleaseCustomOpDomain);
MMVISION_SAME_FUNCTION(ReleaseAllocator);

#define MMVISION_SAME_FIELD(table, name)                                                     \
    static_assert(offsetof(::table, name) == offsetof(ort::table, name), #table "::" #name); \
    static_assert(alike<decltype(::table::name), decltype(ort::table::name)>(), #table "::" #name)

MMVISION_SAME_FIELD(OrtApiBase, GetApi);
MMVISION_SAME_FIELD(OrtApiBase, GetVersionString);
MMVISION_SAME_FIELD(OrtAllocator, version);
MMVISION_SAME_FIELD(OrtAllocator, Alloc);
MMVISION_SAME_FIELD(OrtAllocator, Free);
MMVISION_SAME_FIELD(OrtCustomOp, version);
MMVISION_SAME_FIELD(OrtCustomOp, CreateKernel);
MMVISION_SAME_FIELD(OrtCustomOp, GetName);
MMVISION_SAME_FIELD(OrtCustomOp, GetExecutionProviderType);
MMVISION_SAME_FIELD(OrtCustomOp, GetInputType);
MMVISION_SAME_FIELD(OrtCustomOp, GetInputTypeCount);
MMVISION_SAME_FIELD(OrtCustomOp, GetOutputType);
MMVISION_SAME_FIELD(OrtCustomOp, GetOutputTypeCount);
MMVISION_SAME_FIELD(OrtCustomOp, KernelCompute);
MMVISION_SAME_FIELD(OrtCustomOp, KernelDestroy);
MMVISION_SAME_FIELD(OrtCustomOp, GetInputCharacteristic);
MMVISION_SAME_FIELD(OrtCustomOp, GetOutputCharacteristic);
MMVISION_SAME_FIELD(OrtCustomOp, GetInputMemoryType);
MMVISION_SAME_FIELD(OrtCustomOp, GetVariadicInputMinArity);
MMVISION_SAME_FIELD(OrtCustomOp, GetVariadicInputHomogeneity);
MMVISION_SAME_FIELD(OrtCustomOp, GetVariadicOutputMinArity);
MMVISION_SAME_FIELD(OrtCustomOp, GetVariadicOutputHomogeneity);
MMVISION_SAME_FIELD(OrtCustomOp, CreateKernelV2);
MMVISION_SAME_FIELD(OrtCustomOp, KernelComputeV2);
MMVISION_SAME_FIELD(OrtCustomOp, InferOutputShapeFn);
MMVISION_SAME_FIELD(OrtCustomOp, GetStartVersion);
MMVISION_SAME_FIELD(OrtCustomOp, GetEndVersion);

static_assert(ORT_API_VERSION >= ort::kApiVersion);
static_assert(static_cast<int>(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) == ort::kFloat);
static_assert(static_cast<int>(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32) == ort::kInt32);
static_assert(static_cast<int>(INPUT_OUTPUT_REQUIRED) == ort::kRequired);
static_assert(static_cast<int>(INPUT_OUTPUT_OPTIONAL) == ort::kOptional);
static_assert(static_cast<int>(ORT_FAIL) == ort::kFail);
static_assert(static_cast<int>(ORT_INVALID_ARGUMENT) == ort::kInvalidArgument);
static_assert(static_cast<int>(OrtArenaAllocator) == ort::kArenaAllocator);
static_assert(static_cast<int>(OrtMemTypeDefault) == ort::kDefaultMemory);

}  // namespace

}  // namespace mmvision::amx
