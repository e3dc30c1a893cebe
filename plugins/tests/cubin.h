// What a compiled kernel says of itself, read from the binary: the stand-in holds each launch
// against it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace fake {

struct ImageKernel {
    std::string function;
    std::vector<size_t> parameterSizes;  // bytes of each, in order
    uint32_t threads;                    // that a block must have
};

struct Image {
    bool isPtx;
    int32_t sm;
    bool isExact;  // has features of one architecture
    std::vector<ImageKernel> kernels;
};

// Reads a cubin or PTX; throws std::runtime_error for anything else.
Image readImage(void const* data);

}  // namespace fake
