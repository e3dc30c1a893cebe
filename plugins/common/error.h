// What a plugin refuses, and how that reaches TensorRT: logged with the plugin's name, then a
// failure code.
#pragma once

#include <NvInferRuntime.h>

#include <exception>
#include <stdexcept>
#include <string>

namespace mmvision {

class Error : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

// Where messages go: the finder TensorRT gave when it loaded the library, else TensorRT's global
// logger, else stderr.
void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept;
void logError(char const* plugin, char const* message) noexcept;

// Runs a body inside a noexcept method: what it throws is logged, and `failure` returned.
template <class Result, class Body>
Result guarded(char const* plugin, Result failure, Body&& body) noexcept {
    try {
        return body();
    } catch (std::exception const& error) {
        logError(plugin, error.what());
    } catch (...) {
        logError(plugin, "unknown exception");
    }
    return failure;
}

}  // namespace mmvision
