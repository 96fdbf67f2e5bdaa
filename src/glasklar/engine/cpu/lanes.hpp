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
inline Floats load(const float* p) { return load_as<Floats>(p); }
inline Floats load(const bf16* p) {
    return reinterpret_cast<Floats>(__builtin_convertvector(load_as<Halves>(p), Words) << 16);
}
inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

#if defined(__FMA__) && !defined(__AVX512F__)
typedef float Eight __attribute__((vector_size(32)));
inline Eight low(Floats v) { return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7); }
inline Eight high(Floats v) { return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15); }
inline Eight fma(Eight a, Eight b, Eight c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats fma(Floats a, Floats b, Floats c) {
    return __builtin_shufflevector(fma(low(a), low(b), low(c)), fma(high(a), high(b), high(c)), 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
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
inline void put(float* p, float x) { *p = x; }
inline void put(bf16* p, float x) { *p = narrow(x); }

// Sixteen values rounded as `narrow` does it; each the upper half of its word, the lower one 0.
inline Words rounded(Floats v) {
    Words w = reinterpret_cast<Words>(v), odd = w >> 16 & 1u;
    return (v != v ? w | 0x400000u : w + odd + 0x7fffu) & 0xffff0000u;
}
inline void store(bf16* p, Floats v) {
#if defined(__AVX512BF16__)
    __m256bh h = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v));
    std::memcpy(p, &h, sizeof h);
#else
    Halves h = __builtin_convertvector(rounded(v) >> 16, Halves);
    std::memcpy(p, &h, sizeof h);
#endif
}

// Pairwise, in a fixed order.
inline float sum(Floats v) {
    float s[LANES];
    store(s, v);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) s[i] += s[i + half];
    return s[0];
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
inline Floats larger(Floats a, Floats b) { return a < b ? b : a; }
inline Floats smaller(Floats a, Floats b) { return b < a ? b : a; }
inline Floats magnitude(Floats v) { return reinterpret_cast<Floats>(reinterpret_cast<Words>(v) & 0x7fffffffu); }
inline float largest(Floats v) {
    float top = v[0];
    for (int i = 1; i < LANES; ++i) top = std::max(top, v[i]);
    return top;
}

// exp to 2 ulp: 2^n times a polynomial on [-ln2/2, ln2/2]. Exactly 0 below -87 (so for -inf); NaN stays NaN.
inline Floats exp(Floats x) {
    Floats clamped = x < -87.0f ? spread(-87.0f) : x;
    clamped = clamped > 88.0f ? spread(88.0f) : clamped;
    const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number in the low bits
    Floats n = fma(clamped, spread(1.44269504f), spread(shift));
    Ints exponent = reinterpret_cast<Ints>(n) << 23;
    n -= shift;
    Floats r = fma(n, spread(2.12194440e-4f), fma(n, spread(-0.693359375f), clamped));
    Floats p = spread(1.0f / 720);
    for (float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = fma(p, r, spread(c));
    Floats scaled = reinterpret_cast<Floats>(reinterpret_cast<Ints>(p) + exponent);
    return x < -87.0f ? spread(0) : scaled;
}
inline float exp1(float x) { return exp(spread(x))[0]; }
inline Floats silu(Floats x) { return x / (1.0f + exp(-x)); }

// Sixteen pairs of bf16, as products want them: a word for each pair, or all first ones and all second ones as floats.
// `Narrow` is how activations that meet them are kept: rounded to bf16 either way.
#if defined(__AVX512BF16__)
typedef Words Pairs;
typedef bf16 Narrow;
inline Pairs pairs(Words w) { return w; }
inline Pairs spread_pair(const Narrow* p) {
    uint32_t pair;
    std::memcpy(&pair, p, 4);
    return Words{} + pair;
}
inline void store_narrow(Narrow* p, Floats v) { store(p, v); }
// Two rows of 32 values, made pairs of a column: the even columns, then the odd ones.
inline void pair_rows(Words a, Words b, Pairs& even, Pairs& odd) {
    even = (a & 0xffffu) | b << 16;
    odd = a >> 16 | (b & 0xffff0000u);
}
#else
struct Pairs {
    Floats first, second;
};
typedef float Narrow;
inline Pairs pairs(Words w) { return {reinterpret_cast<Floats>(w << 16), reinterpret_cast<Floats>(w & 0xffff0000u)}; }
inline Pairs spread_pair(const Narrow* p) { return {spread(p[0]), spread(p[1])}; }
inline void store_narrow(Narrow* p, Floats v) { store(p, reinterpret_cast<Floats>(rounded(v))); }
inline void pair_rows(Words a, Words b, Pairs& even, Pairs& odd) {
    even = {reinterpret_cast<Floats>(a << 16), reinterpret_cast<Floats>(b << 16)};
    odd = {reinterpret_cast<Floats>(a & 0xffff0000u), reinterpret_cast<Floats>(b & 0xffff0000u)};
}
#endif

// Compilers make operands in memory of what is loaded once and used twice; two loads of whole vectors a cycle are more than the
// processor has. This one stays in a register.
inline void keep(Floats& v) {
#if defined(__AVX512F__)
    asm("" : "+v"(v));
#endif
}
#if defined(__AVX512BF16__)
inline void keep(Pairs& v) { asm("" : "+v"(v)); }
#else
inline void keep(Pairs& v) { keep(v.first), keep(v.second); }
#endif

// a . b of pairs added to c: the second products first, each fused, as the instruction does it.
inline Floats dot_pairs(Floats c, const Pairs& a, const Pairs& b) {
#if defined(__AVX512BF16__)
    return reinterpret_cast<Floats>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(c), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
#else
    return fma(a.first, b.first, fma(a.second, b.second, c));
#endif
}

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
