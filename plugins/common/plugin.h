// What every plugin of this library shares: the IPluginV3 methods, around the little that is an
// op's own.
//
// An op is a class with
//   kNAME, kFOLDER               name of the ONNX node and folder of its kernel
//   kINPUTS                      Input of each input, in order: of the op's float type, or of a
//   type of its own kNB_OUTPUTS                  outputs have the shape and type of input 0
//   Attributes, kATTRIBUTES      floats that come from the node
//   check(dims)                  throws Error unless the inputs' shapes belong together; a
//   dimension of -1 is not known yet launch(kernel, attributes, inputDesc, inputs, outputs, stream)
// and of these launch alone runs once per inference.
#pragma once

#include "common/error.h"
#include "common/kernels.h"
#include "common/shapes.h"

#include <NvInferRuntime.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

namespace mmvision {

constexpr char const* kNAMESPACE = "mmvision";
constexpr char const* kVERSION = "1";

// An input is of the op's float type T, or always of one type.
struct Input {
    char const* name;
    bool isFloatType;
    nvinfer1::DataType type;  // if not of the float type
};

// A float attribute of the node.
template <class Attributes>
struct Attribute {
    char const* name;
    float Attributes::* value;
};

constexpr Input ofFloatType(char const* name) {
    return {name, true, nvinfer1::DataType::kHALF};
}

constexpr Input ofType(char const* name, nvinfer1::DataType type) {
    return {name, false, type};
}

constexpr bool isSupportedFloat(nvinfer1::DataType type) {
    return type == nvinfer1::DataType::kHALF || type == nvinfer1::DataType::kBF16;
}

template <class Op>
class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuild,
                     public nvinfer1::IPluginV3OneRuntime {
public:
    using Attributes = typename Op::Attributes;

    static constexpr int32_t kNB_INPUTS =
        static_cast<int32_t>(std::tuple_size_v<decltype(Op::kINPUTS)>);

    // What an engine keeps of a plugin.
    struct State {
        Attributes attributes;
        int32_t dtype;    // nvinfer1::DataType of the float type, or -1 until the builder has
                          // configured the plugin
        int32_t headDim;  // likewise
    };

    explicit Plugin(State const& state) : mState{state} {}

    // IPluginV3

    nvinfer1::IPluginCapability* getCapabilityInterface(
        nvinfer1::PluginCapabilityType type) noexcept override {
        switch (type) {
            case nvinfer1::PluginCapabilityType::kCORE:
                return static_cast<nvinfer1::IPluginV3OneCore*>(this);
            case nvinfer1::PluginCapabilityType::kBUILD:
                return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
            case nvinfer1::PluginCapabilityType::kRUNTIME:
                return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }

    nvinfer1::IPluginV3* clone() noexcept override {
        return guarded(Op::kNAME, static_cast<nvinfer1::IPluginV3*>(nullptr),
                       [this]() -> nvinfer1::IPluginV3* {
                           auto copy = std::make_unique<Plugin>(mState);
                           copy->mKernel = mKernel;
                           return copy.release();
                       });
    }

    // IPluginV3OneCore

    char const* getPluginName() const noexcept override { return Op::kNAME; }

    char const* getPluginVersion() const noexcept override { return kVERSION; }

    char const* getPluginNamespace() const noexcept override { return kNAMESPACE; }

    // IPluginV3OneBuild

    int32_t getNbOutputs() const noexcept override { return Op::kNB_OUTPUTS; }

    int32_t getOutputDataTypes(nvinfer1::DataType* outputTypes, int32_t nbOutputs,
                               nvinfer1::DataType const* inputTypes,
                               int32_t nbInputs) const noexcept override {
        return guarded(Op::kNAME, kFAILURE, [&] {
            checkCounts(nbInputs, nbOutputs);
            for (int32_t i = 0; i < nbInputs; ++i) {
                checkType(i, inputTypes[i], inputTypes[0]);
            }
            std::fill_n(outputTypes, nbOutputs, inputTypes[0]);
            return kSUCCESS;
        });
    }

    int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs,
                            nvinfer1::DimsExprs const*, int32_t, nvinfer1::DimsExprs* outputs,
                            int32_t nbOutputs, nvinfer1::IExprBuilder&) noexcept override {
        return guarded(Op::kNAME, kFAILURE, [&] {
            checkCounts(nbInputs, nbOutputs);
            Shapes shapes{};
            for (int32_t i = 0; i < nbInputs; ++i) {
                nvinfer1::Dims& shape = shapes.at(static_cast<size_t>(i));
                shape.nbDims = inputs[i].nbDims;
                for (int32_t j = 0; j < inputs[i].nbDims; ++j) {
                    shape.d[j] =
                        inputs[i].d[j]->isConstant() ? inputs[i].d[j]->getConstantValue() : -1;
                }
            }
            Op::check(shapes);
            std::fill_n(outputs, nbOutputs, inputs[0]);
            return kSUCCESS;
        });
    }

    bool supportsFormatCombination(int32_t pos, nvinfer1::DynamicPluginTensorDesc const* inOut,
                                   int32_t nbInputs, int32_t nbOutputs) noexcept override {
        return guarded(Op::kNAME, false, [&] {
            checkCounts(nbInputs, nbOutputs);
            // An output is of the float type.
            bool const isFloatType = pos >= nbInputs || input(pos).isFloatType;
            nvinfer1::PluginTensorDesc const& desc = inOut[pos].desc;
            if (desc.format != nvinfer1::TensorFormat::kLINEAR) {
                return false;
            }
            if (!isFloatType) {
                return desc.type == input(pos).type;
            }
            return isSupportedFloat(desc.type) && desc.type == inOut[0].desc.type;
        });
    }

    int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t nbInputs,
                            nvinfer1::DynamicPluginTensorDesc const*,
                            int32_t nbOutputs) noexcept override {
        return guarded(Op::kNAME, kFAILURE, [&] {
            checkCounts(nbInputs, nbOutputs);
            std::array<nvinfer1::PluginTensorDesc, kNB_INPUTS> descs{};
            std::transform(in, in + nbInputs, descs.begin(),
                           [](auto const& dynamic) { return dynamic.desc; });
            prepare(descs.data());
            return kSUCCESS;
        });
    }

    size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const*, int32_t,
                            nvinfer1::DynamicPluginTensorDesc const*,
                            int32_t) const noexcept override {
        return 0;
    }

    // Attributes change no timing, and shapes are in TensorRT's own key.
    char const* getTimingCacheID() noexcept override { return kVERSION; }

    // IPluginV3OneRuntime

    int32_t onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t nbInputs,
                          nvinfer1::PluginTensorDesc const*, int32_t nbOutputs) noexcept override {
        return guarded(Op::kNAME, kFAILURE, [&] {
            checkCounts(nbInputs, nbOutputs);
            prepare(in);
            return kSUCCESS;
        });
    }

    int32_t enqueue(nvinfer1::PluginTensorDesc const* inputDesc, nvinfer1::PluginTensorDesc const*,
                    void const* const* inputs, void* const* outputs, void*,
                    cudaStream_t stream) noexcept override {
        return guarded(Op::kNAME, kFAILURE, [&] {
            if (mKernel == nullptr || mKernel->context() != currentContext()) {
                // Loading here could allocate in the middle of a captured graph.
                throw Error("enqueued in a CUDA context that it was not prepared for");
            }
            // A batch without patches has nothing to launch, and CUDA refuses an empty grid.
            if (inputDesc[0].dims.d[0] != 0) {
                Op::launch(*mKernel, mState.attributes, inputDesc, inputs, outputs,
                           reinterpret_cast<CUstream>(stream));
            }
            return kSUCCESS;
        });
    }

    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override {
        return guarded(Op::kNAME, static_cast<nvinfer1::IPluginV3*>(nullptr),
                       [this]() -> nvinfer1::IPluginV3* {
                           auto copy = std::make_unique<Plugin>(mState);
                           if (mState.dtype >= 0) {
                               // A GPU without a kernel is found here, when the execution context
                               // is made, not at its first batch.
                               copy->load();
                           }
                           return copy.release();
                       });
    }

    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override {
        return guarded(
            Op::kNAME, static_cast<nvinfer1::PluginFieldCollection const*>(nullptr), [this] {
                mFields.clear();
                for (auto const& attribute : Op::kATTRIBUTES) {
                    mFields.emplace_back(attribute.name, &(mState.attributes.*attribute.value),
                                         nvinfer1::PluginFieldType::kFLOAT32, 1);
                }
                mFields.emplace_back(kDTYPE_FIELD, &mState.dtype, nvinfer1::PluginFieldType::kINT32,
                                     1);
                mFields.emplace_back(kHEAD_DIM_FIELD, &mState.headDim,
                                     nvinfer1::PluginFieldType::kINT32, 1);
                mCollection = {static_cast<int32_t>(mFields.size()), mFields.data()};
                return static_cast<nvinfer1::PluginFieldCollection const*>(&mCollection);
            });
    }

    static constexpr char const* kDTYPE_FIELD = "dtype";
    static constexpr char const* kHEAD_DIM_FIELD = "head_dim";

private:
    static constexpr int32_t kSUCCESS = 0;
    static constexpr int32_t kFAILURE = -1;

    using Shapes = std::array<nvinfer1::Dims, kNB_INPUTS>;

    static void checkCounts(int32_t nbInputs, int32_t nbOutputs) {
        if (nbInputs != kNB_INPUTS || nbOutputs != Op::kNB_OUTPUTS) {
            throw Error("takes " + std::to_string(kNB_INPUTS) + " inputs and gives " +
                        std::to_string(Op::kNB_OUTPUTS) + " outputs, got " +
                        std::to_string(nbInputs) + " and " + std::to_string(nbOutputs));
        }
    }

    static Input const& input(int32_t index) { return Op::kINPUTS.at(static_cast<size_t>(index)); }

    static void checkType(int32_t index, nvinfer1::DataType type, nvinfer1::DataType floatType) {
        Input const& expected = input(index);
        if (expected.isFloatType && !isSupportedFloat(type)) {
            throw Error(std::string{expected.name} + " is " + dtypeName(type) +
                        ", the kernels are for float16 and bfloat16; build a strongly typed engine "
                        "from a graph of one of these");
        }
        nvinfer1::DataType const expectedType = expected.isFloatType ? floatType : expected.type;
        if (type != expectedType) {
            throw Error(std::string{expected.name} + " must be " + dtypeName(expectedType) +
                        ", got " + dtypeName(type));
        }
    }

    // Checks what is known now and loads the kernel for it.
    void prepare(nvinfer1::PluginTensorDesc const* in) {
        Shapes shapes{};
        for (int32_t i = 0; i < kNB_INPUTS; ++i) {
            checkType(i, in[i].type, in[0].type);
            shapes.at(static_cast<size_t>(i)) = in[i].dims;
        }
        Op::check(shapes);
        mState.dtype = static_cast<int32_t>(in[0].type);
        mState.headDim = static_cast<int32_t>(in[0].dims.d[2]);
        load();
    }

    void load() {
        if (mKernel == nullptr || mKernel->context() != currentContext() ||
            mKernel->embedded().dtype != static_cast<nvinfer1::DataType>(mState.dtype) ||
            (mKernel->embedded().headDim != 0 && mKernel->embedded().headDim != mState.headDim)) {
            mKernel = kernelForCurrentContext(
                {Op::kFOLDER, static_cast<nvinfer1::DataType>(mState.dtype), mState.headDim});
        }
    }

    State mState;
    std::shared_ptr<LoadedKernel const> mKernel;
    std::vector<nvinfer1::PluginField> mFields;
    nvinfer1::PluginFieldCollection mCollection{};
};

}  // namespace mmvision
