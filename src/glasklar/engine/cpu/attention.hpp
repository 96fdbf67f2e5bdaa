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
    if (left > 0) std::memcpy(&w, p, left * sizeof(T));
    return w;
}

// 64 bytes of a cached row as the products take them.
template <class T> struct Cached;
template <> struct Cached<float> {
    typedef Floats Part;
    static Part of(Words w) { return reinterpret_cast<Floats>(w); }
    static Floats dot(Floats c, const Part& a, const Part& b) { return fma(a, b, c); }
};
template <> struct Cached<bf16> {
    typedef Pairs Part;
    static Part of(Words w) { return pairs(w); }
    static Floats dot(Floats c, const Part& a, const Part& b) { return dot_pairs(c, a, b); }
};
template <class T> using Part = typename Cached<T>::Part;
template <class T> constexpr int STEP = 64 / sizeof(T);

// The queries of a block of heads, [width / STEP, H], zeros for heads that are none.
template <class T, int H>
inline void take_queries(const T* queries, int heads, int width, Part<T>* out) {
    for (int k = 0; k < width; k += STEP<T>)
        for (int h = 0; h < H; ++h) *out++ = Cached<T>::of(h < heads ? part(queries + h * width + k, width - k) : Words{});
}

// Lane j * H + h: query h . key j, over `width` values.
template <class T, int H>
inline Floats dots(const Part<T>* queries, const T* const* keys, int width) {
    Floats total[LANES] = {};
    auto add = [&](auto read) {
        Part<T> part_of[LANES / H];
#pragma GCC unroll 16
        for (int j = 0; j < LANES / H; ++j) part_of[j] = Cached<T>::of(read(keys[j]));
#pragma GCC unroll 8
        for (int h = 0; h < H; ++h) {
            Part<T> query = queries[h];
            keep(query);
#pragma GCC unroll 16
            for (int j = 0; j < LANES / H; ++j) total[j * H + h] = Cached<T>::dot(total[j * H + h], query, part_of[j]);
        }
        queries += H;
    };
    int k = 0;
    for (; k + STEP<T> <= width; k += STEP<T>) add([k](const T* key) { return load_as<Words>(key + k); });
    if (k < width) add([k, width](const T* key) { return part(key + k, width - k); });
    return sums_of(total);
}

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
            for (int c = 0; c < width; c += LANES) store(mine + c, fma(load(other + c), spread(fresh), load(mine + c) * old));
        }
    }
    // The result of head h into `out`.
    void finish(int h, float* out, int count) const {
        for (int c = 0; c < count; ++c) out[c] = values[h * width + c] / total[h];
    }
};

// Weights of a span, [keys, H]. Those that meet bf16 are rounded to it, and kept in pairs of keys where the products want that.
template <class T, int H>
class Weights {
   public:
    // Of as many keys from `key` on as fill a vector; returns them as kept.
    Floats put(int key, Floats v) {
        store(values_ + key * H, v);
        return v;
    }
    Floats operator()(int key, int h) const { return spread(values_[key * H + h]); }

   private:
    alignas(64) float values_[SPAN * H];
};
template <int H>
class Weights<bf16, H> {
   public:
    Floats put(int key, Floats v) {
        const Words w = rounded(v);
#if defined(__AVX512BF16__)
        for (int i = 0; i < LANES / 2; ++i) {
            const int at = i / H * 2 * H + i % H;
            values_[key / 2 * H + i] = w[at] >> 16 | w[at + H];
        }
#else
        store(values_ + key * H, reinterpret_cast<Floats>(w));
#endif
        return reinterpret_cast<Floats>(w);
    }
#if defined(__AVX512BF16__)
    Pairs pair(int key, int h) const { return Words{} + values_[key / 2 * H + h]; }

   private:
    alignas(64) uint32_t values_[SPAN * H / 2];
#else
    Pairs pair(int key, int h) const { return {spread(values_[key * H + h]), spread(values_[(key + 1) * H + h])}; }

   private:
    alignas(64) float values_[SPAN * H];
#endif
};

// Weighted sums of C vectors of columns of the rows, for all heads.
template <int H, int C>
inline void mix_columns(const bf16* const* rows, int count, int column, int left, const Weights<bf16, H>& weights, Mixed& out) {
    Floats even[C * H] = {}, odd[C * H] = {};
    for (int s = 0; s < count; s += 2)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
            const bf16 *a = rows[s] + column + c * 32, *b = rows[std::min(s + 1, count - 1)] + column + c * 32;
            Pairs evens, odds;
            pair_rows(part(a, left - c * 32), part(b, left - c * 32), evens, odds);
#pragma GCC unroll 8
            for (int h = 0; h < H; ++h) {
                const Pairs w = weights.pair(s, h);
                even[c * H + h] = dot_pairs(even[c * H + h], evens, w);
                odd[c * H + h] = dot_pairs(odd[c * H + h], odds, w);
            }
        }
    for (int i = 0; i < C * H; ++i) {
        float* to = out.values + i % H * out.width + column + i / H * 32;
        store(to, __builtin_shufflevector(even[i], odd[i], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23));
        store(to + LANES, __builtin_shufflevector(even[i], odd[i], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
    }
}
template <int H, int C>
inline void mix_columns(const float* const* rows, int count, int column, int left, const Weights<float, H>& weights, Mixed& out) {
    Floats total[C * H] = {};
    for (int s = 0; s < count; ++s)
        for (int c = 0; c < C; ++c) {
            const Floats row = reinterpret_cast<Floats>(part(rows[s] + column + c * LANES, left - c * LANES));
            for (int h = 0; h < H; ++h) total[c * H + h] = fma(row, weights(s, h), total[c * H + h]);
        }
    for (int i = 0; i < C * H; ++i) store(out.values + i % H * out.width + column + i / H * LANES, total[i]);
}

// Softmax attention of up to H heads over `count` <= SPAN rows; the values lie `value_at` into a row.
template <class T, int H>
__attribute__((noinline)) void attend_heads(const Part<T>* queries, int key_width, const T* const* rows, int count, int value_at, int value_width,
                                            float scale, Mixed& out) {
    constexpr int KEYS = LANES / H, STEPS = std::min(4, 8 / H);
    Weights<T, H> weights;
    Floats scores[SPAN / KEYS], peak = spread(-INFINITY), total{};
    const int blocks = (count + KEYS - 1) / KEYS;
    for (int i = 0; i < blocks; ++i) {
        const T* keys[KEYS];
        for (int j = 0; j < KEYS; ++j) keys[j] = rows[std::min(i * KEYS + j, count - 1)];
        scores[i] = dots<T, H>(queries, keys, key_width) * scale;
        for (int lane = (count - i * KEYS) * H; lane < LANES; ++lane) scores[i][lane] = -INFINITY;
        peak = larger(peak, scores[i]);
    }
    for (int half = LANES / 2; half >= H; half /= 2)
        for (int lane = 0; lane < half; ++lane) peak[lane] = std::max(peak[lane], peak[lane + half]);
    for (int lane = H; lane < LANES; ++lane) peak[lane] = peak[lane % H];
    for (int i = 0; i < blocks; ++i) total += weights.put(i * KEYS, exp(scores[i] - peak));
    for (int half = LANES / 2; half >= H; half /= 2)
        for (int lane = 0; lane < half; ++lane) total[lane] += total[lane + half];
    for (int h = 0; h < H; ++h) out.top[h] = peak[h], out.total[h] = total[h];

    const T* values[SPAN];
    for (int s = 0; s < count; ++s) values[s] = rows[s] + value_at;
    int c = 0;
    for (; c + STEPS * STEP<T> <= value_width; c += STEPS * STEP<T>) mix_columns<H, STEPS>(values, count, c, value_width - c, weights, out);
    for (; c < value_width; c += STEP<T>) mix_columns<H, 1>(values, count, c, value_width - c, weights, out);
}

// Of `heads` queries [heads, key_width]; `taken` has room for HEADS of them as the products want them.
template <class T>
inline void attend(const T* queries, int heads, int key_width, const T* const* rows, int count, int value_at, int value_width,
                   float scale, Part<T>* taken, Mixed& out) {
    auto with = [&](auto size) {
        take_queries<T, size>(queries, heads, key_width, taken);
        attend_heads<T, size>(taken, key_width, rows, count, value_at, value_width, scale, out);
    };
    if (heads > 4) with(std::integral_constant<int, 8>());
    else if (heads > 2) with(std::integral_constant<int, 4>());
    else if (heads > 1) with(std::integral_constant<int, 2>());
    else with(std::integral_constant<int, 1>());
}

}  // namespace glasklar
