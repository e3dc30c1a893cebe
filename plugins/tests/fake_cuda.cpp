// Errors, devices and contexts, and what tests ask of the stand-in.
#include "fake_cuda.h"

#include "fake_state.h"

#include <cstdlib>
#include <cstring>
#include <map>
#include <sstream>

namespace {

constexpr int32_t kDRIVER_VERSION = 12060;
constexpr int32_t kSHARED_LIMIT = 227 * 1024;

std::map<std::string, CUresult> gFaults;   // of the next call
std::map<std::string, CUresult> gPlanted;  // of every call
std::vector<std::string> gCalls;
std::vector<std::string> gBroken;
int32_t gDriverVersion = kDRIVER_VERSION;

thread_local std::vector<CUcontext> gCurrent;

// Devices by their compute capabilities (FAKE_CUDA_DEVICES="87,90"), for a process that calls
// nothing else here.
void devicesFromEnvironment() {
    char const* const text = std::getenv("FAKE_CUDA_DEVICES");  // NOLINT(concurrency-mt-unsafe)
    if (text == nullptr || !fake::contexts().empty()) {
        return;
    }
    std::istringstream list{text};
    for (std::string sm; std::getline(list, sm, ',');) {
        fake::makeContext(std::stoi(sm), kSHARED_LIMIT);
    }
}

}  // namespace

namespace fake {

std::recursive_mutex& mutex() {
    static std::recursive_mutex sMutex;
    return sMutex;
}

std::vector<std::unique_ptr<CUctx_st>>& contexts() {
    static std::vector<std::unique_ptr<CUctx_st>> sContexts;
    return sContexts;
}

CUresult called(std::string const& function) {
    gCalls.push_back(function);
    if (auto const planted = gPlanted.find(function); planted != gPlanted.end()) {
        return planted->second;
    }
    auto const fault = gFaults.find(function);
    if (fault == gFaults.end()) {
        return CUDA_SUCCESS;
    }
    CUresult const result = fault->second;
    gFaults.erase(fault);
    return result;
}

CUcontext current() {
    return gCurrent.empty() ? nullptr : gCurrent.back();
}

CUresult broken(std::string const& rule, CUresult result) {
    gBroken.push_back(rule);
    return result;
}

}  // namespace fake

extern "C" {

CUresult cuInit(unsigned int flags) {
    FAKE_CALL("cuInit")
    devicesFromEnvironment();
    if (flags != 0) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    return fake::contexts().empty() ? CUDA_ERROR_NO_DEVICE : CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int* version) {
    FAKE_CALL("cuDriverGetVersion")
    *version = gDriverVersion;
    return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult error, char const** text) {
    static std::map<CUresult, char const*> const sNames{
        {CUDA_ERROR_INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE"},
        {CUDA_ERROR_OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY"},
        {CUDA_ERROR_NOT_FOUND, "CUDA_ERROR_NOT_FOUND"},
        {CUDA_ERROR_INVALID_PTX, "CUDA_ERROR_INVALID_PTX"},
        {CUDA_ERROR_NO_DEVICE, "CUDA_ERROR_NO_DEVICE"},
        {CUDA_ERROR_INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT"},
        {CUDA_ERROR_INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE"},
        {CUDA_ERROR_ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS"},
        {CUDA_ERROR_LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED"},
        {CUDA_ERROR_STUB_LIBRARY, "CUDA_ERROR_STUB_LIBRARY"},
        {CUDA_ERROR_SYSTEM_DRIVER_MISMATCH, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"},
        {CUDA_ERROR_NO_BINARY_FOR_GPU, "CUDA_ERROR_NO_BINARY_FOR_GPU"},
        {CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"},
        {CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"},
        {CUDA_ERROR_STREAM_CAPTURE_ISOLATION, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION"},
        {CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT"},
        {CUDA_ERROR_CAPTURED_EVENT, "CUDA_ERROR_CAPTURED_EVENT"},
        {CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"}};
    auto const found = sNames.find(error);
    *text = found == sNames.end() ? nullptr : found->second;
    return found == sNames.end() ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult, char const** text) {
    *text = "as the driver describes it";
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int* count) {
    FAKE_CALL("cuDeviceGetCount")
    *count = static_cast<int>(fake::contexts().size());
    return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
    FAKE_CALL("cuDeviceGet")
    if (ordinal < 0 || static_cast<size_t>(ordinal) >= fake::contexts().size()) {
        return CUDA_ERROR_INVALID_DEVICE;
    }
    *device = ordinal;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetName(char* name, int size, CUdevice) {
    FAKE_CALL("cuDeviceGetName")
    std::strncpy(name, "stand-in", static_cast<size_t>(size));
    return CUDA_SUCCESS;
}

CUresult cuDeviceTotalMem(size_t* size, CUdevice) {
    FAKE_CALL("cuDeviceTotalMem")
    *size = size_t{1} << 30U;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
    FAKE_CALL("cuDeviceGetAttribute")
    CUctx_st const& context = *fake::contexts().at(static_cast<size_t>(device));
    switch (attribute) {
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
            *value = context.sm / 10;
            return CUDA_SUCCESS;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
            *value = context.sm % 10;
            return CUDA_SUCCESS;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
            *value = context.sharedLimit;
            return CUDA_SUCCESS;
        case CU_DEVICE_ATTRIBUTE_INTEGRATED:
            *value = context.isIntegrated ? 1 : 0;
            return CUDA_SUCCESS;
        case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
            *value = 1;
            return CUDA_SUCCESS;
        case CU_DEVICE_ATTRIBUTE_CLOCK_RATE:
            *value = 1;
            return CUDA_SUCCESS;
        default:
            return CUDA_ERROR_INVALID_VALUE;
    }
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
    FAKE_CALL("cuDevicePrimaryCtxRetain")
    *context = fake::contexts().at(static_cast<size_t>(device)).get();
    ++(*context)->holders;
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRelease(CUdevice device) {
    std::lock_guard<std::recursive_mutex> const lock{fake::mutex()};
    CUresult const fault = fake::called("cuDevicePrimaryCtxRelease");
    CUctx_st& context = *fake::contexts().at(static_cast<size_t>(device));
    if (context.holders == 0) {
        return fake::broken("a context that nobody holds was released", CUDA_ERROR_INVALID_CONTEXT);
    }
    --context.holders;
    return fault;
}

CUresult cuCtxSetCurrent(CUcontext context) {
    FAKE_CALL("cuCtxSetCurrent")
    if (context != nullptr && context->holders == 0) {
        return CUDA_ERROR_INVALID_CONTEXT;
    }
    fake::setCurrent(context);
    return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
    FAKE_CALL("cuCtxGetCurrent")
    *context = fake::current();
    return CUDA_SUCCESS;
}

CUresult cuCtxPushCurrent(CUcontext context) {
    FAKE_CALL("cuCtxPushCurrent")
    gCurrent.push_back(context);
    return CUDA_SUCCESS;
}

CUresult cuCtxPopCurrent(CUcontext* context) {
    FAKE_CALL("cuCtxPopCurrent")
    if (gCurrent.empty()) {
        return CUDA_ERROR_INVALID_CONTEXT;
    }
    *context = gCurrent.back();
    gCurrent.pop_back();
    return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice* device) {
    FAKE_CALL_IN_CONTEXT("cuCtxGetDevice")
    *device = fake::current()->device;
    return CUDA_SUCCESS;
}

// For tests in Python, by ctypes.

int fakeAddDevice(int sm, int isIntegrated) {
    CUcontext const context = fake::makeContext(sm, kSHARED_LIMIT);
    context->isIntegrated = isIntegrated != 0;
    return context->device;
}

void fakeSetDevice(int device, int sm, int isIntegrated) {
    fake::contexts().at(static_cast<size_t>(device))->sm = sm;
    fake::contexts().at(static_cast<size_t>(device))->isIntegrated = isIntegrated != 0;
}

void fakeSetDriverVersion(int version) {
    gDriverVersion = version;
}

// Every call of a function gives this result from now on; none does for CUDA_SUCCESS.
void fakeFail(char const* function, int result) {
    std::lock_guard<std::recursive_mutex> const lock{fake::mutex()};
    gPlanted.erase(function);
    if (result != CUDA_SUCCESS) {
        gPlanted[function] = static_cast<CUresult>(result);
    }
}

int fakeIsDeviceMemory(uintptr_t address, size_t size) {
    std::lock_guard<std::recursive_mutex> const lock{fake::mutex()};
    return fake::isDeviceMemory({address, size}) ? 1 : 0;
}

// Writes what is held, what was called and which rules were broken, as JSON; gives the length,
// which may not fit.
size_t fakeReport(char* text, size_t size) {
    std::lock_guard<std::recursive_mutex> const lock{fake::mutex()};
    fake::Held held{};
    fake::countStreams(held);
    fake::countMemory(held);
    fake::countModules(held);
    for (auto const& context : fake::contexts()) {
        held.contexts += static_cast<size_t>(context->holders);
    }
    std::ostringstream json;
    json << R"({"held": {"streams": )" << held.streams << R"(, "events": )" << held.events
         << R"(, "graphs": )" << held.graphs << R"(, "executables": )" << held.executables
         << R"(, "device_buffers": )" << held.deviceBuffers << R"(, "pinned_buffers": )"
         << held.pinnedBuffers << R"(, "modules": )" << held.modules << R"(, "contexts": )"
         << held.contexts << "}";
    auto const list = [&json](char const* name, std::vector<std::string> const& entries) {
        json << ", \"" << name << "\": [";
        for (size_t i = 0; i < entries.size(); ++i) {
            json << (i == 0 ? "\"" : ", \"") << entries[i] << '"';
        }
        json << ']';
    };
    list("calls", gCalls);
    list("broken", gBroken);
    json << '}';
    std::string const report = json.str();
    if (report.size() < size) {
        std::memcpy(text, report.c_str(), report.size() + 1);
    }
    return report.size();
}

}  // extern "C"

namespace fake {

CUcontext makeContext(int32_t sm, int32_t sharedLimit) {
    std::lock_guard<std::recursive_mutex> const lock{mutex()};
    auto const device = static_cast<CUdevice>(contexts().size());
    contexts().push_back(
        std::make_unique<CUctx_st>(CUctx_st{sm, sharedLimit, device, isTegra(sm), 0}));
    return contexts().back().get();
}

void setCurrent(CUcontext context) {
    gCurrent.clear();
    if (context != nullptr) {
        gCurrent.push_back(context);
    }
}

void setIntegrated(CUcontext context, bool isIntegrated) {
    context->isIntegrated = isIntegrated;
}

void failNext(std::string const& function, CUresult result) {
    std::lock_guard<std::recursive_mutex> const lock{mutex()};
    gFaults[function] = result;
}

std::vector<std::string> calls() {
    std::lock_guard<std::recursive_mutex> const lock{mutex()};
    return gCalls;
}

void clear() {
    std::lock_guard<std::recursive_mutex> const lock{mutex()};
    gCalls.clear();
    gFaults.clear();
    clearLaunches();
}

}  // namespace fake
