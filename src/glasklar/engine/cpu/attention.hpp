// Attention of one query over cached rows, several heads at a time: heads that share a key read it once.
//
// Keys come in spans that begin at fixed positions. Each span is summed on its own and the spans are joined in order, so that
// the result does not depend on who computes which span, nor on how the prompt was cut.
//
// Rows of bf16 are multiplied as 16-bit integers with a scale: sums of integers are exact and take two products a lane. A row
// and a query have the Euclidean length REACH then, so that no sum leaves 32 bits (Cauchy and Schwarz); the rounding is finer
// than that of bf16.
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

template <int N, int... I>
inline Floats repeat(Floats v, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(v, v, (I % N)...);
}
// A value for each key, whatever the head (LANES of them are read); a value for each head, whatever the key.
template <int H>
inline Floats by_key(const float* p) { return repeat<KEYS<H>>(load(p), std::make_integer_sequence<int, LANES>()); }
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
            for (int c = 0; c < width; c += LANES) store(mine + c, fma(load(other + c), spread(fresh), load(mine + c) * old));
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
    Floats peak = spread(-INFINITY), total{};
    for (int i = first; i <= last; ++i) peak = larger(peak, scores[i]);
    over_keys<H>(peak, out.top, most);
    peak = by_head<H>(out.top);
    for (int i = first; i <= last; ++i) total += scores[i] = exp(scores[i] - peak);
    over_keys<H>(total, out.total, add);
}

// --- rows of 16-bit integers ------------------------------------------------------------------------------------------------

// Rows, or queries: value = integer * scale.
struct Fixed {
    int16_t* integers;
    float* scales;
    int row, step;  // from a row to the next, and from 32 values of a row to the next 32

    const int16_t* at(int i) const { return integers + int64_t(i) * row; }
};

// The 32 values at p as floats: those at even places, those at odd ones; zeros beyond `left`.
inline void two(const bf16* p, int left, Floats& even, Floats& odd) {
    Words w = part(p, left);
    keep(w);
    even = reinterpret_cast<Floats>(w << 16), odd = reinterpret_cast<Floats>(w & 0xffff0000u);
}
inline void two(const float* p, int left, Floats& even, Floats& odd) {
    const Floats a = reinterpret_cast<Floats>(part(p, left)), b = reinterpret_cast<Floats>(part(p + LANES, left - LANES));
    even = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    odd = __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

// Takes rows [from, to) of LANES ones, the others have the scale 0. What is not finite ends up in the scale.
template <class T>
inline void take_rows(const T* const* rows, int from, int to, int width, const Fixed& out) {
    const int whole = width / 32 * 32;
    Floats squares[LANES] = {}, even, odd;
    for (int i = from; i < to; ++i) {
        Floats evens{}, odds{};
        auto take = [&](int k, int left) {
            two(rows[i] + k, left, even, odd);
            evens = fma(even, even, evens), odds = fma(odd, odd, odds);
        };
        for (int k = 0; k < whole; k += 32) take(k, 32);
        if (whole < width) take(whole, width - whole);
        squares[i] = evens + odds;
    }
    alignas(64) float inverses[LANES];
    const Floats length = root(sums(squares));
    store(out.scales, length / REACH);
    store(inverses, length > 0.0f ? REACH / length : spread(0));
    for (int i = from; i < to; ++i) {
        const Floats inverse = spread(inverses[i]);
        int16_t* at = out.integers + int64_t(i) * out.row;
        auto take = [&](int k, int left) {
            two(rows[i] + k, left, even, odd);
            store(at, shorts(nearest(even, inverse), nearest(odd, inverse)));
            at += out.step;
        };
        for (int k = 0; k < whole; k += 32) take(k, 32);
        if (whole < width) take(whole, width - whole);
    }
}

// Rows that will be read next: the memory is asked for some of them at a time, while there is something to compute.
struct Ahead {
    const uint8_t* const* row;
    int rows, bytes;

    void ask(int count) {
        for (; count > 0 && rows > 0; --count, --rows, ++row)
            for (int at = 0; at < bytes; at += 64) __builtin_prefetch(*row + at);
    }
};

// Rows of int8, part by part (MLA: one part; else keys and values of a head): values, the scale of the row as float, and a shift
// for each group of 32 values: value = int8 * 2^shift * scale. Shifted, they are 16-bit integers of the length that `Fixed` has.
struct Small {
    int8_t bits;
};
constexpr float SMALL_REACH = 31000;  // leaves room for what rounding adds: 32 values by 1/254 of their largest

template <class T>
inline int part_size(int width) { return width; }
template <>
inline int part_size<Small>(int width) { return round_up(width, 4) + 4 + round_up((width + 31) / 32, 4); }

template <class T>
inline void store_part(const float* x, int width, T* to) {
    for (int i = 0; i < width; ++i) put(to + i, x[i]);
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

inline void take_rows(const Small* const* rows, int from, int to, int width, const Fixed& out) {
    std::fill(out.scales, out.scales + LANES, 0.0f);
    for (int i = from; i < to; ++i) {
        const Small *row = rows[i], *after = row + round_up(width, 4);
        std::memcpy(out.scales + i, after, 4);
        int16_t* at = out.integers + int64_t(i) * out.row;
        int k = 0;
        for (; k + 32 <= width; k += 32, at += out.step) store(at, shorts(load_as<Bytes>(row + k), after[4 + k / 32].bits));
        if (k == width) continue;
        Bytes rest{};
        std::memcpy(&rest, row + k, width - k);
        store(at, shorts(rest, after[4 + k / 32].bits));
    }
}

// Scores of the blocks that hold keys [from, to). `queries` lie [width / 32, H, 32].
template <int H>
__attribute__((noinline)) void score_fixed(const Fixed& queries, const Fixed& keys, int key_width, int from, int to, float scale, Floats* scores, Ahead& ahead) {
    constexpr int K = KEYS<H>;
    const Floats query_scale = by_head<H>(queries.scales) * scale;
    for (int i = from / K; i * K < to; ++i) {
        ahead.ask(K);
        Ints total[LANES] = {};
        const int16_t *query = queries.integers, *key = keys.at(i * K);
        for (int k = 0; k < key_width; k += 32, key += 32) {
            Shorts part_of[K];
#pragma GCC unroll 16
            for (int j = 0; j < K; ++j) part_of[j] = load_as<Shorts>(key + j * keys.row);
#pragma GCC unroll 8
            for (int h = 0; h < H; ++h, query += 32) {
                Shorts q = load_as<Shorts>(query);
                keep(q);
#pragma GCC unroll 16
                for (int j = 0; j < K; ++j) total[h * K + j] = dot_shorts(total[h * K + j], q, part_of[j]);
            }
        }
        scores[i] = floats(sums_of(total)) * query_scale * by_key<H>(keys.scales + i * K);
    }
}

// Softmax and the weighted sums of the values; scores are used up.
template <int H>
__attribute__((noinline)) void mix_fixed(Floats* scores, const Fixed& values, int value_width, int from, int to, Mixed& out) {
    constexpr int K = KEYS<H>;
    constexpr float MOST = 65000;
    weigh<H>(scores, from, to, out);
    // Weights take up their rows' scales and become integers that neither leave 16 bits nor, summed, 32.
    Floats sum{}, top{};
    for (int i = from / K; i * K < to; ++i) {
        scores[i] = scores[i] == 0.0f ? spread(0) : scores[i] * by_key<H>(values.scales + i * K);
        sum += scores[i], top = larger(top, scores[i]);
    }
    float sums[H], tops[H], units[H], inverses[H];
    over_keys<H>(sum, sums, add), over_keys<H>(top, tops, most);
    for (int h = 0; h < H; ++h) units[h] = most(sums[h] / MOST, tops[h] / REACH), inverses[h] = units[h] > 0 ? 1 / units[h] : 0;
    const Floats inverse = by_head<H>(inverses);
    alignas(64) int16_t weights[SPAN * H];
    for (int i = from / K; i * K < to; ++i) store_low(weights + i * LANES, nearest(scores[i], inverse));

    for (int c = 0; c < value_width; c += 32) {
        Ints low[H] = {}, high[H] = {};
        for (int s = from / 2 * 2; s < to; s += 2) {
            Shorts a = load_as<Shorts>(values.at(s) + c), b = load_as<Shorts>(values.at(s + 1) + c);
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
        for (int h = 0; h < H; ++h) {
            float* at = out.values + h * out.width + c;
            const Floats a = floats(low[h]) * units[h], b = floats(high[h]) * units[h];  // columns 0-3, 8-11, ..., and 4-7, 12-15, ...
            store(at, __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23));
            store(at + LANES, __builtin_shufflevector(a, b, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31));
        }
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

    bool within() const { return value_at + value <= key; }  // MLA: a key begins with its values
    int padded_key() const { return round_up(key, 32); }
};

// Rows of floats, where they lie.
class FloatSpan {
   public:
    void reserve(const Widths& widths) { widths_ = widths; }
    // Rows [from, to) of a span, of the same LANES ones; `rows` are those of the whole span.
    void take(const float* const* rows, int from, int to, int) { std::copy(rows + from, rows + to, rows_ + from); }

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

// Rows of bf16 or int8, as integers.
class FixedSpan {
   public:
    void reserve(const Widths& widths) {
        widths_ = widths;
        const int key_row = widths.padded_key(), value_row = round_up(widths.value, 32), own = widths.within() ? 0 : 1;
        memory_.resize(SPAN * (key_row + own * value_row) / 32);
        scales_.resize(SPAN * (1 + own) + LANES);
        int16_t* at = reinterpret_cast<int16_t*>(memory_.data());
        keys_ = {at, scales_.data(), key_row, 32};
        values_ = own ? Fixed{at + SPAN * key_row, scales_.data() + SPAN, value_row, 32} : Fixed{at + widths.value_at, keys_.scales, key_row, 32};
    }
    template <class T>
    void take(const T* const* rows, int from, int to, int end) {
        const int first = from / LANES * LANES;
        ahead_ = {reinterpret_cast<const uint8_t* const*>(rows) + to, std::min(LANES, end - to), int(sizeof(T)) * std::max(widths_.key, widths_.value_at + widths_.value)};
        take_rows(rows + first, from - first, to - first, widths_.key, part_of(keys_, first));
        if (widths_.within()) return;
        const T* values[LANES];
        for (int i = from - first; i < to - first; ++i) values[i] = rows[first + i] + widths_.value_at;
        take_rows(values, from - first, to - first, widths_.value, part_of(values_, first));
    }

    static int query_lines(const Widths& widths) { return HEADS * widths.padded_key() / 32; }
    template <int H>
    void take_queries(const float* queries, int heads, Line* lines, float* scales) const {
        if (heads < H) std::fill(lines, lines + H * widths_.padded_key() / 32, Line{});
        const float* rows[HEADS];
        for (int h = 0; h < heads; ++h) rows[h] = queries + h * widths_.key;
        take_rows(rows, 0, heads, widths_.key, fixed<H>(lines, scales));
    }
    template <int H>
    void score(Line* queries, float* scales, int from, int to, float scale, Floats* scores) {
        score_fixed<H>(fixed<H>(queries, scales), keys_, widths_.key, from, to, scale, scores, ahead_);
    }
    template <int H>
    void mix(Floats* scores, int from, int to, Mixed& out) const { mix_fixed<H>(scores, values_, widths_.value, from, to, out); }

   private:
    static Fixed part_of(const Fixed& all, int first) { return {all.integers + int64_t(first) * all.row, all.scales + first, all.row, all.step}; }
    template <int H>
    static Fixed fixed(Line* queries, float* scales) { return {reinterpret_cast<int16_t*>(queries), scales, 32, H * 32}; }

    Widths widths_;
    std::vector<Line> memory_;
    std::vector<float> scales_;
    Fixed keys_, values_;
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
