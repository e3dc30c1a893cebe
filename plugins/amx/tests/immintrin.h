// The intrinsics that the kernels use, in plain C++, so that their tests run on a CPU without AMX
// and AVX-512. Stands in for the compiler's <immintrin.h>. Semantics: Intel 64 and IA-32
// Architectures Software Developer's Manual, volume 2.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>

// NOLINTBEGIN(bugprone-reserved-identifier,readability-identifier-naming): the names are Intel's.

struct alignas(64) __m512 {
    float v[16];
};
struct alignas(64) __m512i {
    std::uint32_t v[16];
};
using __mmask16 = std::uint16_t;

constexpr int _MM_FROUND_TO_NEAREST_INT = 0;
constexpr int _MM_FROUND_NO_EXC = 8;
constexpr int _CMP_NEQ_UQ = 4;
constexpr int _CMP_LE_OQ = 18;

namespace emulated {

template <class Vector = __m512, class Function>
Vector each(Function function) {
    Vector result{};
    for (std::size_t lane = 0; lane < 16; ++lane) {
        result.v[lane] = function(lane);
    }
    return result;
}

inline bool has(__mmask16 mask, std::size_t lane) {
    return ((mask >> lane) & 1) != 0;
}

// An address that an aligned instruction would fault on ends the process here too.
template <class Pointer>
Pointer aligned(Pointer pointer) {
    if (reinterpret_cast<std::uintptr_t>(pointer) % 64 != 0) {
        std::abort();
    }
    return pointer;
}

}  // namespace emulated

inline __m512 _mm512_castsi512_ps(__m512i a) {
    __m512 result;
    std::memcpy(&result, &a, sizeof result);
    return result;
}
inline __m512i _mm512_castps_si512(__m512 a) {
    __m512i result;
    std::memcpy(&result, &a, sizeof result);
    return result;
}

inline __m512 _mm512_setzero_ps() {
    return {};
}
inline __m512i _mm512_setzero_si512() {
    return {};
}
inline __m512 _mm512_set1_ps(float a) {
    return emulated::each([=](std::size_t) { return a; });
}
inline __m512i _mm512_set1_epi32(int a) {
    return emulated::each<__m512i>([=](std::size_t) { return static_cast<std::uint32_t>(a); });
}

inline __m512 _mm512_load_ps(const float* from) {
    __m512 result;
    std::memcpy(&result, emulated::aligned(from), sizeof result);
    return result;
}
inline void _mm512_store_ps(float* to, __m512 a) {
    std::memcpy(emulated::aligned(to), &a, sizeof a);
}
inline __m512i _mm512_load_si512(const void* from) {
    __m512i result;
    std::memcpy(&result, emulated::aligned(from), sizeof result);
    return result;
}
inline void _mm512_store_si512(void* to, __m512i a) {
    std::memcpy(emulated::aligned(to), &a, sizeof a);
}
// What the mask leaves out is not touched: it may be beyond the end of an array.
inline __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const float* from) {
    return emulated::each(
        [=](std::size_t lane) { return emulated::has(mask, lane) ? from[lane] : 0.0F; });
}
inline void _mm512_mask_storeu_ps(float* to, __mmask16 mask, __m512 a) {
    for (std::size_t lane = 0; lane < 16; ++lane) {
        if (emulated::has(mask, lane)) {
            to[lane] = a.v[lane];
        }
    }
}

inline __m512 _mm512_add_ps(__m512 a, __m512 b) {
    return emulated::each([&](std::size_t lane) { return a.v[lane] + b.v[lane]; });
}
inline __m512 _mm512_sub_ps(__m512 a, __m512 b) {
    return emulated::each([&](std::size_t lane) { return a.v[lane] - b.v[lane]; });
}
inline __m512 _mm512_mul_ps(__m512 a, __m512 b) {
    return emulated::each([&](std::size_t lane) { return a.v[lane] * b.v[lane]; });
}
inline __m512 _mm512_maskz_mul_ps(__mmask16 mask, __m512 a, __m512 b) {
    return emulated::each(
        [&](std::size_t lane) { return emulated::has(mask, lane) ? a.v[lane] * b.v[lane] : 0.0F; });
}
inline __m512 _mm512_div_ps(__m512 a, __m512 b) {
    return emulated::each([&](std::size_t lane) { return a.v[lane] / b.v[lane]; });
}
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
    return emulated::each(
        [&](std::size_t lane) { return std::fma(a.v[lane], b.v[lane], c.v[lane]); });
}
// The second operand where one is no number.
inline __m512 _mm512_max_ps(__m512 a, __m512 b) {
    return emulated::each(
        [&](std::size_t lane) { return a.v[lane] > b.v[lane] ? a.v[lane] : b.v[lane]; });
}
inline __m512 _mm512_min_ps(__m512 a, __m512 b) {
    return emulated::each(
        [&](std::size_t lane) { return a.v[lane] < b.v[lane] ? a.v[lane] : b.v[lane]; });
}
inline __m512 _mm512_abs_ps(__m512 a) {
    return emulated::each([&](std::size_t lane) { return std::fabs(a.v[lane]); });
}
inline __m512 _mm512_roundscale_ps(__m512 a, int control) {
    if (control != (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)) {
        std::abort();
    }
    return emulated::each([&](std::size_t lane) { return std::nearbyint(a.v[lane]); });
}
// a 2^floor(b). To minus infinity it is 0, of a NaN too (VSCALEFPS, table of special cases).
inline __m512 _mm512_scalef_ps(__m512 a, __m512 b) {
    return emulated::each([&](std::size_t lane) {
        const float x = a.v[lane];
        const float power = b.v[lane];
        if (std::isinf(power) && !std::isinf(x)) {
            return power > 0 ? std::numeric_limits<float>::infinity() : 0.0F;
        }
        if (std::isnan(power) || std::isnan(x) || std::isinf(power)) {
            return std::numeric_limits<float>::quiet_NaN();
        }
        constexpr float kBeyond = 1000.0F;
        return std::ldexp(
            x, static_cast<int>(std::fmax(-kBeyond, std::fmin(kBeyond, std::floor(power)))));
    });
}

inline __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int predicate) {
    unsigned mask = 0;
    for (std::size_t lane = 0; lane < 16; ++lane) {
        bool holds = false;
        if (predicate == _CMP_LE_OQ) {
            holds = a.v[lane] <= b.v[lane];
        } else if (predicate == _CMP_NEQ_UQ) {
            holds = !(a.v[lane] == b.v[lane]);
        } else {
            std::abort();
        }
        mask |= (holds ? 1U : 0U) << lane;
    }
    return static_cast<__mmask16>(mask);
}
inline __m512 _mm512_mask_blend_ps(__mmask16 mask, __m512 a, __m512 b) {
    return emulated::each(
        [&](std::size_t lane) { return emulated::has(mask, lane) ? b.v[lane] : a.v[lane]; });
}

inline __m512i _mm512_and_si512(__m512i a, __m512i b) {
    return emulated::each<__m512i>([&](std::size_t lane) { return a.v[lane] & b.v[lane]; });
}
inline __m512i _mm512_or_si512(__m512i a, __m512i b) {
    return emulated::each<__m512i>([&](std::size_t lane) { return a.v[lane] | b.v[lane]; });
}
inline __m512i _mm512_srli_epi32(__m512i a, unsigned count) {
    return emulated::each<__m512i>([&](std::size_t lane) { return a.v[lane] >> count; });
}

// Bit 5 of an index chooses the vector, the lower ones the 16-bit lane.
inline __m512i _mm512_permutex2var_epi16(__m512i a, __m512i index, __m512i b) {
    std::uint16_t from[2][32];
    std::uint16_t places[32];
    std::uint16_t to[32];
    std::memcpy(from[0], &a, sizeof a);
    std::memcpy(from[1], &b, sizeof b);
    std::memcpy(places, &index, sizeof index);
    for (std::size_t lane = 0; lane < 32; ++lane) {
        to[lane] = from[(places[lane] >> 5) & 1][places[lane] & 31];
    }
    __m512i result;
    std::memcpy(&result, to, sizeof result);
    return result;
}
// In each 128 bits: the lower or upper half of both, in turns of `width` lanes.
namespace emulated {
inline __m512i unpack(__m512i a, __m512i b, std::size_t width, std::size_t half) {
    return each<__m512i>([&](std::size_t lane) {
        const std::size_t in_quarter = lane % 4;
        const std::size_t turn = in_quarter / width;
        const std::size_t from =
            lane - in_quarter + half * 2 + turn / 2 * width + in_quarter % width;
        return turn % 2 == 0 ? a.v[from] : b.v[from];
    });
}
}  // namespace emulated
inline __m512i _mm512_unpacklo_epi32(__m512i a, __m512i b) {
    return emulated::unpack(a, b, 1, 0);
}
inline __m512i _mm512_unpackhi_epi32(__m512i a, __m512i b) {
    return emulated::unpack(a, b, 1, 1);
}
inline __m512i _mm512_unpacklo_epi64(__m512i a, __m512i b) {
    return emulated::unpack(a, b, 2, 0);
}
inline __m512i _mm512_unpackhi_epi64(__m512i a, __m512i b) {
    return emulated::unpack(a, b, 2, 1);
}
// Quarters of 128 bits: two of a, then two of b, each chosen by two bits.
inline __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, int chosen) {
    return emulated::each<__m512i>([&](std::size_t lane) {
        const std::size_t quarter = lane / 4;
        const auto from = static_cast<std::size_t>(chosen >> (2 * quarter)) & 3U;
        return (quarter < 2 ? a : b).v[from * 4 + lane % 4];
    });
}

// AMX: eight tiles of 16 rows of 64 bytes, for each thread. Using them before they are configured
// ends the process.
namespace emulated {
struct Tiles {
    bool configured = false;
    std::uint32_t row[8][16][16];

    auto& operator[](int tile) {
        if (!configured) {
            std::abort();
        }
        return row[tile];
    }
};
inline thread_local Tiles tiles;

// The matrix unit takes what is below the smallest normal number for zero, and gives zero for it.
inline float flushed(float x) {
    return std::fabs(x) < std::numeric_limits<float>::min() ? 0.0F : x;
}

inline float bf16(std::uint32_t pair, bool upper) {
    const std::uint32_t bits = upper ? pair & 0xffff0000U : pair << 16;
    float value = 0.0F;
    std::memcpy(&value, &bits, sizeof value);
    return flushed(value);
}
}  // namespace emulated

inline void _tile_loadconfig(const void* config) {
    std::uint8_t bytes[64];
    std::memcpy(bytes, config, sizeof bytes);
    for (std::size_t tile = 0; tile < 8;
         ++tile) {  // palette 1, all tiles at full size: the one case that is used
        if (bytes[0] != 1 || bytes[16 + 2 * tile] != 64 || bytes[17 + 2 * tile] != 0 ||
            bytes[48 + tile] != 16) {
            std::abort();
        }
    }
    emulated::tiles.configured = true;
}
inline void _tile_release() {
    emulated::tiles.configured = false;
}
inline void _tile_zero(int tile) {
    std::memset(&emulated::tiles[tile], 0, sizeof emulated::tiles[tile]);
}
inline void _tile_loadd(int tile, const void* from, int stride) {
    for (std::ptrdiff_t row = 0; row < 16; ++row) {
        std::memcpy(emulated::tiles[tile][row], static_cast<const char*>(from) + row * stride, 64);
    }
}
inline void _tile_stored(int tile, void* to, int stride) {
    for (std::ptrdiff_t row = 0; row < 16; ++row) {
        std::memcpy(static_cast<char*>(to) + row * stride, emulated::tiles[tile][row], 64);
    }
}
// c[16, 16] += a[16, 32] b[32, 16] of bfloat16, b's rows in pairs. The products of even and of odd
// columns of a are summed apart (TDPBF16PS). A product of two bfloat16 is exact in float32, so a
// fused multiply-add is a product and a sum.
inline void _tile_dpbf16ps(int to, int left, int right) {
    auto& c = emulated::tiles[to];
    const auto& a = emulated::tiles[left];
    const auto& b = emulated::tiles[right];
    float factors[2][16][16];
    for (std::size_t pair = 0; pair < 16; ++pair) {
        for (std::size_t column = 0; column < 16; ++column) {
            factors[0][pair][column] = emulated::bf16(b[pair][column], false);
            factors[1][pair][column] = emulated::bf16(b[pair][column], true);
        }
    }
    for (std::size_t row = 0; row < 16; ++row) {
        float sums[2][16] = {};
        for (std::size_t pair = 0; pair < 16; ++pair) {
            for (std::size_t odd = 0; odd < 2; ++odd) {
                const float factor = emulated::bf16(a[row][pair], odd == 1);
                for (std::size_t column = 0; column < 16; ++column) {
                    sums[odd][column] =
                        emulated::flushed(sums[odd][column] + factor * factors[odd][pair][column]);
                }
            }
        }
        for (std::size_t column = 0; column < 16; ++column) {
            float sum = 0.0F;
            std::memcpy(&sum, &c[row][column], sizeof sum);
            sum = emulated::flushed(emulated::flushed(sum) +
                                    emulated::flushed(sums[0][column] + sums[1][column]));
            std::memcpy(&c[row][column], &sum, sizeof sum);
        }
    }
}

// NOLINTEND(bugprone-reserved-identifier,readability-identifier-naming)
