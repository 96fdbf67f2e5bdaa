// Products with AVX2: a register has the lanes of half a tile.
#pragma once  // by product.hpp

namespace glasklar {

constexpr int MOST_ROWS = 4, TASK_TILES = 2;  // as in product_lanes.hpp

// sums[half] of a tile, with M rows: even and odd steps of floats are summed apart, as everywhere.
template <int KIND, int M>
class Product {
   public:
    static constexpr int SIZE = group_bytes(KIND), SUMS = KIND < INT8 ? 2 * M : M;

    Product(const Rows& a, const int64_t* rows) {
        for (int m = 0; m < M; ++m) rows_[m] = row_of<KIND>(a, rows[m]);
    }

    // sums += products of group g, whose weights stand at `at`.
    __attribute__((always_inline)) void add(const uint8_t* at, int g, __m256 (*sums)[SUMS]) const {
        if constexpr (KIND < INT8) add_floats(at, g, sums);
        else add_integers(at, g, sums);
    }

   private:
    // The even steps, then the odd ones, so that activations are spread once for both halves.
    __attribute__((always_inline)) void add_floats(const uint8_t* at, int g, __m256 (*sums)[SUMS]) const {
        constexpr int STEP = KIND == FLOAT ? 1 : 2;  // inputs a vector
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; ++odd) {
            __m256 now[2][M];
#pragma GCC unroll 8
            for (int i = 0; i < 2 * M; ++i) now[i % 2][i / 2] = sums[i % 2][odd * M + i / 2];
            for (int k = odd; k < GROUP / STEP; k += 2) {
                __m256i words[2];
#pragma GCC unroll 2
                for (int half = 0; half < 2; ++half) words[half] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + 64 * k + 32 * half));
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

    __attribute__((always_inline)) void add_integers(const uint8_t* at, int g, __m256 (*sums)[SUMS]) const {
        constexpr int WORDS = KIND == INT4 ? 4 : 8;
        const __m256i ones = _mm256_set1_epi16(1);
        __m256i dots[2][M];
#pragma GCC unroll 8
        for (int i = 0; i < WORDS; ++i) {
            __m256i words[2];
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
                words[half] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + 64 * i + 32 * half));
                asm("" : "+x"(words[half]));  // one load for both uses
            }
#pragma GCC unroll 2
            for (int high = 0; high < 2; ++high) {
                __m256i w[2];
#pragma GCC unroll 2
                for (int half = 0; half < 2; ++half)  // with their offset
                    w[half] = KIND == INT8 ? (high ? _mm256_srli_epi16(words[half], 8) : _mm256_and_si256(words[half], _mm256_set1_epi16(255)))
                                           : _mm256_and_si256(high ? _mm256_srli_epi16(words[half], 4) : words[half], _mm256_set1_epi8(15));
#pragma GCC unroll 4
                for (int m = 0; m < M; ++m) {
                    int32_t few;  // four bytes, or two of 16 bits
                    std::memcpy(&few, rows_[m][g].values + (KIND == INT8 ? 4 * i + 2 * high : 4 * i + 16 * high), 4);
                    const __m256i x = _mm256_set1_epi32(few);
#pragma GCC unroll 2
                    for (int half = 0; half < 2; ++half) {
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
        __m256 scales[2];
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half)
            scales[half] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at + SIZE - 2 * TILE + 16 * half)));
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
            const Element<KIND>& x = rows_[m][g];
            const __m256 scale = _mm256_broadcast_ss(&x.scale);
            const __m256i offset = _mm256_set1_epi32(x.sum);
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
                const __m256i dot = _mm256_add_epi32(KIND == INT4 ? _mm256_madd_epi16(dots[half][m], ones) : dots[half][m], offset);
                sums[half][m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_mul_ps(scales[half], scale), sums[half][m]);
            }
        }
    }

    const Element<KIND>* rows_[M];
};

template <int KIND, int M>
__attribute__((noinline)) void multiply_rows(const Tiles& tiles, bool far, int groups, const Rows& a, const int64_t* rows, Floats* out) {
    typedef Product<KIND, M> Each;
    constexpr int SIZE = Each::SIZE, SUMS = Each::SUMS;
    const Each product(a, rows);
    const int turn = std::max(0, groups - EARLY<KIND>);  // from this group on the next tile is asked for
    for (int t = 0; t < tiles.count; ++t) {
        const uint8_t* at = tiles.now[t];
        const uint8_t* then = (t + 1 < tiles.count ? tiles.now[t + 1] : tiles.next[0]) + (turn + EARLY<KIND> - groups) * SIZE;
        const uint8_t* ahead = at + EARLY<KIND> * SIZE;
        __m256 sums[2][SUMS];
        for (auto& half : sums) std::fill(half, half + SUMS, _mm256_setzero_ps());
        for (int g = 0; g < groups; ++g, at += SIZE, ahead += SIZE) {
            if (g == turn) ahead = then;
            for (int i = 0; far && i < SIZE; i += 64) __builtin_prefetch(ahead + i);
            product.add(at, g, sums);
        }
        for (int half = 0; half < 2; ++half)
            for (int m = 0; m < M; ++m)
                _mm256_storeu_ps(reinterpret_cast<float*>(out + t * M + m) + 8 * half, KIND < INT8 ? _mm256_add_ps(sums[half][m], sums[half][SUMS - M + m]) : sums[half][m]);
    }
}

}  // namespace glasklar
