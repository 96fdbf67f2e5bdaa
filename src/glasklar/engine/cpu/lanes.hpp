// Sixteen floats at a time, whatever the CPU: an AVX2 or plain build takes the same sums in the same order as AVX-512, so
// the engine's numbers are the same on every machine. Nothing is contracted or reordered unless written so (`fma`).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
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

inline Floats spread(float x) { return Floats{} + x; }
inline Floats load(const float* p) { return load_as<Floats>(p); }
inline Floats load(const bf16* p) {
    return reinterpret_cast<Floats>(__builtin_convertvector(load_as<Halves>(p), Words) << 16);
}
inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

inline Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return reinterpret_cast<Floats>(_mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__FMA__)
    union { Floats all; __m256 half[2]; } x{a}, y{b}, z{c};
    for (int i = 0; i < 2; ++i) z.half[i] = _mm256_fmadd_ps(x.half[i], y.half[i], z.half[i]);
    return z.all;
#else
    for (int i = 0; i < LANES; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#endif
}

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

inline void store(bf16* p, Floats v) {
#if defined(__AVX512BF16__)
    __m256bh h = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v));
    std::memcpy(p, &h, sizeof h);
#else
    for (int i = 0; i < LANES; ++i) p[i] = narrow(v[i]);
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
inline Floats larger(Floats a, Floats b) { return a < b ? b : a; }
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

// a . b of bf16 pairs added to c: the odd products first, each fused, as the instruction does it.
inline Floats dot_pairs(Floats c, Words a, Words b) {
#if defined(__AVX512BF16__)
    return reinterpret_cast<Floats>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(c), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
#else
    c = fma(reinterpret_cast<Floats>(a & 0xffff0000u), reinterpret_cast<Floats>(b & 0xffff0000u), c);
    return fma(reinterpret_cast<Floats>(a << 16), reinterpret_cast<Floats>(b << 16), c);
#endif
}

// Sixteen sums of four products u8 * s8 each, added to c. `Largest` bounds the unsigned side.
template <int Largest>
inline Ints dot_bytes(Ints c, Words u, Words s) {
#if defined(__AVX512VNNI__)
    return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(c), reinterpret_cast<__m512i>(u), reinterpret_cast<__m512i>(s)));
#elif defined(__AVX2__)
    union { Words all; __m256i half[2]; } x{u}, y{s};
    union { Ints all; __m256i half[2]; } z{c};
    const __m256i ones = _mm256_set1_epi16(1);
    for (int i = 0; i < 2; ++i) {
        if constexpr (Largest * 127 * 2 < 32768) {
            z.half[i] = _mm256_add_epi32(z.half[i], _mm256_madd_epi16(_mm256_maddubs_epi16(x.half[i], y.half[i]), ones));
        } else {  // pairs would overflow 16 bits: even and odd bytes apart
            const __m256i low = _mm256_set1_epi16(255);
            __m256i even = _mm256_maddubs_epi16(_mm256_and_si256(x.half[i], low), y.half[i]);
            __m256i odd = _mm256_maddubs_epi16(_mm256_andnot_si256(low, x.half[i]), y.half[i]);
            z.half[i] = _mm256_add_epi32(z.half[i], _mm256_add_epi32(_mm256_madd_epi16(even, ones), _mm256_madd_epi16(odd, ones)));
        }
    }
    return z.all;
#else
    uint8_t a[64];
    int8_t b[64];
    std::memcpy(a, &u, 64);
    std::memcpy(b, &s, 64);
    for (int i = 0; i < 64; ++i) c[i / 4] += int(a[i]) * b[i];
    return c;
#endif
}

inline int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

}  // namespace glasklar
