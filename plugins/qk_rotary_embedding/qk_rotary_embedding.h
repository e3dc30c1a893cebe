// QKRotaryEmbedding(q, k, cos, sin): partial rotary embedding of q and k in one launch.
#pragma once

#include "common/plugin.h"

namespace mmvision {

struct QKRotaryEmbedding {
    struct Attributes {};

    static constexpr char const* kNAME = "QKRotaryEmbedding";
    static constexpr char const* kFOLDER = "qk_rotary_embedding";
    static constexpr int32_t kNB_OUTPUTS = 2;
    static constexpr std::array<Input, 4> kINPUTS{ofFloatType("q"), ofFloatType("k"),
                                                  ofType("cos", nvinfer1::DataType::kFLOAT),
                                                  ofType("sin", nvinfer1::DataType::kFLOAT)};
    static constexpr std::array<Attribute<Attributes>, 0> kATTRIBUTES{};

    static void check(std::array<nvinfer1::Dims, 4> const& dims);
    static void launch(LoadedKernel const& kernel, Attributes const& attributes,
                       nvinfer1::PluginTensorDesc const* inputDesc, void const* const* inputs,
                       void* const* outputs, CUstream stream);
};

}  // namespace mmvision
