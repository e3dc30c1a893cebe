// Flash attention (Dao et al., 2022), turned around: a block of scores is [keys, queries], so that the queries are the lanes of
// a vector. Maxima and sums over the keys then need no step across lanes, the weights come out as the right factor
// of the second product, and k, row-major, is the left factor of the first as it is. v is transposed, once per head.
#include "cpu/attention.h"

#include <algorithm>
#include <limits>

#include "cpu/tiles.h"
#include "cpu/vector_math.h"

namespace mmvision::cpu {

namespace {

constexpr std::size_t kQueryTiles = 8;   // 128 queries share what is read of k and v
constexpr std::size_t kKeyTiles = 32;    // of a block of scores: 512 keys
constexpr std::size_t kKeySteps = kKeyTiles * kTile / kStep;

std::size_t divide_up(std::size_t value, std::size_t by) { return (value + by - 1) / by; }

// One factor A of v^T: 16 channels, 32 keys, zero beyond.
void pack_transposed(const float* v, std::size_t stride, std::size_t keys, std::size_t channels, Bf16* factor) {
    __m512i halves[2][kTile];
    const __mmask16 kept = lanes(channels);
    for (std::size_t key = 0; key < kStep; ++key) {
        halves[key / kTile][key % kTile] =
            key < keys ? _mm512_castps_si512(_mm512_maskz_loadu_ps(kept, v + key * stride)) : _mm512_setzero_si512();
    }
    transpose(halves[0]);
    transpose(halves[1]);
    for (std::size_t channel = 0; channel < kTile; ++channel) {
        const Split first = split(_mm512_castsi512_ps(halves[0][channel]));
        const Split second = split(_mm512_castsi512_ps(halves[1][channel]));
        for (std::size_t piece = 0; piece < kPieces; ++piece) {
            _mm512_store_si512(factor + (piece * kTile + channel) * kStep,
                               append(first.piece[piece], second.piece[piece]));
        }
    }
}

// What one worker needs for a segment of at most `keys` keys; every part is a multiple of 64 bytes.
struct Scratch {
    std::size_t head_steps;
    std::size_t channel_tiles;
    std::size_t key_tiles;
    Bf16* k;        // [key tile][head step] factors
    Bf16* v;        // [channel tile][key step] factors
    Bf16* q;        // [query tile][head step] factors
    Bf16* weights;  // [of two query tiles][key step] factors
    float* scores;  // [of two query tiles][key tile] sums
    float* sums;    // [query tile][channel tile] sums
    float* scaled;  // a query tile [16, head_dim]

    Scratch(std::size_t head_dim, std::size_t keys)
        : head_steps(divide_up(head_dim, kStep)),
          channel_tiles(2 * divide_up(head_dim, 2 * kTile)),
          key_tiles(2 * divide_up(keys, 2 * kTile)) {}

    std::size_t place(char* at) {
        char* const start = at;
        const auto factors = [&](std::size_t count) {
            auto* part = reinterpret_cast<Bf16*>(at);
            at += count * kFactor * sizeof(Bf16);
            return part;
        };
        const auto tiles = [&](std::size_t count) {
            auto* part = reinterpret_cast<float*>(at);
            at += count * kSum * sizeof(float);
            return part;
        };
        k = factors(key_tiles * head_steps);
        v = factors(channel_tiles * key_tiles / 2);
        q = factors(kQueryTiles * head_steps);
        weights = factors(2 * kKeySteps);
        scores = tiles(2 * kKeyTiles);
        sums = tiles(kQueryTiles * channel_tiles);
        scaled = tiles(2 * head_steps);
        return static_cast<std::size_t>(at - start);
    }
};

// Scores of one query tile become weights, in place of what `weights` held; returns what to scale earlier sums by.
__m512 softmax_block(const float* scores, std::size_t keys, Bf16* weights, __m512& maximum, __m512& total) {
    __m512 highest = maximum;
    for (std::size_t key = 0; key < keys; ++key) {
        highest = _mm512_max_ps(highest, _mm512_load_ps(scores + key * kTile));
    }
    __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (std::size_t step = 0; step < divide_up(keys, kStep); ++step) {
        for (std::size_t pair = 0; pair < kTile; ++pair) {
            Split both[2]{};
            for (std::size_t odd = 0; odd < 2; ++odd) {
                const std::size_t key = step * kStep + 2 * pair + odd;
                if (key < keys) {
                    const __m512 weight = exp2(_mm512_sub_ps(_mm512_load_ps(scores + key * kTile), highest));
                    sums[odd] = _mm512_add_ps(sums[odd], weight);
                    both[odd] = split(weight);
                }
            }
            for (std::size_t piece = 0; piece < kPieces; ++piece) {
                _mm512_store_si512(weights + step * kFactor + (piece * kTile + pair) * kStep,
                                   interleave(both[0].piece[piece], both[1].piece[piece]));
            }
        }
    }
    const __m512 fade = exp2(_mm512_sub_ps(maximum, highest));
    total = _mm512_fmadd_ps(total, fade, _mm512_add_ps(sums[0], sums[1]));
    maximum = highest;
    return fade;
}

}  // namespace

void varlen_attention(const float* q, const float* k, const float* v, const std::int32_t* bounds, float scale,
                      float* out, AttentionShape shape, Workers& workers) {
    std::size_t longest = 0;
    for (std::size_t segment = 0; segment < shape.segments; ++segment) {
        longest = std::max(longest, static_cast<std::size_t>(bounds[segment + 1] - bounds[segment]));
    }
    const std::size_t stride = shape.heads * shape.head_dim;
    Scratch layout(shape.head_dim, longest);
    const std::size_t worker_bytes = layout.place(nullptr);
    // With few heads for many workers, the queries of a head are shared out too, and its keys are packed again.
    const std::size_t units = std::max<std::size_t>(1, shape.segments * shape.heads);
    const std::size_t parts = std::clamp<std::size_t>(divide_up(2 * workers.most(), units), 1,
                                                      std::max<std::size_t>(1, longest / (kQueryTiles * kTile)));
    // The scores' base is 2.
    const float q_scale = scale * 1.44269504F;

    const std::size_t end = static_cast<std::size_t>(bounds[shape.segments]) * stride;
    std::fill(out + end, out + shape.tokens * stride, 0.0F);  // behind the last segment
    workers.run(shape.segments * shape.heads * parts, worker_bytes, [&](std::size_t task, char* scratch) {
        const std::size_t segment = task / parts / shape.heads;
        const auto start = static_cast<std::size_t>(bounds[segment]);
        const auto length = static_cast<std::size_t>(bounds[segment + 1]) - start;
        const std::size_t part_queries = kTile * divide_up(divide_up(length, kTile), parts);
        const std::size_t first_query = task % parts * part_queries;
        const std::size_t last_query = std::min(length, first_query + part_queries);
        if (first_query >= last_query) {
            return;
        }
        const std::size_t origin = start * stride + task / parts % shape.heads * shape.head_dim;
        Scratch own(shape.head_dim, length);
        own.place(scratch);
        for (std::size_t tile = 0; tile < own.key_tiles; ++tile) {
            const std::size_t key = tile * kTile;
            pack_rows(k + origin + key * stride, stride, key < length ? length - key : 0, shape.head_dim, own.head_steps,
                      own.k + tile * own.head_steps * kFactor);
        }
        const std::size_t key_steps = own.key_tiles / 2;
        for (std::size_t step = 0; step < key_steps; ++step) {
            for (std::size_t tile = 0; tile < own.channel_tiles; ++tile) {
                const std::size_t channel = tile * kTile;
                pack_transposed(v + origin + step * kStep * stride + channel, stride, length - step * kStep,
                                channel < shape.head_dim ? shape.head_dim - channel : 0,
                                own.v + (tile * key_steps + step) * kFactor);
            }
        }
        const TileScope scope;
        for (std::size_t query = first_query; query < last_query; query += kQueryTiles * kTile) {
            const std::size_t queries = std::min(kQueryTiles * kTile, last_query - query);
            const std::size_t query_tiles = 2 * divide_up(queries, 2 * kTile);
            for (std::size_t tile = 0; tile < query_tiles; ++tile) {
                const std::size_t first = query + tile * kTile;
                const std::size_t rows = first < last_query ? std::min(kTile, last_query - first) : 0;
                for (std::size_t row = 0; row < rows; ++row) {
                    const float* from = q + origin + (first + row) * stride;
                    std::transform(from, from + shape.head_dim, own.scaled + row * shape.head_dim,
                                   [=](float value) { return value * q_scale; });
                }
                pack_columns(own.scaled, shape.head_dim, rows, shape.head_dim, own.head_steps,
                             own.q + tile * own.head_steps * kFactor);
            }
            __m512 maximum[kQueryTiles];
            __m512 total[kQueryTiles];
            std::fill_n(maximum, kQueryTiles, _mm512_set1_ps(-std::numeric_limits<float>::infinity()));
            std::fill_n(total, kQueryTiles, _mm512_setzero_ps());
            for (std::size_t key = 0; key < length; key += kKeyTiles * kTile) {
                const std::size_t keys = std::min(kKeyTiles * kTile, length - key);
                const std::size_t key_tiles = 2 * divide_up(keys, 2 * kTile);
                // Two tiles of queries at a time, whose scores stay in the first-level cache.
                for (std::size_t j = 0; j < query_tiles; j += 2) {
                    const Bf16* b = own.q + j * own.head_steps * kFactor;
                    for (std::size_t i = 0; i < key_tiles; i += 2) {
                        const Bf16* a = own.k + (key / kTile + i) * own.head_steps * kFactor;
                        float* first = own.scores + i * kSum;
                        float* second = first + kKeyTiles * kSum;
                        float* const sums[2][2] = {{first, second}, {first + kSum, second + kSum}};
                        multiply_2x2(a, a + own.head_steps * kFactor, b, b + own.head_steps * kFactor, own.head_steps,
                                     sums, false);
                    }
                    for (std::size_t half = 0; half < 2; ++half) {
                        const __m512 fade = softmax_block(own.scores + half * kKeyTiles * kSum, keys,
                                                          own.weights + half * kKeySteps * kFactor, maximum[j + half],
                                                          total[j + half]);
                        if (key > 0 && _mm512_cmp_ps_mask(fade, _mm512_set1_ps(1.0F), _CMP_NEQ_UQ) != 0) {
                            float* tile = own.sums + (j + half) * own.channel_tiles * kSum;
                            for (std::size_t at = 0; at < own.channel_tiles * kSum; at += kTile) {
                                _mm512_store_ps(tile + at, _mm512_mul_ps(_mm512_load_ps(tile + at), fade));
                            }
                        }
                    }
                    for (std::size_t i = 0; i < own.channel_tiles; i += 2) {
                        const Bf16* a = own.v + (i * key_steps + key / kStep) * kFactor;
                        float* first = own.sums + (j * own.channel_tiles + i) * kSum;
                        float* second = first + own.channel_tiles * kSum;
                        float* const sums[2][2] = {{first, second}, {first + kSum, second + kSum}};
                        multiply_2x2(a, a + key_steps * kFactor, own.weights, own.weights + kKeySteps * kFactor,
                                     divide_up(keys, kStep), sums, key > 0);
                    }
                }
            }
            for (std::size_t j = 0; j < query_tiles; ++j) {
                const __m512 factor = _mm512_div_ps(_mm512_set1_ps(1.0F), total[j]);
                for (std::size_t i = 0; i * kTile < shape.head_dim; ++i) {
                    __m512i turned[kTile];
                    for (std::size_t channel = 0; channel < kTile; ++channel) {
                        const float* sum = own.sums + (j * own.channel_tiles + i) * kSum + channel * kTile;
                        turned[channel] = _mm512_castps_si512(_mm512_mul_ps(_mm512_load_ps(sum), factor));
                    }
                    transpose(turned);
                    const __mmask16 kept = lanes(shape.head_dim - i * kTile);
                    for (std::size_t row = 0; row < kTile && j * kTile + row < queries; ++row) {
                        _mm512_mask_storeu_ps(out + origin + (query + j * kTile + row) * stride + i * kTile, kept,
                                              _mm512_castsi512_ps(turned[row]));
                    }
                }
            }
        }
    });
}

}  // namespace mmvision::cpu
