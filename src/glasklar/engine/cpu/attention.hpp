// Attention of one query over cached rows, several heads at a time: heads that share a key read it once.
//
// Keys come in spans that begin at fixed positions. Each span is summed on its own and the spans are joined in order, so that
// the result does not depend on who computes which span, nor on how the prompt was cut.
#pragma once

#include "lanes.hpp"

namespace glasklar {

constexpr int SPAN = 256, HEADS = 8;

// Sums of the lanes of 16 vectors, as one vector: pairs, then pairs of pairs, and so on.
inline Floats sums_of(const Floats* v) {
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
    Floats a[8], b[4], c[2];
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
    std::memcpy(&w, p, left * sizeof(T));
    return w;
}
inline Floats multiply_add(Floats c, Words a, Words b, const float*) { return fma(reinterpret_cast<Floats>(a), reinterpret_cast<Floats>(b), c); }
inline Floats multiply_add(Floats c, Words a, Words b, const bf16*) { return dot_pairs(c, a, b); }

// out[4 i + j] = query i . key j, over `width` values.
template <class T>
inline Floats dots(const T* const* queries, const T* const* keys, int width) {
    constexpr int step = 64 / sizeof(T);
    Floats total[16] = {};
    for (int k = 0; k < width; k += step) {
        Words q[4], r[4];
        for (int i = 0; i < 4; ++i) q[i] = part(queries[i] + k, width - k);
        for (int j = 0; j < 4; ++j) r[j] = part(keys[j] + k, width - k);
        for (int i = 0; i < 4; ++i)
            for (int j = 0; j < 4; ++j) total[4 * i + j] = multiply_add(total[4 * i + j], q[i], r[j], static_cast<const T*>(nullptr));
    }
    return sums_of(total);
}

// What one span, or several joined, give: the largest score, the sum of the weights, and the weighted sum of the values.
struct Mixed {
    float top[HEADS], total[HEADS];
    float* values;  // [HEADS, width]
    int width;      // a multiple of 16

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
            for (int c = 0; c < width; c += LANES) store(mine + c, fma(load(other + c), spread(fresh), load(mine + c) * old));
        }
    }
    // The result of head h into `out`.
    void finish(int h, float* out, int count) const {
        for (int c = 0; c < count; ++c) out[c] = values[h * width + c] / total[h];
    }
};

// Weighted sums of 32 (bf16) or 16 (float) columns of the rows, for all heads.
inline void mix_columns(const bf16* const* rows, int count, int column, int left, const bf16 (*weights)[SPAN], int heads, float* out, int width) {
    Floats even[HEADS] = {}, odd[HEADS] = {};
    for (int s = 0; s < count; s += 2) {
        Words a = part(rows[s] + column, left), b = part(rows[std::min(s + 1, count - 1)] + column, left);
        Words low = (a & 0xffffu) | b << 16, high = a >> 16 | (b & 0xffff0000u);
        for (int h = 0; h < HEADS; ++h) {
            uint32_t pair;
            std::memcpy(&pair, weights[h] + s, 4);
            even[h] = dot_pairs(even[h], low, Words{} + pair);
            odd[h] = dot_pairs(odd[h], high, Words{} + pair);
        }
    }
    for (int h = 0; h < heads; ++h)
        for (int i = 0; i < LANES && 2 * i < left; ++i) {
            out[h * width + column + 2 * i] = even[h][i];
            if (2 * i + 1 < left) out[h * width + column + 2 * i + 1] = odd[h][i];
        }
}
inline void mix_columns(const float* const* rows, int count, int column, int left, const float (*weights)[SPAN], int heads, float* out, int width) {
    Floats total[HEADS] = {};
    for (int s = 0; s < count; ++s) {
        Floats row = reinterpret_cast<Floats>(part(rows[s] + column, left));
        for (int h = 0; h < HEADS; ++h) total[h] = fma(row, spread(weights[h][s]), total[h]);
    }
    for (int h = 0; h < heads; ++h)
        for (int i = 0; i < LANES && i < left; ++i) out[h * width + column + i] = total[h][i];
}

// Softmax attention of `heads` queries ([heads, key_width]) over `count` <= SPAN rows; the values lie `value_at` into a row.
template <class T>
inline void attend(const T* queries, int heads, int key_width, const T* const* rows, int count, int value_at, int value_width,
                   float scale, Mixed& out) {
    alignas(64) float scores[HEADS][SPAN];
    alignas(64) T weights[HEADS][SPAN];
    for (int h = 0; h < heads; h += 4) {
        const T* q[4];
        for (int i = 0; i < 4; ++i) q[i] = queries + std::min(h + i, heads - 1) * key_width;
        for (int s = 0; s < count; s += 4) {
            const T* k[4];
            for (int j = 0; j < 4; ++j) k[j] = rows[std::min(s + j, count - 1)];
            Floats found = dots(q, k, key_width) * scale;
            for (int i = 0; i < 4 && h + i < HEADS; ++i) std::memcpy(scores[h + i] + s, reinterpret_cast<float*>(&found) + 4 * i, 16);
        }
    }
    const int padded = round_up(count, LANES);
    for (int h = 0; h < HEADS; ++h) {
        if (h >= heads) {
            std::memset(weights[h], 0, sizeof weights[h]);
            continue;
        }
        std::fill(scores[h] + count, scores[h] + padded, -INFINITY);
        Floats peak = spread(-INFINITY), total{};
        for (int s = 0; s < padded; s += LANES) peak = larger(peak, load(scores[h] + s));
        out.top[h] = largest(peak);
        for (int s = 0; s < padded; s += LANES) {
            store(weights[h] + s, exp(load(scores[h] + s) - out.top[h]));
            total += load(weights[h] + s);  // as rounded
        }
        out.total[h] = sum(total);
    }
    constexpr int step = 64 / sizeof(T);
    const T* values[SPAN];
    for (int s = 0; s < count; ++s) values[s] = rows[s] + value_at;
    for (int c = 0; c < value_width; c += step) mix_columns(values, count, c, value_width - c, weights, heads, out.values, out.width);
}

}  // namespace glasklar
