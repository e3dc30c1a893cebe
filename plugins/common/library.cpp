// What the shared library exports, and the two ways in which it is loaded.
//
// IPluginRegistry::loadLibrary (VisionEncoder, trtexec --dynamicPlugins) calls getCreators. A plain
// dlopen (trtexec
// --staticPlugins, polygraphy --plugins, ONNX Runtime's trt_extra_plugin_lib_paths, Triton
// Inference Server's plugins) does not: then the library has to register its creators by itself.
// registerSelf does so if there is a TensorRT in the process; getCreators takes that back, so that
// loadLibrary finds nothing registered twice.

#include "common/creator.h"
#include "common/error.h"
#include "common/tensorrt_library.h"
#include "qk_rotary_embedding/qk_rotary_embedding.h"
#include "varlen_attention/varlen_attention.h"

#include <NvInferRuntime.h>

#include <array>

#define MMVISION_EXPORT extern "C" __attribute__((visibility("default")))

namespace mmvision {
namespace {

using Creators = std::array<nvinfer1::IPluginCreatorInterface*, 2>;

// Never destroyed: TensorRT's registry may outlive this library's statics.
Creators const& creators() {
    static auto* const sVarlenAttention = new Creator<VarlenAttention>;
    static auto* const sQKRotaryEmbedding = new Creator<QKRotaryEmbedding>;
    static auto* const sCreators = new Creators{sVarlenAttention, sQKRotaryEmbedding};
    return *sCreators;
}

// The registry, if it belongs to the TensorRT of this library's headers: between 10 and 11 its
// functions moved.
nvinfer1::IPluginRegistry* registry() {
    using GetMajorVersion = int32_t (*)() noexcept;
    auto const getMajorVersion =
        reinterpret_cast<GetMajorVersion>(tensorrtSymbol("getInferLibMajorVersion"));
    if (getMajorVersion == nullptr || getMajorVersion() != NV_TENSORRT_MAJOR) {
        return nullptr;
    }
    using GetPluginRegistry = nvinfer1::IPluginRegistry* (*)() noexcept;
    auto const getPluginRegistry =
        reinterpret_cast<GetPluginRegistry>(tensorrtSymbol("getPluginRegistry"));
    return getPluginRegistry == nullptr ? nullptr : getPluginRegistry();
}

bool gIsSelfRegistered = false;

__attribute__((constructor)) void registerSelf() {
    guarded("library", false, [] {
        if (nvinfer1::IPluginRegistry* const found = registry()) {
            for (nvinfer1::IPluginCreatorInterface* const creator : creators()) {
                gIsSelfRegistered =
                    found->registerCreator(*creator, kNAMESPACE) || gIsSelfRegistered;
            }
        }
        return gIsSelfRegistered;
    });
}

}  // namespace
}  // namespace mmvision

MMVISION_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nbCreators) {
    using namespace mmvision;
    nbCreators = 0;
    return guarded("library", static_cast<nvinfer1::IPluginCreatorInterface* const*>(nullptr), [&] {
        if (gIsSelfRegistered) {
            for (nvinfer1::IPluginCreatorInterface* const creator : creators()) {
                registry()->deregisterCreator(*creator);
            }
            gIsSelfRegistered = false;
        }
        nbCreators = static_cast<int32_t>(creators().size());
        return creators().data();
    });
}

MMVISION_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
    mmvision::setLoggerFinder(finder);
}
