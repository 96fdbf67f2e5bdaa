// Attention of one query over cached rows, several heads at a time: heads that share a key read it once.
//
// Keys come in spans that begin at fixed positions. Each span is summed on its own and the spans are joined in order, so that
// the result does not depend on who computes which span, nor on how the prompt was cut.
//
// Rows are multiplied as 16-bit integers with a scale: sums of integers are exact and take two products a lane. A row and a query
// have the Euclidean length REACH then, so that no sum leaves 32 bits (Cauchy and Schwarz). The cache holds the integers: as
// many bytes as bf16 would take, and finer.
#pragma once

#include <utility>
#include <vector>

#include "lanes.hpp"

namespace glasklar {

constexpr int SPAN = 256, HEADS = 8;
constexpr float REACH = 32767;

// Sums of the lanes of 16 vectors, as one vector: pairs, then pairs of pairs, and so on.
template <class V>
inline V sums_of(const V* v) {
#define JOIN(a, b, first, second) \
    (__builtin_shufflevector(a, b, first) + __builtin_shufflevector(a, b, second))
#define EVEN 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30
#define ODD 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31
#define EVEN2 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define ODD2 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define EVEN4 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27
#define ODD4 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31
#define LOW 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define HIGH 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
    V a[8], b[4], c[2];
    for (int i = 0; i < 8; ++i) a[i] = JOIN(v[2 * i], v[2 * i + 1], EVEN, ODD);
    for (int i = 0; i < 4; ++i) b[i] = JOIN(a[2 * i], a[2 * i + 1], EVEN2, ODD2);
    for (int i = 0; i < 2; ++i) c[i] = JOIN(b[2 * i], b[2 * i + 1], EVEN4, ODD4);
    return JOIN(c[0], c[1], LOW, HIGH);
#undef JOIN
#undef EVEN
#undef ODD
#undef EVEN2
#undef ODD2
#undef EVEN4
#undef ODD4
#undef LOW
#undef HIGH
}

// 64 bytes of a row, zeros beyond its end.
template <class T>
inline Words part(const T* p, int left) {
    constexpr int whole = 64 / sizeof(T);
    if (left >= whole) return load_as<Words>(p);
    Words w{};
    if (left > 0) std::memcpy(&w, p, left * sizeof(T));
    return w;
}

// Lanes are heads times keys: lane h * KEYS + j is head h and key j.
template <int H> constexpr int KEYS = LANES / H;

template <int N, class V, int... I>
inline V repeat(V v, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(v, v, (I % N)...);
}
// A value for each key, whatever the head (LANES of them are read), or the part of it from a lane on; a value for each head, whatever
// the key.
template <int H>
inline Floats by_key(const float* p) { return repeat<KEYS<H>>(load(p), std::make_integer_sequence<int, LANES>()); }
template <int H>
inline Near by_key(const float* p, int from) {
    if constexpr (KEYS<H> > NEAR) return near_at(p + from);
    return repeat<std::min(KEYS<H>, NEAR)>(near_at(p), std::make_integer_sequence<int, NEAR>());
}
template <int H>
inline Floats by_head(const float* p) {
    Floats v;
    for (int lane = 0; lane < LANES; ++lane) v[lane] = p[lane / KEYS<H>];
    return v;
}
// Over the keys of a vector, in order.
template <int H, class Join>
inline void over_keys(Floats v, float* by_head, Join join) {
    for (int h = 0; h < H; ++h) {
        by_head[h] = v[h * KEYS<H>];
        for (int j = 1; j < KEYS<H>; ++j) by_head[h] = join(by_head[h], v[h * KEYS<H> + j]);
    }
}
inline float add(float a, float b) { return a + b; }
inline float most(float a, float b) { return a < b ? b : a; }  // NaN stays if it comes first

// What one span, or several joined, give: the largest score, the sum of the weights, and the weighted sum of the values.
struct Mixed {
    float top[HEADS], total[HEADS];
    float* values;  // [HEADS, width]
    int width;      // a multiple of 32

    void clear() {
        std::fill(top, top + HEADS, -INFINITY);
        std::fill(total, total + HEADS, 0.0f);
        std::fill(values, values + HEADS * width, 0.0f);
    }
    void join(const Mixed& next, int heads) {
        for (int h = 0; h < heads; ++h) {
            float peak = std::max(top[h], next.top[h]);
            float old = exp1(top[h] - peak), fresh = exp1(next.top[h] - peak);
            total[h] = total[h] * old + next.total[h] * fresh;
            top[h] = peak;
            float* mine = values + h * width;
            const float* other = next.values + h * width;
            for (int c = 0; c < width; c += NEAR) put(mine + c, fma(near_at(other + c), spread_as<Near>(fresh), near_at(mine + c) * old));
        }
    }
    // The result of head h into `out`.
    void finish(int h, float* out, int count) const {
        for (int c = 0; c < count; ++c) out[c] = values[h * width + c] / total[h];
    }
};

// A span's scores, [blocks of KEYS, H, KEYS], of which keys [from, to) count, become weights: exp(score - the head's largest).
template <int H>
inline void weigh(Floats* scores, int from, int to, Mixed& out) {
    constexpr int K = KEYS<H>;
    const int first = from / K, last = (to - 1) / K;
    for (int i : {first, last})
        for (int lane = 0; lane < LANES; ++lane)
            if (const int key = i * K + lane % K; key < from || key >= to) scores[i][lane] = -INFINITY;
    float* at = reinterpret_cast<float*>(scores);
    alignas(64) float peaks[LANES], totals[LANES];
    for (int part = 0; part < LANES; part += NEAR) {
        Near peak = spread_as<Near>(-INFINITY);
        for (int i = first; i <= last; ++i) peak = larger(peak, near_at(at + i * LANES + part));
        put(peaks + part, peak);
    }
    over_keys<H>(load(peaks), out.top, most);
    store(peaks, by_head<H>(out.top));
    for (int part = 0; part < LANES; part += NEAR) {
        const Near peak = near_at(peaks + part);
        Near total{};
        for (int i = first; i <= last; ++i) {
            const Near weight = exp(near_at(at + i * LANES + part) - peak);
            put(at + i * LANES + part, weight), total += weight;
        }
        put(totals + part, total);
    }
    over_keys<H>(load(totals), out.total, add);
}

// --- rows of 16-bit integers ------------------------------------------------------------------------------------------------

// Rows of a span: value = integer * scale. LANES of them lie side by side.
struct Fixed {
    const int16_t* const* blocks;
    const float* scales;
    int row;  // from a row to the next

    const int16_t* at(int i) const { return blocks[i / LANES] + i % LANES * row; }
};

// Queries of H heads: [width / 32, H, 32].
struct FixedQueries {
    int16_t* integers;
    float* scales;
};

// Of 2 * NEAR values at p those at even places and those at odd ones; zeros beyond `left`.
inline void two(const float* p, int left, Near& even, Near& odd) {
    alignas(64) float padded[2 * NEAR];
    if (left < 2 * NEAR) {
        for (int i = 0; i < 2 * NEAR; ++i) padded[i] = i < left ? p[i] : 0.0f;
        p = padded;
    }
    const Near a = near_at(p), b = near_at(p + NEAR);
#if defined(__FMA__) && !defined(__AVX512F__)
    const __m256 evens = _mm256_shuffle_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), 0x88), odds = _mm256_shuffle_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), 0xdd);
    even = reinterpret_cast<Near>(_mm256_permute4x64_pd(_mm256_castps_pd(evens), 0xd8)), odd = reinterpret_cast<Near>(_mm256_permute4x64_pd(_mm256_castps_pd(odds), 0xd8));
#else
    even = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    odd = __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#endif
}

// Stores x as integers, 32 of them every `step`, zeros after the last; returns their scale, in which ends up what is not finite.
inline float store_fixed(const float* x, int width, int16_t* to, int step) {
    constexpr int PARTS = LANES / NEAR;
    Near evens[PARTS] = {}, odds[PARTS] = {}, even, odd;
    for (int k = 0; k < width; k += 32)
#pragma GCC unroll 2
        for (int p = 0; p < PARTS; ++p) {
            two(x + k + p * 2 * NEAR, width - k - p * 2 * NEAR, even, odd);
            evens[p] = fma(even, even, evens[p]), odds[p] = fma(odd, odd, odds[p]);
        }
    alignas(64) float squares[LANES];
    for (int p = 0; p < PARTS; ++p) put(squares + p * NEAR, evens[p] + odds[p]);
    const float length = std::sqrt(sum_at(squares));
    const Near inverse = spread_as<Near>(length > 0 ? REACH / length : 0);
    for (int k = 0; k < width; k += 32, to += step)
#pragma GCC unroll 2
        for (int p = 0; p < PARTS; ++p) {
            two(x + k + p * 2 * NEAR, width - k - p * 2 * NEAR, even, odd);
            const auto integers = shorts(nearest(even, inverse), nearest(odd, inverse));
            std::memcpy(to + p * 2 * NEAR, &integers, sizeof integers);
        }
    return length / REACH;
}

// Rows that will be read next. The memory is asked for their lines evenly while these ones are multiplied: more at a time would fill
// the core's places for lines on their way, and what is near would wait for one as well.
struct Ahead {
    const uint8_t* const* row;
    int rows, bytes, share;  // rows still to come; a share: lines to ask for while LANES rows meet one block of heads
    const uint8_t *at = nullptr, *end = nullptr;

    void ask(int parts) {  // one of so many of a share
        const uint8_t *line = at, *stop = end;
        for (int left = (share + parts - 1) / parts; left > 0; --left, line += 64) {
            if (line >= stop) {
                if (rows == 0) break;
                line = *row++, stop = line + bytes, --rows;
            }
            __builtin_prefetch(line);
        }
        at = line, end = stop;
    }
};

// A row of the cache has one part (MLA), or for each head a key and its values.
//
// Parts of 16-bit integers, rounded up to 32 of them. The 32 bits of their scale, a float, are the lowest ones of the first 32
// integers: so a part takes no more than its values, and the products need not know of it.
struct Short {
    int16_t bits;
};

// Parts of int8: values, the scale as float, and a shift for each group of 32 values: value = int8 * 2^shift * scale. Shifted, they
// are integers of the length that products want.
struct Small {
    int8_t bits;
};
constexpr float SMALL_REACH = 31000;  // leaves room for what rounding adds: 32 values by 1/254 of their largest

template <class T>
inline int part_size(int width) { return width; }
template <>
inline int part_size<Short>(int width) { return round_up(width, 32); }
template <>
inline int part_size<Small>(int width) { return round_up(width, 4) + 4 + round_up((width + 31) / 32, 4); }

template <class T>
inline void store_part(const float* x, int width, T* to) {
    std::copy(x, x + width, to);
}
template <>
inline void store_part(const float* x, int width, Short* to) {
    const float scale = store_fixed(x, width, &to->bits, 32);
    uint32_t bits;
    std::memcpy(&bits, &scale, 4);
    for (int i = 0; i < 32; ++i) to[i].bits = int16_t((to[i].bits & ~1) | int(bits >> i & 1));
}
inline float scale_of(const Short* part) {
    const Shorts first = load_as<Shorts>(part);
    uint32_t bits = 0;
#if defined(__AVX512BW__)
    bits = _mm512_test_epi16_mask(reinterpret_cast<__m512i>(first), _mm512_set1_epi16(1));
#elif defined(__AVX2__)
    __m256i half[2];  // the lowest bits become signs, those the bits of a mask
    std::memcpy(half, &first, sizeof half);
    const __m256i signs = _mm256_packs_epi16(_mm256_slli_epi16(half[0], 15), _mm256_slli_epi16(half[1], 15));
    bits = uint32_t(_mm256_movemask_epi8(_mm256_permute4x64_epi64(signs, 0xd8)));
#else
    for (int i = 0; i < 32; ++i) bits |= uint32_t(first[i] & 1) << i;
#endif
    float scale;
    std::memcpy(&scale, &bits, 4);
    return scale;
}
template <>
inline void store_part(const float* x, int width, Small* to) {
    Floats squares{};
    auto at = [&](int k) { return reinterpret_cast<Floats>(part(x + k, width - k)); };
    for (int k = 0; k < width; k += LANES) squares = fma(at(k), at(k), squares);
    const float length = std::sqrt(sum(squares)), scale = length / SMALL_REACH, inverse = length > 0 ? SMALL_REACH / length : 0;
    Small* after = to + round_up(width, 4);
    std::memcpy(after, &scale, 4);
    for (int k = 0; k < width; k += 32) {
        const Floats a = at(k), b = k + LANES < width ? at(k + LANES) : Floats{};
        const float top = largest(larger(magnitude(a), magnitude(b))) * inverse;
        int shift = 0;
        while (top > float(127 << shift)) ++shift;
        after[4 + k / 32].bits = int8_t(shift);
        const Floats factor = spread(inverse / float(1 << shift));
        const Words low = nearest(a, factor), high = nearest(b, factor);
        for (int i = 0; i < std::min(32, width - k); ++i) to[k + i].bits = int8_t(i < LANES ? low[i] : high[i - LANES]);
    }
}

// Makes the integers of a part, returns their scale.
inline float widen(const Small* part, int width, int16_t* to) {
    const Small* after = part + round_up(width, 4);
    int k = 0;
    for (; k + 32 <= width; k += 32) store(to + k, shorts(load_as<Bytes>(part + k), after[4 + k / 32].bits));
    if (k < width) {
        Bytes rest{};
        std::memcpy(&rest, part + k, width - k);
        store(to + k, shorts(rest, after[4 + k / 32].bits));
    }
    float scale;
    std::memcpy(&scale, after, 4);
    return scale;
}

#if defined(__AVX2__) && !defined(__AVX512BW__)
// Sixteen registers of sixteen integers: eight sums at a time stay in them. Sums of integers are the same in any order.
inline __m256i load_half(const int16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline __m256i add_pairs(__m256i c, __m256i a, __m256i b) {
    c = _mm256_add_epi32(c, _mm256_madd_epi16(a, b));
    asm("" : "+x"(c));  // else compilers add up last what they should add at once, and have no room for it
    return c;
}
// Sums of the lanes of each of eight vectors.
inline __m256i sums_of_eight(const __m256i* v) {
    const __m256i a = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
    const __m256i b = _mm256_hadd_epi32(_mm256_hadd_epi32(v[4], v[5]), _mm256_hadd_epi32(v[6], v[7]));
    return _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
}

// The products of H queries, [width / 32, H, 32], with KEYS keys.
template <int H>
__attribute__((always_inline)) inline Ints dot_block(const int16_t* queries, const int16_t* keys, int row, int width) {
    constexpr int K = KEYS<H>, SOME_KEYS = K < 8 ? K : 8, SOME_HEADS = 8 / SOME_KEYS;
    __m256i dots[2];
    for (int half = 0; half < 2; ++half) {
        const int16_t *query = queries + half * 8 / K * 32, *key = keys + half * 8 % K * row;
        __m256i sums[8];
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) sums[i] = _mm256_setzero_si256();
        for (int k = 0; k < width; k += 32, query += H * 32, key += 32)
#pragma GCC unroll 2
            for (int part = 0; part < 32; part += 16) {
                __m256i q[SOME_HEADS];
#pragma GCC unroll 4
                for (int h = 0; h < SOME_HEADS; ++h) q[h] = load_half(query + h * 32 + part);
#pragma GCC unroll 8
                for (int j = 0; j < SOME_KEYS; ++j) {
                    const __m256i mine = load_half(key + j * row + part);
#pragma GCC unroll 4
                    for (int h = 0; h < SOME_HEADS; ++h) sums[h * SOME_KEYS + j] = add_pairs(sums[h * SOME_KEYS + j], q[h], mine);
                }
            }
        dots[half] = sums_of_eight(sums);
    }
    return load_as<Ints>(dots);
}

// The 32 values at column c of the rows [from, to), summed by each head's weights, [blocks of KEYS, H, KEYS]. Block by block of LANES
// rows, as the near cache does not hold the lines of a whole span.
template <int H>
__attribute__((always_inline)) inline void sum_columns(const Fixed& values, int c, const int16_t* weights, int from, int to, Ints (*sums)[2]) {
    constexpr int K = KEYS<H>, SOME = H < 4 ? H : 4;
    __m256i all[2][H][2];
    for (auto& part : all)
        for (auto& head : part) head[0] = head[1] = _mm256_setzero_si256();
    for (int begin = from / LANES * LANES; begin < to; begin += LANES) {
        const int first_pair = begin < from ? (from - begin) / 2 : 0, last_pair = (std::min(to - begin, LANES) + 1) / 2;
        const int16_t *rows = values.at(begin) + c, *block = weights + begin / K * LANES;
        for (int part = 0; part < 2; ++part)
            for (int first = 0; first < H; first += SOME) {
                __m256i low[SOME], high[SOME];
#pragma GCC unroll 4
                for (int h = 0; h < SOME; ++h) low[h] = all[part][first + h][0], high[h] = all[part][first + h][1];
                for (int pair = first_pair; pair < last_pair; ++pair) {
                    const int16_t *at = rows + int64_t(2 * pair) * values.row + part * 16, *two = block + 2 * pair / K * LANES + 2 * pair % K + first * K;
                    const __m256i a = load_half(at), b = load_half(at + values.row);
                    const __m256i lows = _mm256_unpacklo_epi16(a, b), highs = _mm256_unpackhi_epi16(a, b);
#pragma GCC unroll 4
                    for (int h = 0; h < SOME; ++h) {
                        int32_t bits;
                        std::memcpy(&bits, two + h * K, 4);
                        const __m256i weight = _mm256_set1_epi32(bits);
                        low[h] = add_pairs(low[h], lows, weight), high[h] = add_pairs(high[h], highs, weight);
                    }
                }
#pragma GCC unroll 4
                for (int h = 0; h < SOME; ++h) all[part][first + h][0] = low[h], all[part][first + h][1] = high[h];
            }
    }
    for (int part = 0; part < 2; ++part)
        for (int h = 0; h < H; ++h) {  // columns 0-3, 8-11, and 4-7, 12-15
            const __m256i low = all[part][h][0], high = all[part][h][1];
            const __m256i both[2] = {_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31)};
            sums[h][part] = load_as<Ints>(both);
        }
}
#else
// The products of H queries, [width / 32, H, 32], with KEYS keys.
template <int H>
__attribute__((always_inline)) inline Ints dot_block(const int16_t* query, const int16_t* key, int row, int width) {
    constexpr int K = KEYS<H>;
    Ints total[LANES] = {};
    for (int k = 0; k < width; k += 32, key += 32) {
        Shorts part_of[K];
#pragma GCC unroll 16
        for (int j = 0; j < K; ++j) part_of[j] = load_as<Shorts>(key + j * row);
#pragma GCC unroll 8
        for (int h = 0; h < H; ++h, query += 32) {
            Shorts q = load_as<Shorts>(query);
            keep(q);
#pragma GCC unroll 16
            for (int j = 0; j < K; ++j) total[h * K + j] = dot_shorts(total[h * K + j], q, part_of[j]);
        }
    }
    return sums_of(total);
}

// The 32 values at column c of the rows [from, to), summed by each head's weights, [blocks of KEYS, H, KEYS].
template <int H>
__attribute__((always_inline)) inline void sum_columns(const Fixed& values, int c, const int16_t* weights, int from, int to, Ints (*sums)[2]) {
    constexpr int K = KEYS<H>;
    Ints low[H] = {}, high[H] = {};
    for (int s = from / 2 * 2; s < to;) {
        const int16_t* at = values.at(s) + c;
        for (const int stop = std::min(to, s / LANES * LANES + LANES); s < stop; s += 2, at += 2 * values.row) {
            Shorts a = load_as<Shorts>(at), b = load_as<Shorts>(at + values.row);
            keep(a), keep(b);
            const Shorts lows = zip_low(a, b), highs = zip_high(a, b);
            const int16_t* pair = weights + s / K * LANES + s % K;
#pragma GCC unroll 8
            for (int h = 0; h < H; ++h) {
                Shorts weight = spread_two(pair + h * K);
                keep(weight);
                low[h] = dot_shorts(low[h], lows, weight);
                high[h] = dot_shorts(high[h], highs, weight);
            }
        }
    }
    for (int h = 0; h < H; ++h) {  // columns 0-3, 8-11, ..., and 4-7, 12-15, ...
        const Ints a = low[h], b = high[h];
        sums[h][0] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        sums[h][1] = __builtin_shufflevector(a, b, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    }
}
#endif

// Scores of the blocks that hold keys [from, to). The lowest bits of a part, and what lies after its values, count for nothing.
template <int H>
__attribute__((noinline)) void score_fixed(const FixedQueries& queries, const Fixed& keys, int key_width, int from, int to, float scale, Floats* scores, Ahead& ahead) {
    constexpr int K = KEYS<H>;
    const Floats query_scale = by_head<H>(queries.scales) * scale;
    for (int i = from / K; i * K < to; ++i) {
        ahead.ask(LANES / K);
        scores[i] = floats(dot_block<H>(queries.integers, keys.at(i * K), keys.row, key_width)) * query_scale * by_key<H>(keys.scales + i * K);
    }
}

// Softmax and the weighted sums of the values; scores are used up.
template <int H>
__attribute__((noinline)) void mix_fixed(Floats* scores, const Fixed& values, int value_width, int from, int to, Mixed& out) {
    constexpr int K = KEYS<H>;
    constexpr float MOST = 65000;
    weigh<H>(scores, from, to, out);
    // Weights take up their rows' scales and become integers that neither leave 16 bits nor, summed, 32.
    float* at = reinterpret_cast<float*>(scores);
    alignas(64) float every[LANES], largest[LANES];
    for (int part = 0; part < LANES; part += NEAR) {
        Near sum{}, top{};
        for (int i = from / K; i * K < to; ++i) {
            float* here = at + i * LANES + part;
            const Near weight = near_at(here), scaled = weight == 0.0f ? Near{} : weight * by_key<H>(values.scales + i * K, part);
            put(here, scaled), sum += scaled, top = larger(top, scaled);
        }
        put(every + part, sum), put(largest + part, top);
    }
    float totals[H], tops[H], units[H], inverses[H];
    over_keys<H>(load(every), totals, add), over_keys<H>(load(largest), tops, most);
    for (int h = 0; h < H; ++h) units[h] = most(totals[h] / MOST, tops[h] / REACH), inverses[h] = units[h] > 0 ? 1 / units[h] : 0;
    store(every, by_head<H>(inverses));
    alignas(64) int16_t weights[SPAN * H];
    for (int part = 0; part < LANES; part += NEAR) {
        const Near inverse = near_at(every + part);
        for (int i = from / K; i * K < to; ++i) store_low(weights + i * LANES + part, nearest(near_at(at + i * LANES + part), inverse));
    }

    for (int c = 0; c < value_width; c += 32) {
        Ints sums[H][2];
        sum_columns<H>(values, c, weights, from, to, sums);
        for (int h = 0; h < H; ++h)
            for (int part = 0; part < 2; ++part) store(out.values + h * out.width + c + part * LANES, floats(sums[h][part]) * units[h]);
    }
}

// --- rows of floats ---------------------------------------------------------------------------------------------------------

template <int H>
__attribute__((noinline)) void score_floats(const float* queries, const float* const* rows, int key_width, int from, int to, float scale, Floats* scores) {
    constexpr int K = KEYS<H>;
    for (int i = from / K; i * K < to; ++i) {
        Floats total[LANES] = {};
        const float* query = queries;
        for (int k = 0; k < key_width; k += LANES) {
            Floats part_of[K];
#pragma GCC unroll 16
            for (int j = 0; j < K; ++j) part_of[j] = reinterpret_cast<Floats>(part(rows[std::clamp(i * K + j, from, to - 1)] + k, key_width - k));
#pragma GCC unroll 8
            for (int h = 0; h < H; ++h, query += LANES) {
                Floats q = load(query);
                keep(q);
#pragma GCC unroll 16
                for (int j = 0; j < K; ++j) total[h * K + j] = fma(q, part_of[j], total[h * K + j]);
            }
        }
        scores[i] = sums_of(total) * scale;
    }
}

template <int H>
__attribute__((noinline)) void mix_floats(Floats* scores, const float* const* rows, int value_at, int value_width, int from, int to, Mixed& out) {
    constexpr int K = KEYS<H>;
    weigh<H>(scores, from, to, out);
    const float* weights = reinterpret_cast<const float*>(scores);
    for (int c = 0; c < value_width; c += LANES) {
        Floats total[H] = {};
        for (int s = from; s < to; ++s) {
            const Floats row = reinterpret_cast<Floats>(part(rows[s] + value_at + c, value_width - c));
            for (int h = 0; h < H; ++h) total[h] = fma(row, spread(weights[s / K * LANES + h * K + s % K]), total[h]);
        }
        for (int h = 0; h < H; ++h) store(out.values + h * out.width + c, total[h]);
    }
}

// --- a span, and the queries of a block of heads ----------------------------------------------------------------------------

struct alignas(64) Line {
    uint8_t bytes[64];
};

struct Widths {
    int key, value, value_at;  // values a key has, values that are mixed, and where they begin in a row (in units of its type)
    int row;                   // a whole row, in units of its type

    bool within() const { return value_at + value <= key; }  // MLA: a key begins with its values
    int padded_key() const { return round_up(key, 32); }
};

// Rows of floats, where they lie.
class FloatSpan {
   public:
    void reserve(const Widths& widths) { widths_ = widths; }
    // Rows [from, to) of a span, of the same LANES ones; `rows` are those of the whole span, which ends at the third number. `slots`
    // blocks of heads will meet them.
    void take(const float* const* rows, int from, int to, int, int) { std::copy(rows + from, rows + to, rows_ + from); }

    static int query_lines(const Widths& widths) { return HEADS * widths.padded_key() / LANES; }
    template <int H>
    void take_queries(const float* queries, int heads, Line* lines, float*) const {
        float* to = reinterpret_cast<float*>(lines);
        for (int k = 0; k < widths_.key; k += LANES)
            for (int h = 0; h < H; ++h, to += LANES) store(to, h < heads ? reinterpret_cast<Floats>(part(queries + h * widths_.key + k, widths_.key - k)) : Floats{});
    }
    template <int H>
    void score(Line* queries, float*, int from, int to, float scale, Floats* scores) const {
        score_floats<H>(reinterpret_cast<const float*>(queries), rows_, widths_.key, from, to, scale, scores);
    }
    template <int H>
    void mix(Floats* scores, int from, int to, Mixed& out) const { mix_floats<H>(scores, rows_, widths_.value_at, widths_.value, from, to, out); }

   private:
    Widths widths_;
    const float* rows_[SPAN];
};

// Rows of integers: of 16 bits where they lie, of 8 bits widened.
class FixedSpan {
   public:
    void reserve(const Widths& widths) { widths_ = widths; }
    void take(const Short* const* rows, int from, int to, int end, int slots) {
        ask_after(rows, to, end, slots);
        take_part(rows, from, to, 0, key_blocks_, key_scales_);
        if (!widths_.within()) take_part(rows, from, to, widths_.value_at, value_blocks_, value_scales_);
    }
    void take(const Small* const* rows, int from, int to, int end, int slots) {
        ask_after(rows, to, end, slots);
        const int key_row = widths_.padded_key(), value_row = round_up(widths_.value, 32), own = widths_.within() ? 0 : 1;
        if (wide_.empty()) wide_.resize(SPAN * (key_row + own * value_row) / 32);
        int16_t* at = reinterpret_cast<int16_t*>(wide_.data());
        widen_part(rows, from, to, 0, widths_.key, at, key_row, key_blocks_, key_scales_);
        if (own) widen_part(rows, from, to, widths_.value_at, widths_.value, at + SPAN * key_row, value_row, value_blocks_, value_scales_);
        widened_ = true;
    }

    static int query_lines(const Widths& widths) { return HEADS * widths.padded_key() / 32; }
    template <int H>
    void take_queries(const float* queries, int heads, Line* lines, float* scales) const {
        if (heads < H) std::fill(lines, lines + H * widths_.padded_key() / 32, Line{});
        std::fill(scales, scales + LANES, 0.0f);
        for (int h = 0; h < heads; ++h) scales[h] = store_fixed(queries + h * widths_.key, widths_.key, reinterpret_cast<int16_t*>(lines + h), H * 32);
    }
    template <int H>
    void score(Line* queries, float* scales, int from, int to, float scale, Floats* scores) {
        const Fixed keys{key_blocks_, key_scales_, widened_ ? widths_.padded_key() : widths_.row};
        score_fixed<H>({reinterpret_cast<int16_t*>(queries), scales}, keys, widths_.key, from, to, scale, scores, ahead_);
    }
    template <int H>
    void mix(Floats* scores, int from, int to, Mixed& out) const {
        const bool within = widths_.within();
        const int row = widened_ ? (within ? widths_.padded_key() : round_up(widths_.value, 32)) : widths_.row;
        mix_fixed<H>(scores, {within ? key_blocks_ : value_blocks_, within ? key_scales_ : value_scales_, row}, widths_.value, from, to, out);
    }

   private:
    template <class T>
    void ask_after(const T* const* rows, int to, int end, int slots) {
        const int count = std::min(LANES, end - to), bytes = int(sizeof(T)) * std::max(widths_.key, widths_.value_at + widths_.value);
        ahead_ = {reinterpret_cast<const uint8_t* const*>(rows) + to, count, bytes, (count * ((bytes + 63) / 64) + slots - 1) / slots};
    }
    void take_part(const Short* const* rows, int from, int to, int part, const int16_t** blocks, float* scales) const {
        const int first = from / LANES * LANES;
        blocks[first / LANES] = &rows[from][part].bits - (from - first) * widths_.row;
        std::fill(scales + first, scales + first + LANES, 0.0f);
        for (int i = from; i < to; ++i) scales[i] = scale_of(rows[i] + part);
    }
    void widen_part(const Small* const* rows, int from, int to, int part, int width, int16_t* wide, int row, const int16_t** blocks, float* scales) const {
        const int first = from / LANES * LANES;
        blocks[first / LANES] = wide + int64_t(first) * row;
        std::fill(scales + first, scales + first + LANES, 0.0f);
        for (int i = from; i < to; ++i) scales[i] = widen(rows[i] + part, width, wide + int64_t(i) * row);
    }

    Widths widths_;
    std::vector<Line> wide_;
    bool widened_ = false;
    const int16_t *key_blocks_[SPAN / LANES], *value_blocks_[SPAN / LANES];
    alignas(64) float key_scales_[SPAN + LANES], value_scales_[SPAN + LANES];
    Ahead ahead_{};
};

// Calls f with the least number of heads, as a constant, that holds `heads`.
template <class F>
inline void with_heads(int heads, F f) {
    if (heads > 4) f(std::integral_constant<int, 8>());
    else if (heads > 2) f(std::integral_constant<int, 4>());
    else if (heads > 1) f(std::integral_constant<int, 2>());
    else f(std::integral_constant<int, 1>());
}

}  // namespace glasklar
