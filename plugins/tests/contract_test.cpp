// What TensorRT asks of a plugin when it parses, builds, serialises and loads: every method but
// enqueue.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include "fake_cuda.h"
#include "harness.h"

#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <set>

using namespace harness;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

namespace {

constexpr int32_t kSHARED_ORIN = 163 * 1024;

// An expression of a dimension, as the builder hands it out: a constant, or -1 for a size known at
// run time only.
class Dimension final : public nvinfer1::IDimensionExpr {
public:
    explicit Dimension(int64_t value) : mValue{value} { mImpl = &mValue; }
    Dimension(Dimension const&) = delete;
    Dimension(Dimension&& other) : Dimension{other.mValue.mConstant} {}

private:
    struct Value final : nvinfer1::apiv::VDimensionExpr {
        explicit Value(int64_t constant) : mConstant{constant} {}
        bool isConstant() const override { return mConstant >= 0; }
        int64_t getConstantValue() const override { return mConstant; }
        bool isSizeTensor() const override { return false; }
        int64_t mConstant;
    };
    Value mValue;
};

class ExprBuilder final : public nvinfer1::IExprBuilder {};

struct Shapes {
    explicit Shapes(Descs const& descs) {
        dimensions.reserve(descs.size() * Dims::MAX_DIMS);
        for (nvinfer1::PluginTensorDesc const& one : descs) {
            nvinfer1::DimsExprs expression{one.dims.nbDims, {}};
            for (int32_t i = 0; i < one.dims.nbDims; ++i) {
                dimensions.emplace_back(one.dims.d[i]);
                expression.d[i] = &dimensions.back();
            }
            expressions.push_back(expression);
        }
    }

    std::vector<Dimension> dimensions;
    std::vector<nvinfer1::DimsExprs> expressions;
};

int32_t outputShapes(Instance const& plugin, Descs const& inputs,
                     std::vector<nvinfer1::DimsExprs>& result) {
    Shapes const shapes{inputs};
    ExprBuilder builder;
    return plugin.build().getOutputShapes(
        shapes.expressions.data(), static_cast<int32_t>(inputs.size()), nullptr, 0, result.data(),
        static_cast<int32_t>(result.size()), builder);
}

int32_t outputTypes(Instance const& plugin, std::vector<DataType> const& inputs,
                    std::vector<DataType>& result) {
    return plugin.build().getOutputDataTypes(result.data(), static_cast<int32_t>(result.size()),
                                             inputs.data(), static_cast<int32_t>(inputs.size()));
}

bool supports(Instance const& plugin, int32_t pos, Descs inputs, size_t nbOutputs) {
    Descs const results = outputs(inputs, nbOutputs);
    auto const nbInputs = static_cast<int32_t>(inputs.size());
    inputs.insert(inputs.end(), results.begin(), results.end());
    return plugin.build().supportsFormatCombination(pos, dynamic(inputs).data(), nbInputs,
                                                    static_cast<int32_t>(nbOutputs));
}

int32_t configure(Instance const& plugin, Descs const& inputs, size_t nbOutputs) {
    Descs const results = outputs(inputs, nbOutputs);
    return plugin.build().configurePlugin(dynamic(inputs).data(),
                                          static_cast<int32_t>(inputs.size()),
                                          dynamic(results).data(), static_cast<int32_t>(nbOutputs));
}

Descs with(Descs descs, size_t index, nvinfer1::PluginTensorDesc const& changed) {
    descs[index] = changed;
    return descs;
}

}  // namespace

TEST_CASE("the library lists both creators under the names that the graph's nodes carry") {
    int32_t count = 0;
    REQUIRE(Library::get().creators(count) != nullptr);
    REQUIRE(count == 2);
    for (std::string const name : {"VarlenAttention", "QKRotaryEmbedding"}) {
        nvinfer1::IPluginCreatorV3One const& creator = Library::get().creator(name);
        CHECK(std::string{creator.getPluginVersion()} == "1");
        CHECK(std::string{creator.getPluginNamespace()} == "mmvision");
        CHECK(std::string{creator.getInterfaceInfo().kind} == "PLUGIN CREATOR_V3ONE");
    }
    nvinfer1::PluginFieldCollection const* const fields =
        Library::get().creator("VarlenAttention").getFieldNames();
    REQUIRE(fields->nbFields == 1);
    CHECK(std::string{fields->fields[0].name} == "scale");
    CHECK(fields->fields[0].type == PluginFieldType::kFLOAT32);
    CHECK(Library::get().creator("QKRotaryEmbedding").getFieldNames()->nbFields == 0);
}

TEST_CASE("a plugin is made from its node's attributes") {
    float const scale = 0.5F;
    char const text[] = "1";
    Instance const plugin =
        create("VarlenAttention", {{"plugin_version", text, PluginFieldType::kCHAR, 1},
                                   {"scale", &scale, PluginFieldType::kFLOAT32, 1}});
    REQUIRE(plugin);
    CHECK(std::string{plugin.core().getPluginName()} == "VarlenAttention");
    CHECK(std::string{plugin.core().getPluginVersion()} == "1");
    CHECK(std::string{plugin.core().getPluginNamespace()} == "mmvision");
    CHECK(plugin.build().getNbOutputs() == 1);
    CHECK(createRotary().build().getNbOutputs() == 2);
    CHECK(plugin.build().getWorkspaceSize(nullptr, 0, nullptr, 0) == 0);
    CHECK(plugin.build().getTimingCacheID() != nullptr);
    CHECK(plugin.build().getNbTactics() == 0);
    CHECK(logger().take().empty());
}

TEST_CASE("a plugin is refused without its attributes, and the log names the one") {
    float const scales[2] = {0.5F, 0.5F};
    double const wide = 0.5;
    float const nan = std::numeric_limits<float>::quiet_NaN();
    auto const refused = [](std::vector<PluginField> const& fields) {
        CHECK_FALSE(create("VarlenAttention", fields));
        return logger().take();
    };
    CHECK(refused({}) == "mmvision::VarlenAttention: attribute scale is missing\n");
    CHECK(contains(refused({{"scale", &wide, PluginFieldType::kFLOAT64, 1}}),
                   "scale must be one float32, got type 2"));
    CHECK(contains(refused({{"scale", scales, PluginFieldType::kFLOAT32, 2}}), "length 2"));
    CHECK(contains(refused({{"scale", nullptr, PluginFieldType::kFLOAT32, 1}}),
                   "scale must be one float32"));
    CHECK(contains(refused({{"scale", &nan, PluginFieldType::kFLOAT32, 1}}),
                   "scale must be finite, got nan"));
    CHECK(contains(refused({{nullptr, &nan, PluginFieldType::kFLOAT32, 1}}), "scale is missing"));
    // TensorRT has no field collection for a node without attributes in some versions.
    CHECK(Instance{Library::get()
                       .creator("QKRotaryEmbedding")
                       .createPlugin("layer", nullptr, nvinfer1::TensorRTPhase::kBUILD)});
}

TEST_CASE("outputs have the type of q, which is float16 or bfloat16") {
    for (DataType const type : {DataType::kHALF, DataType::kBF16}) {
        std::vector<DataType> one(1);
        CHECK(outputTypes(createAttention(), {type, type, type, DataType::kINT32}, one) == kOK);
        CHECK(one[0] == type);
        std::vector<DataType> two(2);
        CHECK(outputTypes(createRotary(), {type, type, DataType::kFLOAT, DataType::kFLOAT}, two) ==
              kOK);
        CHECK((two[0] == type && two[1] == type));
    }
    auto const refused = [](Instance const& plugin, std::vector<DataType> const& inputs,
                            size_t nbOutputs) {
        std::vector<DataType> result(nbOutputs);
        CHECK(outputTypes(plugin, inputs, result) != kOK);
        return logger().take();
    };
    auto const half = DataType::kHALF;
    CHECK(contains(
        refused(createAttention(),
                {DataType::kFLOAT, DataType::kFLOAT, DataType::kFLOAT, DataType::kINT32}, 1),
        "q is float32, the kernels are for float16 and bfloat16"));
    CHECK(contains(refused(createAttention(), {half, DataType::kBF16, half, DataType::kINT32}, 1),
                   "k must be float16"));
    CHECK(contains(refused(createAttention(), {half, half, half, DataType::kINT64}, 1),
                   "cu_seqlens must be int32, got int64"));
    CHECK(contains(refused(createRotary(), {half, half, half, DataType::kFLOAT}, 2),
                   "cos must be float32, got float16"));
    CHECK(contains(refused(createAttention(), {half, half, half}, 1),
                   "takes 4 inputs and gives 1 outputs, got 3 and 1"));
}

TEST_CASE("outputs have the shape of q, known or not") {
    for (int64_t const patches : {int64_t{-1}, int64_t{1024}}) {
        std::vector<nvinfer1::DimsExprs> one(1);
        CHECK(outputShapes(createAttention(), attentionInputs(patches, -1), one) == kOK);
        CHECK(one[0].nbDims == 3);
        std::vector<nvinfer1::DimsExprs> two(2);
        CHECK(outputShapes(createRotary(), rotaryInputs(patches), two) == kOK);
        CHECK((two[0].nbDims == 3 && two[1].nbDims == 3));
    }
}

TEST_CASE("shapes that do not belong together are refused, and the log shows them") {
    auto const half = DataType::kHALF;
    auto const refused = [](Instance const& plugin, Descs const& inputs, size_t nbOutputs) {
        std::vector<nvinfer1::DimsExprs> result(nbOutputs);
        CHECK(outputShapes(plugin, inputs, result) != kOK);
        std::string const parsing = logger().take();
        // The builder and the run time ask again, with what they know by then.
        CHECK(configure(plugin, inputs, nbOutputs) != kOK);
        CHECK(logger().take() == parsing);
        Descs const results = outputs(inputs, nbOutputs);
        CHECK(plugin.runtime().onShapeChange(inputs.data(), static_cast<int32_t>(inputs.size()),
                                             results.data(),
                                             static_cast<int32_t>(nbOutputs)) != kOK);
        CHECK(logger().take() == parsing);
        return parsing;
    };
    fake::setCurrent(fake::makeContext(87, kSHARED_ORIN));
    Descs const attention = attentionInputs(-1, -1);
    for (int64_t const headDim : {int64_t{72}, int64_t{0}, int64_t{144}, int64_t{-1}}) {
        CHECK(contains(refused(createAttention(), attentionInputs(-1, -1, headDim), 1),
                       "head_dim must be a multiple of 16 from 16 to 128, fixed when the engine is "
                       "built; q is [-1, 16, " +
                           std::to_string(headDim) + "]"));
    }
    CHECK(contains(refused(createAttention(), with(attention, 0, desc({-1, 80}, half)), 1),
                   "q must have 3 dimensions"));
    CHECK(contains(refused(createAttention(), with(attention, 1, desc({-1, 8, 80}, half)), 1),
                   "k must have the shape of q, got [-1, 8, 80] and [-1, 16, 80]"));
    CHECK(contains(refused(createAttention(), with(attention, 2, desc({-1, 16, 64}, half)), 1),
                   "v must have the shape"));
    CHECK(contains(refused(createAttention(), with(attention, 3, desc({1}, DataType::kINT32)), 1),
                   "cu_seqlens must hold the bounds of at least one segment, got [1]"));
    CHECK(
        contains(refused(createAttention(), with(attention, 3, desc({1, 2}, DataType::kINT32)), 1),
                 "cu_seqlens must have 1 dim"));
    Descs const manyHeads(3, desc({-1, 70000, 80}, half));
    CHECK(contains(
        refused(createAttention(), {manyHeads[0], manyHeads[0], manyHeads[0], attention[3]}, 1),
        "heads must be from 1 to 65535"));

    Descs const rotary = rotaryInputs(-1);
    nvinfer1::PluginTensorDesc const wide = desc({-1, 41}, DataType::kFLOAT);
    CHECK(contains(refused(createRotary(), {rotary[0], rotary[1], wide, wide}, 2),
                   "at most head_dim / 2, got [-1, 41] for q of [-1, 16, 80]"));
    CHECK(contains(refused(createRotary(), with(rotary, 3, wide), 2),
                   "sin must have the shape of cos"));
    Descs const known = rotaryInputs(64);
    nvinfer1::PluginTensorDesc const shortCos = desc({60, 39}, DataType::kFLOAT);
    CHECK(contains(refused(createRotary(), {known[0], known[1], shortCos, shortCos}, 2),
                   "a row for each patch of q"));
    CHECK(fake::loadedModules() == 0);
}

TEST_CASE("formats are linear, and types those of the kernels") {
    Instance const plugin = createAttention();
    auto const half = DataType::kHALF;
    Descs const inputs = attentionInputs(-1, -1);
    for (int32_t pos = 0; pos < 5; ++pos) {
        CHECK(supports(plugin, pos, inputs, 1));
        CHECK(supports(plugin, pos, attentionInputs(-1, -1, 80, DataType::kBF16), 1));
        bool const isFloatType = pos != 3;
        CHECK(supports(plugin, pos, attentionInputs(-1, -1, 80, DataType::kFLOAT), 1) ==
              !isFloatType);
    }
    CHECK_FALSE(supports(plugin, 1, with(inputs, 1, desc({-1, 16, 80}, DataType::kBF16)), 1));
    CHECK_FALSE(supports(
        plugin, 0, with(inputs, 0, desc({-1, 16, 80}, half, nvinfer1::TensorFormat::kCHW16)), 1));
    CHECK_FALSE(supports(plugin, 3, with(inputs, 3, desc({-1}, DataType::kINT64)), 1));
    CHECK_FALSE(supports(createRotary(), 2, with(rotaryInputs(-1), 2, desc({-1, 39}, half)), 2));
    CHECK(supports(createRotary(), 2, rotaryInputs(-1), 2));
    CHECK(logger().take().empty());
}

TEST_CASE("building picks the best kernel for the GPU, or fails and says what there is") {
    struct Case {
        int32_t gpu;
        int32_t sm;
        bool isPtx;
        bool isIntegrated{false};
    };
    // The test's library has kernels for 8.0, 8.7, 9.0 and 11.0; its PTX is for 8.0.
    for (Case const& one :
         {Case{80, 80, false}, Case{86, 80, false}, Case{87, 87, false, true}, Case{89, 80, false},
          Case{90, 90, false}, Case{100, 80, true}, Case{103, 80, true},
          Case{110, 110, false, true}, Case{120, 80, true}, Case{121, 80, true, true},
          // Integrated GPUs take binaries of their own architecture alone, and PTX.
          Case{86, 80, true, true}, Case{80, 80, false, true}}) {
        CAPTURE(one.gpu);
        CUcontext const context = fake::makeContext(one.gpu, 227 * 1024);
        fake::setIntegrated(context, one.isIntegrated);
        fake::setCurrent(context);
        Instance const plugin = createAttention();
        REQUIRE(configure(plugin, attentionInputs(-1, -1), 1) == kOK);
        CHECK(fake::loadedModules() == 1);
        Descs const inputs = attentionInputs(64, 1);
        Descs const results = outputs(inputs, 1);
        REQUIRE(plugin.runtime().onShapeChange(inputs.data(), 4, results.data(), 1) == kOK);
        void const* const in[4] = {nullptr, nullptr, nullptr, nullptr};
        void* const out[1] = {nullptr};
        fake::clear();
        REQUIRE(plugin.runtime().enqueue(inputs.data(), results.data(), in, out, nullptr,
                                         nullptr) == kOK);
        REQUIRE(fake::launches().size() == 1);
        CHECK(fake::launches()[0].image.sm == one.sm);
        CHECK(fake::launches()[0].image.isPtx == one.isPtx);
    }
    CHECK(fake::loadedModules() == 0);
    CHECK(logger().take().empty());

    fake::setCurrent(fake::makeContext(75, 64 * 1024));
    CHECK(configure(createAttention(), attentionInputs(-1, -1), 1) != kOK);
    CHECK(contains(logger().take(),
                   "no kernel for compute capability 7.5, float16, head_dim 80; it has it for: 80, "
                   "80 and later (PTX), 87, 90, 110"));
    fake::setCurrent(fake::makeContext(87, kSHARED_ORIN));
    CHECK(configure(createAttention(), attentionInputs(-1, -1, 96), 1) != kOK);
    CHECK(contains(logger().take(), "head_dim 96; it has it for: no architecture"));
    // A GPU with too little shared memory for the tile.
    fake::setCurrent(fake::makeContext(80, 16 * 1024));
    CHECK(configure(createAttention(), attentionInputs(-1, -1), 1) != kOK);
    CHECK(contains(logger().take(), "no kernel for compute capability 8.0"));
    fake::setCurrent(nullptr);
    CHECK(configure(createAttention(), attentionInputs(-1, -1), 1) != kOK);
    CHECK(contains(logger().take(), "no CUDA context is current in this thread"));
}

TEST_CASE(
    "what the engine keeps makes the same plugin again, with its kernel loaded when the context is "
    "made") {
    fake::setCurrent(fake::makeContext(87, kSHARED_ORIN));
    Instance const built = createAttention();
    REQUIRE(configure(built, attentionInputs(-1, -1, 64, DataType::kBF16), 1) == kOK);
    nvinfer1::PluginFieldCollection const* const fields = built.runtime().getFieldsToSerialize();
    REQUIRE(fields != nullptr);
    std::set<std::string> names;
    for (int32_t i = 0; i < fields->nbFields; ++i) {
        names.insert(fields->fields[i].name);
    }
    CHECK(names == std::set<std::string>{"scale", "dtype", "head_dim"});

    Instance const loaded =
        create("VarlenAttention",
               std::vector<PluginField>(fields->fields, fields->fields + fields->nbFields),
               nvinfer1::TensorRTPhase::kRUNTIME);
    REQUIRE(loaded);
    fake::clear();
    Instance const attached{loaded.runtime().attachToContext(nullptr)};
    REQUIRE(attached);
    Descs const inputs = attentionInputs(64, 1, 64, DataType::kBF16);
    Descs const results = outputs(inputs, 1);
    void const* const in[4] = {nullptr, nullptr, nullptr, nullptr};
    void* const out[1] = {nullptr};
    REQUIRE(attached.runtime().enqueue(inputs.data(), results.data(), in, out, nullptr, nullptr) ==
            kOK);
    float scale = 0.0F;
    std::memcpy(&scale, fake::launches().at(0).arguments.at(8).data(), sizeof(scale));
    CHECK(scale == doctest::Approx(kSCALE * std::log2(std::exp(1.0))));

    // On a GPU without a kernel the execution context is not made.
    fake::setCurrent(fake::makeContext(75, 64 * 1024));
    CHECK_FALSE(Instance{loaded.runtime().attachToContext(nullptr)});
    CHECK(contains(logger().take(), "no kernel for compute capability 7.5, bfloat16, head_dim 64"));
}

TEST_CASE("a clone is an object of its own with the same state") {
    fake::setCurrent(fake::makeContext(87, kSHARED_ORIN));
    auto original = std::make_unique<Instance>(createRotary());
    REQUIRE(configure(*original, rotaryInputs(-1), 2) == kOK);
    Instance const clone{original->plugin->clone()};
    REQUIRE(clone);
    CHECK(clone.plugin.get() != original->plugin.get());
    original.reset();
    CHECK(fake::loadedModules() == 1);
    nvinfer1::PluginFieldCollection const* const fields = clone.runtime().getFieldsToSerialize();
    REQUIRE(fields->nbFields == 2);
    int32_t headDim = 0;
    std::memcpy(&headDim, fields->fields[1].data, sizeof(headDim));
    CHECK(headDim == 80);
}
