// A plain dlopen, as trtexec --staticPlugins and ONNX Runtime do it: the library finds TensorRT's
// registry by itself. This program stands in for TensorRT, of the headers' version or of another
// (FAKE_MAJOR_VERSION).
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include "harness.h"

#include <doctest/doctest.h>

#include <map>

#if NV_TENSORRT_MAJOR == 10
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
#endif

using namespace nvinfer1;

namespace {

class Registry final : public IPluginRegistry {
public:
    std::map<IPluginCreatorInterface const*, std::string> creators;

    bool registerCreator(IPluginCreatorInterface& creator,
                         char const* pluginNamespace) noexcept override {
        return creators.emplace(&creator, pluginNamespace).second;
    }
    bool deregisterCreator(IPluginCreatorInterface const& creator) noexcept override {
        return creators.erase(&creator) == 1;
    }

    // Not used by the library.
#if NV_TENSORRT_MAJOR == 10
    bool registerCreator(IPluginCreator&, char const*) noexcept override { return false; }
    IPluginCreator* const* getPluginCreatorList(int32_t*) const noexcept override {
        return nullptr;
    }
    IPluginCreator* getPluginCreator(char const*, char const*, char const*) noexcept override {
        return nullptr;
    }
    bool deregisterCreator(IPluginCreator const&) noexcept override { return false; }
#endif
    void setErrorRecorder(IErrorRecorder*) noexcept override {}
    IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
    bool isParentSearchEnabled() const override { return false; }
    void setParentSearchEnabled(bool) override {}
    PluginLibraryHandle loadLibrary(char const*) noexcept override { return nullptr; }
    void deregisterLibrary(PluginLibraryHandle) noexcept override {}
    IPluginCreatorInterface* const* getAllCreators(int32_t*) const noexcept override {
        return nullptr;
    }
    IPluginCreatorInterface* getCreator(char const*, char const*, char const*) noexcept override {
        return nullptr;
    }
    IPluginResource* acquirePluginResource(char const*, IPluginResource*) noexcept override {
        return nullptr;
    }
    int32_t releasePluginResource(char const*) noexcept override { return 0; }
    IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t*) noexcept override {
        return nullptr;
    }
};

Registry& registry() {
    static Registry sRegistry;
    return sRegistry;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT IPluginRegistry* getPluginRegistry() noexcept {
    return &registry();
}

EXPORT int32_t getInferLibMajorVersion() noexcept {
    return FAKE_MAJOR_VERSION;
}

TEST_CASE("the library registers itself with the TensorRT it was compiled for, and with no other") {
    bool const isOurs = FAKE_MAJOR_VERSION == NV_TENSORRT_MAJOR;
    harness::Library const& library = harness::Library::get();
    CHECK(registry().creators.size() == (isOurs ? 2 : 0));
    for (auto const& [creator, pluginNamespace] : registry().creators) {
        CHECK(pluginNamespace == "mmvision");
    }
    // loadLibrary asks for the creators, and registers what it gets: nothing may be there twice.
    int32_t count = 0;
    CHECK(library.creators(count) != nullptr);
    CHECK(count == 2);
    CHECK(registry().creators.empty());
}
