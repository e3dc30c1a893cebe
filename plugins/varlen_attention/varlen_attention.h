// VarlenAttention(q, k, v, cu_seqlens; scale): attention inside each segment of a packed sequence.
#pragma once

#include "common/plugin.h"

namespace mmvision {

struct VarlenAttention {
    struct Attributes {
        float scale;
    };

    static constexpr char const* kNAME = "VarlenAttention";
    static constexpr char const* kFOLDER = "varlen_attention";
    static constexpr int32_t kNB_OUTPUTS = 1;
    static constexpr std::array<Input, 4> kINPUTS{ofFloatType("q"), ofFloatType("k"),
                                                  ofFloatType("v"),
                                                  ofType("cu_seqlens", nvinfer1::DataType::kINT32)};
    static constexpr std::array<Attribute<Attributes>, 1> kATTRIBUTES{
        {{"scale", &Attributes::scale}}};

    static void check(std::array<nvinfer1::Dims, 4> const& dims);
    static void launch(LoadedKernel const& kernel, Attributes const& attributes,
                       nvinfer1::PluginTensorDesc const* inputDesc, void const* const* inputs,
                       void* const* outputs, CUstream stream);
};

}  // namespace mmvision
