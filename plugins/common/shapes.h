// What an op demands of its inputs' shapes. A dimension of -1 is not known yet.
#pragma once

#include "common/error.h"

#include <NvInferRuntime.h>

#include <cstdint>
#include <string>

namespace mmvision {

// Shapes as messages show them: [-1, 16, 80].
inline std::string shapeName(nvinfer1::Dims const& dims) {
    std::string text = "[";
    for (int32_t i = 0; i < dims.nbDims; ++i) {
        text += (i == 0 ? "" : ", ") + std::to_string(dims.d[i]);
    }
    return text + "]";
}

inline void requireRank(char const* name, nvinfer1::Dims const& dims, int32_t rank) {
    if (dims.nbDims != rank) {
        throw Error(std::string{name} + " must have " + std::to_string(rank) + " dimensions, got " +
                    shapeName(dims));
    }
}

// Whether two dimensions are equal, or one is not known yet.
constexpr bool mayBeEqual(int64_t a, int64_t b) {
    return a < 0 || b < 0 || a == b;
}

// q, k and what has their shape: [N, heads, head_dim] with a head_dim that the kernels are written
// for.
inline void requireHeads(char const* name, nvinfer1::Dims const& dims) {
    constexpr int64_t kMAX_HEAD_DIM = 128;
    constexpr int64_t kHEAD_DIM_STEP = 16;
    constexpr int64_t kMAX_HEADS = 65535;  // second dimension of a CUDA grid
    requireRank(name, dims, 3);
    int64_t const heads = dims.d[1];
    int64_t const headDim = dims.d[2];
    if (headDim % kHEAD_DIM_STEP != 0 || headDim < kHEAD_DIM_STEP || headDim > kMAX_HEAD_DIM) {
        throw Error(
            "head_dim must be a multiple of 16 from 16 to 128, fixed when the engine is built; " +
            std::string{name} + " is " + shapeName(dims));
    }
    if (heads < 1 || heads > kMAX_HEADS) {
        throw Error("heads must be from 1 to 65535, fixed when the engine is built; " +
                    std::string{name} + " is " + shapeName(dims));
    }
}

inline void requireSameShape(char const* name, nvinfer1::Dims const& dims, char const* otherName,
                             nvinfer1::Dims const& other) {
    bool same = dims.nbDims == other.nbDims;
    for (int32_t i = 0; same && i < dims.nbDims; ++i) {
        same = mayBeEqual(dims.d[i], other.d[i]);
    }
    if (!same) {
        throw Error(std::string{name} + " must have the shape of " + otherName + ", got " +
                    shapeName(dims) + " and " + shapeName(other));
    }
}

}  // namespace mmvision
