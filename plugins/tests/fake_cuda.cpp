#include "fake_cuda.h"

#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>

struct CUctx_st {
    int32_t sm;
    int32_t sharedLimit;
    CUdevice device;
};

struct CUfunc_st {
    CUmod_st* module;
    fake::ImageKernel kernel;
    uint32_t sharedLimit;
};

struct CUmod_st {
    CUctx_st* context;
    fake::Image image;
    std::vector<std::unique_ptr<CUfunc_st>> functions;
};

namespace {

constexpr uint32_t kSHARED_WITHOUT_ASKING = 48U * 1024U;
constexpr uint32_t kMAX_GRID_YZ = 65535;
constexpr uint32_t kMAX_GRID_X = 0x7FFFFFFFU;

std::mutex gMutex;
std::vector<std::unique_ptr<CUctx_st>> gContexts;
std::map<CUmodule, std::unique_ptr<CUmod_st>> gModules;
std::map<std::string, CUresult> gFaults;
std::vector<std::string> gCalls;
std::vector<fake::Launch> gLaunches;

thread_local std::vector<CUcontext> gCurrent;
thread_local CUstreamCaptureMode gCaptureMode = CU_STREAM_CAPTURE_MODE_GLOBAL;
thread_local bool gIsCapturing = false;

// Records a call; gives the fault planted for it, if any.
CUresult called(std::string const& function) {
    gCalls.push_back(function);
    auto const fault = gFaults.find(function);
    if (fault == gFaults.end()) {
        return CUDA_SUCCESS;
    }
    CUresult const result = fault->second;
    gFaults.erase(fault);
    return result;
}

bool canRun(fake::Image const& image, int32_t sm) {
    if (image.isPtx) {
        return image.sm <= sm && !image.isExact;
    }
    return image.isExact ? image.sm == sm : image.sm / 10 == sm / 10 && image.sm <= sm;
}

}  // namespace

#define FAKE_CALL(name)                                               \
    std::lock_guard<std::mutex> const lock{gMutex};                   \
    if (CUresult const fault = called(name); fault != CUDA_SUCCESS) { \
        return fault;                                                 \
    }

extern "C" {

CUresult cuGetErrorName(CUresult error, char const** text) {
    static std::map<CUresult, char const*> const sNames{
        {CUDA_ERROR_INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE"},
        {CUDA_ERROR_OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY"},
        {CUDA_ERROR_NOT_FOUND, "CUDA_ERROR_NOT_FOUND"},
        {CUDA_ERROR_INVALID_PTX, "CUDA_ERROR_INVALID_PTX"},
        {CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"}};
    auto const found = sNames.find(error);
    *text = found == sNames.end() ? nullptr : found->second;
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult, char const** text) {
    *text = "as the driver describes it";
    return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
    FAKE_CALL("cuCtxGetCurrent")
    *context = gCurrent.empty() ? nullptr : gCurrent.back();
    return CUDA_SUCCESS;
}

CUresult cuCtxPushCurrent(CUcontext context) {
    FAKE_CALL("cuCtxPushCurrent")
    gCurrent.push_back(context);
    return CUDA_SUCCESS;
}

CUresult cuCtxPopCurrent(CUcontext* context) {
    FAKE_CALL("cuCtxPopCurrent")
    if (gCurrent.empty()) {
        return CUDA_ERROR_INVALID_CONTEXT;
    }
    *context = gCurrent.back();
    gCurrent.pop_back();
    return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice* device) {
    FAKE_CALL("cuCtxGetDevice")
    if (gCurrent.empty()) {
        return CUDA_ERROR_INVALID_CONTEXT;
    }
    *device = gCurrent.back()->device;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
    FAKE_CALL("cuDeviceGetAttribute")
    CUctx_st const& context = *gContexts.at(static_cast<size_t>(device));
    switch (attribute) {
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
            *value = context.sm / 10;
            return CUDA_SUCCESS;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
            *value = context.sm % 10;
            return CUDA_SUCCESS;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
            *value = context.sharedLimit;
            return CUDA_SUCCESS;
        default:
            return CUDA_ERROR_INVALID_VALUE;
    }
}

CUresult cuModuleLoadDataEx(CUmodule* module, void const* data, unsigned int numOptions,
                            CUjit_option* options, void** values) {
    FAKE_CALL("cuModuleLoadDataEx")
    if (gCurrent.empty()) {
        return CUDA_ERROR_INVALID_CONTEXT;
    }
    if (gIsCapturing && gCaptureMode != CU_STREAM_CAPTURE_MODE_RELAXED) {
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    }
    auto loaded = std::make_unique<CUmod_st>();
    loaded->context = gCurrent.back();
    try {
        loaded->image = fake::readImage(data);
    } catch (std::runtime_error const& error) {
        if (numOptions == 2 && options[0] == CU_JIT_ERROR_LOG_BUFFER) {
            std::string(error.what())
                .copy(static_cast<char*>(values[0]), reinterpret_cast<size_t>(values[1]) - 1);
        }
        return CUDA_ERROR_INVALID_IMAGE;
    }
    if (!canRun(loaded->image, loaded->context->sm)) {
        return CUDA_ERROR_NO_BINARY_FOR_GPU;
    }
    *module = loaded.get();
    gModules[*module] = std::move(loaded);
    return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) {
    FAKE_CALL("cuModuleUnload")
    if (gModules.count(module) == 0 || gCurrent.empty() || gCurrent.back() != module->context) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    gModules.erase(module);
    return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, char const* name) {
    FAKE_CALL("cuModuleGetFunction")
    for (fake::ImageKernel const& kernel : module->image.kernels) {
        if (kernel.function == name) {
            module->functions.push_back(
                std::make_unique<CUfunc_st>(CUfunc_st{module, kernel, kSHARED_WITHOUT_ASKING}));
            *function = module->functions.back().get();
            return CUDA_SUCCESS;
        }
    }
    return CUDA_ERROR_NOT_FOUND;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    FAKE_CALL("cuFuncSetAttribute")
    if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES ||
        value > function->module->context->sharedLimit) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    function->sharedLimit = static_cast<uint32_t>(value);
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction function, unsigned int gridX, unsigned int gridY,
                        unsigned int gridZ, unsigned int blockX, unsigned int blockY,
                        unsigned int blockZ, unsigned int sharedBytes, CUstream stream,
                        void** arguments, void** extra) {
    FAKE_CALL("cuLaunchKernel")
    if (gModules.count(function->module) == 0 || gCurrent.empty() ||
        gCurrent.back() != function->module->context) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    bool const isEmpty = gridX == 0 || gridY == 0 || gridZ == 0;
    bool const isTooLarge = gridX > kMAX_GRID_X || gridY > kMAX_GRID_YZ || gridZ > kMAX_GRID_YZ;
    if (isEmpty || isTooLarge || extra != nullptr ||
        blockX * blockY * blockZ != function->kernel.threads ||
        sharedBytes > function->sharedLimit) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    fake::Launch launch{function->module->context,
                        function->module->image,
                        function->kernel.function,
                        {gridX, gridY, gridZ},
                        {blockX, blockY, blockZ},
                        sharedBytes,
                        stream,
                        {}};
    for (size_t i = 0; i < function->kernel.parameterSizes.size(); ++i) {
        auto const* const bytes = static_cast<unsigned char const*>(arguments[i]);
        launch.arguments.emplace_back(bytes, bytes + function->kernel.parameterSizes[i]);
    }
    gLaunches.push_back(std::move(launch));
    return CUDA_SUCCESS;
}

CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
    FAKE_CALL("cuThreadExchangeStreamCaptureMode")
    std::swap(*mode, gCaptureMode);
    return CUDA_SUCCESS;
}

}  // extern "C"

namespace fake {

CUcontext makeContext(int32_t sm, int32_t sharedLimit) {
    std::lock_guard<std::mutex> const lock{gMutex};
    auto const device = static_cast<CUdevice>(gContexts.size());
    gContexts.push_back(std::make_unique<CUctx_st>(CUctx_st{sm, sharedLimit, device}));
    return gContexts.back().get();
}

void setCurrent(CUcontext context) {
    gCurrent.clear();
    if (context != nullptr) {
        gCurrent.push_back(context);
    }
}

void setCapturing(bool capturing) {
    gIsCapturing = capturing;
}

CUstreamCaptureMode captureMode() {
    return gCaptureMode;
}

void failNext(std::string const& function, CUresult result) {
    std::lock_guard<std::mutex> const lock{gMutex};
    gFaults[function] = result;
}

std::vector<std::string> calls() {
    std::lock_guard<std::mutex> const lock{gMutex};
    return gCalls;
}

std::vector<Launch> launches() {
    std::lock_guard<std::mutex> const lock{gMutex};
    return gLaunches;
}

void clear() {
    std::lock_guard<std::mutex> const lock{gMutex};
    gCalls.clear();
    gLaunches.clear();
    gFaults.clear();
}

int32_t loadedModules() {
    std::lock_guard<std::mutex> const lock{gMutex};
    return static_cast<int32_t>(gModules.size());
}

}  // namespace fake
