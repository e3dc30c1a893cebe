#include "common/cuda_driver.h"

#include "common/error.h"

#include <dlfcn.h>

#include <string>

// cuda.h renames some functions to the version of their signature (cuCtxPushCurrent is
// cuCtxPushCurrent_v2): the symbol to look up is the name after the preprocessor.
#define MMVISION_STRING(name) #name
#define MMVISION_SYMBOL(name) MMVISION_STRING(name)

namespace mmvision {
namespace {

constexpr char const* kLIBRARY = "libcuda.so.1";

template <class Function>
void find(void* library, char const* symbol, Function& function) {
    function = reinterpret_cast<Function>(dlsym(library, symbol));
    if (function == nullptr) {
        throw Error(std::string{kLIBRARY} + " has no " + symbol +
                    ": the CUDA driver is older than 11.4");
    }
}

CudaDriver load() {
    void* const library = dlopen(kLIBRARY, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        char const* const reason = dlerror();  // NOLINT(concurrency-mt-unsafe): per thread in glibc
        throw Error(std::string{"there is no CUDA driver: "} +
                    (reason == nullptr ? kLIBRARY : reason));
    }
    CudaDriver driver;
    find(library, MMVISION_SYMBOL(cuGetErrorName), driver.getErrorName);
    find(library, MMVISION_SYMBOL(cuGetErrorString), driver.getErrorString);
    find(library, MMVISION_SYMBOL(cuCtxGetCurrent), driver.ctxGetCurrent);
    find(library, MMVISION_SYMBOL(cuCtxPushCurrent), driver.ctxPushCurrent);
    find(library, MMVISION_SYMBOL(cuCtxPopCurrent), driver.ctxPopCurrent);
    find(library, MMVISION_SYMBOL(cuCtxGetDevice), driver.ctxGetDevice);
    find(library, MMVISION_SYMBOL(cuDeviceGetAttribute), driver.deviceGetAttribute);
    find(library, MMVISION_SYMBOL(cuModuleLoadDataEx), driver.moduleLoadDataEx);
    find(library, MMVISION_SYMBOL(cuModuleUnload), driver.moduleUnload);
    find(library, MMVISION_SYMBOL(cuModuleGetFunction), driver.moduleGetFunction);
    find(library, MMVISION_SYMBOL(cuFuncSetAttribute), driver.funcSetAttribute);
    find(library, MMVISION_SYMBOL(cuLaunchKernel), driver.launchKernel);
    find(library, MMVISION_SYMBOL(cuThreadExchangeStreamCaptureMode),
         driver.threadExchangeStreamCaptureMode);
    return driver;
}

}  // namespace

CudaDriver const& CudaDriver::get() {
    static CudaDriver const sDriver = load();
    return sDriver;
}

void CudaDriver::check(CUresult result, char const* what) const {
    if (result == CUDA_SUCCESS) {
        return;
    }
    char const* name = nullptr;
    char const* description = nullptr;
    getErrorName(result, &name);
    getErrorString(result, &description);
    throw Error(std::string{what} + " failed: " + (name == nullptr ? "unknown error" : name) +
                " (" + std::to_string(static_cast<int>(result)) + ")" +
                (description == nullptr ? "" : std::string{", "} + description));
}

}  // namespace mmvision
