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
// Tiles that are read side by side, and how many bytes ahead. Measured on two cores of an Ice Lake Xeon: 27 GB/s, a plain sum 22.
// Without AVX-512 one after the other: two cores of a Zen 4 read 29 to 46 GB/s so, a plain sum 32 to 57, eight streams 24 to 38.
constexpr int STREAMS = 8;
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int AHEAD = 2048;
#else
constexpr int AHEAD = 512;
#endif

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

// A group of activations, as integer weights meet it.
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

// Activation rows as a kind of matrix wants them: floats, bf16, or int8 by groups.
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

inline uint32_t four_bytes(const int8_t* p) {
    uint32_t w;
    std::memcpy(&w, p, 4);
    return w;
}

// Rows of activations that a product takes at most, and tiles that some rows meet at once. A core does two products a cycle and
// little more than one load: an activation is loaded for all tiles and a weight for all rows, and their sums fill the registers.
#if defined(__AVX512F__)
constexpr int MOST_ROWS = 8;
constexpr int tiles_at_once(int kind, int rows) { return rows > (kind < INT8 ? 5 : 6) ? 3 : 4; }
#else
constexpr int MOST_ROWS = 4;
constexpr int tiles_at_once([[maybe_unused]] int kind, [[maybe_unused]] int rows) {
#if defined(__AVX2__)
    return 1;
#else
    return 1;
#endif
}
#endif

// Products of M rows of activations, which may be wider than the matrix, with a group of T tiles.
template <int KIND, int M>
class Product {
   public:
    static constexpr int SIZE = KIND == INT4 ? 288 : KIND == INT8 ? 544 : KIND == BF16 ? 1024 : 2048;  // bytes of a group
    static constexpr int EARLY = (AHEAD + SIZE - 1) / SIZE, LATER = EARLY * SIZE;  // groups, bytes from asking for weights to their use
    // Even and odd steps of floats are summed apart: two chains hide the latency when there are few rows.
    static constexpr int SUMS = KIND < INT8 ? 2 * M : M;

    Product(const Rows& a, const int64_t* rows) {
        for (int m = 0; m < M; ++m) {
            if constexpr (KIND == FLOAT) rows_[m] = a.wide + rows[m] * a.width;
            else if constexpr (KIND == BF16) rows_[m] = a.narrow + rows[m] * a.width;
            else if constexpr (KIND == INT8 && !EIGHTS_FOR_INT8) rows_[m] = a.sixteens + rows[m] * a.groups();
            else rows_[m] = a.eights + rows[m] * a.groups();
        }
    }

    // sums[tile][SUMS] += products of group g, whose weights stand at at[tile]. `far`: what stands there LATER is asked for meanwhile.
#if defined(__AVX2__) && !defined(__AVX512F__)
    template <int T>
    __attribute__((always_inline)) void add(const uint8_t* const* at, int g, __m256 (*sums)[SUMS]) const {
        if constexpr (KIND < INT8) add_floats<T>(at, g, sums);
        else add_integers<T>(at, g, sums);
    }
#else
    template <int T>
    __attribute__((always_inline)) void add(const uint8_t* const* at, bool far, int g, Floats* sums) const {
        if constexpr (KIND < INT8) add_floats<T>(at, far, g, sums);
        else add_integers<T>(at, far, g, sums);
    }
#endif

   private:
    typedef std::conditional_t<KIND == FLOAT, float, std::conditional_t<KIND == BF16, Narrow, std::conditional_t<KIND == INT8, Sixteens, Eights>>> Element;

#if defined(__AVX2__) && !defined(__AVX512F__)
    // A register has the lanes of half a tile. The even steps, then the odd ones, so that activations are spread once for both halves.
    template <int T>
    __attribute__((always_inline)) void add_floats(const uint8_t* const* at, int g, __m256 (*sums)[SUMS]) const {
        static_assert(T == 1);
        constexpr int STEP = KIND == FLOAT ? 1 : 2;  // inputs a vector
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; ++odd) {
            __m256 now[2][M];
#pragma GCC unroll 8
            for (int i = 0; i < 2 * M; ++i) now[i % 2][i / 2] = sums[i % 2][odd * M + i / 2];
            for (int k = odd; k < GROUP / STEP; k += 2) {
                __m256i words[2];
#pragma GCC unroll 2
                for (int half = 0; half < 2; ++half) words[half] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at[0] + 64 * k + 32 * half));
#pragma GCC unroll 2
                for (int step = 0; step < STEP; ++step) {
                    __m256 w[2];
#pragma GCC unroll 2
                    for (int half = 0; half < 2; ++half)
                        w[half] = _mm256_castsi256_ps(KIND == FLOAT ? words[half] : step == 0 ? _mm256_and_si256(words[half], _mm256_set1_epi32(int(0xffff0000))) : _mm256_slli_epi32(words[half], 16));
#pragma GCC unroll 4
                    for (int m = 0; m < M; ++m) {
                        const __m256 x = _mm256_broadcast_ss(rows_[m] + g * GROUP + STEP * k + (KIND == FLOAT ? 0 : 1 - step));
#pragma GCC unroll 2
                        for (int half = 0; half < 2; ++half) now[half][m] = _mm256_fmadd_ps(w[half], x, now[half][m]);
                    }
                }
            }
#pragma GCC unroll 8
            for (int i = 0; i < 2 * M; ++i) sums[i % 2][odd * M + i / 2] = now[i % 2][i / 2];
        }
    }
#else
    template <int T>
    __attribute__((always_inline)) void add_floats(const uint8_t* const* at, bool far, int g, Floats* sums) const {
        constexpr int STEP = KIND == FLOAT ? 1 : 2;                      // inputs a vector
        constexpr int TOGETHER = T * M > 8 ? 1 : 2;  // of even and odd steps, as registers allow
        for (int first = 0; first < 2; first += TOGETHER) {
            Floats now[TOGETHER][T][M];
            auto each = [&](auto f) __attribute__((always_inline)) {
#pragma GCC unroll 2
                for (int odd = 0; odd < TOGETHER; ++odd)
#pragma GCC unroll 8
                    for (int t = 0; t < T; ++t)
#pragma GCC unroll 8
                        for (int m = 0; m < M; ++m) f(now[odd][t][m], sums[t * SUMS + (first + odd) * M + m]);
            };
            each([](Floats& mine, Floats& sum) __attribute__((always_inline)) { mine = sum; });
            for (int k = first; k < GROUP / STEP; k += 2)
#pragma GCC unroll 2
                for (int odd = 0; odd < TOGETHER; ++odd)
#pragma GCC unroll 2
                    for (int step = 0; step < (KIND == BF16 ? PAIR_STEPS : 1); ++step) {
                        Floats w[T];
#pragma GCC unroll 8
                        for (int t = 0; t < T; ++t) {
                            if (far && step == 0) __builtin_prefetch(at[t] + LATER + 64 * (k + odd));
                            const Words word = load_as<Words>(at[t] + 64 * (k + odd));
                            w[t] = KIND == BF16 ? of_pairs(word, step) : reinterpret_cast<Floats>(word);
                        }
#pragma GCC unroll 8
                        for (int m = 0; m < M; ++m) {
                            const Element* from = rows_[m] + g * GROUP + STEP * (k + odd);
                            Floats x;
                            if constexpr (KIND == BF16) x = spread_pair(from, step);
                            else x = spread(*from);
#pragma GCC unroll 8
                            for (int t = 0; t < T; ++t) {
                                if constexpr (KIND == BF16) now[odd][t][m] = add_products(now[odd][t][m], w[t], x);
                                else now[odd][t][m] = fma(w[t], x, now[odd][t][m]);
                            }
                        }
                    }
            each([](Floats& mine, Floats& sum) __attribute__((always_inline)) { sum = mine; });
        }
    }
#endif

#if defined(__AVX512VNNI__)
    template <int T>
    __attribute__((always_inline)) void add_integers(const uint8_t* const* at, bool far, int g, Floats* sums) const {
        // One row and few tiles: two chains, as one would wait for itself.
        constexpr int CHAINS = T * M <= 4 ? 2 : 1;
        int64_t place = g * int64_t(sizeof(Eights));
        asm("" : "+r"(place));  // else compilers load a group once for all tiles, into more registers than there are
        auto group = [&](int m) __attribute__((always_inline)) -> const Eights& {
            return *reinterpret_cast<const Eights*>(reinterpret_cast<const uint8_t*>(rows_[m]) + place);
        };
        __m512i dots[CHAINS][T][M];
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const __m512i offset = _mm512_set1_epi32(KIND == INT4 ? group(m).sum : group(m).sum * 16);
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) {
                dots[0][t][m] = offset;
                if constexpr (CHAINS == 2) dots[1][t][m] = _mm512_setzero_si512();
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < (KIND == INT4 ? 4 : 8); ++i) {
            Words w[T];
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) {
                w[t] = load_as<Words>(at[t] + 64 * i);
                keep(w[t]);
                if (far) __builtin_prefetch(at[t] + LATER + 64 * i);
            }
#pragma GCC unroll 2
            for (int high = 0; high < (KIND == INT4 ? 2 : 1); ++high)
#pragma GCC unroll 8
                for (int m = 0; m < M; ++m) {
                    const __m512i x = _mm512_set1_epi32(int(four_bytes(group(m).values + 4 * i + 16 * high)));
#pragma GCC unroll 8
                    for (int t = 0; t < T; ++t) {
                        const Words quad = KIND == INT4 ? (high ? w[t] >> 4 : w[t]) & 0x0f0f0f0fu : w[t];
                        __m512i& dot = dots[CHAINS == 2 && (KIND == INT4 ? high : i % 2)][t][m];
                        dot = _mm512_dpbusd_epi32(dot, reinterpret_cast<__m512i>(quad), x);
                    }
                }
        }
        Floats scales[T];
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            scales[t] = half_scales(at[t] + SIZE - 2 * TILE);
            if (far) __builtin_prefetch(at[t] + LATER + SIZE - 2 * TILE);
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const Floats scale = spread(group(m).scale);
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) {
                __m512i dot = dots[0][t][m];
                if constexpr (CHAINS == 2) dot = _mm512_add_epi32(dot, dots[1][t][m]);
                sums[t * M + m] = fma(floats(reinterpret_cast<Ints>(dot)), scales[t] * scale, sums[t * M + m]);
            }
        }
    }
#elif defined(__AVX2__)
    template <int T>
    __attribute__((always_inline)) void add_integers(const uint8_t* const* at, int g, __m256 (*sums)[SUMS]) const {
        constexpr int WORDS = KIND == INT4 ? 4 : 8;
        const __m256i ones = _mm256_set1_epi16(1);
        __m256i dots[2 * T][M];
#pragma GCC unroll 8
        for (int i = 0; i < WORDS; ++i) {
            __m256i words[2 * T];
#pragma GCC unroll 4
            for (int half = 0; half < 2 * T; ++half) {
                words[half] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at[half / 2] + 64 * i + 32 * (half % 2)));
                asm("" : "+x"(words[half]));  // one load for both uses, if there is a register for it
            }
#pragma GCC unroll 2
            for (int high = 0; high < 2; ++high) {
                __m256i w[2 * T];
#pragma GCC unroll 4
                for (int half = 0; half < 2 * T; ++half)  // with their offset
                    w[half] = KIND == INT8 ? (high ? _mm256_srli_epi16(words[half], 8) : _mm256_and_si256(words[half], _mm256_set1_epi16(255)))
                                           : _mm256_and_si256(high ? _mm256_srli_epi16(words[half], 4) : words[half], _mm256_set1_epi8(15));
#pragma GCC unroll 4
                for (int m = 0; m < M; ++m) {
                    int32_t few;  // four bytes, or two of 16 bits
                    std::memcpy(&few, rows_[m][g].values + (KIND == INT8 ? 4 * i + 2 * high : 4 * i + 16 * high), 4);
                    const __m256i x = _mm256_set1_epi32(few);
#pragma GCC unroll 4
                    for (int half = 0; half < 2 * T; ++half) {
                        __m256i& dot = dots[half][m];
                        if constexpr (KIND == INT4) {  // eight pairs of 15 * 127 + 15 * 127 stay within 16 bits
                            const __m256i pairs = _mm256_maddubs_epi16(w[half], x);
                            dot = i == 0 && high == 0 ? pairs : _mm256_add_epi16(dot, pairs);
                        } else {
                            const __m256i pairs = _mm256_madd_epi16(w[half], x);
                            dot = i == 0 && high == 0 ? pairs : _mm256_add_epi32(dot, pairs);
                        }
                        asm("" : "+x"(dot));  // else compilers add up last what they should add at once, and have no room for it
                    }
                }
            }
        }
        __m256 scales[2 * T];
#pragma GCC unroll 4
        for (int half = 0; half < 2 * T; ++half)
            scales[half] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at[half / 2] + SIZE - 2 * TILE + 16 * (half % 2))));
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
            const Element& x = rows_[m][g];
            const __m256 scale = _mm256_broadcast_ss(&x.scale);
            const __m256i offset = _mm256_set1_epi32(x.sum);
#pragma GCC unroll 4
            for (int half = 0; half < 2 * T; ++half) {
                const __m256i dot = _mm256_add_epi32(KIND == INT4 ? _mm256_madd_epi16(dots[half][m], ones) : dots[half][m], offset);
                sums[half][m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_mul_ps(scales[half], scale), sums[half][m]);
            }
        }
    }
#else
    template <int T>
    __attribute__((always_inline)) void add_integers(const uint8_t* const* at, bool, int g, Floats* sums) const {
        static_assert(T == 1);
        Words w[8];
        for (int i = 0; i < (KIND == INT4 ? 4 : 8); ++i) {
            w[i] = load_as<Words>(at[0] + 64 * i);
            if constexpr (KIND == INT4) w[i + 4] = w[i] >> 4 & 0x0f0f0f0fu, w[i] &= 0x0f0f0f0fu;
        }
        const Floats scales = half_scales(at[0] + SIZE - 2 * TILE);
        for (int m = 0; m < M; ++m) {
            const Eights& x = rows_[m][g];
            Ints dot = Ints{} + (KIND == INT4 ? x.sum : x.sum * 16);
            for (int i = 0; i < GROUP; ++i) dot += reinterpret_cast<Ints>(w[i / 4] >> i % 4 * 8 & 255u) * int32_t(x.values[i]);
            sums[m] = fma(floats(dot), scales * x.scale, sums[m]);
        }
    }
#endif

    const Element* rows_[M];
};

// Up to STREAMS tiles of a matrix, and where those begin that will be read after them.
struct Tiles {
    int count = 0, which[STREAMS];
    const uint8_t *now[STREAMS], *next[STREAMS];

    void add(int tile, const uint8_t* here, const uint8_t* then) { which[count] = tile, now[count] = here, next[count++] = then; }
};

// Products of tiles with M rows, out[tile][row]. `far`: the tiles come from memory, not from a cache; then what is read AHEAD bytes
// later is asked for, as the processor's own reading ahead ends with each page.
#if defined(__AVX2__) && !defined(__AVX512F__)
// T tiles from `t` on.
template <int KIND, int M, int T>
__attribute__((always_inline)) inline void multiply_some(const Product<KIND, M>& product, const Tiles& tiles, int t, bool far, int groups, Floats* out) {
    typedef Product<KIND, M> Each;
    constexpr int SIZE = Each::SIZE, SUMS = Each::SUMS;
    const int turn = std::max(0, groups - Each::EARLY);  // from this group on the next tiles are asked for
    const uint8_t *at[T], *then[T];
    for (int j = 0; j < T; ++j) {
        const int after = t + T + j;
        at[j] = tiles.now[t + j], then[j] = (after < tiles.count ? tiles.now[after] : tiles.next[after - tiles.count]) + (turn + Each::EARLY - groups) * SIZE;
    }
    __m256 sums[2 * T][SUMS];
    for (auto& half : sums) std::fill(half, half + SUMS, _mm256_setzero_ps());
    for (int g = 0; g < groups; ++g) {
#pragma GCC unroll 2
        for (int j = 0; j < T; ++j)
            for (int i = 0; far && i < SIZE; i += 64) __builtin_prefetch((g < turn ? at[j] + Each::LATER : then[j] + (g - turn) * SIZE) + i);
        product.template add<T>(at, g, sums);
#pragma GCC unroll 2
        for (int j = 0; j < T; ++j) at[j] += SIZE;
    }
    for (int half = 0; half < 2 * T; ++half)
        for (int m = 0; m < M; ++m)
            _mm256_storeu_ps(reinterpret_cast<float*>(out + (t + half / 2) * M + m) + 8 * (half % 2), KIND < INT8 ? _mm256_add_ps(sums[half][m], sums[half][SUMS - M + m]) : sums[half][m]);
}

template <int KIND, int M>
__attribute__((noinline)) void multiply_rows(const Tiles& tiles, bool far, int groups, const Rows& a, const int64_t* rows, Floats* out) {
    constexpr int T = tiles_at_once(KIND, M);
    const Product<KIND, M> product(a, rows);
    int t = 0;
    for (; t + T <= tiles.count; t += T) multiply_some<KIND, M, T>(product, tiles, t, far, groups, out);
    for (; t < tiles.count; ++t) multiply_some<KIND, M, 1>(product, tiles, t, far, groups, out);
}
#else
// The tiles are read side by side, a group of each in turn: one stream of reads does not keep the memory busy.
template <int KIND, int M>
__attribute__((noinline)) void multiply_rows(const Tiles& tiles, bool far, int groups, const Rows& a, const int64_t* rows, Floats* out) {
    typedef Product<KIND, M> Each;
    constexpr int SIZE = Each::SIZE;
    [[maybe_unused]] constexpr int MOST = tiles_at_once(KIND, M);
    const int count = tiles.count;
    const Each product(a, rows);
    Floats sums[STREAMS * Each::SUMS];
    std::fill(sums, sums + count * Each::SUMS, Floats{});
    for (int g = 0; g < groups; ++g) {
        const int64_t place = int64_t(g) * SIZE, begun = g + Each::EARLY - groups;
        for (int t = 0; far && begun >= 0 && t < count; ++t)
            for (int i = 0; i < SIZE; i += 64) __builtin_prefetch(tiles.next[t] + begun * SIZE + i);
        int t = 0;
        auto some = [&](auto number) __attribute__((always_inline)) {
            constexpr int T = decltype(number)::value;
            for (; t + T <= count; t += T) {
                const uint8_t* at[T];
#pragma GCC unroll 8
                for (int j = 0; j < T; ++j) at[j] = tiles.now[t + j] + place;
                product.template add<T>(at, far, g, sums + t * Each::SUMS);
            }
        };
        some(std::integral_constant<int, MOST>{});
        if constexpr (MOST > 2) some(std::integral_constant<int, 2>{});
        if constexpr (MOST > 1) some(std::integral_constant<int, 1>{});
    }
    for (int t = 0; t < count; ++t)
        for (int m = 0; m < M; ++m) out[t * M + m] = KIND < INT8 ? sums[t * 2 * M + m] + sums[t * 2 * M + M + m] : sums[t * M + m];
}
#endif

typedef void (*MultiplyRows)(const Tiles& tiles, bool far, int groups, const Rows& a, const int64_t* rows, Floats* out);

// Out of line: one copy of each product serves all callers. `rows`: how many it takes; no more than `left`, or with the
// others repeated.
template <int KIND>
inline MultiplyRows choose_product(int left, int& rows) {
    constexpr int MOST = MOST_ROWS;
    // Of some rows more than one call takes, each takes half.
    rows = left <= MOST || left > 3 * MOST / 2 ? std::min(left, MOST) : (left + 1) / 2;
    if constexpr (MOST == 8) {
        if (rows > 6) {
            rows = 8;
            return multiply_rows<KIND, 8>;
        }
        if (rows > 4) return rows == 6 ? multiply_rows<KIND, 6> : multiply_rows<KIND, 5>;
    }
    return rows == 4 ? multiply_rows<KIND, 4> : rows == 3 ? multiply_rows<KIND, 3> : rows == 2 ? multiply_rows<KIND, 2> : multiply_rows<KIND, 1>;
}
inline MultiplyRows choose_product(int kind, int left, int& rows) {
    return kind == INT4 ? choose_product<INT4>(left, rows) : kind == INT8 ? choose_product<INT8>(left, rows)
         : kind == BF16 ? choose_product<BF16>(left, rows) : choose_product<FLOAT>(left, rows);
}

inline Floats bias_of(const Matrix& w, int copy, int tile) {
    Floats bias{};
    std::memcpy(&bias, w.bias + int64_t(copy) * w.outputs + tile * TILE, 4 * std::min(TILE, w.outputs - tile * TILE));
    return bias;
}

// emit(i, j, outputs of the j-th tile) for the activation rows rows[0..count), bias added.
template <class Emit>
inline void multiply(const Matrix& w, int copy, const Tiles& tiles, bool far, const Rows& a, const int64_t* rows, int count, Emit emit) {
    for (int first = 0, at_once; first < count; first += at_once) {
        Floats out[STREAMS * MOST_ROWS];
        int64_t list[MOST_ROWS];
        const MultiplyRows product = choose_product(w.kind, count - first, at_once);
        for (int m = 0; m < at_once; ++m) list[m] = rows[std::min(first + m, count - 1)];
        product(tiles, far, w.groups(), a, list, out);
        for (int m = 0; m < std::min(at_once, count - first); ++m)
            for (int j = 0; j < tiles.count; ++j) {
                const Floats v = out[j * at_once + m];
                emit(first + m, j, w.bias ? v + bias_of(w, copy, tiles.which[j]) : v);
            }
    }
}

// The same for the tiles [first, last), set by set: emit(i, tile, its outputs). `after`: where the tiles begin that will be read
// then, if not the following ones.
template <class Emit>
inline void multiply_all(const Matrix& w, int copy, int first, int last, const uint8_t* after, bool far, const Rows& a, const int64_t* rows, int count, Emit emit) {
    const int64_t size = tile_bytes(w.kind, w.inputs);
    for (int t = first; t < last; t += STREAMS) {
        Tiles tiles;
        const uint8_t* then = t + STREAMS < last || !after ? w.tile(copy, t + STREAMS) : after;
        for (int j = 0; j < std::min(STREAMS, last - t); ++j) tiles.add(t + j, w.tile(copy, t + j), then + j * size);
        multiply(w, copy, tiles, far, a, rows, count, [&](int i, int j, Floats v) { emit(i, t + j, v); });
    }
}

}  // namespace glasklar
