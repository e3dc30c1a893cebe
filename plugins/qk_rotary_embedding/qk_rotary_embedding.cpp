#include "qk_rotary_embedding/qk_rotary_embedding.h"

namespace mmvision {

void QKRotaryEmbedding::check(std::array<nvinfer1::Dims, 4> const& dims) {
    auto const& [q, k, cos, sin] = dims;
    requireHeads("q", q);
    requireSameShape("k", k, "q", q);
    requireRank("cos", cos, 2);
    requireSameShape("sin", sin, "cos", cos);
    if (!mayBeEqual(cos.d[0], q.d[0])) {
        throw Error("cos must have a row for each patch of q, got " + shapeName(cos) + " and " +
                    shapeName(q));
    }
    if (cos.d[1] < 0 || 2 * cos.d[1] > q.d[2]) {
        throw Error("cos has a column for each rotated pair, at most head_dim / 2, got " +
                    shapeName(cos) + " for q of " + shapeName(q));
    }
}

void QKRotaryEmbedding::launch(LoadedKernel const& kernel, Attributes const&,
                               nvinfer1::PluginTensorDesc const* inputDesc,
                               void const* const* inputs, void* const* outputs, CUstream stream) {
    nvinfer1::Dims const& q = inputDesc[0].dims;

    // In the order of plugins/qk_rotary_embedding/kernel.py, then the two scratch buffers that
    // Triton gives every kernel.
    void const* qPtr = inputs[0];
    void const* kPtr = inputs[1];
    void const* cosPtr = inputs[2];
    void const* sinPtr = inputs[3];
    void* qOutPtr = outputs[0];
    void* kOutPtr = outputs[1];
    auto numPatches = static_cast<int32_t>(q.d[0]);
    auto numHeads = static_cast<int32_t>(q.d[1]);
    auto headDim = static_cast<int32_t>(q.d[2]);
    auto half = static_cast<int32_t>(inputDesc[2].dims.d[1]);
    void* scratch = nullptr;
    std::array<void*, 12> arguments{&qPtr,       &kPtr,     &cosPtr,  &sinPtr, &qOutPtr, &kOutPtr,
                                    &numPatches, &numHeads, &headDim, &half,   &scratch, &scratch};

    uint32_t const rows = kernel.embedded().blockM;
    uint32_t const numBlocks = (static_cast<uint32_t>(numPatches) + rows - 1) / rows;
    constexpr uint32_t kQ_AND_K = 2;
    kernel.launch({numBlocks, static_cast<uint32_t>(numHeads), kQ_AND_K}, arguments.data(), stream);
}

}  // namespace mmvision
