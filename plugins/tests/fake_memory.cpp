// Device and pinned memory, and copies, which are done when their stream's turn comes and not
// before: a host array that was changed or freed meanwhile gives wrong data, as it does on a GPU
// that reads the host's memory by itself.
#include "fake_state.h"

#include <cstring>
#include <map>

namespace {

using Buffers = std::map<uintptr_t, std::vector<unsigned char>>;

// NaN in every float type.
constexpr unsigned char kNEVER_WRITTEN = 0xFF;

Buffers gDevice;
Buffers gPinned;

uintptr_t allocate(Buffers& buffers, size_t size) {
    std::vector<unsigned char> memory(size, kNEVER_WRITTEN);
    auto const address = reinterpret_cast<uintptr_t>(memory.data());
    buffers.emplace(address, std::move(memory));
    return address;
}

// An allocation is not given back while queued work uses it: CUDA waits for that, or lets it read
// what is not there.
CUresult freeFrom(Buffers& buffers, uintptr_t address, char const* what) {
    if (address == 0) {
        return CUDA_SUCCESS;
    }
    if (fake::forbiddenByCapture()) {
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    }
    auto const found = buffers.find(address);
    if (found == buffers.end()) {
        return fake::broken(std::string{what} + " was freed that was not allocated",
                            CUDA_ERROR_INVALID_VALUE);
    }
    if (fake::isInUse({address, found->second.size()})) {
        return fake::broken(std::string{what} + " was freed that queued work uses",
                            CUDA_ERROR_INVALID_VALUE);
    }
    buffers.erase(found);
    return CUDA_SUCCESS;
}

bool contains(Buffers const& buffers, fake::Range const& range) {
    auto const after = buffers.upper_bound(range.address);
    if (after == buffers.begin()) {
        return false;
    }
    auto const& [start, memory] = *std::prev(after);
    return range.address + range.size <= start + memory.size();
}

void* pointer(uintptr_t address) {
    return reinterpret_cast<void*>(address);  // NOLINT(performance-no-int-to-ptr)
}

// Copies when the turn comes; what is on the device must be there then.
CUresult copy(uintptr_t target, uintptr_t source, size_t size,
              std::vector<fake::Range> const& onDevice, CUstream stream) {
    auto ranges = onDevice;
    for (uintptr_t const host : {target, source}) {
        if (contains(gPinned, {host, size})) {
            ranges.push_back({host, size});  // so that it is not freed before
        }
    }
    return fake::enqueue(
        stream,
        [=] {
            for (fake::Range const& range : onDevice) {
                if (!fake::isDeviceMemory(range)) {
                    return fake::broken("a copy to or from what is no device memory",
                                        CUDA_ERROR_ILLEGAL_ADDRESS);
                }
            }
            std::memmove(pointer(target), pointer(source), size);
            return CUDA_SUCCESS;
        },
        ranges);
}

}  // namespace

extern "C" {

CUresult cuMemAlloc(CUdeviceptr* address, size_t size) {
    FAKE_CALL_IN_CONTEXT("cuMemAlloc")
    if (fake::forbiddenByCapture()) {
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    }
    if (size == 0) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    *address = allocate(gDevice, size);
    return CUDA_SUCCESS;
}

CUresult cuMemFree(CUdeviceptr address) {
    FAKE_FREE("cuMemFree")
    CUresult const freed = freeFrom(gDevice, address, "device memory");
    return freed == CUDA_SUCCESS ? fault : freed;
}

CUresult cuMemGetInfo(size_t* free, size_t* total) {
    FAKE_CALL_IN_CONTEXT("cuMemGetInfo")
    *total = size_t{1} << 30U;
    *free = *total;
    for (auto const& [address, memory] : gDevice) {
        *free -= memory.size();
    }
    return CUDA_SUCCESS;
}

CUresult cuMemHostAlloc(void** address, size_t size, unsigned int) {
    FAKE_CALL_IN_CONTEXT("cuMemHostAlloc")
    if (fake::forbiddenByCapture()) {
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    }
    if (size == 0) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    *address = pointer(allocate(gPinned, size));
    return CUDA_SUCCESS;
}

CUresult cuMemFreeHost(void* address) {
    FAKE_FREE("cuMemFreeHost")
    CUresult const freed = freeFrom(gPinned, reinterpret_cast<uintptr_t>(address), "pinned memory");
    return freed == CUDA_SUCCESS ? fault : freed;
}

CUresult cuMemcpyHtoDAsync(CUdeviceptr target, void const* source, size_t size, CUstream stream) {
    FAKE_CALL_IN_CONTEXT("cuMemcpyHtoDAsync")
    return copy(target, reinterpret_cast<uintptr_t>(source), size, {{target, size}}, stream);
}

CUresult cuMemcpyDtoHAsync(void* target, CUdeviceptr source, size_t size, CUstream stream) {
    FAKE_CALL_IN_CONTEXT("cuMemcpyDtoHAsync")
    return copy(reinterpret_cast<uintptr_t>(target), source, size, {{source, size}}, stream);
}

CUresult cuMemcpyDtoDAsync(CUdeviceptr target, CUdeviceptr source, size_t size, CUstream stream) {
    FAKE_CALL_IN_CONTEXT("cuMemcpyDtoDAsync")
    return copy(target, source, size, {{target, size}, {source, size}}, stream);
}

CUresult cuMemsetD8Async(CUdeviceptr address, unsigned char value, size_t size, CUstream stream) {
    FAKE_CALL_IN_CONTEXT("cuMemsetD8Async")
    return fake::enqueue(stream,
                         [=] {
                             if (!fake::isDeviceMemory({address, size})) {
                                 return fake::broken("what is no device memory was filled",
                                                     CUDA_ERROR_ILLEGAL_ADDRESS);
                             }
                             std::memset(pointer(address), value, size);
                             return CUDA_SUCCESS;
                         },
                         {{address, size}});
}

}  // extern "C"

namespace fake {

bool isDeviceMemory(Range const& range) {
    return contains(gDevice, range);
}

void countMemory(Held& held) {
    held.deviceBuffers = gDevice.size();
    held.pinnedBuffers = gPinned.size();
}

}  // namespace fake
