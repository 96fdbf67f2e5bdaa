// Weight matrices in tiles of 16 output rows, and their products with rows of activations.
//
// A tile holds its 16 rows side by side, so that one vector is 16 outputs. Along the inputs:
//
//     float   one input a vector                                        bf16   pairs of inputs
//     int8    groups of 32 inputs: 8 vectors of 16 x 4 bytes (value + 128), then 16 scales as fp16
//     int4    groups of 32 inputs: 4 vectors; the low halves hold the first four quads of inputs, the high halves the
//             others (value + 8), then 16 scales as fp16
//
// Against int8 and int4 the activations are int8 as well, in the same groups with a scale each; the dots within a group are
// integers and the groups are added in order, so that a product does not depend on what else is computed beside it.
#pragma once

#include "lanes.hpp"

namespace glasklar {

enum Kind { FLOAT = 0, BF16 = 1, INT8 = 2, INT4 = 3 };
constexpr int GROUP = 32, TILE = LANES;

inline int offset_of(int kind) { return kind == INT8 ? 128 : 8; }
// Bytes of one tile over `inputs` inputs (rounded up to whole groups).
inline int64_t tile_bytes(int kind, int inputs) {
    int64_t groups = round_up(inputs, GROUP) / GROUP;
    constexpr int64_t by_kind[] = {TILE * GROUP * 4, TILE * GROUP * 2, TILE * GROUP + 2 * TILE, TILE * GROUP / 2 + 2 * TILE};
    return groups * by_kind[kind];
}

struct Matrix {
    const uint8_t* data;  // null: absent
    const float* bias;    // one an output, or null
    int32_t kind, outputs, inputs;
    int32_t copies;  // matrices of this shape, one after the other: experts, heads

    int tiles() const { return round_up(outputs, TILE) / TILE; }
    int groups() const { return round_up(inputs, GROUP) / GROUP; }
    const uint8_t* tile(int copy, int i) const {
        return data + (int64_t(copy) * tiles() + i) * tile_bytes(kind, inputs);
    }
};

// Activation rows as a kind of matrix wants them: floats, bf16, or int8 with a scale and the sum of each group.
struct Rows {
    float* wide = nullptr;
    bf16* narrow = nullptr;
    int8_t* bytes = nullptr;
    float* scales = nullptr;
    int32_t* sums = nullptr;  // times -8: what int4's offset adds to a dot, taken back
    int width = 0;            // values a row, padding included: whole groups

    int groups() const { return width / GROUP; }
};

// One group of 32 values at `x`.
inline void prepare_group(const float* x, const Rows& to, int64_t row, int group) {
    int64_t place = row * to.width + group * GROUP;
    Floats a = load(x), b = load(x + LANES);
    if (to.wide && to.wide + place != x) {
        store(to.wide + place, a);
        store(to.wide + place + LANES, b);
    }
    if (to.narrow) {
        store(to.narrow + place, a);
        store(to.narrow + place + LANES, b);
    }
    if (!to.bytes) return;
    // A row that is not finite must not become finite here: NaN and infinity end up in the scale.
    bool finite = sum(a * 0.0f + b * 0.0f) == 0;
    float top = largest(larger(magnitude(a), magnitude(b)));
    float scale = top / 127, inverse = top > 0 ? 127 / top : 0;
    int8_t* q = to.bytes + place;
    int32_t total = 0;
#if defined(__AVX512F__)
    // Rounds to nearest, ties to even, as below.
    __m512i qa = _mm512_cvtps_epi32(reinterpret_cast<__m512>(a * inverse)), qb = _mm512_cvtps_epi32(reinterpret_cast<__m512>(b * inverse));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q), _mm512_cvtepi32_epi8(qa));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + LANES), _mm512_cvtepi32_epi8(qb));
    total = _mm512_reduce_add_epi32(_mm512_add_epi32(qa, qb));
#else
    for (int i = 0; i < GROUP; ++i) {
        q[i] = finite ? int8_t(std::nearbyint((i < LANES ? a[i] : b[i - LANES]) * inverse)) : 0;
        total += q[i];
    }
#endif
    to.scales[row * to.groups() + group] = finite ? scale : std::nanf("");
    to.sums[row * to.groups() + group] = -8 * total;
}

// `x` holds to.width floats, zeros beyond the row's own values.
inline void prepare(const float* x, const Rows& to, int64_t row) {
    for (int g = 0; g < to.groups(); ++g) prepare_group(x + g * GROUP, to, row, g);
}

inline Floats half_scales(const uint8_t* p) {
#if defined(__AVX512F__)
    return reinterpret_cast<Floats>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
    union { Floats all; __m256 half[2]; } s;
    for (int i = 0; i < 2; ++i) s.half[i] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + i));
    return s.all;
#else
    uint16_t h[LANES];
    std::memcpy(h, p, sizeof h);
    Floats s;
    for (int i = 0; i < LANES; ++i) {
        int exponent = h[i] >> 10 & 31, fraction = h[i] & 1023;
        float v = exponent ? std::ldexp(float(1024 + fraction), exponent - 25) : std::ldexp(float(fraction), -24);
        if (exponent == 31) v = fraction ? std::nanf("") : INFINITY;
        s[i] = h[i] >> 15 ? -v : v;
    }
    return s;
#endif
}

inline Words four_bytes(const int8_t* p) {
    uint32_t w;
    std::memcpy(&w, p, 4);
    return Words{} + w;
}

// Products of one tile with M rows of activations, which may be wider than the matrix: total[m][lane].
template <int M>
struct Products {
    Floats total[M];

    void quantised(const uint8_t* tile, bool four_bits, int groups, const Rows& a, const int64_t* rows) {
        const int8_t* bytes[M];
        const float* scales[M];
        const int32_t* sums[M];
        for (int m = 0; m < M; ++m) {
            bytes[m] = a.bytes + rows[m] * a.width;
            scales[m] = a.scales + rows[m] * a.groups();
            sums[m] = a.sums + rows[m] * a.groups();
            total[m] = Floats{};
        }
        if (four_bits) each_group<INT4>(tile, groups, bytes, scales, sums);
        else each_group<INT8>(tile, groups, bytes, scales, sums);
    }

    template <int KIND>
    void each_group(const uint8_t* tile, int groups, const int8_t* const* bytes, const float* const* scales, const int32_t* const* sums) {
        constexpr int SIZE = KIND == INT4 ? 288 : 544, SHIFT = KIND == INT4 ? 0 : 4;
        for (int g = 0; g < groups; ++g, tile += SIZE) {
            // With few rows the processor's own prefetching keeps up; with more, the next lines must be asked for early.
            if constexpr (M >= 4)
                for (int i = 0; i < SIZE; i += 64) __builtin_prefetch(tile + 4096 + i);
            Words w[8];
            if constexpr (KIND == INT4) {
                for (int i = 0; i < 4; ++i) {
                    Words both = load_as<Words>(tile + 64 * i);
                    w[i] = both & 0x0f0f0f0fu;
                    w[i + 4] = both >> 4 & 0x0f0f0f0fu;
                }
            } else {
                for (int i = 0; i < 8; ++i) w[i] = load_as<Words>(tile + 64 * i);
            }
            Floats scale = half_scales(tile + SIZE - 32);
#pragma GCC unroll 16
            for (int m = 0; m < M; ++m) {
                Ints dot = Ints{} + (sums[m][g] << SHIFT);
                const int8_t* x = bytes[m] + g * GROUP;
#pragma GCC unroll 8
                for (int i = 0; i < 8; ++i) dot = dot_bytes<KIND == INT4 ? 15 : 255>(dot, w[i], four_bytes(x + 4 * i));
                total[m] = fma(__builtin_convertvector(dot, Floats), scale * scales[m][g], total[m]);
            }
        }
    }

    // Even and odd steps apart: two chains of sums hide the latency when there are few rows.
    void floats(const uint8_t* tile, int groups, const Rows& a, const int64_t* rows) {
        Floats odd[M] = {};
        for (int m = 0; m < M; ++m) total[m] = Floats{};
        const float* w = reinterpret_cast<const float*>(tile);
        for (int k = 0; k < groups * GROUP; k += 2, w += 2 * TILE) {
            Floats w0 = load(w), w1 = load(w + TILE);
            for (int m = 0; m < M; ++m) {
                const float* x = a.wide + rows[m] * a.width + k;
                total[m] = fma(w0, spread(x[0]), total[m]);
                odd[m] = fma(w1, spread(x[1]), odd[m]);
            }
        }
        for (int m = 0; m < M; ++m) total[m] += odd[m];
    }

    void halves(const uint8_t* tile, int groups, const Rows& a, const int64_t* rows) {
        Floats odd[M] = {};
        for (int m = 0; m < M; ++m) total[m] = Floats{};
        for (int k = 0; k < groups * GROUP; k += 4, tile += 128) {
            Words w0 = load_as<Words>(tile), w1 = load_as<Words>(tile + 64);
            for (int m = 0; m < M; ++m) {
                uint32_t pair[2];
                std::memcpy(pair, a.narrow + rows[m] * a.width + k, 8);
                total[m] = dot_pairs(total[m], w0, Words{} + pair[0]);
                odd[m] = dot_pairs(odd[m], w1, Words{} + pair[1]);
            }
        }
        for (int m = 0; m < M; ++m) total[m] += odd[m];
    }
};

template <int M, class Emit>
inline void multiply_block(const Matrix& w, const uint8_t* tile, const Rows& a, const int64_t* rows, int first, Emit& emit) {
    Products<M> p;
    if (w.kind >= INT8) p.quantised(tile, w.kind == INT4, w.groups(), a, rows);
    else if (w.kind == BF16) p.halves(tile, w.groups(), a, rows);
    else p.floats(tile, w.groups(), a, rows);
    for (int m = 0; m < M; ++m) emit(first + m, p.total[m]);
}

// emit(i, outputs 16t .. 16t+15) for the activation rows rows[0..count), bias added.
template <class Emit>
inline void multiply(const Matrix& w, int copy, int t, const Rows& a, const int64_t* rows, int count, Emit emit) {
    const uint8_t* tile = w.tile(copy, t);
    Floats bias{};
    if (w.bias)
        for (int i = 0; i < std::min(TILE, w.outputs - t * TILE); ++i) bias[i] = w.bias[int64_t(copy) * w.outputs + t * TILE + i];
    auto add = [&](int i, Floats v) { emit(i, w.bias ? v + bias : v); };
    int i = 0;
    if (w.kind >= INT8)
        for (; i + 16 <= count; i += 16) multiply_block<16>(w, tile, a, rows + i, i, add);
    for (; i + 8 <= count; i += 8) multiply_block<8>(w, tile, a, rows + i, i, add);
    for (; i + 4 <= count; i += 4) multiply_block<4>(w, tile, a, rows + i, i, add);
    for (; i + 2 <= count; i += 2) multiply_block<2>(w, tile, a, rows + i, i, add);
    if (i < count) multiply_block<1>(w, tile, a, rows + i, i, add);
}

}  // namespace glasklar
