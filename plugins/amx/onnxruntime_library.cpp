// The operators of domain mmvision for ONNX Runtime's CPU provider. Where the CPU has no AMX they
// are refused, rather than left out in silence: ONNX Runtime would run the functions that the graph
// defines them by.
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <new>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "amx/amx.h"
#include "amx/attention.h"
#include "amx/linear.h"
#include "amx/onnxruntime_table.h"

namespace mmvision::amx {

namespace {

using ort::OrtAllocator;
using ort::OrtApi;
using ort::OrtCustomOp;
using ort::OrtKernelContext;
using ort::OrtKernelInfo;
using ort::OrtMemoryInfo;
using ort::OrtStatus;
using ort::OrtTensorTypeAndShapeInfo;
using ort::OrtValue;

// A failure that ONNX Runtime has reported itself.
struct Reported {
    OrtStatus* status;
};

void check(OrtStatus* status) {
    if (status != nullptr) {
        throw Reported{status};
    }
}

template <class Body>
OrtStatus* guarded(OrtApi* api, Body body) noexcept {
    try {
        body();
        return nullptr;
    } catch (const Reported& reported) {
        return reported.status;
    } catch (const std::invalid_argument& error) {
        return ort::kCreateStatus(api, ort::kInvalidArgument, error.what());
    } catch (const std::exception& error) {
        return ort::kCreateStatus(api, ort::kFail, error.what());
    }
}

// The threads and the memory of the session that runs a kernel.
class SessionWorkers : public Workers {
public:
    SessionWorkers(OrtApi* api, OrtKernelContext* context) : api_(api), context_(context) {
        check(ort::kCreateCpuMemoryInfo(api, ort::kArenaAllocator, ort::kDefaultMemory, &info_));
        OrtStatus* status = ort::kKernelContext_GetAllocator(api, context, info_, &allocator_);
        if (status != nullptr) {
            ort::kReleaseMemoryInfo(api, info_);
            throw Reported{status};
        }
        cpu_set_t allowed;
        most_ = sched_getaffinity(0, sizeof allowed, &allowed) == 0
                    ? static_cast<std::size_t>(CPU_COUNT(&allowed))
                    : 1;
    }
    ~SessionWorkers() override {
        for (void* block : blocks_) {
            allocator_->Free(allocator_, block);
        }
        ort::kReleaseAllocator(api_, allocator_);
        ort::kReleaseMemoryInfo(api_, info_);
    }
    SessionWorkers(const SessionWorkers&) = delete;
    SessionWorkers& operator=(const SessionWorkers&) = delete;

    void run(std::size_t count, std::size_t bytes,
             const std::function<void(std::size_t, char*)>& task) override {
        struct Shared {
            SessionWorkers* workers;
            const std::function<void(std::size_t, char*)>* task;
            std::size_t count;
            std::size_t bytes;
            std::atomic<std::size_t> next{0};
            std::atomic<bool> out_of_memory{false};
        } shared{this, &task, count, bytes};
        const auto work = [](void* data, std::size_t) {
            auto& all = *static_cast<Shared*>(data);
            OrtAllocator* allocator = all.workers->allocator_;
            std::size_t index = all.next++;
            void* block = nullptr;
            if (index < all.count && all.bytes > 0) {
                try {  // this may be a thread of the pool, which no exception may leave
                    block = allocator->Alloc(allocator, all.bytes + kAlignment);
                } catch (const std::exception&) {
                    block = nullptr;
                }
                if (block == nullptr) {
                    all.out_of_memory = true;
                    return;
                }
            }
            for (; index < all.count; index = all.next++) {
                (*all.task)(index, aligned(block));
            }
            if (block != nullptr) {
                allocator->Free(allocator, block);
            }
        };
        check(ort::kKernelContext_ParallelFor(api_, context_, work, std::min(count, most_), 0,
                                              &shared));
        if (shared.out_of_memory) {
            throw std::bad_alloc();
        }
    }

    std::size_t most() const override { return most_; }

    char* shared(std::size_t bytes) override {
        blocks_.reserve(blocks_.size() + 1);
        void* block = allocator_->Alloc(allocator_, bytes + kAlignment);
        if (block == nullptr) {
            throw std::bad_alloc();
        }
        blocks_.push_back(block);
        return aligned(block);
    }

private:
    static constexpr std::size_t kAlignment = 64;

    static char* aligned(void* block) {
        const auto address = reinterpret_cast<std::uintptr_t>(block);
        return static_cast<char*>(block) + (kAlignment - address % kAlignment) % kAlignment;
    }

    OrtApi* api_;
    OrtKernelContext* context_;
    OrtMemoryInfo* info_ = nullptr;
    OrtAllocator* allocator_ = nullptr;
    std::size_t most_ = 1;
    std::vector<void*> blocks_;
};

struct Tensor {
    std::vector<std::int64_t> shape;
    const void* data = nullptr;

    const float* floats() const { return static_cast<const float*>(data); }
    std::size_t size(std::size_t axis) const { return static_cast<std::size_t>(shape[axis]); }
};

Tensor input(OrtApi* api, const OrtKernelContext* context, std::size_t index) {
    Tensor tensor;
    const OrtValue* value = nullptr;
    check(ort::kKernelContext_GetInput(api, context, index, &value));
    if (value == nullptr) {
        return tensor;
    }
    OrtTensorTypeAndShapeInfo* info = nullptr;
    check(ort::kGetTensorTypeAndShape(api, value, &info));
    std::size_t rank = 0;
    OrtStatus* status = ort::kGetDimensionsCount(api, info, &rank);
    if (status == nullptr) {
        tensor.shape.resize(rank);
        status = ort::kGetDimensions(api, info, tensor.shape.data(), rank);
    }
    ort::kReleaseTensorTypeAndShapeInfo(api, info);
    check(status);
    void* data = nullptr;
    check(ort::kGetTensorMutableData(api, const_cast<OrtValue*>(value), &data));
    tensor.data = data;
    return tensor;
}

float* output(OrtApi* api, OrtKernelContext* context, const std::vector<std::int64_t>& shape) {
    OrtValue* value = nullptr;
    check(ort::kKernelContext_GetOutput(api, context, 0, shape.data(), shape.size(), &value));
    void* data = nullptr;
    check(ort::kGetTensorMutableData(api, value, &data));
    return static_cast<float*>(data);
}

void require(bool holds, const char* what) {
    if (!holds) {
        throw std::invalid_argument(what);
    }
}

// Linear and LinearGelu(x [m, k], weight [n, k], bias [n] or none) -> y [m, n]
template <Activation activation>
struct Linear {
    static constexpr const char* kName = activation == Activation::kGelu ? "LinearGelu" : "Linear";
    static constexpr std::size_t kInputs = 3;
    static int input_type(std::size_t) { return ort::kFloat; }
    static int characteristic(std::size_t index) {
        return index == 2 ? ort::kOptional : ort::kRequired;
    }

    explicit Linear(OrtApi* api, const OrtKernelInfo*) : api_(api) {}

    void compute(OrtKernelContext* context) const {
        std::size_t count = 0;
        check(ort::kKernelContext_GetInputCount(api_, context, &count));
        const Tensor x = input(api_, context, 0);
        const Tensor weight = input(api_, context, 1);
        const Tensor bias = count > 2 ? input(api_, context, 2) : Tensor();
        require(x.shape.size() == 2 && weight.shape.size() == 2 && x.shape[1] == weight.shape[1],
                "Linear: x must be [m, k] and weight [n, k]");
        require(
            bias.data == nullptr || (bias.shape.size() == 1 && bias.shape[0] == weight.shape[0]),
            "Linear: bias must be [n]");
        float* y = output(api_, context, {x.shape[0], weight.shape[0]});
        SessionWorkers workers(api_, context);
        linear(x.floats(), weight.floats(), bias.floats(), y,
               {x.size(0), x.size(1), weight.size(0)}, activation, workers);
    }

private:
    OrtApi* api_;
};

// VarlenAttention(q, k, v [n, heads, head_dim], cu_seqlens int32 [s + 1]) -> out, as q
struct VarlenAttention {
    static constexpr const char* kName = "VarlenAttention";
    static constexpr std::size_t kInputs = 4;
    static int input_type(std::size_t index) { return index == 3 ? ort::kInt32 : ort::kFloat; }
    static int characteristic(std::size_t) { return ort::kRequired; }

    explicit VarlenAttention(OrtApi* api, const OrtKernelInfo* info) : api_(api) {
        check(ort::kKernelInfoGetAttribute_float(api, info, "scale", &scale_));
    }

    void compute(OrtKernelContext* context) const {
        const Tensor q = input(api_, context, 0);
        const Tensor k = input(api_, context, 1);
        const Tensor v = input(api_, context, 2);
        const Tensor cu_seqlens = input(api_, context, 3);
        require(q.shape.size() == 3 && q.shape == k.shape && q.shape == v.shape,
                "mmvision::VarlenAttention: q, k and v must be [n, heads, head_dim]");
        require(cu_seqlens.shape.size() == 1 && cu_seqlens.shape[0] >= 1,
                "mmvision::VarlenAttention: cu_seqlens must be [segments + 1]");
        const auto* bounds = static_cast<const std::int32_t*>(cu_seqlens.data);
        const std::size_t segments = cu_seqlens.size(0) - 1;
        require(bounds[0] == 0 && std::is_sorted(bounds, bounds + segments + 1) &&
                    bounds[segments] <= q.shape[0],
                "mmvision::VarlenAttention: cu_seqlens must rise from 0 to n at most");
        float* out = output(api_, context, q.shape);
        SessionWorkers workers(api_, context);
        varlen_attention(q.floats(), k.floats(), v.floats(), bounds, scale_, out,
                         {q.size(0), q.size(1), q.size(2), segments}, workers);
    }

private:
    OrtApi* api_;
    float scale_ = 1.0F;
};

template <class Kernel>
struct CustomOp : OrtCustomOp {
    CustomOp() : OrtCustomOp{} {
        version = ort::kApiVersion;
        GetName = [](const OrtCustomOp*) { return Kernel::kName; };
        GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
        GetInputType = [](const OrtCustomOp*, std::size_t index) {
            return Kernel::input_type(index);
        };
        GetInputTypeCount = [](const OrtCustomOp*) { return Kernel::kInputs; };
        GetOutputType = [](const OrtCustomOp*, std::size_t) -> int { return ort::kFloat; };
        GetOutputTypeCount = [](const OrtCustomOp*) -> std::size_t { return 1; };
        GetInputCharacteristic = [](const OrtCustomOp*, std::size_t index) {
            return Kernel::characteristic(index);
        };
        GetOutputCharacteristic = [](const OrtCustomOp*, std::size_t) -> int {
            return ort::kRequired;
        };
        GetInputMemoryType = [](const OrtCustomOp*, std::size_t) { return 0; };
        GetStartVersion = [](const OrtCustomOp*) { return 1; };
        GetEndVersion = [](const OrtCustomOp*) { return 1; };
        CreateKernelV2 = [](const OrtCustomOp*, OrtApi* api, const OrtKernelInfo* info,
                            void** kernel) {
            return guarded(api, [&] { *kernel = new Held{api, Kernel(api, info)}; });
        };
        KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
            const auto* held = static_cast<const Held*>(kernel);
            return guarded(held->api, [&] { held->kernel.compute(context); });
        };
        KernelDestroy = [](void* kernel) { delete static_cast<Held*>(kernel); };
    }

private:
    struct Held {
        OrtApi* api;
        Kernel kernel;
    };
};

}  // namespace

// ONNX Runtime calls this when the library is registered with a session's options.
extern "C" __attribute__((visibility("default"))) ort::OrtStatus* RegisterCustomOps(
    ort::OrtSessionOptions* options, const ort::OrtApiBase* base) {
    OrtApi* api = base->GetApi(ort::kApiVersion);
    if (api == nullptr) {
        return ort::kCreateStatus(base->GetApi(1), ort::kFail,
                                  "the AMX kernels need ONNX Runtime 1.17 or later");
    }
    if (!amx_allowed()) {
        return ort::kCreateStatus(
            api, ort::kFail, "this CPU has no AMX, or the system does not let this process use it");
    }
    // ONNX Runtime keeps pointers to these for as long as any session lives.
    static const CustomOp<Linear<Activation::kNone>> linear_op;
    static const CustomOp<Linear<Activation::kGelu>> linear_gelu_op;
    static const CustomOp<VarlenAttention> attention_op;
    return guarded(api, [&] {
        ort::OrtCustomOpDomain* domain = nullptr;
        check(ort::kCreateCustomOpDomain(api, "mmvision", &domain));
        check(ort::kCustomOpDomain_Add(api, domain, &linear_op));
        check(ort::kCustomOpDomain_Add(api, domain, &linear_gelu_op));
        check(ort::kCustomOpDomain_Add(api, domain, &attention_op));
        check(ort::kAddCustomOpDomain(api, options, domain));
    });
}

}  // namespace mmvision::amx
