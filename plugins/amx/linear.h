// y[m, n] = activation(x[m, k] w[n, k]^T + bias[n]) in float32, by way of bfloat16 pieces on AMX.
#pragma once

#include <cstddef>

#include "amx/workers.h"

namespace mmvision::amx {

enum class Activation { kNone, kGelu };

struct LinearShape {
    std::size_t rows;     // m
    std::size_t inputs;   // k
    std::size_t outputs;  // n
};

void linear(const float* x, const float* weight, const float* bias, float* y, LinearShape shape,
            Activation activation, Workers& workers);

}  // namespace mmvision::amx
