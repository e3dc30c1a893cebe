// The creator of an op's plugins: from a node's attributes, and from what an engine keeps.
#pragma once

#include "common/plugin.h"

#include <cmath>
#include <cstring>

namespace mmvision {

template <class Op>
class Creator final : public nvinfer1::IPluginCreatorV3One {
public:
    Creator() {
        for (auto const& attribute : Op::kATTRIBUTES) {
            mFields.emplace_back(attribute.name, nullptr, nvinfer1::PluginFieldType::kFLOAT32, 1);
        }
        mCollection = {static_cast<int32_t>(mFields.size()), mFields.data()};
    }

    char const* getPluginName() const noexcept override { return Op::kNAME; }

    char const* getPluginVersion() const noexcept override { return kVERSION; }

    char const* getPluginNamespace() const noexcept override { return kNAMESPACE; }

    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override {
        return &mCollection;
    }

    nvinfer1::IPluginV3* createPlugin(char const*, nvinfer1::PluginFieldCollection const* fields,
                                      nvinfer1::TensorRTPhase) noexcept override {
        return guarded(
            Op::kNAME, static_cast<nvinfer1::IPluginV3*>(nullptr), [&]() -> nvinfer1::IPluginV3* {
                typename Plugin<Op>::State state{{}, -1, -1};
                for (auto const& attribute : Op::kATTRIBUTES) {
                    float& value = state.attributes.*attribute.value;
                    if (!read(fields, attribute.name, nvinfer1::PluginFieldType::kFLOAT32, value)) {
                        throw Error(std::string{"attribute "} + attribute.name + " is missing");
                    }
                    if (!std::isfinite(value)) {
                        throw Error(std::string{"attribute "} + attribute.name +
                                    " must be finite, got " + std::to_string(value));
                    }
                }
                // There once an engine has been built.
                read(fields, Plugin<Op>::kDTYPE_FIELD, nvinfer1::PluginFieldType::kINT32,
                     state.dtype);
                read(fields, Plugin<Op>::kHEAD_DIM_FIELD, nvinfer1::PluginFieldType::kINT32,
                     state.headDim);
                return std::make_unique<Plugin<Op>>(state).release();
            });
    }

private:
    // Other fields are left alone: the node's plugin_namespace and plugin_version come as fields
    // too.
    template <class Value>
    static bool read(nvinfer1::PluginFieldCollection const* fields, char const* name,
                     nvinfer1::PluginFieldType type, Value& value) {
        for (int32_t i = 0; fields != nullptr && i < fields->nbFields; ++i) {
            nvinfer1::PluginField const& field = fields->fields[i];
            if (field.name == nullptr || std::strcmp(field.name, name) != 0) {
                continue;
            }
            if (field.type != type || field.length != 1 || field.data == nullptr) {
                throw Error(std::string{"attribute "} + name + " must be one " +
                            (type == nvinfer1::PluginFieldType::kFLOAT32 ? "float32" : "int32") +
                            ", got type " + std::to_string(static_cast<int32_t>(field.type)) +
                            " and length " + std::to_string(field.length));
            }
            std::memcpy(&value, field.data, sizeof(value));
            return true;
        }
        return false;
    }

    std::vector<nvinfer1::PluginField> mFields;
    nvinfer1::PluginFieldCollection mCollection{};
};

}  // namespace mmvision
