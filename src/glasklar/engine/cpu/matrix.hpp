// Weight matrices in tiles of 16 output rows, and rows of activations as they meet them (product.hpp).
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
// Bytes of a group of one tile; of one tile over `inputs` inputs (rounded up to whole groups).
constexpr int group_bytes(int kind) {
    constexpr int by_kind[] = {TILE * GROUP * 4, TILE * GROUP * 2, TILE * GROUP + 2 * TILE, TILE * GROUP / 2 + 2 * TILE};
    return by_kind[kind];
}
inline int64_t tile_bytes(int kind, int inputs) { return int64_t(round_up(inputs, GROUP) / GROUP) * group_bytes(kind); }

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

// A group of activations, as int4 weights meet it, and int8 ones but with AVX2.
struct Eights {
    int8_t values[GROUP];
    float scale;
    int32_t sum;  // of the values, times -8: what int4's offset adds to a dot, taken back
};

#if defined(__AVX2__) && !defined(__AVX512F__)
// The same as int8 weights meet it, in 16 bits: without VNNI products of bytes leave them. Of each four values the even ones come first.
struct Sixteens {
    int16_t values[GROUP];
    float scale;
    int32_t sum;  // of the values, times -128
};
constexpr bool EIGHTS_FOR_INT8 = false;
#else
typedef Eights Sixteens;
constexpr bool EIGHTS_FOR_INT8 = true;
#endif

// Activation rows as a kind of matrix wants them: floats, bf16, or int8 by groups (of 16 bits for int8 weights with AVX2).
struct Rows {
    float* wide = nullptr;
    Narrow* narrow = nullptr;
    Eights* eights = nullptr;
    Sixteens* sixteens = nullptr;
    int width = 0;  // values a row, padding included: whole groups

    int groups() const { return width / GROUP; }
};

#if defined(__AVX2__) && !defined(__AVX512F__)
// As below.
inline void prepare_eights(const float* x, Eights& out) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256 v[4], top = _mm256_setzero_ps(), finite = _mm256_castsi256_ps(_mm256_set1_epi32(-1));
    for (int i = 0; i < 4; ++i) {
        v[i] = _mm256_loadu_ps(x + 8 * i);
        const __m256 size = _mm256_andnot_ps(sign, v[i]);
        finite = _mm256_and_ps(finite, _mm256_cmp_ps(size, _mm256_set1_ps(3.40282347e38f), _CMP_LE_OQ));
        top = _mm256_max_ps(top, size);
    }
    __m128 most = _mm_max_ps(_mm256_castps256_ps128(top), _mm256_extractf128_ps(top, 1));
    most = _mm_max_ps(most, _mm_movehl_ps(most, most)), most = _mm_max_ss(most, _mm_movehdup_ps(most));
    const float largest = _mm_cvtss_f32(most);
    if (_mm256_movemask_ps(finite) != 255) {
        std::memset(out.values, 0, GROUP);
        out.scale = std::nanf(""), out.sum = 0;
        return;
    }
    const __m256 inverse = _mm256_set1_ps(largest > 0 ? 127 / largest : 0);
    __m256i q[4];
    for (int i = 0; i < 4; ++i) q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], inverse));
    const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out.values), _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
    const __m256i sums = _mm256_add_epi32(_mm256_add_epi32(q[0], q[1]), _mm256_add_epi32(q[2], q[3]));
    __m128i total = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    total = _mm_add_epi32(total, _mm_shuffle_epi32(total, 0x4e)), total = _mm_add_epi32(total, _mm_shuffle_epi32(total, 0xb1));
    out.scale = largest / 127, out.sum = -8 * _mm_cvtsi128_si32(total);
}

inline void widen(const Eights& from, Sixteens& to) {
    const __m128i even_first = _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
    for (int i = 0; i < GROUP; i += 16) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from.values + i));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to.values + i), _mm256_cvtepi8_epi16(_mm_shuffle_epi8(bytes, even_first)));
    }
    to.scale = from.scale, to.sum = 16 * from.sum;
}
#endif

// One group of 32 values at `x`.
inline void prepare_group(const float* x, const Rows& to, int64_t row, int group) {
    int64_t place = row * to.width + group * GROUP;
    for (int i = 0; i < GROUP; i += NEAR) {
        if (to.wide && to.wide + place != x) put(to.wide + place + i, near_at(x + i));
        if (to.narrow) store_narrow(to.narrow + place + i, near_at(x + i));
    }
    if (!to.eights && !to.sixteens) return;
    // A row that is not finite must not become finite here: NaN and infinity end up in the scale.
#if defined(__AVX2__) && !defined(__AVX512F__)
    const int64_t mine = row * to.groups() + group;
    Eights here;
    Eights& out = to.eights ? to.eights[mine] : here;
    prepare_eights(x, out);
    if (to.sixteens) widen(out, to.sixteens[mine]);
#else
    Floats a = load(x), b = load(x + LANES);
    bool finite = sum(a * 0.0f + b * 0.0f) == 0;
    float top = largest(larger(magnitude(a), magnitude(b)));
    float scale = top / 127, inverse = top > 0 ? 127 / top : 0;
    Eights& out = to.eights[row * to.groups() + group];
    int8_t* q = out.values;
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
    out.scale = finite ? scale : std::nanf("");
    out.sum = -8 * total;
#endif
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

}  // namespace glasklar
