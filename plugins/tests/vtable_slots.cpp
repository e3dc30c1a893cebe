// Prints where each virtual function that the library calls or implements stands in its class's
// table, for the TensorRT headers it is compiled with: `IPluginV3::clone 7`.
//
// A pointer to a virtual member function holds 1 + the function's offset in the table (Itanium C++
// ABI, section 2.3; on AArch64 that offset is the first word too, and the 1 is in the second), so
// these are the slots that compiled code uses.
#include <NvInferRuntime.h>
#include <NvInferRuntimePlugin.h>

#include <cstdint>
#include <cstdio>
#include <cstring>

namespace {

template <class Function>
void print(char const* name, Function function) {
    uintptr_t words[2];
    static_assert(sizeof function == sizeof words);
    std::memcpy(words, &function, sizeof words);
#ifdef __aarch64__
    bool const isVirtual = (words[1] & 1) != 0;
    uintptr_t const offset = words[0];
#else
    bool const isVirtual = (words[0] & 1) != 0;
    uintptr_t const offset = words[0] - 1;
#endif
    if (isVirtual) {
        std::printf("%s %zu\n", name, static_cast<size_t>(offset / sizeof(void*)));
    } else {
        std::printf("%s not virtual\n", name);
    }
}

}  // namespace

#define SLOT(Class, function) print(#Class "::" #function, &nvinfer1::Class::function)

int main() {
    using namespace nvinfer1;
    // Implemented here and called by TensorRT.
    SLOT(IPluginV3, getInterfaceInfo);
    SLOT(IPluginV3, getAPILanguage);
    SLOT(IPluginV3, getCapabilityInterface);
    SLOT(IPluginV3, clone);
    SLOT(IPluginV3OneCore, getInterfaceInfo);
    SLOT(IPluginV3OneCore, getPluginName);
    SLOT(IPluginV3OneCore, getPluginVersion);
    SLOT(IPluginV3OneCore, getPluginNamespace);
    SLOT(IPluginV3OneBuild, getInterfaceInfo);
    SLOT(IPluginV3OneBuild, configurePlugin);
    SLOT(IPluginV3OneBuild, getOutputDataTypes);
    SLOT(IPluginV3OneBuild, getOutputShapes);
    SLOT(IPluginV3OneBuild, supportsFormatCombination);
    SLOT(IPluginV3OneBuild, getNbOutputs);
    SLOT(IPluginV3OneBuild, getWorkspaceSize);
    SLOT(IPluginV3OneBuild, getValidTactics);
    SLOT(IPluginV3OneBuild, getNbTactics);
    SLOT(IPluginV3OneBuild, getTimingCacheID);
    SLOT(IPluginV3OneBuild, getFormatCombinationLimit);
    SLOT(IPluginV3OneBuild, getMetadataString);
    SLOT(IPluginV3OneRuntime, getInterfaceInfo);
    SLOT(IPluginV3OneRuntime, setTactic);
    SLOT(IPluginV3OneRuntime, onShapeChange);
    SLOT(IPluginV3OneRuntime, enqueue);
    SLOT(IPluginV3OneRuntime, attachToContext);
    SLOT(IPluginV3OneRuntime, getFieldsToSerialize);
    SLOT(IPluginCreatorV3One, getInterfaceInfo);
    SLOT(IPluginCreatorV3One, createPlugin);
    SLOT(IPluginCreatorV3One, getFieldNames);
    SLOT(IPluginCreatorV3One, getPluginName);
    SLOT(IPluginCreatorV3One, getPluginVersion);
    SLOT(IPluginCreatorV3One, getPluginNamespace);
    // Implemented by TensorRT and called here.
    SLOT(ILogger, log);
    SLOT(ILoggerFinder, findLogger);
    using Register = bool (IPluginRegistry::*)(IPluginCreatorInterface&, AsciiChar const*) noexcept;
    using Deregister = bool (IPluginRegistry::*)(IPluginCreatorInterface const&) noexcept;
    print("IPluginRegistry::registerCreator",
          static_cast<Register>(&IPluginRegistry::registerCreator));
    print("IPluginRegistry::deregisterCreator",
          static_cast<Deregister>(&IPluginRegistry::deregisterCreator));
    // The library's calls of these are inline and go to an implementation with a table of its own.
    SLOT(apiv::VDimensionExpr, isConstant);
    SLOT(apiv::VDimensionExpr, getConstantValue);
    return 0;
}
