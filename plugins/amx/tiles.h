// Products of matrix tiles on AMX, in the precision of float32 (see bf16x3.h).
//
// C[16, 16] += A[16, 32] B[32, 16] takes a row-major tile of A and one of B whose rows are
// interleaved in pairs, each in three bfloat16 pieces one after the other. AMX holds eight tiles:
// four sums of two by two products, and their four factors.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "amx/bf16x3.h"

namespace mmvision::amx {

constexpr std::size_t kTile = 16;  // rows and columns of a sum
constexpr std::size_t kStep = 32;  // of the inner dimension, in one instruction
constexpr std::size_t kFactor =
    kPieces * kTile * kStep;                 // bfloat16 values of one factor tile, all pieces
constexpr std::size_t kSum = kTile * kTile;  // float32 values of a sum

constexpr std::size_t divide_up(std::size_t value, std::size_t by) {
    return (value + by - 1) / by;
}

// All eight tiles at full size, for the current thread, until the end of the scope.
class TileScope {
public:
    TileScope() {
        struct alignas(64) {
            std::uint8_t palette = 1;
            std::uint8_t start_row = 0;
            std::uint8_t reserved[14] = {};
            std::uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } const full;
        _tile_loadconfig(&full);
    }
    ~TileScope() { _tile_release(); }
    TileScope(const TileScope&) = delete;
    TileScope& operator=(const TileScope&) = delete;
};

// Two by two sums over `steps` steps: sums[i][j] (+)= a_i b_j. The small products come first.
inline void multiply_2x2(const Bf16* a_0, const Bf16* a_1, const Bf16* b_0, const Bf16* b_1,
                         std::size_t steps, float* const sums[2][2], bool add) {
    constexpr int kStride = 64;
    constexpr std::size_t kPiece = kTile * kStep;
    if (add) {
        _tile_loadd(0, sums[0][0], kStride);
        _tile_loadd(1, sums[0][1], kStride);
        _tile_loadd(2, sums[1][0], kStride);
        _tile_loadd(3, sums[1][1], kStride);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
#define MMVISION_LOAD_A(piece)                       \
    _tile_loadd(4, a_0 + (piece) * kPiece, kStride); \
    _tile_loadd(5, a_1 + (piece) * kPiece, kStride)
#define MMVISION_LOAD_B(piece)                       \
    _tile_loadd(6, b_0 + (piece) * kPiece, kStride); \
    _tile_loadd(7, b_1 + (piece) * kPiece, kStride)
#define MMVISION_MULTIPLY()  \
    _tile_dpbf16ps(0, 4, 6); \
    _tile_dpbf16ps(1, 4, 7); \
    _tile_dpbf16ps(2, 5, 6); \
    _tile_dpbf16ps(3, 5, 7)
    for (std::size_t step = 0; step < steps; ++step) {
        MMVISION_LOAD_A(0);
        MMVISION_LOAD_B(2);
        MMVISION_MULTIPLY();
        MMVISION_LOAD_B(1);
        MMVISION_MULTIPLY();
        MMVISION_LOAD_A(1);
        MMVISION_MULTIPLY();
        MMVISION_LOAD_B(0);
        MMVISION_MULTIPLY();
        MMVISION_LOAD_A(2);
        MMVISION_MULTIPLY();
        MMVISION_LOAD_A(0);
        MMVISION_MULTIPLY();
        a_0 += kFactor;
        a_1 += kFactor;
        b_0 += kFactor;
        b_1 += kFactor;
    }
#undef MMVISION_LOAD_A
#undef MMVISION_LOAD_B
#undef MMVISION_MULTIPLY
    _tile_stored(0, sums[0][0], kStride);
    _tile_stored(1, sums[0][1], kStride);
    _tile_stored(2, sums[1][0], kStride);
    _tile_stored(3, sums[1][1], kStride);
}

// Lanes of a vector of 16 that hold something, if `count` values remain.
inline __mmask16 lanes(std::size_t count) {
    return count >= 16 ? static_cast<__mmask16>(0xffff)
                       : static_cast<__mmask16>((1U << count) - 1U);
}

// Factors A, one a step: 16 rows of a row-major matrix, zero beyond its `rows` and `columns`.
inline void pack_rows(const float* matrix, std::size_t stride, std::size_t rows,
                      std::size_t columns, std::size_t steps, Bf16* factors) {
    for (std::size_t step = 0; step < steps; ++step, factors += kFactor) {
        const std::size_t column = std::min(columns, step * kStep);
        const __mmask16 left = lanes(columns - column);
        const __mmask16 right = lanes(columns - std::min(columns, column + kTile));
        for (std::size_t row = 0; row < kTile; ++row) {
            Split first{};
            Split second{};
            if (row < rows) {
                const float* values = matrix + row * stride + column;
                first = split(_mm512_maskz_loadu_ps(left, values));
                second = split(_mm512_maskz_loadu_ps(right, values + kTile));
            }
            for (std::size_t piece = 0; piece < kPieces; ++piece) {
                _mm512_store_si512(factors + (piece * kTile + row) * kStep,
                                   append(first.piece[piece], second.piece[piece]));
            }
        }
    }
}

// Factors B from the transposed matrix: the same rows and columns, which become columns and rows.
inline void pack_columns(const float* matrix, std::size_t stride, std::size_t rows,
                         std::size_t columns, std::size_t steps, Bf16* factors) {
    pack_rows(matrix, stride, rows, columns, steps, factors);
    for (Bf16* tile = factors; tile < factors + steps * kFactor; tile += kTile * kStep) {
        __m512i pairs[kTile];
        for (std::size_t row = 0; row < kTile; ++row) {
            pairs[row] = _mm512_load_si512(tile + row * kStep);
        }
        transpose(pairs);
        for (std::size_t row = 0; row < kTile; ++row) {
            _mm512_store_si512(tile + row * kStep, pairs[row]);
        }
    }
}

}  // namespace mmvision::amx
