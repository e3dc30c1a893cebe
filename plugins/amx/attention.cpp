// Flash attention (Dao et al., 2022), turned around: a block of scores is [keys, queries], so that
// the queries are the lanes of a vector. Maxima and sums over the keys then need no step across
// lanes, the weights come out as the right factor of the second product, and k, row-major, is the
// left factor of the first as it is. v is transposed, once per head.
#include "amx/attention.h"

#include <algorithm>
#include <limits>

#include "amx/tiles.h"
#include "amx/vector_math.h"

namespace mmvision::amx {

namespace {

constexpr std::size_t kQueryTiles = 8;  // 128 queries share what is read of k and v
constexpr std::size_t kKeyTiles = 32;   // of a block of scores: 512 keys
constexpr std::size_t kKeySteps = kKeyTiles * kTile / kStep;

// One factor A of v^T: 16 channels, 32 keys, zero beyond.
void pack_transposed(const float* v, std::size_t stride, std::size_t keys, std::size_t channels,
                     Bf16* factor) {
    __m512i halves[2][kTile];
    const __mmask16 kept = lanes(channels);
    for (std::size_t key = 0; key < kStep; ++key) {
        halves[key / kTile][key % kTile] =
            key < keys ? _mm512_castps_si512(_mm512_maskz_loadu_ps(kept, v + key * stride))
                       : _mm512_setzero_si512();
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

// Scores of one query tile become weights, in place of what `weights` held; returns what to scale
// earlier sums by.
__m512 softmax_block(const float* scores, std::size_t keys, Bf16* weights, __m512& maximum,
                     __m512& total) {
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
                    const __m512 weight =
                        exp2(_mm512_sub_ps(_mm512_load_ps(scores + key * kTile), highest));
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

// One segment of one head, in the memory of one worker; every part is a multiple of 64 bytes.
class Head {
public:
    Head(std::size_t head_dim, std::size_t length)
        : head_dim_(head_dim),
          length_(length),
          head_steps_(divide_up(head_dim, kStep)),
          channel_tiles_(2 * divide_up(head_dim, 2 * kTile)),
          key_tiles_(2 * divide_up(length, 2 * kTile)) {}

    // Takes the memory; returns how much that is.
    std::size_t place(char* memory) {
        char* at = memory;
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
        k_ = factors(key_tiles_ * head_steps_);
        v_ = factors(channel_tiles_ * key_tiles_ / 2);
        q_ = factors(kQueryTiles * head_steps_);
        weights_ = factors(2 * kKeySteps);
        scores_ = tiles(2 * kKeyTiles);
        sums_ = tiles(kQueryTiles * channel_tiles_);
        scaled_ = tiles(2 * head_steps_);
        return static_cast<std::size_t>(at - memory);
    }

    void pack_keys(const float* k, const float* v, std::size_t stride) {
        for (std::size_t tile = 0; tile < key_tiles_; ++tile) {
            const std::size_t key = std::min(length_, tile * kTile);
            pack_rows(k + key * stride, stride, length_ - key, head_dim_, head_steps_,
                      k_ + tile * head_steps_ * kFactor);
        }
        for (std::size_t step = 0; step < key_tiles_ / 2; ++step) {
            for (std::size_t tile = 0; tile < channel_tiles_; ++tile) {
                const std::size_t channel = std::min(head_dim_, tile * kTile);
                pack_transposed(v + step * kStep * stride + channel, stride, length_ - step * kStep,
                                head_dim_ - channel, values_of(tile, step));
            }
        }
    }

    // Attention of at most kQueryTiles * kTile queries.
    void attend(const float* q, float* out, std::size_t stride, std::size_t queries, float scale) {
        const std::size_t query_tiles = 2 * divide_up(queries, 2 * kTile);
        pack_queries(q, stride, queries, scale);
        std::fill_n(maximum_, kQueryTiles, _mm512_set1_ps(-std::numeric_limits<float>::infinity()));
        std::fill_n(total_, kQueryTiles, _mm512_setzero_ps());
        for (std::size_t key = 0; key < length_; key += kKeyTiles * kTile) {
            const std::size_t keys = std::min(kKeyTiles * kTile, length_ - key);
            // Two tiles of queries at a time, whose scores stay in the first-level cache.
            for (std::size_t j = 0; j < query_tiles; j += 2) {
                score(j, key, keys);
                weigh(j, key, keys);
                add_values(j, key, keys);
            }
        }
        for (std::size_t j = 0; j < query_tiles; ++j) {
            const std::size_t query = std::min(queries, j * kTile);
            write(j, out + query * stride, stride, queries - query);
        }
    }

private:
    Bf16* values_of(std::size_t channel_tile, std::size_t key_step) {
        return v_ + (channel_tile * key_tiles_ / 2 + key_step) * kFactor;
    }
    float* sums_of(std::size_t query_tile) { return sums_ + query_tile * channel_tiles_ * kSum; }

    void pack_queries(const float* q, std::size_t stride, std::size_t queries, float scale) {
        for (std::size_t tile = 0; tile < 2 * divide_up(queries, 2 * kTile); ++tile) {
            const std::size_t first = std::min(queries, tile * kTile);
            const std::size_t rows = std::min(kTile, queries - first);
            for (std::size_t row = 0; row < rows; ++row) {
                const float* from = q + (first + row) * stride;
                std::transform(from, from + head_dim_, scaled_ + row * head_dim_,
                               [=](float value) { return value * scale; });
            }
            pack_columns(scaled_, head_dim_, rows, head_dim_, head_steps_,
                         q_ + tile * head_steps_ * kFactor);
        }
    }

    // scores[keys, queries] = k q^T
    void score(std::size_t j, std::size_t key, std::size_t keys) {
        const std::size_t stride = head_steps_ * kFactor;
        const Bf16* b = q_ + j * stride;
        for (std::size_t i = 0; i < divide_up(keys, kTile); i += 2) {
            const Bf16* a = k_ + (key / kTile + i) * stride;
            float* const first = scores_ + i * kSum;
            float* const second = first + kKeyTiles * kSum;
            float* const sums[2][2] = {{first, second}, {first + kSum, second + kSum}};
            multiply_2x2(a, a + stride, b, b + stride, head_steps_, sums, false);
        }
    }

    // Scores become weights; what has been summed before fades as the maximum rises.
    void weigh(std::size_t j, std::size_t key, std::size_t keys) {
        for (std::size_t half = 0; half < 2; ++half) {
            const __m512 fade = softmax_block(scores_ + half * kKeyTiles * kSum, keys,
                                              weights_ + half * kKeySteps * kFactor,
                                              maximum_[j + half], total_[j + half]);
            if (key > 0 && _mm512_cmp_ps_mask(fade, _mm512_set1_ps(1.0F), _CMP_NEQ_UQ) != 0) {
                float* sums = sums_of(j + half);
                for (std::size_t at = 0; at < channel_tiles_ * kSum; at += kTile) {
                    _mm512_store_ps(sums + at, _mm512_mul_ps(_mm512_load_ps(sums + at), fade));
                }
            }
        }
    }

    // sums[channels, queries] += v^T weights
    void add_values(std::size_t j, std::size_t key, std::size_t keys) {
        for (std::size_t i = 0; i < channel_tiles_; i += 2) {
            float* const first = sums_of(j) + i * kSum;
            float* const second = sums_of(j + 1) + i * kSum;
            float* const sums[2][2] = {{first, second}, {first + kSum, second + kSum}};
            multiply_2x2(values_of(i, key / kStep), values_of(i + 1, key / kStep), weights_,
                         weights_ + kKeySteps * kFactor, divide_up(keys, kStep), sums, key > 0);
        }
    }

    void write(std::size_t j, float* out, std::size_t stride, std::size_t queries) {
        const __m512 factor = _mm512_div_ps(_mm512_set1_ps(1.0F), total_[j]);
        for (std::size_t i = 0; i * kTile < head_dim_; ++i) {
            __m512i turned[kTile];
            for (std::size_t channel = 0; channel < kTile; ++channel) {
                const float* sum = sums_of(j) + i * kSum + channel * kTile;
                turned[channel] = _mm512_castps_si512(_mm512_mul_ps(_mm512_load_ps(sum), factor));
            }
            transpose(turned);
            const __mmask16 kept = lanes(head_dim_ - i * kTile);
            for (std::size_t row = 0; row < std::min(kTile, queries); ++row) {
                _mm512_mask_storeu_ps(out + row * stride + i * kTile, kept,
                                      _mm512_castsi512_ps(turned[row]));
            }
        }
    }

    std::size_t head_dim_;
    std::size_t length_;
    std::size_t head_steps_;
    std::size_t channel_tiles_;
    std::size_t key_tiles_;
    Bf16* k_ = nullptr;        // [key tile][head step] factors
    Bf16* v_ = nullptr;        // [channel tile][key step] factors
    Bf16* q_ = nullptr;        // [query tile][head step] factors
    Bf16* weights_ = nullptr;  // [of two query tiles][key step] factors
    float* scores_ = nullptr;  // [of two query tiles][key tile] sums
    float* sums_ = nullptr;    // [query tile][channel tile] sums
    float* scaled_ = nullptr;  // a query tile [16, head_dim]
    __m512 maximum_[kQueryTiles];
    __m512 total_[kQueryTiles];
};

}  // namespace

void varlen_attention(const float* q, const float* k, const float* v, const std::int32_t* bounds,
                      float scale, float* out, AttentionShape shape, Workers& workers) {
    std::size_t longest = 0;
    for (std::size_t segment = 0; segment < shape.segments; ++segment) {
        longest =
            std::max(longest, static_cast<std::size_t>(bounds[segment + 1] - bounds[segment]));
    }
    const std::size_t stride = shape.heads * shape.head_dim;
    const std::size_t end = static_cast<std::size_t>(bounds[shape.segments]) * stride;
    std::fill(out + end, out + shape.tokens * stride, 0.0F);  // behind the last segment
    // With few heads for many workers, the queries of a head are shared out too, and its keys are
    // packed again.
    constexpr std::size_t kQueries = kQueryTiles * kTile;
    const std::size_t heads = shape.segments * shape.heads;
    const std::size_t parts =
        std::clamp<std::size_t>(divide_up(2 * workers.most(), std::max<std::size_t>(1, heads)), 1,
                                std::max<std::size_t>(1, longest / kQueries));
    const float base_2_scale = scale * 1.44269504F;  // exp2 follows

    workers.run(
        heads * parts, Head(shape.head_dim, longest).place(nullptr),
        [&](std::size_t task, char* memory) {
            const std::size_t segment = task / parts / shape.heads;
            const auto start = static_cast<std::size_t>(bounds[segment]);
            const auto length = static_cast<std::size_t>(bounds[segment + 1]) - start;
            const std::size_t part_queries = kTile * divide_up(divide_up(length, kTile), parts);
            const std::size_t first = task % parts * part_queries;
            const std::size_t last = std::min(length, first + part_queries);
            if (first >= last) {
                return;
            }
            const std::size_t origin = start * stride + task / parts % shape.heads * shape.head_dim;
            Head head(shape.head_dim, length);
            head.place(memory);
            head.pack_keys(k + origin, v + origin, stride);
            const TileScope scope;
            for (std::size_t query = first; query < last; query += kQueries) {
                const std::size_t at = origin + query * stride;
                head.attend(q + at, out + at, stride, std::min(kQueries, last - query),
                            base_2_scale);
            }
        });
}

}  // namespace mmvision::amx
