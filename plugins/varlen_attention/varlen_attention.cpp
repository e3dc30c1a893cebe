#include "varlen_attention/varlen_attention.h"

namespace mmvision {

void VarlenAttention::check(std::array<nvinfer1::Dims, 4> const& dims) {
    auto const& [q, k, v, cuSeqlens] = dims;
    requireHeads("q", q);
    requireSameShape("k", k, "q", q);
    requireSameShape("v", v, "q", q);
    requireRank("cu_seqlens", cuSeqlens, 1);
    if (cuSeqlens.d[0] == 0 || cuSeqlens.d[0] == 1) {
        throw Error("cu_seqlens must hold the bounds of at least one segment, got " +
                    shapeName(cuSeqlens));
    }
}

void VarlenAttention::launch(LoadedKernel const& kernel, Attributes const& attributes,
                             nvinfer1::PluginTensorDesc const* inputDesc, void const* const* inputs,
                             void* const* outputs, CUstream stream) {
    constexpr float kLOG2_E = 1.44269504088896340736F;
    nvinfer1::Dims const& q = inputDesc[0].dims;
    auto numPatches = static_cast<int32_t>(q.d[0]);
    auto const numHeads = static_cast<uint32_t>(q.d[1]);

    // In the order of plugins/varlen_attention/kernel.py, then the two scratch buffers that Triton
    // gives every kernel.
    void const* qPtr = inputs[0];
    void const* kPtr = inputs[1];
    void const* vPtr = inputs[2];
    void const* cuSeqlensPtr = inputs[3];
    void* outPtr = outputs[0];
    auto numSegments = static_cast<int32_t>(inputDesc[3].dims.d[0] - 1);
    auto rowStride = static_cast<int32_t>(q.d[1] * q.d[2]);
    float scaleLog2 = attributes.scale * kLOG2_E;
    void* scratch = nullptr;
    std::array<void*, 11> arguments{&qPtr,      &kPtr,       &vPtr,        &cuSeqlensPtr,
                                    &outPtr,    &numPatches, &numSegments, &rowStride,
                                    &scaleLog2, &scratch,    &scratch};

    // Enough programs for every segment's tiles, whatever the lengths: see num_programs() in
    // kernel.py.
    uint32_t const numPrograms = static_cast<uint32_t>(numPatches) / kernel.embedded().blockM +
                                 static_cast<uint32_t>(numSegments);
    kernel.launch({numPrograms, numHeads, 1}, arguments.data(), stream);
}

}  // namespace mmvision
