#include "common/tensorrt_library.h"

#include <dlfcn.h>

#include <initializer_list>

namespace mmvision {

void* tensorrtSymbol(char const* name) noexcept {
    if (void* const symbol = dlsym(RTLD_DEFAULT, name)) {
        return symbol;
    }
    // Python's bindings may load TensorRT without making its symbols global. RTLD_NOLOAD finds what
    // is there already.
    for (char const* library : {"libnvinfer.so.11", "libnvinfer.so.10", "libtensorrt_rtx.so.1"}) {
        if (void* const handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD)) {
            void* const symbol = dlsym(handle, name);
            dlclose(handle);
            if (symbol != nullptr) {
                return symbol;
            }
        }
    }
    return nullptr;
}

}  // namespace mmvision
