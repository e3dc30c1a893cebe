// Weights stay float32 in their mapped file. A task takes a block of their rows, splits it into its
// core's cache, and multiplies all rows of x with it. x is split once, for all tasks. Both are
// split for a part of the inputs at a time, and y gathers the sums of the parts, so that what is
// split stays small. The weights are the left factor, row-major as they are, so that only x, the
// smaller, is transposed; the sums come out transposed, and are turned around as they are written.
#include "amx/linear.h"

#include <algorithm>

#include "amx/tiles.h"
#include "amx/vector_math.h"

namespace mmvision::amx {

namespace {

// A block of weights, 160 by 1024 in three pieces, is 960 KB: half of the second-level cache of
// every CPU with AMX.
constexpr std::size_t kBlockTiles = 10;
constexpr std::size_t kBlockSteps = 32;

struct Result {
    float* y;
    const float* bias;
    std::size_t rows;
    std::size_t outputs;
    Activation activation;
};

// Writes a sum [16 outputs, 16 rows] into y. The first part adds the bias, the later ones what is
// there.
void write_sum(const float* sum, const Result& to, std::size_t row_tile, std::size_t output_tile,
               bool is_first, bool is_last) {
    const std::size_t first_row = row_tile * kTile;
    const std::size_t output = output_tile * kTile;
    if (first_row >= to.rows || output >= to.outputs) {
        return;
    }
    __m512i turned[kTile];
    for (std::size_t i = 0; i < kTile; ++i) {
        turned[i] = _mm512_load_si512(sum + i * kTile);
    }
    transpose(turned);
    const __mmask16 kept = lanes(to.outputs - output);
    const __m512 bias =
        to.bias == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(kept, to.bias + output);
    for (std::size_t row = 0; row < std::min(to.rows - first_row, kTile); ++row) {
        float* y = to.y + (first_row + row) * to.outputs + output;
        __m512 value = _mm512_castsi512_ps(turned[row]);
        value = _mm512_add_ps(value, is_first ? bias : _mm512_maskz_loadu_ps(kept, y));
        if (is_last && to.activation == Activation::kGelu) {
            value = gelu(value);
        }
        _mm512_mask_storeu_ps(y, kept, value);
    }
}

}  // namespace

// NOLINTNEXTLINE(readability-non-const-parameter): y is written through `result`.
void linear(const float* x, const float* weight, const float* bias, float* y, LinearShape shape,
            Activation activation, Workers& workers) {
    const std::size_t steps = divide_up(shape.inputs, kStep);
    const std::size_t row_tiles = 2 * divide_up(shape.rows, 2 * kTile);
    const std::size_t output_tiles = 2 * divide_up(shape.outputs, 2 * kTile);
    const std::size_t blocks = divide_up(output_tiles, kBlockTiles);
    // Parts of equal size, so that none is a remainder.
    const std::size_t passes = std::max<std::size_t>(1, divide_up(steps, kBlockSteps));
    const std::size_t pass_steps = divide_up(steps, passes);
    // With few blocks for many workers, the rows of x are shared out too.
    const std::size_t row_parts =
        std::clamp<std::size_t>(divide_up(2 * workers.most(), blocks), 1, divide_up(row_tiles, 8));
    const std::size_t part_tiles = 2 * divide_up(row_tiles / 2, row_parts);
    const std::size_t factor_bytes = kBlockTiles * pass_steps * kFactor * sizeof(Bf16);
    auto* x_factors =
        reinterpret_cast<Bf16*>(workers.shared(row_tiles * pass_steps * kFactor * sizeof(Bf16)));

    const Result result{y, bias, shape.rows, shape.outputs, activation};

    for (std::size_t pass = 0; pass < passes; ++pass) {
        const std::size_t column = std::min(shape.inputs, pass * pass_steps * kStep);
        const std::size_t columns = shape.inputs - column;
        workers.run(row_tiles, 0, [&](std::size_t tile, char*) {
            const std::size_t row = std::min(shape.rows, tile * kTile);
            pack_columns(x + row * shape.inputs + column, shape.inputs, shape.rows - row, columns,
                         pass_steps, x_factors + tile * pass_steps * kFactor);
        });
        workers.run(
            blocks * row_parts, factor_bytes + 4 * kSum * sizeof(float),
            [&](std::size_t task, char* scratch) {
                const std::size_t block = task / row_parts * kBlockTiles;
                const std::size_t tiles = std::min(kBlockTiles, output_tiles - block);
                const std::size_t first_row = std::min(row_tiles, task % row_parts * part_tiles);
                const std::size_t last_row = std::min(row_tiles, first_row + part_tiles);
                auto* w_factors = reinterpret_cast<Bf16*>(scratch);
                auto* sums = reinterpret_cast<float*>(scratch + factor_bytes);
                float* const four[2][2] = {{sums, sums + kSum}, {sums + 2 * kSum, sums + 3 * kSum}};
                for (std::size_t tile = 0; tile < tiles; ++tile) {
                    const std::size_t output = std::min(shape.outputs, (block + tile) * kTile);
                    pack_rows(weight + output * shape.inputs + column, shape.inputs,
                              shape.outputs - output, columns, pass_steps,
                              w_factors + tile * pass_steps * kFactor);
                }
                const TileScope scope;
                for (std::size_t row_tile = first_row; row_tile < last_row; row_tile += 2) {
                    const Bf16* b = x_factors + row_tile * pass_steps * kFactor;
                    for (std::size_t tile = 0; tile < tiles; tile += 2) {
                        const Bf16* a = w_factors + tile * pass_steps * kFactor;
                        multiply_2x2(a, a + pass_steps * kFactor, b, b + pass_steps * kFactor,
                                     pass_steps, four, false);
                        for (std::size_t j = 0; j < 2; ++j) {
                            for (std::size_t i = 0; i < 2; ++i) {
                                write_sum(four[i][j], result, row_tile + j, block + tile + i,
                                          pass == 0, pass + 1 == passes);
                            }
                        }
                    }
                }
            });
    }
}

}  // namespace mmvision::amx
