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
constexpr int STREAMS = 8, AHEAD = 512;

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
    // Two chains: their order does not matter to integers, and one would wait for itself.
    __m512i even = _mm512_set1_epi32(KIND == INT4 ? sum : sum * 16), odd = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        even = _mm512_dpbusd_epi32(even, reinterpret_cast<__m512i>(w[i]), _mm512_set1_epi32(int(four_bytes(x + 4 * i))));
        odd = _mm512_dpbusd_epi32(odd, reinterpret_cast<__m512i>(w[i + 1]), _mm512_set1_epi32(int(four_bytes(x + 4 * i + 4))));
    }
    return reinterpret_cast<Ints>(_mm512_add_epi32(even, odd));
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

// M rows of activations, which may be wider than the matrix, against one group of a tile.
template <int KIND, int M>
class Product {
   public:
    static constexpr int SIZE = KIND == INT4 ? 288 : KIND == INT8 ? 544 : KIND == BF16 ? 1024 : 2048;  // bytes of a group
    // Even and odd steps of floats are summed apart: two chains hide the latency when there are few rows.
    static constexpr int SUMS = KIND < INT8 ? 2 * M : M;

    Product(const Rows& a, const int64_t* rows) : a_(a) {
        for (int m = 0; m < M; ++m) values_[m] = rows[m] * a.width, groups_[m] = rows[m] * a.groups();
    }

    __attribute__((always_inline)) void add_group(const uint8_t* at, int g, Floats* sums) const {
        if constexpr (KIND < INT8) add_floats(at, g, sums);
        else add_integers(at, g, sums);
    }

   private:
    void add_floats(const uint8_t* at, int g, Floats* sums) const {
        constexpr int STEP = KIND == FLOAT ? 1 : 2;  // inputs a vector
        Floats now[SUMS];
        std::memcpy(now, sums, sizeof now);
        for (int k = g * GROUP; k < (g + 1) * GROUP; k += 2 * STEP, at += 128) {
            const Words w0 = load_as<Words>(at), w1 = load_as<Words>(at + 64);
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                if constexpr (KIND == FLOAT) {
                    const float* x = a_.wide + values_[m] + k;
                    now[2 * m] = fma(reinterpret_cast<Floats>(w0), spread(x[0]), now[2 * m]);
                    now[2 * m + 1] = fma(reinterpret_cast<Floats>(w1), spread(x[1]), now[2 * m + 1]);
                } else {
                    const Narrow* x = a_.narrow + values_[m] + k;
                    now[2 * m] = dot_pairs(now[2 * m], pairs(w0), spread_pair(x));
                    now[2 * m + 1] = dot_pairs(now[2 * m + 1], pairs(w1), spread_pair(x + 2));
                }
            }
        }
        std::memcpy(sums, now, sizeof now);
    }

    void add_integers(const uint8_t* at, int g, Floats* sums) const {
        const Floats scales = half_scales(at + SIZE - 2 * TILE);
        for (int part = 0; part < PARTS; ++part) {
            const int place = part * 4 * PART;
            PartWords w[8];
            for (int i = 0; i < (KIND == INT4 ? 4 : 8); ++i) {
                w[i] = load_as<PartWords>(at + 64 * i + place);
                if constexpr (KIND == INT4) w[i + 4] = w[i] >> 4 & 0x0f0f0f0fu, w[i] &= 0x0f0f0f0fu;
            }
            const PartFloats scale = load_as<PartFloats>(reinterpret_cast<const uint8_t*>(&scales) + place);
#pragma GCC unroll 4
            for (int m = 0; m < M; ++m) {
                const PartInts dot = dot_group<KIND>(w, a_.bytes + values_[m] + g * GROUP, a_.sums[groups_[m] + g]);
                uint8_t* to = reinterpret_cast<uint8_t*>(sums + m) + place;
                const PartFloats sum = fma(__builtin_convertvector(dot, PartFloats), scale * a_.scales[groups_[m] + g], load_as<PartFloats>(to));
                std::memcpy(to, &sum, sizeof sum);
            }
        }
    }

    Rows a_;
    int64_t values_[M], groups_[M];
};

// Up to STREAMS tiles of a matrix, and where those begin that will be read after them.
struct Tiles {
    int count = 0, which[STREAMS];
    const uint8_t *now[STREAMS], *next[STREAMS];

    void add(const Matrix& w, int copy, int tile, const uint8_t* then) {
        which[count] = tile, now[count] = w.tile(copy, tile), next[count++] = then;
    }
    // Asks for what is read AHEAD bytes after a group of `size` bytes. The processor's own reading ahead ends with each page.
    void prefetch(int t, int g, int groups, int size) const {
        const int early = (AHEAD + size - 1) / size;
        const uint8_t* at = g + early < groups ? now[t] + int64_t(g + early) * size : next[t] + int64_t(g + early - groups) * size;
        for (int i = 0; i < size; i += 64) __builtin_prefetch(at + i);
    }
};

// Products of tiles with M rows, out[tile][row]. `far`: the tiles come from memory, not from a cache. Then they are read side by
// side, a group of each in turn: one stream of reads does not keep the memory busy.
template <int KIND, int M>
__attribute__((noinline)) void multiply_rows(const Tiles& tiles, bool far, int groups, const Rows& a, const int64_t* rows, Floats* out) {
    typedef Product<KIND, M> Each;
    const int count = tiles.count;
    const Each product(a, rows);
    Floats sums[STREAMS * Each::SUMS];
    std::fill(sums, sums + count * Each::SUMS, Floats{});
    auto add = [&](int t, int g) __attribute__((always_inline)) { product.add_group(tiles.now[t] + int64_t(g) * Each::SIZE, g, sums + t * Each::SUMS); };
    if (far) {
        for (int g = 0; g < groups; ++g)
            for (int t = 0; t < count; ++t) tiles.prefetch(t, g, groups, Each::SIZE), add(t, g);
    } else {
        for (int t = 0; t < count; ++t)
            for (int g = 0; g < groups; ++g) add(t, g);
    }
    for (int i = 0; i < count * M; ++i) out[i] = KIND < INT8 ? sums[2 * i] + sums[2 * i + 1] : sums[i];
}

#if defined(__AVX512VNNI__)
// The same for eight rows, two tiles at a time (the last one of an odd number is taken twice): an activation is loaded once for
// both, and all sums of a group stay in registers. What a dot is made of, and in which order groups are added, is as in `Product`.
constexpr int BLOCK = 8;

// A group of eight rows: what its values are multiplied with, side by side, so that addresses leave registers for the rows.
struct BlockGroup {
    int32_t sums[BLOCK];
    float scales[BLOCK];
};

template <int KIND>
inline void add_block(const uint8_t* first, const uint8_t* second, const int8_t* const* bytes, int64_t at, const BlockGroup& group, Floats* to) {
    constexpr int SIZE = Product<KIND, BLOCK>::SIZE;
    for (int i = 0; i < SIZE; i += 64) __builtin_prefetch(first + AHEAD + i), __builtin_prefetch(second + AHEAD + i);
    __m512i dot0[BLOCK], dot1[BLOCK];
#pragma GCC unroll 8
    for (int m = 0; m < BLOCK; ++m) dot0[m] = dot1[m] = _mm512_set1_epi32(group.sums[m]);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        const int quad = KIND == INT4 ? 64 * (i % 4) : 64 * i;
        Words w0 = load_as<Words>(first + quad), w1 = load_as<Words>(second + quad);
        if constexpr (KIND == INT4) {
            if (i >= 4) w0 = w0 >> 4, w1 = w1 >> 4;
            w0 &= 0x0f0f0f0fu, w1 &= 0x0f0f0f0fu;
        }
#pragma GCC unroll 8
        for (int m = 0; m < BLOCK; ++m) {
            const __m512i x = _mm512_set1_epi32(int(four_bytes(bytes[m] + at + 4 * i)));
            dot0[m] = _mm512_dpbusd_epi32(dot0[m], reinterpret_cast<__m512i>(w0), x);
            dot1[m] = _mm512_dpbusd_epi32(dot1[m], reinterpret_cast<__m512i>(w1), x);
        }
    }
    const Floats scale0 = half_scales(first + SIZE - 2 * TILE), scale1 = half_scales(second + SIZE - 2 * TILE);
#pragma GCC unroll 8
    for (int m = 0; m < BLOCK; ++m) {
        const Floats scale = spread(group.scales[m]);
        to[m] = fma(__builtin_convertvector(reinterpret_cast<Ints>(dot0[m]), Floats), scale0 * scale, to[m]);
        to[BLOCK + m] = fma(__builtin_convertvector(reinterpret_cast<Ints>(dot1[m]), Floats), scale1 * scale, to[BLOCK + m]);
    }
}

template <int KIND>
__attribute__((noinline)) void multiply_block(const Tiles& tiles, bool, int groups, const Rows& a, const int64_t* rows, Floats* out) {
    constexpr int SIZE = Product<KIND, BLOCK>::SIZE, SOME = 64;
    const int count = tiles.count;
    const int8_t* bytes[BLOCK];
    for (int m = 0; m < BLOCK; ++m) bytes[m] = a.bytes + rows[m] * a.width;
    std::fill(out, out + round_up(count, 2) * BLOCK, Floats{});
    BlockGroup some[SOME];
    for (int from = 0; from < groups; from += SOME) {
        const int to = std::min(groups, from + SOME);
        for (int m = 0; m < BLOCK; ++m)
            for (int g = from; g < to; ++g) {
                const int64_t at = rows[m] * a.groups() + g;
                some[g - from].sums[m] = KIND == INT4 ? a.sums[at] : a.sums[at] * 16, some[g - from].scales[m] = a.scales[at];
            }
        for (int g = from; g < to; ++g) {
            const int64_t place = int64_t(g) * SIZE;
            for (int t = 0; t < count; t += 2) {
                const int other = std::min(t + 1, count - 1);
                add_block<KIND>(tiles.now[t] + place, tiles.now[other] + place, bytes, g * GROUP, some[g - from], out + t * BLOCK);
            }
        }
    }
}
#endif

typedef void (*MultiplyRows)(const Tiles& tiles, bool far, int groups, const Rows& a, const int64_t* rows, Floats* out);

// Out of line: one copy of each product serves all callers. `rows`: how many it takes; no more than `left`, or with the
// others repeated.
template <int KIND>
inline MultiplyRows choose_product(int left, int& rows) {
#if defined(__AVX512VNNI__)
    if constexpr (KIND >= INT8)
        if (left > BLOCK / 2) {
            rows = BLOCK;
            return multiply_block<KIND>;
        }
#endif
#if defined(__AVX512F__)
    if constexpr (KIND < INT8)
        if (left >= 8) {
            rows = 8;
            return multiply_rows<KIND, 8>;
        }
#endif
    rows = std::min(left, 4);
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
        Floats out[STREAMS * 8];
        int64_t list[8];
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
        for (int j = 0; j < std::min(STREAMS, last - t); ++j) tiles.add(w, copy, t + j, then + j * size);
        multiply(w, copy, tiles, far, a, rows, count, [&](int i, int j, Floats v) { emit(i, t + j, v); });
    }
}

}  // namespace glasklar
