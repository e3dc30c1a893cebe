// Functions of 16 float32 at once.
#pragma once

#include <immintrin.h>

#include <cstddef>

namespace mmvision::amx {

template <std::size_t count>
inline __m512 polynomial(const float (&coefficients)[count],
                         __m512 x) {  // the highest power's first
    __m512 sum = _mm512_set1_ps(coefficients[0]);
    for (std::size_t i = 1; i < count; ++i) {
        sum = _mm512_fmadd_ps(sum, x, _mm512_set1_ps(coefficients[i]));
    }
    return sum;
}

// 2^x for x <= 0, to a unit in the last place: the series of e^(f ln 2) for |f| <= 1/2, whose rest
// is 5e-9.
inline __m512 exp2(__m512 x) {
    constexpr float kSeries[] = {1.52527338e-5F, 1.54035304e-4F, 1.33335581e-3F, 9.61812911e-3F,
                                 5.55041087e-2F, 2.40226507e-1F, 6.93147181e-1F, 1.0F};
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm512_scalef_ps(polynomial(kSeries, _mm512_sub_ps(x, whole)), whole);
}

// x P(x), P the normal distribution: exact GELU, to 1e-7. Up to 1.5, P is 1/2 + x A(x^2); beyond,
// its tail is 2^B(|x|), up to 6, where it is 1e-9. A and B are least-squares fits to P in float64,
// of 1e-8 and 3e-8.
inline __m512 gelu(__m512 x) {
    constexpr float kA[] = {-2.53363668e-8F, 6.12940198e-7F, -9.34825312e-6F, 1.15335788e-4F,
                            -1.18727260e-3F, 9.97354183e-3F, -6.64903820e-2F, 3.98942292e-1F};
    constexpr float kB[] = {3.08152194e-5F,  -7.11204426e-4F, 7.63650145e-3F, -5.18500768e-2F,
                            -4.61588055e-1F, -1.14866114F,    -1.00090384F};
    const __m512 size = _mm512_abs_ps(x);
    const __m512 half = _mm512_set1_ps(0.5F);
    const __m512 inner =
        _mm512_mul_ps(x, _mm512_fmadd_ps(x, polynomial(kA, _mm512_mul_ps(x, x)), half));
    const __mmask16 is_small = _mm512_cmp_ps_mask(size, _mm512_set1_ps(1.5F), _CMP_LE_OQ);
    const __mmask16 has_tail = _mm512_cmp_ps_mask(size, _mm512_set1_ps(6.0F), _CMP_LE_OQ);
    const __m512 tail = _mm512_maskz_mul_ps(
        has_tail, size, exp2(polynomial(kB, _mm512_min_ps(size, _mm512_set1_ps(6.0F)))));
    // max() gives its second operand where one is no number.
    const __m512 outer = _mm512_sub_ps(_mm512_max_ps(_mm512_setzero_ps(), x), tail);
    return _mm512_mask_blend_ps(is_small, outer, inner);
}

}  // namespace mmvision::amx
