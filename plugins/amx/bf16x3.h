// A float32 as the sum of three bfloat16, exactly: 24 bits of significand are three times eight.
//
// Cutting bits off the end gives the first piece; the difference is exact, and is cut again. So x =
// x0 + x1 + x2 with |x1| < 2^-7 |x| and |x2| < 2^-15 |x|, and a product of two such sums is, to
// 2^-21 of itself, the six products whose indices add up to 2 at most. Each of those is exact in
// float32. (Infinities become NaN; what is below 2^-110 in size may lose its last pieces, which the
// matrix unit takes for zero.) The same scheme as oneMKL's float_to_bf16x3.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace mmvision::amx {

using Bf16 = std::uint16_t;

constexpr int kPieces = 3;

struct Split {
    __m512 piece[kPieces];  // whose lower 16 bits are zero, but for the last ones of floats below
                            // 2^-110
};

inline Split split(__m512 x) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000U));
    const __m512 first = _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), upper));
    const __m512 rest = _mm512_sub_ps(x, first);
    const __m512 second = _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(rest), upper));
    return {{first, second, _mm512_sub_ps(rest, second)}};
}

// The bfloat16 of 16 and 16 floats, one after the other.
inline __m512i append(__m512 first, __m512 second) {
    alignas(64) static constexpr std::uint16_t kUpperHalves[32] = {
        1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
        33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    return _mm512_permutex2var_epi16(_mm512_castps_si512(first), _mm512_load_si512(kUpperHalves),
                                     _mm512_castps_si512(second));
}

// The bfloat16 of 16 and 16 floats, in turns. The last piece of a float below 2^-110 has bits in
// its lower half.
inline __m512i interleave(__m512 even, __m512 odd) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000U));
    return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(even), 16),
                           _mm512_and_si512(_mm512_castps_si512(odd), upper));
}

// Transposes 16 rows of 16 values of 32 bits.
inline void transpose(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        for (int half = 0; half < 16; half += 8) {
            t[i + half] = _mm512_shuffle_i32x4(r[i + half], r[i + half + 4], 0x88);
            t[i + half + 4] = _mm512_shuffle_i32x4(r[i + half], r[i + half + 4], 0xdd);
        }
    }
    for (int i = 0; i < 8; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

}  // namespace mmvision::amx
