// What happens at every inference: the launch, argument by argument, and what must not happen
// beside it.
#include "fake_cuda.h"
#include "harness.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <thread>

using namespace harness;

// Counts allocations, but under a sanitizer, which has a malloc of its own.
#if !defined(__SANITIZE_ADDRESS__)
#define MMVISION_COUNTS_ALLOCATIONS
namespace {
std::atomic<int64_t> gAllocations{0};
}  // namespace
extern "C" void* __libc_malloc(size_t size);  // NOLINT: glibc's own name
extern "C" void* malloc(size_t size) noexcept {
    ++gAllocations;
    return __libc_malloc(size);
}
#endif

namespace {

constexpr int32_t kSHARED = 227 * 1024;

// Addresses that are never read: the stand-in launches nothing.
template <class Pointer>
Pointer address(uintptr_t value) {
    return reinterpret_cast<Pointer>(value);  // NOLINT(performance-no-int-to-ptr)
}

struct Batch {
    Batch(Descs given, size_t nbOutputs)
        : inputs{std::move(given)}, results{outputs(inputs, nbOutputs)} {
        for (size_t i = 0; i < inputs.size(); ++i) {
            inputAddresses.push_back(address<void const*>(0x1000 * (i + 1)));
        }
        for (size_t i = 0; i < nbOutputs; ++i) {
            outputAddresses.push_back(address<void*>(0x100000 * (i + 1)));
        }
    }

    int32_t prepare(Instance const& plugin) const {
        return plugin.runtime().onShapeChange(inputs.data(), static_cast<int32_t>(inputs.size()),
                                              results.data(), static_cast<int32_t>(results.size()));
    }

    int32_t enqueue(Instance const& plugin, cudaStream_t stream = nullptr) const {
        return plugin.runtime().enqueue(inputs.data(), results.data(), inputAddresses.data(),
                                        outputAddresses.data(), nullptr, stream);
    }

    Descs inputs;
    Descs results;
    std::vector<void const*> inputAddresses;
    std::vector<void*> outputAddresses;
};

template <class Value>
Value argument(fake::Launch const& launch, size_t index) {
    REQUIRE(launch.arguments.at(index).size() == sizeof(Value));
    Value value;
    std::memcpy(&value, launch.arguments.at(index).data(), sizeof(Value));
    return value;
}

std::vector<std::string> namesOfCalls(std::initializer_list<char const*> names) {
    return {names.begin(), names.end()};
}

}  // namespace

TEST_CASE("attention is launched with its grid, block, shared memory and every argument") {
    struct Case {
        int32_t sm;
        int64_t patches;
        int64_t segments;
        int64_t headDim;
        DataType type;
        uint32_t blockM;
    };
    for (Case const& one :
         {Case{87, 4, 1, 80, DataType::kHALF, 128}, Case{87, 1024, 1, 80, DataType::kHALF, 128},
          Case{90, 1300, 7, 64, DataType::kBF16, 128},
          Case{110, 65536, 1024, 80, DataType::kHALF, 128}}) {
        CAPTURE(one.sm);
        CAPTURE(one.patches);
        CUcontext const context = fake::makeContext(one.sm, kSHARED);
        fake::setCurrent(context);
        Instance const plugin = createAttention();
        Batch const batch{attentionInputs(one.patches, one.segments, one.headDim, one.type), 1};
        REQUIRE(batch.prepare(plugin) == kOK);
        fake::clear();
        CUstream stream = nullptr;
        REQUIRE(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING) == CUDA_SUCCESS);
        fake::clear();
        REQUIRE(batch.enqueue(plugin, stream) == kOK);

        REQUIRE(fake::launches().size() == 1);
        fake::Launch const launch = fake::launches()[0];
        CHECK(launch.context == context);
        CHECK(launch.image.sm == one.sm);
        CHECK(launch.function == "varlen_attention_kernel");
        CHECK(launch.grid[0] == static_cast<uint32_t>(one.patches) / one.blockM +
                                    static_cast<uint32_t>(one.segments));
        CHECK(launch.grid[1] == 16);
        CHECK(launch.grid[2] == 1);
        CHECK(launch.block[0] == 256);
        CHECK(launch.sharedBytes > 0);
        CHECK(launch.stream == stream);
        CHECK(cuStreamSynchronize(stream) == CUDA_SUCCESS);
        CHECK(cuStreamDestroy(stream) == CUDA_SUCCESS);
        REQUIRE(launch.arguments.size() == 11);
        for (size_t i = 0; i < 4; ++i) {
            CHECK(argument<uintptr_t>(launch, i) == 0x1000 * (i + 1));
        }
        CHECK(argument<uintptr_t>(launch, 4) == 0x100000);
        CHECK(argument<int32_t>(launch, 5) == one.patches);
        CHECK(argument<int32_t>(launch, 6) == one.segments);
        CHECK(argument<int32_t>(launch, 7) == 16 * one.headDim);
        CHECK(argument<float>(launch, 8) == doctest::Approx(kSCALE / std::log(2.0)));
        CHECK(argument<uintptr_t>(launch, 9) == 0);
        CHECK(argument<uintptr_t>(launch, 10) == 0);
    }
}

TEST_CASE("the rotary op is launched for q and k at once, with every argument") {
    fake::setCurrent(fake::makeContext(87, kSHARED));
    for (int64_t const patches : {int64_t{1}, int64_t{16}, int64_t{17}, int64_t{4096}}) {
        Instance const plugin = createRotary();
        Batch const batch{rotaryInputs(patches, 39, 80), 2};
        REQUIRE(batch.prepare(plugin) == kOK);
        fake::clear();
        REQUIRE(batch.enqueue(plugin) == kOK);
        REQUIRE(fake::launches().size() == 1);
        fake::Launch const launch = fake::launches()[0];
        CHECK(launch.function == "qk_rotary_embedding_kernel");
        CHECK(launch.grid ==
              std::array<uint32_t, 3>{static_cast<uint32_t>((patches + 15) / 16), 16, 2});
        CHECK(launch.block[0] == 128);
        REQUIRE(launch.arguments.size() == 12);
        for (size_t i = 0; i < 4; ++i) {
            CHECK(argument<uintptr_t>(launch, i) == 0x1000 * (i + 1));
        }
        CHECK(argument<uintptr_t>(launch, 4) == 0x100000);
        CHECK(argument<uintptr_t>(launch, 5) == 0x200000);
        CHECK(argument<int32_t>(launch, 6) == patches);
        CHECK(argument<int32_t>(launch, 7) == 16);
        CHECK(argument<int32_t>(launch, 8) == 80);
        CHECK(argument<int32_t>(launch, 9) == 39);
        CHECK(argument<uintptr_t>(launch, 10) == 0);
        CHECK(argument<uintptr_t>(launch, 11) == 0);
    }
}

TEST_CASE("a batch without patches launches nothing") {
    fake::setCurrent(fake::makeContext(87, kSHARED));
    Instance const plugin = createAttention();
    Batch const batch{attentionInputs(0, 1), 1};
    REQUIRE(batch.prepare(plugin) == kOK);
    fake::clear();
    CHECK(batch.enqueue(plugin) == kOK);
    CHECK(fake::launches().empty());
}

TEST_CASE(
    "enqueue asks which context is current and launches: it allocates nothing and waits for "
    "nothing") {
    fake::setCurrent(fake::makeContext(87, kSHARED));
    Instance const attention = createAttention();
    Instance const rotary = createRotary();
    Batch const attentionBatch{attentionInputs(1024, 4), 1};
    Batch const rotaryBatch{rotaryInputs(1024), 2};
    REQUIRE(attentionBatch.prepare(attention) == kOK);
    REQUIRE(rotaryBatch.prepare(rotary) == kOK);
    for (bool const capturing : {false, true}) {
        fake::setCapturing(capturing);
        fake::clear();
        CHECK(attentionBatch.enqueue(attention) == kOK);
        CHECK(rotaryBatch.enqueue(rotary) == kOK);
        CHECK(fake::calls() == namesOfCalls({"cuCtxGetCurrent", "cuLaunchKernel", "cuCtxGetCurrent",
                                             "cuLaunchKernel"}));
    }
    fake::setCapturing(false);
#ifdef MMVISION_COUNTS_ALLOCATIONS
    // Without a batch nothing is launched, so that only the plugin's own allocations are counted,
    // not the stand-in's.
    Batch const empty{attentionInputs(0, 1), 1};
    auto const allocationsOf = [](auto const& body) {
        int64_t const before = gAllocations;
        body();
        return gAllocations - before;
    };
    fake::clear();
    int64_t const asking = allocationsOf([] {
        CUcontext context{};
        cuCtxGetCurrent(&context);
    });
    fake::clear();
    CHECK(allocationsOf([&] { empty.enqueue(attention); }) == asking);
    // The control: preparing a plugin for its first context does allocate.
    CHECK(allocationsOf([&] { rotaryBatch.prepare(createRotary()); }) > 0);
#endif
}

TEST_CASE(
    "a kernel first needed while a graph is captured is loaded without breaking the capture") {
    fake::setCurrent(fake::makeContext(87, kSHARED));
    Instance const plugin = createAttention();
    Batch const batch{attentionInputs(64, 1), 1};
    fake::setCapturing(true);
    CHECK(batch.prepare(plugin) == kOK);
    CHECK(batch.enqueue(plugin) == kOK);
    CHECK(fake::captureMode() == CU_STREAM_CAPTURE_MODE_GLOBAL);
    fake::setCapturing(false);
}

TEST_CASE("enqueue in a context that the plugin was not prepared for is an error, not a launch") {
    fake::setCurrent(fake::makeContext(87, kSHARED));
    Instance const plugin = createAttention();
    Batch const batch{attentionInputs(64, 1), 1};
    CHECK(batch.enqueue(plugin) != kOK);
    REQUIRE(batch.prepare(plugin) == kOK);
    fake::setCurrent(fake::makeContext(87, kSHARED));
    fake::clear();
    CHECK(batch.enqueue(plugin) != kOK);
    CHECK(fake::launches().empty());
    CHECK(contains(logger().take(), "enqueued in a CUDA context that it was not prepared for"));
    // Once TensorRT has told it of its shapes there, it works there.
    REQUIRE(batch.prepare(plugin) == kOK);
    CHECK(batch.enqueue(plugin) == kOK);
}

TEST_CASE("plugins of one context share a module, and the last one unloads it") {
    fake::setCurrent(fake::makeContext(87, kSHARED));
    Batch const batch{attentionInputs(64, 1), 1};
    {
        std::vector<Instance> layers;
        for (int32_t i = 0; i < 32; ++i) {
            layers.push_back(createAttention());
            REQUIRE(batch.prepare(layers.back()) == kOK);
        }
        CHECK(fake::loadedModules() == 1);
        // bfloat16 is another kernel.
        Instance const other = createAttention();
        REQUIRE(Batch{attentionInputs(64, 1, 80, DataType::kBF16), 1}.prepare(other) == kOK);
        CHECK(fake::loadedModules() == 2);
    }
    CHECK(fake::loadedModules() == 0);
}

TEST_CASE("threads with contexts on different GPUs do not meet") {
    constexpr int32_t kNB_THREADS = 8;
    constexpr int32_t kNB_BATCHES = 50;
    fake::clear();
    std::vector<CUcontext> contexts;
    std::vector<std::thread> threads;
    std::atomic<int32_t> failures{0};
    for (int32_t i = 0; i < kNB_THREADS; ++i) {
        contexts.push_back(fake::makeContext(i % 2 == 0 ? 87 : 90, kSHARED));
    }
    for (int32_t i = 0; i < kNB_THREADS; ++i) {
        threads.emplace_back([&, i] {
            fake::setCurrent(contexts[static_cast<size_t>(i)]);
            for (int32_t j = 0; j < kNB_BATCHES; ++j) {
                Instance const plugin = createAttention();
                Batch const batch{attentionInputs(64 + i, 1), 1};
                failures += batch.prepare(plugin) == kOK && batch.enqueue(plugin) == kOK ? 0 : 1;
            }
        });
    }
    for (std::thread& thread : threads) {
        thread.join();
    }
    CHECK(failures == 0);
    CHECK(fake::launches().size() == kNB_THREADS * kNB_BATCHES);
    for (fake::Launch const& launch : fake::launches()) {
        auto const thread =
            std::find(contexts.begin(), contexts.end(), launch.context) - contexts.begin();
        CHECK(launch.image.sm == (thread % 2 == 0 ? 87 : 90));
    }
    CHECK(fake::loadedModules() == 0);
}

TEST_CASE("a driver call that fails is logged by name, fails the step, and leaks no module") {
    fake::setCurrent(fake::makeContext(110, kSHARED));
    Batch const batch{attentionInputs(64, 1), 1};
    struct Case {
        char const* function;
        CUresult result;
        char const* message;
    };
    for (Case const& one :
         {Case{"cuCtxGetCurrent", CUDA_ERROR_INVALID_VALUE,
               "cuCtxGetCurrent failed: CUDA_ERROR_INVALID"},
          Case{"cuCtxGetDevice", CUDA_ERROR_INVALID_VALUE, "cuCtxGetDevice failed"},
          Case{"cuDeviceGetAttribute", CUDA_ERROR_INVALID_VALUE, "cuDeviceGetAttribute failed"},
          Case{"cuModuleLoadDataEx", CUDA_ERROR_OUT_OF_MEMORY,
               "loading varlen_attention_kernel for sm_110 failed: CUDA_ERROR_OUT_OF_MEMORY (2), "
               "as the driver describes"},
          Case{"cuModuleGetFunction", CUDA_ERROR_NOT_FOUND,
               "cuModuleGetFunction failed: CUDA_ERROR_NOT_FOUND"},
          Case{"cuFuncSetAttribute", CUDA_ERROR_INVALID_VALUE,
               "asking for shared memory failed"}}) {
        CAPTURE(one.function);
        Instance const plugin = createAttention();
        fake::failNext(one.function, one.result);
        CHECK(batch.prepare(plugin) != kOK);
        CHECK(contains(logger().take(), one.message));
        CHECK(fake::loadedModules() == 0);
        // And the next attempt is not spoilt by it.
        CHECK(batch.prepare(plugin) == kOK);
    }
    Instance const plugin = createAttention();
    REQUIRE(batch.prepare(plugin) == kOK);
    fake::failNext("cuLaunchKernel", CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES);
    CHECK(batch.enqueue(plugin) != kOK);
    CHECK(contains(logger().take(), "cuLaunchKernel failed: CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"));
}
