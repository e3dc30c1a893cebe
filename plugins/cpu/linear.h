// y[m, n] = x[m, k] w[n, k]^T + bias[n] in float32, by way of bfloat16 pieces on AMX.
#pragma once

#include <cstddef>

#include "cpu/workers.h"

namespace mmvision::cpu {

struct LinearShape {
    std::size_t rows;      // m
    std::size_t inputs;    // k
    std::size_t outputs;   // n
};

void linear(const float* x, const float* weight, const float* bias, float* y, LinearShape shape, Workers& workers);

}  // namespace mmvision::cpu
