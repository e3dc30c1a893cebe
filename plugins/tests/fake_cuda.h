// A stand-in for libcuda.so.1, for C++ and Python: it enforces the driver's rules, does the work of
// a stream only when somebody waits for it, counts what is not freed, and records launches.
// FAKE_CUDA_DEVICES and FAKE_CUDA_REFUSES_CAPTURES set it up for a process that knows nothing of
// it.
#pragma once

#include "cubin.h"

#include <cuda.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace fake {

struct Launch {
    CUcontext context;
    Image image;
    std::string function;
    std::array<uint32_t, 3> grid;
    std::array<uint32_t, 3> block;
    uint32_t sharedBytes;
    CUstream stream;
    std::vector<std::vector<unsigned char>> arguments;  // bytes of each parameter
};

// One GPU with one context.
CUcontext makeContext(int32_t sm, int32_t sharedLimit);

// A GPU that shares the host's memory, as a Jetson's does.
void setIntegrated(CUcontext context, bool isIntegrated);

// For the calling thread, as the driver has it.
void setCurrent(CUcontext context);

// The calling thread captures a graph in the strictest mode.
void setCapturing(bool capturing);
CUstreamCaptureMode captureMode();

// The next call of a function gives this result.
void failNext(std::string const& function, CUresult result);

// Names of the calls made since the last clear, by all threads.
std::vector<std::string> calls();
std::vector<Launch> launches();
void clear();
void clearLaunches();

int32_t loadedModules();

}  // namespace fake
