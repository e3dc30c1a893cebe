// out = softmax(scale q k^T) v within each segment and head, in float32, by way of bfloat16 pieces
// on AMX.
#pragma once

#include <cstddef>
#include <cstdint>

#include "amx/workers.h"

namespace mmvision::amx {

struct AttentionShape {
    std::size_t tokens;
    std::size_t heads;
    std::size_t head_dim;
    std::size_t segments;
};

// q, k, v, out: [tokens, heads, head_dim]. bounds: [segments + 1], from 0 to tokens, not falling:
// the caller checks.
void varlen_attention(const float* q, const float* k, const float* v, const std::int32_t* bounds,
                      float scale, float* out, AttentionShape shape, Workers& workers);

}  // namespace mmvision::amx
