// Products in vectors of 16 floats: AVX-512, and plain C++.
#pragma once  // by product.hpp

namespace glasklar {

// Rows of activations that a product takes at most, tiles that a task has at least where many rows meet them, and tiles that some
// rows meet at once. An AVX-512 core does two products a cycle and little more than one load: an activation is loaded for all tiles and
// a weight for all rows, and their sums fill the registers.
#if defined(__AVX512F__)
constexpr int MOST_ROWS = 8, TASK_TILES = STREAMS;
constexpr int tiles_at_once(int kind, int rows) { return rows > (kind < INT8 ? 5 : 6) ? 3 : 4; }
#else
constexpr int MOST_ROWS = 4, TASK_TILES = 2;
constexpr int tiles_at_once(int, int) { return 1; }
#endif

#if defined(__AVX512VNNI__)
inline uint32_t four_bytes(const int8_t* p) {
    uint32_t w;
    std::memcpy(&w, p, 4);
    return w;
}
#endif

// Products of M rows with a group of T tiles.
template <int KIND, int M>
class Product {
   public:
    static constexpr int SIZE = group_bytes(KIND), LATER = EARLY<KIND> * SIZE;
    // Even and odd steps of floats are summed apart: two chains hide the latency when there are few rows.
    static constexpr int SUMS = KIND < INT8 ? 2 * M : M;

    Product(const Rows& a, const int64_t* rows) {
        for (int m = 0; m < M; ++m) rows_[m] = row_of<KIND>(a, rows[m]);
    }

    // sums[tile][SUMS] += products of group g, whose weights stand at at[tile]. `far`: what stands there LATER is asked for meanwhile.
    template <int T>
    __attribute__((always_inline)) void add(const uint8_t* const* at, bool far, int g, Floats* sums) const {
        if constexpr (KIND < INT8) add_floats<T>(at, far, g, sums);
        else add_integers<T>(at, far, g, sums);
    }

   private:
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
                            const Element<KIND>* from = rows_[m] + g * GROUP + STEP * (k + odd);
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

    const Element<KIND>* rows_[M];
};

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
        const int64_t place = int64_t(g) * SIZE, begun = g + EARLY<KIND> - groups;
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

}  // namespace glasklar
