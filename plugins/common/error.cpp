#include "common/error.h"

#include "common/tensorrt_library.h"

#include <atomic>
#include <cstdio>

namespace mmvision {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> gLoggerFinder{nullptr};

nvinfer1::ILogger* findLogger() {
    if (nvinfer1::ILoggerFinder* const finder = gLoggerFinder.load()) {
        return finder->findLogger();
    }
    using GetLogger = nvinfer1::ILogger* (*)() noexcept;
    auto const getLogger = reinterpret_cast<GetLogger>(tensorrtSymbol("getLogger"));
    return getLogger == nullptr ? nullptr : getLogger();
}

}  // namespace

void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept {
    gLoggerFinder.store(finder);
}

void logError(char const* plugin, char const* message) noexcept {
    try {
        std::string const line = std::string{"mmvision::"} + plugin + ": " + message;
        if (nvinfer1::ILogger* const logger = findLogger()) {
            logger->log(nvinfer1::ILogger::Severity::kERROR, line.c_str());
            return;
        }
        std::fprintf(stderr, "%s\n", line.c_str());
    } catch (...) {
        // No memory for the message: the failure code is all there is.
        std::fputs("mmvision: an error could not be logged\n", stderr);
    }
}

}  // namespace mmvision
