// In place of amx.cpp, where the intrinsics are emulated (immintrin.h): they run on every CPU.
#include "amx/amx.h"

namespace mmvision::amx {

bool amx_allowed() {
    return true;
}

}  // namespace mmvision::amx
