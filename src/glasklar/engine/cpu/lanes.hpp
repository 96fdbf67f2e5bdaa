// Sixteen floats at a time, whatever the CPU: an AVX2 or plain build takes the same sums in the same order as AVX-512, so
// the engine's numbers are the same on every machine. Nothing is contracted or reordered unless written so (`fma`).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace glasklar {

constexpr int LANES = 16;

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef int16_t Shorts __attribute__((vector_size(64)));
typedef int8_t Bytes __attribute__((vector_size(32)));

struct bf16 {
    uint16_t bits;
};

template <class V, class P>
inline V load_as(const P* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// Written out, as compilers take 0 + x for an addition.
inline Floats spread(float x) { return Floats{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
template <class V>
inline V spread_as(float x) {
    V v;
    for (size_t i = 0; i < sizeof v / sizeof x; ++i) v[i] = x;
    return v;
}
inline Floats load(const float* p) { return load_as<Floats>(p); }
inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }
// The first `count` of them; all, if there are more places.
inline void store_first(float* p, Floats v, int64_t count) {
    if (count >= LANES) return store(p, v);
    std::memcpy(p, &v, 4 * count);
}

#if defined(__FMA__) && !defined(__AVX512F__)
typedef float Eight __attribute__((vector_size(32)));
inline Eight low(Floats v) { return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7); }
inline Eight high(Floats v) { return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15); }
inline Eight fma(Eight a, Eight b, Eight c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats both(Eight low, Eight high) { return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
inline Floats fma(Floats a, Floats b, Floats c) { return both(fma(low(a), low(b), low(c)), fma(high(a), high(b), high(c))); }
#else
inline Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return reinterpret_cast<Floats>(_mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#else
    for (int i = 0; i < LANES; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#endif
}
#endif

inline float value(float x) { return x; }
inline float value(bf16 x) {
    uint32_t word = uint32_t(x.bits) << 16;
    float f;
    std::memcpy(&f, &word, 4);
    return f;
}

// Rounds to the nearest bf16, ties to even; NaN stays NaN.
inline bf16 narrow(float x) {
    uint32_t word;
    std::memcpy(&word, &x, 4);
    if (x != x) return {uint16_t(word >> 16 | 0x40)};
    return {uint16_t((word + 0x7fff + ((word >> 16) & 1)) >> 16)};
}

// Values rounded as `narrow` does it; each the upper half of its word, the lower one 0. `W`: as many words.
template <class V, class W>
inline W rounded_of(V v) {
    W w = reinterpret_cast<W>(v), odd = w >> 16 & 1u;
    return (v != v ? w | 0x400000u : w + odd + 0x7fffu) & 0xffff0000u;
}
inline Words rounded(Floats v) { return rounded_of<Floats, Words>(v); }

// The sum of LANES values: pairwise, in a fixed order.
inline float sum_at(const float* p) {
#if defined(__FMA__) && !defined(__AVX512F__)
    const __m256 eight = _mm256_add_ps(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
#else
    float s[LANES];
    std::memcpy(s, p, sizeof s);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) s[i] += s[i + half];
    return s[0];
#endif
}
inline float sum(Floats v) {
    alignas(64) float s[LANES];
    store(s, v);
    return sum_at(s);
}
// The sums of 16 vectors at once, each with the bits of `sum`.
inline Floats sums(const Floats* v) {
#define HALVES(a, b, low, high) (__builtin_shufflevector(a, b, low) + __builtin_shufflevector(a, b, high))
#define LOW8 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define HIGH8 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#define LOW4 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27
#define HIGH4 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31
#define LOW2 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29
#define HIGH2 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31
#define LOW1 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define HIGH1 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
    Floats a[8], b[4], c[2];
    for (int i = 0; i < 8; ++i) a[i] = HALVES(v[2 * i], v[2 * i + 1], LOW8, HIGH8);
    for (int i = 0; i < 4; ++i) b[i] = HALVES(a[2 * i], a[2 * i + 1], LOW4, HIGH4);
    for (int i = 0; i < 2; ++i) c[i] = HALVES(b[2 * i], b[2 * i + 1], LOW2, HIGH2);
    return HALVES(c[0], c[1], LOW1, HIGH1);
#undef HALVES
#undef LOW8
#undef HIGH8
#undef LOW4
#undef HIGH4
#undef LOW2
#undef HIGH2
#undef LOW1
#undef HIGH1
}
template <class V>
inline V larger(V a, V b) { return a < b ? b : a; }
template <class V>
inline V smaller(V a, V b) { return b < a ? b : a; }
inline Floats magnitude(Floats v) { return reinterpret_cast<Floats>(reinterpret_cast<Words>(v) & 0x7fffffffu); }
inline float largest(Floats v) {
    float top = v[0];
    for (int i = 1; i < LANES; ++i) top = std::max(top, v[i]);
    return top;
}

// exp to 2 ulp: 2^n times a polynomial on [-ln2/2, ln2/2]. Exactly 0 below -87 (so for -inf); NaN stays NaN. `I`: as many integers.
template <class V, class I>
__attribute__((always_inline)) inline V exp_of(V x) {
    auto all = [](float c) __attribute__((always_inline)) { return spread_as<V>(c); };
    V clamped = x < -87.0f ? all(-87.0f) : x;
    clamped = clamped > 88.0f ? all(88.0f) : clamped;
    const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number in the low bits
    V n = fma(clamped, all(1.44269504f), all(shift));
    I exponent = reinterpret_cast<I>(n) << 23;
    n -= shift;
    V r = fma(n, all(2.12194440e-4f), fma(n, all(-0.693359375f), clamped));
    V p = all(1.0f / 720);
    for (float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = fma(p, r, all(c));
    V scaled = reinterpret_cast<V>(reinterpret_cast<I>(p) + exponent);
    return x < -87.0f ? all(0) : scaled;
}
#if defined(__FMA__) && !defined(__AVX512F__)
typedef int32_t EightInts __attribute__((vector_size(32)));
inline Eight exp(Eight x) { return exp_of<Eight, EightInts>(x); }
inline Floats exp(Floats x) { return both(exp(low(x)), exp(high(x))); }
#else
inline Floats exp(Floats x) { return exp_of<Floats, Ints>(x); }
#endif
template <class V>
inline V silu(V x) { return x / (1.0f + exp(-x)); }

// Vectors that registers hold: Floats, or halves of them. Compilers keep longer ones in memory.
#if defined(__FMA__) && !defined(__AVX512F__)
typedef Eight Near;
#else
typedef Floats Near;
#endif
constexpr int NEAR = sizeof(Near) / sizeof(float);
inline Near near_at(const float* p) { return load_as<Near>(p); }
inline void put(float* p, Near v) { std::memcpy(p, &v, sizeof v); }

inline float exp1(float x) { return exp(spread_as<Near>(x))[0]; }

// Sixteen pairs of bf16 meet a pair of activations in PAIR_STEPS steps: an instruction does both products, the second one first,
// each fused; without it they are two steps. `Narrow` is how such activations are kept: rounded to bf16 either way.
#if defined(__AVX512BF16__)
constexpr int PAIR_STEPS = 1;
typedef bf16 Narrow;
inline Floats of_pairs(Words w, int) { return reinterpret_cast<Floats>(w); }
inline Floats spread_pair(const Narrow* p, int) {
    uint32_t pair;
    std::memcpy(&pair, p, 4);
    return reinterpret_cast<Floats>(Words{} + pair);
}
inline Floats add_products(Floats c, Floats a, Floats b) {
    return reinterpret_cast<Floats>(
        _mm512_dpbf16_ps(reinterpret_cast<__m512>(c), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
}
inline void store_narrow(Narrow* p, Floats v) {
    const __m256bh h = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v));
    std::memcpy(p, &h, sizeof h);
}
#else
constexpr int PAIR_STEPS = 2;
typedef float Narrow;
inline Floats of_pairs(Words w, int step) { return reinterpret_cast<Floats>(step == 0 ? w & 0xffff0000u : w << 16); }
inline Floats spread_pair(const Narrow* p, int step) { return spread(p[1 - step]); }
inline Floats add_products(Floats c, Floats a, Floats b) { return fma(a, b, c); }
inline void store_narrow(Narrow* p, Floats v) { store(p, reinterpret_cast<Floats>(rounded(v))); }
#if defined(__FMA__) && !defined(__AVX512F__)
typedef uint32_t EightWords __attribute__((vector_size(32)));
inline void store_narrow(Narrow* p, Eight v) { put(p, reinterpret_cast<Eight>(rounded_of<Eight, EightWords>(v))); }
#endif
#endif

// Compilers make operands in memory of what is loaded once and used twice; two loads of whole vectors a cycle are more than the
// processor has. This one stays in a register.
template <class V>
inline void keep(V& v) {
#if defined(__AVX512F__)
    asm("" : "+v"(v));
#else
    (void)v;
#endif
}

// c plus the products of pairs of 16-bit integers, in any order (AVX2 has its own loops in attention.hpp).
inline Ints dot_shorts(Ints c, Shorts a, Shorts b) {
#if defined(__AVX512VNNI__)
    return reinterpret_cast<Ints>(_mm512_dpwssd_epi32(reinterpret_cast<__m512i>(c), reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__SSE2__)
    union { Shorts all; __m128i quarter[4]; } x{a}, y{b};
    union { Ints all; __m128i quarter[4]; } sum{c};
    for (int i = 0; i < 4; ++i) sum.quarter[i] = _mm_add_epi32(sum.quarter[i], _mm_madd_epi16(x.quarter[i], y.quarter[i]));
    return sum.all;
#else
    const Ints x = reinterpret_cast<Ints>(a), y = reinterpret_cast<Ints>(b);
    return c + (x << 16 >> 16) * (y << 16 >> 16) + (x >> 16) * (y >> 16);
#endif
}
// The nearest whole numbers, as the lower halves of the words, if they fit there; ties to even.
inline Words nearest(Floats v, Floats scale) { return reinterpret_cast<Words>(fma(v, scale, spread(12582912.0f))); }
// Pairs of an even and an odd one.
inline Shorts shorts(Words even, Words odd) {
#if defined(__AVX512BW__)
    // Bytes 0 and 1 of each word go to bytes 2 and 3, where the mask lets them: one instruction.
    const __m512i up = _mm512_set4_epi32(0x0d0c0000, 0x09080000, 0x05040000, 0x01000000);
    return reinterpret_cast<Shorts>(
        _mm512_mask_shuffle_epi8(reinterpret_cast<__m512i>(even), 0xcccccccccccccccc, reinterpret_cast<__m512i>(odd), up));
#else
    return reinterpret_cast<Shorts>((even & 0xffffu) | odd << 16);
#endif
}
// Times 2^shift.
inline Shorts shorts(Bytes v, int shift) { return __builtin_convertvector(v, Shorts) << short(shift); }
inline void store(int16_t* p, Shorts v) { std::memcpy(p, &v, sizeof v); }
inline void store_low(int16_t* p, Words w) {
    const Halves h = __builtin_convertvector(w & 0xffffu, Halves);
    std::memcpy(p, &h, sizeof h);
}
#if defined(__FMA__) && !defined(__AVX512F__)
inline EightInts nearest(Eight v, Eight scale) { return reinterpret_cast<EightInts>(fma(v, scale, spread_as<Eight>(12582912.0f))); }
inline __m256i shorts(EightInts even, EightInts odd) {
    return _mm256_blend_epi16(reinterpret_cast<__m256i>(even), _mm256_slli_epi32(reinterpret_cast<__m256i>(odd), 16), 0xaa);
}
inline void store_low(int16_t* p, EightInts w) {
    const __m256i low = _mm256_and_si256(reinterpret_cast<__m256i>(w), _mm256_set1_epi32(0xffff));
    const __m128i h = _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
    std::memcpy(p, &h, sizeof h);
}
#endif
inline Shorts spread_two(const int16_t* p) {
    int32_t w;
    std::memcpy(&w, p, 4);
    return reinterpret_cast<Shorts>(Ints{w, w, w, w, w, w, w, w, w, w, w, w, w, w, w, w});
}
// Of each eight values of a and of b the first four, or the last four, in turns.
inline Shorts zip_low(Shorts a, Shorts b) {
    return __builtin_shufflevector(a, b, 0, 32, 1, 33, 2, 34, 3, 35, 8, 40, 9, 41, 10, 42, 11, 43, 16, 48, 17, 49, 18, 50, 19, 51, 24, 56, 25, 57, 26, 58, 27, 59);
}
inline Shorts zip_high(Shorts a, Shorts b) {
    return __builtin_shufflevector(a, b, 4, 36, 5, 37, 6, 38, 7, 39, 12, 44, 13, 45, 14, 46, 15, 47, 20, 52, 21, 53, 22, 54, 23, 55, 28, 60, 29, 61, 30, 62, 31, 63);
}
inline Floats floats(Ints v) { return __builtin_convertvector(v, Floats); }

// While it lives, numbers below the normal ones count as zero, as the instruction for pairs always has it.
class FlushTiny {
#if defined(__x86_64__)
   public:
    FlushTiny() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
    ~FlushTiny() { _mm_setcsr(before_); }
    FlushTiny(const FlushTiny&) = delete;

   private:
    unsigned before_;
#else
   public:
    FlushTiny() {}
#endif
};

inline int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

}  // namespace glasklar
