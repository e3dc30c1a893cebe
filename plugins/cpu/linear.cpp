// Weights stay float32 in their mapped file. A task takes a block of their rows, splits it into its core's cache, and multiplies
// all rows of x with it. x is split once, for all tasks. The weights are the left factor, row-major as they are, so
// that only x, the smaller, is transposed; the sums come out transposed, and are turned around as they are written.
#include "cpu/linear.h"

#include <algorithm>

#include "cpu/tiles.h"

namespace mmvision::cpu {

namespace {

// A block of weights, 160 by 1024 in three pieces, is 960 KB: half of the second-level cache of every CPU with AMX.
constexpr std::size_t kBlockTiles = 10;
constexpr std::size_t kBlockSteps = 32;

std::size_t divide_up(std::size_t value, std::size_t by) { return (value + by - 1) / by; }

// Writes a sum [outputs, rows] as 16 rows of y.
void write_rows(const float* sum, const float* bias, float* y, std::size_t stride, std::size_t rows,
                std::size_t outputs) {
    __m512i turned[kTile];
    for (std::size_t output = 0; output < kTile; ++output) {
        turned[output] = _mm512_load_si512(sum + output * kTile);
    }
    transpose(turned);
    const __mmask16 kept = lanes(outputs);
    const __m512 added = bias == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(kept, bias);
    for (std::size_t row = 0; row < std::min(rows, kTile); ++row) {
        _mm512_mask_storeu_ps(y + row * stride, kept, _mm512_add_ps(_mm512_castsi512_ps(turned[row]), added));
    }
}

}  // namespace

void linear(const float* x, const float* weight, const float* bias, float* y, LinearShape shape, Workers& workers) {
    const std::size_t steps = divide_up(shape.inputs, kStep);
    const std::size_t row_tiles = 2 * divide_up(shape.rows, 2 * kTile);
    const std::size_t output_tiles = 2 * divide_up(shape.outputs, 2 * kTile);
    const std::size_t blocks = divide_up(output_tiles, kBlockTiles);
    const std::size_t block_steps = std::min(steps, kBlockSteps);
    const std::size_t passes = divide_up(steps, block_steps);

    auto* x_factors = reinterpret_cast<Bf16*>(workers.shared(row_tiles * steps * kFactor * sizeof(Bf16)));
    workers.run(row_tiles, 0, [&](std::size_t tile, char*) {
        const std::size_t row = std::min(shape.rows, tile * kTile);
        pack_columns(x + row * shape.inputs, shape.inputs, shape.rows - row, shape.inputs, steps,
                     x_factors + tile * steps * kFactor);
    });

    // With few blocks for many workers, the rows of x are shared out too.
    const std::size_t row_parts = std::clamp<std::size_t>(divide_up(2 * workers.most(), blocks), 1, divide_up(row_tiles, 8));
    const std::size_t part_tiles = 2 * divide_up(row_tiles / 2, row_parts);
    const std::size_t factor_bytes = kBlockTiles * block_steps * kFactor * sizeof(Bf16);
    const std::size_t sum_bytes = (passes > 1 ? part_tiles : 2) * kBlockTiles * kSum * sizeof(float);

    workers.run(blocks * row_parts, factor_bytes + sum_bytes, [&](std::size_t task, char* scratch) {
        const std::size_t block = task / row_parts * kBlockTiles;
        const std::size_t tiles = std::min(kBlockTiles, output_tiles - block);
        const std::size_t first_row = std::min(row_tiles, task % row_parts * part_tiles);
        const std::size_t last_row = std::min(row_tiles, first_row + part_tiles);
        auto* w_factors = reinterpret_cast<Bf16*>(scratch);
        auto* kept_sums = reinterpret_cast<float*>(scratch + factor_bytes);
        const TileScope scope;
        for (std::size_t pass = 0; pass < passes; ++pass) {
            const std::size_t first_step = pass * block_steps;
            const std::size_t pass_steps = std::min(block_steps, steps - first_step);
            for (std::size_t tile = 0; tile < tiles; ++tile) {
                const std::size_t output = std::min(shape.outputs, (block + tile) * kTile);
                const std::size_t column = first_step * kStep;
                pack_rows(weight + output * shape.inputs + column, shape.inputs, shape.outputs - output,
                          shape.inputs - column, pass_steps, w_factors + tile * block_steps * kFactor);
            }
            for (std::size_t row_tile = first_row; row_tile < last_row; row_tile += 2) {
                const Bf16* b = x_factors + (row_tile * steps + first_step) * kFactor;
                float* sums = kept_sums + (passes > 1 ? row_tile - first_row : 0) * kBlockTiles * kSum;
                for (std::size_t tile = 0; tile < tiles; tile += 2) {
                    const Bf16* a = w_factors + tile * block_steps * kFactor;
                    float* const first = sums + tile * kSum;
                    float* const second = first + kBlockTiles * kSum;
                    float* const four[2][2] = {{first, second}, {first + kSum, second + kSum}};
                    multiply_2x2(a, a + block_steps * kFactor, b, b + steps * kFactor, pass_steps, four, pass > 0);
                }
                for (std::size_t j = 0; j < 2 && pass + 1 == passes; ++j) {
                    const std::size_t row = (row_tile + j) * kTile;
                    for (std::size_t tile = 0; tile < tiles; ++tile) {
                        const std::size_t output = (block + tile) * kTile;
                        if (row < shape.rows && output < shape.outputs) {
                            write_rows(sums + (j * kBlockTiles + tile) * kSum, bias == nullptr ? nullptr : bias + output,
                                       y + row * shape.outputs + output, shape.outputs, shape.rows - row,
                                       shape.outputs - output);
                        }
                    }
                }
            }
        }
    });
}

}  // namespace mmvision::cpu
