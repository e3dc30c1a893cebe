#include "amx/amx.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace mmvision::amx {

bool amx_allowed() {
    unsigned a = 0;
    unsigned b = 0;
    unsigned c = 0;
    unsigned d = 0;
    constexpr unsigned kAmxBf16 = 1U << 22;
    constexpr unsigned kAmxTile = 1U << 24;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kAmxBf16) == 0 ||
        (d & kAmxTile) == 0) {
        return false;
    }
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw")) {
        return false;
    }
    // https://docs.kernel.org/arch/x86/xstate.html: once in a process, for all its threads.
    constexpr long kRequestPermission = 0x1023;
    constexpr long kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace mmvision::amx
