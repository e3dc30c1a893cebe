#include "common/kernels.h"

#include "common/error.h"

#include <cstddef>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>

namespace mmvision {
namespace {

constexpr int32_t kWARP = 32;
constexpr uint32_t kSHARED_WITHOUT_ASKING = 48U * 1024U;
constexpr size_t kLOG_BYTES = 4096;

int32_t deviceAttribute(CUdevice device, CUdevice_attribute attribute) {
    CudaDriver const& driver = CudaDriver::get();
    int value = 0;
    driver.check(driver.deviceGetAttribute(&value, attribute, device), "cuDeviceGetAttribute");
    return value;
}

struct Gpu {
    int32_t sm;
    int32_t sharedLimit;
    bool isIntegrated;
};

bool runsOn(EmbeddedKernel const& kernel, Gpu const& gpu) {
    if (static_cast<int32_t>(kernel.sharedBytes) > gpu.sharedLimit) {
        return false;
    }
    switch (kernel.reach) {
        case Reach::kEXACT:
            return kernel.sm == gpu.sm;
        // CUDA C++ Programming Guide, "Binary Compatibility": among desktop GPUs only, not on
        // Tegra, nor between the two.
        case Reach::kSAME_MAJOR:
            return kernel.sm == gpu.sm ||
                   (!gpu.isIntegrated && kernel.sm / 10 == gpu.sm / 10 && kernel.sm <= gpu.sm);
        case Reach::kLATER:
            return kernel.sm <= gpu.sm;
    }
    return false;
}

// A cubin before PTX, and the nearest architecture before an earlier one.
std::pair<bool, int32_t> rank(EmbeddedKernel const& kernel) {
    return {kernel.reach != Reach::kLATER, kernel.sm};
}

EmbeddedKernel const& select(KernelKey const& key, CUdevice device) {
    Gpu const gpu{10 * deviceAttribute(device, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) +
                      deviceAttribute(device, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
                  deviceAttribute(device, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN),
                  deviceAttribute(device, CU_DEVICE_ATTRIBUTE_INTEGRATED) != 0};

    EmbeddedKernel const* best = nullptr;
    std::string architectures;
    for (int32_t i = 0; i < kNB_EMBEDDED_KERNELS; ++i) {
        EmbeddedKernel const& kernel = kEMBEDDED_KERNELS[i];
        if (std::strcmp(kernel.op, key.op) != 0 || kernel.dtype != key.dtype ||
            (kernel.headDim != 0 && kernel.headDim != key.headDim)) {
            continue;
        }
        architectures += (architectures.empty() ? "" : ", ") + std::to_string(kernel.sm) +
                         (kernel.reach == Reach::kLATER ? " and later (PTX)" : "");
        if (runsOn(kernel, gpu) && (best == nullptr || rank(*best) < rank(kernel))) {
            best = &kernel;
        }
    }
    if (best == nullptr) {
        throw Error(
            "this library has no kernel for compute capability " + std::to_string(gpu.sm / 10) +
            "." + std::to_string(gpu.sm % 10) + ", " + dtypeName(key.dtype) + ", head_dim " +
            std::to_string(key.headDim) +
            "; it has it for: " + (architectures.empty() ? "no architecture" : architectures));
    }
    return *best;
}

// Loading a module allocates, which CUDA forbids to a thread that captures a graph unless it says
// that it means it.
class RelaxedCapture {
public:
    RelaxedCapture() { exchange(); }
    RelaxedCapture(RelaxedCapture const&) = delete;
    RelaxedCapture& operator=(RelaxedCapture const&) = delete;
    RelaxedCapture(RelaxedCapture&&) = delete;
    RelaxedCapture& operator=(RelaxedCapture&&) = delete;
    ~RelaxedCapture() { exchange(); }

private:
    void exchange() noexcept { mDriver.threadExchangeStreamCaptureMode(&mMode); }

    CudaDriver const& mDriver{CudaDriver::get()};
    CUstreamCaptureMode mMode{CU_STREAM_CAPTURE_MODE_RELAXED};
};

}  // namespace

char const* dtypeName(nvinfer1::DataType dtype) noexcept {
    switch (dtype) {
        case nvinfer1::DataType::kFLOAT:
            return "float32";
        case nvinfer1::DataType::kHALF:
            return "float16";
        case nvinfer1::DataType::kBF16:
            return "bfloat16";
        case nvinfer1::DataType::kINT8:
            return "int8";
        case nvinfer1::DataType::kINT32:
            return "int32";
        case nvinfer1::DataType::kINT64:
            return "int64";
        case nvinfer1::DataType::kFP8:
            return "float8";
        default:
            return "another type";
    }
}

LoadedKernel::LoadedKernel(EmbeddedKernel const& embedded, CUcontext context)
    : mEmbedded{embedded}, mContext{context} {
    CudaDriver const& driver = CudaDriver::get();
    RelaxedCapture const relaxed;
    std::array<char, kLOG_BYTES> log{};
    std::array<CUjit_option, 2> options{CU_JIT_ERROR_LOG_BUFFER,
                                        CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES};
    // The driver takes small numbers in the place of pointers.
    auto* const logSize = reinterpret_cast<void*>(log.size());  // NOLINT(performance-no-int-to-ptr)
    std::array<void*, 2> values{log.data(), logSize};
    CUresult const loaded =
        driver.moduleLoadDataEx(&mModule, embedded.image, static_cast<unsigned int>(options.size()),
                                options.data(), values.data());
    std::string const what =
        std::string{"loading "} + embedded.function + " for sm_" + std::to_string(embedded.sm);
    driver.check(loaded, log[0] == '\0' ? what.c_str() : (what + " (" + log.data() + ")").c_str());
    try {
        driver.check(driver.moduleGetFunction(&mFunction, mModule, embedded.function),
                     "cuModuleGetFunction");
        if (embedded.sharedBytes > kSHARED_WITHOUT_ASKING) {
            driver.check(
                driver.funcSetAttribute(mFunction, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                        static_cast<int>(embedded.sharedBytes)),
                "asking for shared memory");
        }
    } catch (...) {
        driver.moduleUnload(mModule);
        throw;
    }
}

LoadedKernel::~LoadedKernel() {
    // Not checked: the context may be gone already, and the module with it.
    CudaDriver const& driver = CudaDriver::get();
    if (driver.ctxPushCurrent(mContext) == CUDA_SUCCESS) {
        driver.moduleUnload(mModule);
        CUcontext popped = nullptr;
        driver.ctxPopCurrent(&popped);
    }
}

void LoadedKernel::launch(Grid grid, void** arguments, CUstream stream) const {
    CudaDriver const& driver = CudaDriver::get();
    driver.check(driver.launchKernel(mFunction, grid.x, grid.y, grid.z, mEmbedded.numWarps * kWARP,
                                     1, 1, mEmbedded.sharedBytes, stream, arguments, nullptr),
                 "cuLaunchKernel");
}

CUcontext currentContext() {
    CudaDriver const& driver = CudaDriver::get();
    CUcontext context = nullptr;
    driver.check(driver.ctxGetCurrent(&context), "cuCtxGetCurrent");
    if (context == nullptr) {
        throw Error("no CUDA context is current in this thread");
    }
    return context;
}

std::shared_ptr<LoadedKernel const> kernelForCurrentContext(KernelKey const& key) {
    using CacheKey = std::pair<CUcontext, EmbeddedKernel const*>;
    static std::mutex sMutex;
    static std::map<CacheKey, std::weak_ptr<LoadedKernel const>> sCache;

    CudaDriver const& driver = CudaDriver::get();
    CUcontext const context = currentContext();
    CUdevice device = 0;
    driver.check(driver.ctxGetDevice(&device), "cuCtxGetDevice");
    EmbeddedKernel const& embedded = select(key, device);

    std::lock_guard<std::mutex> const lock{sMutex};
    std::weak_ptr<LoadedKernel const>& cached = sCache[{context, &embedded}];
    if (std::shared_ptr<LoadedKernel const> kernel = cached.lock()) {
        return kernel;
    }
    auto kernel = std::make_shared<LoadedKernel const>(embedded, context);
    cached = kernel;
    return kernel;
}

}  // namespace mmvision
