// A stand-in for libcuda.so.1: it enforces the driver's rules at the calls that the plugins make,
// and records launches.
//
// It exports those calls and no others: a plugin that allocated or waited would not find the
// function.
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

int32_t loadedModules();

}  // namespace fake
