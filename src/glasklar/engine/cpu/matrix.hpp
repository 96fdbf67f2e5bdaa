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
constexpr int GROUP = 32, TILE = LANES, AHEAD = 4096;

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
    Narrow* narrow = nullptr;
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
        store_narrow(to.narrow + place, a);
        store_narrow(to.narrow + place + LANES, b);
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
    if (!finite) qa = qb = _mm512_setzero_si512();  // the least integer each, whose sums would overflow
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

// A tile is multiplied by parts of as many outputs as a register has lanes.
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
constexpr int PARTS = 2;
#else
constexpr int PARTS = 1;
#endif
constexpr int PART = LANES / PARTS;
typedef float PartFloats __attribute__((vector_size(4 * PART)));
typedef int32_t PartInts __attribute__((vector_size(4 * PART)));
typedef uint32_t PartWords __attribute__((vector_size(4 * PART)));

inline uint32_t four_bytes(const int8_t* p) {
    uint32_t w;
    std::memcpy(&w, p, 4);
    return w;
}

// Dots of a group's eight quads of weights (with their offset) with 32 activations, the offset taken back: `sum` is -8 times
// the sum of the activations.
template <int KIND>
inline PartInts dot_group(const PartWords* w, const int8_t* x, int32_t sum) {
#if defined(__AVX512VNNI__)
    PartInts dot = PartInts{} + (KIND == INT4 ? sum : sum * 16);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
        dot = reinterpret_cast<Ints>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(dot), reinterpret_cast<__m512i>(w[i]), _mm512_set1_epi32(int(four_bytes(x + 4 * i)))));
    return dot;
#elif defined(__AVX2__)
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i dot = _mm256_set1_epi32(KIND == INT4 ? sum : 0), pairs = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        const __m256i quad = reinterpret_cast<__m256i>(w[i]), four = _mm256_set1_epi32(int(four_bytes(x + 4 * i)));
        // Eight pairs of 15 * 127 + 15 * 127 stay within 16 bits. Of int8 the offset is taken off first, and the sign of
        // the activations moved over: 127 * 127 + 127 * 127 do too.
        if constexpr (KIND == INT4) {
            pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(quad, four));
        } else {
            const __m256i plain = _mm256_xor_si256(quad, _mm256_set1_epi8(-128));
            dot = _mm256_add_epi32(dot, _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(four), _mm256_sign_epi8(plain, four)), ones));
        }
    }
    if constexpr (KIND == INT4) dot = _mm256_add_epi32(dot, _mm256_madd_epi16(pairs, ones));
    return reinterpret_cast<PartInts>(dot);
#else
    PartInts dot = PartInts{} + (KIND == INT4 ? sum : sum * 16);
    for (int i = 0; i < GROUP; ++i) dot += reinterpret_cast<PartInts>(w[i / 4] >> i % 4 * 8 & 255u) * int32_t(x[i]);
    return dot;
#endif
}

// Products of one tile with M rows of activations, which may be wider than the matrix: total[m][lane].
template <int M>
struct Products {
    Floats total[M];

    // `next`: what will be read after this tile.
    void quantised(const uint8_t* tile, const uint8_t* next, bool four_bits, int groups, const Rows& a, const int64_t* rows) {
        const int8_t* bytes[M];
        const float* scales[M];
        const int32_t* sums[M];
        for (int m = 0; m < M; ++m) {
            bytes[m] = a.bytes + rows[m] * a.width;
            scales[m] = a.scales + rows[m] * a.groups();
            sums[m] = a.sums + rows[m] * a.groups();
        }
        for (int part = 0; part < PARTS; ++part) {
            if (four_bits) each_group<INT4>(tile, next, part, groups, bytes, scales, sums);
            else each_group<INT8>(tile, next, part, groups, bytes, scales, sums);
        }
    }

    template <int KIND>
    void each_group(const uint8_t* tile, const uint8_t* next, int part, int groups, const int8_t* const* bytes, const float* const* scales, const int32_t* const* sums) {
        constexpr int SIZE = KIND == INT4 ? 288 : 544;
        const int place = part * 4 * PART;
        PartFloats all[M] = {};
        constexpr int EARLY = (AHEAD + SIZE - 1) / SIZE;  // groups
        for (int g = 0; g < groups; ++g, tile += SIZE) {
            // The processor's own prefetching ends with each page and knows nothing of the next tile; measured, some kilobytes
            // ahead reach the rate of a plain read.
            const uint8_t* ahead = g + EARLY < groups ? tile + EARLY * SIZE : next + (g + EARLY - groups) * SIZE;
            for (int i = 0; i < SIZE; i += 64) __builtin_prefetch(ahead + i);
            PartWords w[8];
            if constexpr (KIND == INT4) {
                for (int i = 0; i < 4; ++i) {
                    PartWords both = load_as<PartWords>(tile + 64 * i + place);
                    w[i] = both & 0x0f0f0f0fu;
                    w[i + 4] = both >> 4 & 0x0f0f0f0fu;
                }
            } else {
                for (int i = 0; i < 8; ++i) w[i] = load_as<PartWords>(tile + 64 * i + place);
            }
            const Floats every = half_scales(tile + SIZE - 32);
            const PartFloats scale = load_as<PartFloats>(reinterpret_cast<const uint8_t*>(&every) + place);
#pragma GCC unroll 4
            for (int m = 0; m < M; ++m) {
                PartInts dot = dot_group<KIND>(w, bytes[m] + g * GROUP, sums[m][g]);
                all[m] = fma(__builtin_convertvector(dot, PartFloats), scale * scales[m][g], all[m]);
            }
        }
        for (int m = 0; m < M; ++m) std::memcpy(reinterpret_cast<uint8_t*>(total + m) + place, all + m, sizeof all[m]);
    }

    // Even and odd steps apart: two chains of sums hide the latency when there are few rows.
    void floats(const uint8_t* tile, int groups, const Rows& a, const int64_t* rows) {
        Floats odd[M] = {};
        const float* from[M];
        for (int m = 0; m < M; ++m) total[m] = Floats{}, from[m] = a.wide + rows[m] * a.width;
        const float* w = reinterpret_cast<const float*>(tile);
        for (int k = 0; k < groups * GROUP; k += 2, w += 2 * TILE) {
            Floats w0 = load(w), w1 = load(w + TILE);
            __builtin_prefetch(w + AHEAD / 4), __builtin_prefetch(w + AHEAD / 4 + TILE);
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                const float* x = from[m] + k;
                total[m] = fma(w0, spread(x[0]), total[m]);
                odd[m] = fma(w1, spread(x[1]), odd[m]);
            }
        }
        for (int m = 0; m < M; ++m) total[m] += odd[m];
    }

    void halves(const uint8_t* tile, int groups, const Rows& a, const int64_t* rows) {
        Floats odd[M] = {};
        const Narrow* from[M];
        for (int m = 0; m < M; ++m) total[m] = Floats{}, from[m] = a.narrow + rows[m] * a.width;
        for (int k = 0; k < groups * GROUP; k += 4, tile += 128) {
            const Pairs w0 = pairs(load_as<Words>(tile)), w1 = pairs(load_as<Words>(tile + 64));
            __builtin_prefetch(tile + AHEAD), __builtin_prefetch(tile + AHEAD + 64);
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                const Narrow* x = from[m] + k;
                total[m] = dot_pairs(total[m], w0, spread_pair(x));
                odd[m] = dot_pairs(odd[m], w1, spread_pair(x + 2));
            }
        }
        for (int m = 0; m < M; ++m) total[m] += odd[m];
    }
};

// Out of line: one copy of each product serves all callers.
template <int M>
__attribute__((noinline)) void multiply_rows(const Matrix& w, const uint8_t* tile, const uint8_t* next, const Rows& a, const int64_t* rows, Floats* out) {
    Products<M> p;
    if (w.kind >= INT8) p.quantised(tile, next, w.kind == INT4, w.groups(), a, rows);
    else if (w.kind == BF16) p.halves(tile, w.groups(), a, rows);
    else p.floats(tile, w.groups(), a, rows);
    std::memcpy(out, p.total, sizeof p.total);
}

#if defined(__AVX512VNNI__)
// Products of two neighbouring tiles with BLOCK rows, out[tile][row]: an activation is loaded once for both, and all sums of a
// group stay in registers. What a dot is made of, and in which order groups are added, is as in `Products`.
constexpr int BLOCK = 8;
template <int KIND>
__attribute__((noinline)) void multiply_block(const uint8_t* tile, int64_t next, int groups, const Rows& a, const int64_t* rows, Floats (*out)[BLOCK]) {
    constexpr int SIZE = KIND == INT4 ? 288 : 544;
    const int8_t* bytes[BLOCK];
    const float* scales[BLOCK];
    const int32_t* sums[BLOCK];
    for (int m = 0; m < BLOCK; ++m) {
        bytes[m] = a.bytes + rows[m] * a.width;
        scales[m] = a.scales + rows[m] * a.groups();
        sums[m] = a.sums + rows[m] * a.groups();
        out[0][m] = out[1][m] = Floats{};
    }
    for (int g = 0; g < groups; ++g, tile += SIZE) {
        for (int i = 0; i < SIZE; i += 64) __builtin_prefetch(tile + AHEAD + i), __builtin_prefetch(tile + next + AHEAD + i);
        Words low[2][4], high[2][4];  // quads 0 to 3 and 4 to 7
        for (int t = 0; t < 2; ++t)
            for (int i = 0; i < 4; ++i) {
                const uint8_t* at = tile + t * next + 64 * i;
                low[t][i] = load_as<Words>(at);
                if constexpr (KIND == INT4) high[t][i] = low[t][i] >> 4 & 0x0f0f0f0fu, low[t][i] &= 0x0f0f0f0fu;
                else high[t][i] = load_as<Words>(at + 256);
            }
        __m512i dot[2][BLOCK];
#pragma GCC unroll 8
        for (int m = 0; m < BLOCK; ++m) dot[0][m] = dot[1][m] = _mm512_set1_epi32(KIND == INT4 ? sums[m][g] : sums[m][g] * 16);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            const __m512i w0 = reinterpret_cast<__m512i>(i < 4 ? low[0][i] : high[0][i - 4]);
            const __m512i w1 = reinterpret_cast<__m512i>(i < 4 ? low[1][i] : high[1][i - 4]);
#pragma GCC unroll 8
            for (int m = 0; m < BLOCK; ++m) {
                const __m512i x = _mm512_set1_epi32(int(four_bytes(bytes[m] + g * GROUP + 4 * i)));
                dot[0][m] = _mm512_dpbusd_epi32(dot[0][m], w0, x);
                dot[1][m] = _mm512_dpbusd_epi32(dot[1][m], w1, x);
            }
        }
#pragma GCC unroll 2
        for (int t = 0; t < 2; ++t) {
            const Floats scale = half_scales(tile + t * next + SIZE - 32);
#pragma GCC unroll 8
            for (int m = 0; m < BLOCK; ++m)
                out[t][m] = fma(__builtin_convertvector(reinterpret_cast<Ints>(dot[t][m]), Floats), scale * scales[m][g], out[t][m]);
        }
    }
}
#endif

// emit(i, j, outputs of tile t + j) for the activation rows rows[0..count) and `tiles` (one or two) tiles, bias added.
// `after`: what will be read after them, if not what follows.
template <class Emit>
inline void multiply(const Matrix& w, int copy, int t, int tiles, const Rows& a, const int64_t* rows, int count, Emit emit, const uint8_t* after = nullptr) {
    const uint8_t* tile = w.tile(copy, t);
    const int64_t next = tile_bytes(w.kind, w.inputs);
    if (!after) after = tile + tiles * next;
    Floats bias[2] = {};
    if (w.bias)
        for (int i = 0; i < std::min(tiles * TILE, w.outputs - t * TILE); ++i) bias[i / TILE][i % TILE] = w.bias[int64_t(copy) * w.outputs + t * TILE + i];
    auto put = [&](int i, int j, Floats v) { emit(i, j, w.bias ? v + bias[j] : v); };
    int i = 0;
#if defined(__AVX512VNNI__)
    for (int left; w.kind >= INT8 && (left = count - i) > BLOCK / 2; i += BLOCK) {
        int64_t some[BLOCK];
        Floats out[2][BLOCK];
        for (int m = 0; m < BLOCK; ++m) some[m] = rows[i + std::min(m, left - 1)];
        (w.kind == INT4 ? multiply_block<INT4> : multiply_block<INT8>)(tile, tiles > 1 ? next : 0, w.groups(), a, some, out);
        for (int m = 0; m < std::min(BLOCK, left); ++m)
            for (int j = 0; j < tiles; ++j) put(i + m, j, out[j][m]);
    }
#endif
    for (int done; i < count; i += done) {
        const int left = count - i;
        Floats out[8];
        for (int j = 0; j < tiles; ++j) {
            const uint8_t *here = tile + j * next, *then = j + 1 < tiles ? here + next : after;
#if defined(__AVX512F__)
            if (left >= 8 && w.kind < INT8) multiply_rows<8>(w, here, then, a, rows + i, out), done = 8;
            else
#endif
            if (left >= 4) multiply_rows<4>(w, here, then, a, rows + i, out), done = 4;
            else if (left == 3) multiply_rows<3>(w, here, then, a, rows + i, out), done = 3;
            else if (left == 2) multiply_rows<2>(w, here, then, a, rows + i, out), done = 2;
            else multiply_rows<1>(w, here, then, a, rows + i, out), done = 1;
            for (int m = 0; m < done; ++m) put(i + m, j, out[m]);
        }
    }
}

}  // namespace glasklar
