// The TensorRT that this library was loaded into, if any. It is not linked: one build serves
// TensorRT 10 and 11.
#pragma once

#include <NvInferRuntime.h>

namespace mmvision {

// A function that TensorRT exports, or nullptr.
void* tensorrtSymbol(char const* name) noexcept;

}  // namespace mmvision
