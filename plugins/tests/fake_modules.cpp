// Modules and launches: each launch is held against what the binary says of itself, and recorded.
#include "fake_cuda.h"

#include "fake_state.h"

#include <map>
#include <stdexcept>

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

// A launch as a test in Python sees it, when its turn comes: the kernel's place is taken by what it
// does.
using OnLaunch = int (*)(char const* function, unsigned int const* grid, unsigned int const* block,
                         void const* const* arguments, size_t nbArguments);

std::map<CUmodule, std::unique_ptr<CUmod_st>> gModules;
std::vector<fake::Launch> gLaunches;
OnLaunch gOnLaunch = nullptr;

bool canRun(fake::Image const& image, CUctx_st const& context) {
    int32_t const sm = context.sm;
    if (image.isPtx) {
        return image.sm <= sm && !image.isExact;
    }
    if (image.isExact || context.isIntegrated || fake::isTegra(image.sm) || fake::isTegra(sm)) {
        return image.sm == sm;
    }
    return image.sm / 10 == sm / 10 && image.sm <= sm;
}

CUresult runLaunch(fake::Launch const& launch) {
    if (gOnLaunch == nullptr) {
        return CUDA_SUCCESS;
    }
    std::vector<void const*> arguments;
    arguments.reserve(launch.arguments.size());
    for (auto const& bytes : launch.arguments) {
        arguments.push_back(bytes.data());
    }
    int const failed = gOnLaunch(launch.function.c_str(), launch.grid.data(), launch.block.data(),
                                 arguments.data(), arguments.size());
    return failed == 0 ? CUDA_SUCCESS : CUDA_ERROR_LAUNCH_FAILED;
}

}  // namespace

extern "C" {

CUresult cuModuleLoadDataEx(CUmodule* module, void const* data, unsigned int numOptions,
                            CUjit_option* options, void** values) {
    FAKE_CALL_IN_CONTEXT("cuModuleLoadDataEx")
    if (fake::forbiddenByCapture()) {
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    }
    auto loaded = std::make_unique<CUmod_st>();
    loaded->context = fake::current();
    try {
        loaded->image = fake::readImage(data);
    } catch (std::runtime_error const& error) {
        if (numOptions == 2 && options[0] == CU_JIT_ERROR_LOG_BUFFER) {
            std::string(error.what())
                .copy(static_cast<char*>(values[0]), reinterpret_cast<size_t>(values[1]) - 1);
        }
        return CUDA_ERROR_INVALID_IMAGE;
    }
    if (!canRun(loaded->image, *loaded->context)) {
        return CUDA_ERROR_NO_BINARY_FOR_GPU;
    }
    *module = loaded.get();
    gModules[*module] = std::move(loaded);
    return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule* module, void const* data) {
    return cuModuleLoadDataEx(module, data, 0, nullptr, nullptr);
}

CUresult cuModuleUnload(CUmodule module) {
    FAKE_CALL("cuModuleUnload")
    if (gModules.count(module) == 0 || fake::current() != module->context) {
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
    if (gModules.count(function->module) == 0 || fake::current() != function->module->context) {
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
    CUresult const enqueued = fake::enqueue(stream, [launch] { return runLaunch(launch); }, {});
    if (enqueued == CUDA_SUCCESS) {
        gLaunches.push_back(std::move(launch));
    }
    return enqueued;
}

void fakeOnLaunch(OnLaunch onLaunch) {
    std::lock_guard<std::recursive_mutex> const lock{fake::mutex()};
    gOnLaunch = onLaunch;
}

}  // extern "C"

namespace fake {

std::vector<Launch> launches() {
    std::lock_guard<std::recursive_mutex> const lock{mutex()};
    return gLaunches;
}

void clearLaunches() {
    gLaunches.clear();
}

int32_t loadedModules() {
    std::lock_guard<std::recursive_mutex> const lock{mutex()};
    return static_cast<int32_t>(gModules.size());
}

void countModules(Held& held) {
    held.modules = gModules.size();
}

}  // namespace fake
