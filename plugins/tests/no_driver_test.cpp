// A machine without a GPU, as a build machine is: the library loads and lists its creators; what
// needs a GPU says so.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include "harness.h"

#include <doctest/doctest.h>

using namespace harness;

TEST_CASE("without a driver the library loads, and a build fails with the reason") {
    if (dlopen("libcuda.so.1", RTLD_LAZY) != nullptr) {
        MESSAGE("this machine has a CUDA driver: nothing to test");
        return;
    }
    Instance const plugin = createAttention();
    REQUIRE(plugin);
    Descs const inputs = attentionInputs(64, 1);
    Descs const results = outputs(inputs, 1);
    CHECK(plugin.runtime().onShapeChange(inputs.data(), 4, results.data(), 1) != kOK);
    CHECK(contains(logger().take(),
                   "mmvision::VarlenAttention: there is no CUDA driver: libcuda.so.1"));
    CHECK(plugin.runtime().enqueue(inputs.data(), results.data(), nullptr, nullptr, nullptr,
                                   nullptr) != kOK);
    CHECK(Instance{plugin.plugin->clone()});
}
