// Whether the kernels of this folder run here. Compiled for every x86-64, unlike they.
#pragma once

namespace mmvision::amx {

// Whether this CPU has AMX for bfloat16 and AVX-512, and the system lets this process use them,
// which this asks for.
bool amx_allowed();

}  // namespace mmvision::amx
