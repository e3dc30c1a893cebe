// The CUDA driver API, found at run time: the library is loaded, and its creators are listed, where
// there is no GPU.
#pragma once

#include <cuda.h>

#include <cstddef>

namespace mmvision {

struct CudaDriver {
    decltype(&::cuGetErrorName) getErrorName{};
    decltype(&::cuGetErrorString) getErrorString{};
    decltype(&::cuCtxGetCurrent) ctxGetCurrent{};
    decltype(&::cuCtxPushCurrent) ctxPushCurrent{};
    decltype(&::cuCtxPopCurrent) ctxPopCurrent{};
    decltype(&::cuCtxGetDevice) ctxGetDevice{};
    decltype(&::cuDeviceGetAttribute) deviceGetAttribute{};
    decltype(&::cuModuleLoadDataEx) moduleLoadDataEx{};
    decltype(&::cuModuleUnload) moduleUnload{};
    decltype(&::cuModuleGetFunction) moduleGetFunction{};
    decltype(&::cuFuncSetAttribute) funcSetAttribute{};
    decltype(&::cuLaunchKernel) launchKernel{};
    decltype(&::cuThreadExchangeStreamCaptureMode) threadExchangeStreamCaptureMode{};

    // Loads libcuda.so.1 on first use; throws Error while that fails, and tries again on the next.
    static CudaDriver const& get();

    // Throws Error with the driver's name and description of the error.
    void check(CUresult result, char const* what) const;
};

}  // namespace mmvision
