// What the parts of the stand-in share: one lock, the contexts, and how a call begins.
#pragma once

#include "cubin.h"

#include <cuda.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

// A device and its one context: the primary one, in CUDA's words.
struct CUctx_st {
    int32_t sm;
    int32_t sharedLimit;
    CUdevice device;
    bool isIntegrated;
    int32_t holders;
};

namespace fake {

// Architectures of Tegra: their binaries run on no desktop GPU, and those of one not here.
inline bool isTegra(int32_t sm) {
    return sm == 72 || sm == 87 || sm == 101 || sm == 110;
}

// Device memory that queued work reads or writes.
struct Range {
    uintptr_t address;
    size_t size;
};

// What a stream does when its turn comes.
struct Work {
    std::function<CUresult()> run;
    std::vector<Range> ranges;
    uint64_t order;  // among the work of all streams, from 1 on
};

std::recursive_mutex& mutex();
std::vector<std::unique_ptr<CUctx_st>>& contexts();

// Records a call; gives the fault planted for it, if any.
CUresult called(std::string const& function);

// The calling thread's context, or null.
CUcontext current();

// Keeps a broken rule for the report; gives the result, so that a refusal is one line.
CUresult broken(std::string const& rule, CUresult result);

// Lets a stream do something when its turn comes, or puts that into the graph being captured from
// it.
CUresult enqueue(CUstream stream, std::function<CUresult()> run, std::vector<Range> ranges);

// Whether this thread may not allocate now, because of a capture; that capture is then broken.
bool forbiddenByCapture();

// Whether any stream's queued work uses some of this memory.
bool isInUse(Range const& range);

bool isDeviceMemory(Range const& range);

// Counts of what was made and not freed.
struct Held {
    size_t streams;
    size_t events;
    size_t graphs;
    size_t executables;
    size_t deviceBuffers;
    size_t pinnedBuffers;
    size_t modules;
    size_t contexts;
};
void countStreams(Held& held);
void countMemory(Held& held);
void countModules(Held& held);

}  // namespace fake

#define FAKE_CALL(name)                                                     \
    std::lock_guard<std::recursive_mutex> const lock{fake::mutex()};        \
    if (CUresult const fault = fake::called(name); fault != CUDA_SUCCESS) { \
        return fault;                                                       \
    }

#define FAKE_CALL_IN_CONTEXT(name)         \
    FAKE_CALL(name)                        \
    if (fake::current() == nullptr) {      \
        return CUDA_ERROR_INVALID_CONTEXT; \
    }

// What frees does so even if it gives an error, which may be one of earlier work; `fault` is what
// to give.
#define FAKE_FREE(name)                                              \
    std::lock_guard<std::recursive_mutex> const lock{fake::mutex()}; \
    CUresult const fault = fake::called(name);                       \
    if (fake::current() == nullptr) {                                \
        return CUDA_ERROR_INVALID_CONTEXT;                           \
    }
