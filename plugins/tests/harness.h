// The library as TensorRT sees it: loaded by dlopen, its creators asked for, its messages
// collected.
#pragma once

#include <NvInferRuntime.h>

#include <dlfcn.h>

#include <algorithm>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace harness {

using nvinfer1::DataType;
using nvinfer1::Dims;

constexpr int32_t kOK = 0;

class Logger final : public nvinfer1::ILogger {
public:
    void log(Severity severity, char const* message) noexcept override {
        std::lock_guard<std::mutex> const lock{mMutex};
        mMessages += severity == Severity::kERROR ? std::string{message} + "\n" : std::string{};
    }

    // What was logged as an error since the last call.
    std::string take() {
        std::lock_guard<std::mutex> const lock{mMutex};
        return std::exchange(mMessages, {});
    }

private:
    std::mutex mMutex;
    std::string mMessages;
};

class LoggerFinder final : public nvinfer1::ILoggerFinder {
public:
    explicit LoggerFinder(Logger& logger) : mLogger{logger} {}

    nvinfer1::ILogger* findLogger() override { return &mLogger; }

private:
    Logger& mLogger;
};

inline Logger& logger() {
    static Logger sLogger;
    return sLogger;
}

class Library {
public:
    static Library const& get() {
        static Library const sLibrary;
        return sLibrary;
    }

    nvinfer1::IPluginCreatorInterface* const* creators(int32_t& count) const {
        return mGetCreators(count);
    }

    nvinfer1::IPluginCreatorV3One& creator(std::string const& name) const {
        int32_t count = 0;
        nvinfer1::IPluginCreatorInterface* const* const all = mGetCreators(count);
        for (int32_t i = 0; i < count; ++i) {
            auto* const creator = static_cast<nvinfer1::IPluginCreatorV3One*>(all[i]);
            if (name == creator->getPluginName()) {
                return *creator;
            }
        }
        throw std::runtime_error("no creator of " + name);
    }

private:
    Library() : mHandle{dlopen(MMVISION_LIBRARY, RTLD_NOW | RTLD_LOCAL)} {
        if (mHandle == nullptr) {
            throw std::runtime_error(dlerror());
        }
        mGetCreators = reinterpret_cast<GetCreators>(dlsym(mHandle, "getCreators"));
        auto const setLoggerFinder =
            reinterpret_cast<SetLoggerFinder>(dlsym(mHandle, "setLoggerFinder"));
        static LoggerFinder sFinder{logger()};
        setLoggerFinder(&sFinder);
    }

    using GetCreators = nvinfer1::IPluginCreatorInterface* const* (*)(int32_t&);
    using SetLoggerFinder = void (*)(nvinfer1::ILoggerFinder*);

    void* mHandle;
    GetCreators mGetCreators{};
};

// A plugin and its three interfaces, owned.
struct Instance {
    explicit Instance(nvinfer1::IPluginV3* created) : plugin{created} {}

    explicit operator bool() const { return plugin != nullptr; }

    nvinfer1::IPluginV3OneCore& core() const {
        return capability<nvinfer1::IPluginV3OneCore>(nvinfer1::PluginCapabilityType::kCORE);
    }

    nvinfer1::IPluginV3OneBuild& build() const {
        return capability<nvinfer1::IPluginV3OneBuild>(nvinfer1::PluginCapabilityType::kBUILD);
    }

    nvinfer1::IPluginV3OneRuntime& runtime() const {
        return capability<nvinfer1::IPluginV3OneRuntime>(nvinfer1::PluginCapabilityType::kRUNTIME);
    }

    std::unique_ptr<nvinfer1::IPluginV3> plugin;

private:
    template <class Interface>
    Interface& capability(nvinfer1::PluginCapabilityType type) const {
        auto* const found = static_cast<Interface*>(plugin->getCapabilityInterface(type));
        if (found == nullptr) {
            throw std::runtime_error("an interface is missing");
        }
        return *found;
    }
};

inline Instance create(std::string const& name, std::vector<nvinfer1::PluginField> const& fields,
                       nvinfer1::TensorRTPhase phase = nvinfer1::TensorRTPhase::kBUILD) {
    nvinfer1::PluginFieldCollection const collection{static_cast<int32_t>(fields.size()),
                                                     fields.data()};
    return Instance{Library::get().creator(name).createPlugin("layer", &collection, phase)};
}

constexpr float kSCALE = 0.25F;

inline Instance createAttention() {
    return create("VarlenAttention", {{"scale", &kSCALE, nvinfer1::PluginFieldType::kFLOAT32, 1}});
}

inline Instance createRotary() {
    return create("QKRotaryEmbedding", {});
}

inline Dims dims(std::initializer_list<int64_t> extents) {
    Dims result{static_cast<int32_t>(extents.size()), {}};
    std::copy(extents.begin(), extents.end(), result.d);
    return result;
}

inline nvinfer1::PluginTensorDesc desc(
    std::initializer_list<int64_t> extents, DataType type,
    nvinfer1::TensorFormat format = nvinfer1::TensorFormat::kLINEAR) {
    return {dims(extents), type, format, -1.0F};
}

using Descs = std::vector<nvinfer1::PluginTensorDesc>;

// The builder's form of the same; the sizes of its profile do not matter to the plugins.
inline std::vector<nvinfer1::DynamicPluginTensorDesc> dynamic(Descs const& descs) {
    std::vector<nvinfer1::DynamicPluginTensorDesc> result;
    for (nvinfer1::PluginTensorDesc const& one : descs) {
        result.push_back({one, one.dims, one.dims, one.dims});
    }
    return result;
}

inline Descs attentionInputs(int64_t patches, int64_t segments, int64_t headDim = 80,
                             DataType type = DataType::kHALF) {
    nvinfer1::PluginTensorDesc const q = desc({patches, 16, headDim}, type);
    return {q, q, q, desc({segments < 0 ? -1 : segments + 1}, DataType::kINT32)};
}

inline Descs rotaryInputs(int64_t patches, int64_t half = 39, int64_t headDim = 80,
                          DataType type = DataType::kHALF) {
    nvinfer1::PluginTensorDesc const q = desc({patches, 16, headDim}, type);
    nvinfer1::PluginTensorDesc const cos = desc({patches, half}, DataType::kFLOAT);
    return {q, q, cos, cos};
}

inline Descs outputs(Descs const& inputs, size_t count) {
    return Descs(count, inputs[0]);
}

inline bool contains(std::string const& text, std::string const& part) {
    return text.find(part) != std::string::npos;
}

}  // namespace harness
