// Vectors of floats in the compiler's own notation (GCC, Clang): one source for AVX-512, AVX2, NEON and plain builds.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace glasklar {

#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 32;
#elif defined(__AVX2__)
constexpr int LANES = 8, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int LANES = 4, REGISTERS = 32;
#else
constexpr int LANES = 4, REGISTERS = 16;
#endif

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

struct bf16 {
    uint16_t bits;
};

inline Floats spread(float x) { return Floats{} + x; }

inline Floats load(const float* p) {
    Floats v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline Words widen(const bf16* p) {
    Halves h;
    std::memcpy(&h, p, sizeof h);
#if defined(__AVX512F__)
    return reinterpret_cast<Words>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(h)));
#else
    return __builtin_convertvector(h, Words);
#endif
}

inline Floats load(const bf16* p) { return reinterpret_cast<Floats>(widen(p) << 16); }

// The upper 16 bits of each word after rounding to nearest even.
inline Words round_bf16(Floats v) {
    Words w = reinterpret_cast<Words>(v);
    return (w + 0x7fff + ((w >> 16) & 1)) >> 16;
}

inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

inline void store(bf16* p, Floats v) {
#if defined(__AVX512BF16__)
    __m256bh h = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v));
#else
    Halves h = __builtin_convertvector(round_bf16(v), Halves);
#endif
    std::memcpy(p, &h, sizeof h);
}

inline float value(float x) { return x; }
inline float value(bf16 x) {
    uint32_t word = uint32_t(x.bits) << 16;
    float f;
    std::memcpy(&f, &word, 4);
    return f;
}

inline void put(float* p, float x) { *p = x; }
inline void put(bf16* p, float x) {
    uint32_t word;
    std::memcpy(&word, &x, 4);
    p->bits = uint16_t((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

// The last, incomplete vector of a row; lanes beyond `n` read as `fill` and are not written.
template <class T>
inline Floats load_part(const T* p, int n, float fill = 0) {
    Floats v = spread(fill);
    for (int i = 0; i < n; ++i) v[i] = value(p[i]);
    return v;
}

template <class T>
inline void store_part(T* p, Floats v, int n) {
    for (int i = 0; i < n; ++i) put(p + i, v[i]);
}

// body(column, lanes): whole vectors, then the rest.
template <class Body>
inline void each_vector(int n, Body body) {
    int i = 0;
    for (; i + LANES <= n; i += LANES) body(i, LANES);
    if (i < n) body(i, n - i);
}

template <class T>
inline Floats take(const T* p, int lanes, float fill = 0) {
    return lanes == LANES ? load(p) : load_part(p, lanes, fill);
}

template <class T>
inline void give(T* p, Floats v, int lanes) {
    if (lanes == LANES) store(p, v);
    else store_part(p, v, lanes);
}

// Halves on halves, so that the result does not depend on how a compiler orders the additions.
inline float sum(Floats v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(reinterpret_cast<__m512>(v));
#else
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) v[i] += v[i + half];
    return v[0];
#endif
}

inline float largest(Floats v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps(reinterpret_cast<__m512>(v));
#else
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) v[i] = std::max(v[i], v[i + half]);
    return v[0];
#endif
}

typedef uint64_t Pairs __attribute__((vector_size(LANES * 4)));

inline Floats swap_neighbours(Floats v) {
    Pairs pairs = reinterpret_cast<Pairs>(v);
    return reinterpret_cast<Floats>(pairs << 32 | pairs >> 32);
}

#if defined(__AVX512F__)
// Lanes of a, then of b, by their numbers.
inline Floats pick(Floats a, Floats b, Ints lanes) {
    return reinterpret_cast<Floats>(_mm512_permutex2var_ps(
        reinterpret_cast<__m512>(a), reinterpret_cast<__m512i>(lanes), reinterpret_cast<__m512>(b)));
}

// Row i, lane j goes to row j, lane i: blocks of 1, 2, 4, … lanes change sides. Bits are moved, never computed with.
inline void transpose_square(Floats (&rows)[LANES]) {
#pragma GCC unroll 4
    for (int half = 1; half < LANES; half *= 2) {
        Ints upper, lower;  // lanes of two rows after one another
        for (int j = 0; j < LANES; ++j) {
            upper[j] = j & half ? LANES + j - half : j;
            lower[j] = j & half ? LANES + j : j + half;
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i) {
            if (i & half) continue;
            const Floats a = rows[i], b = rows[i + half];
            rows[i] = pick(a, b, upper);
            rows[i + half] = pick(a, b, lower);
        }
    }
}
#endif

inline Floats larger(Floats a, Floats b) { return a < b ? b : a; }

// exp to 2 ulp: 2^n times a polynomial on [-ln2/2, ln2/2]. Exactly 0 below -87 (so for -inf); NaN stays NaN.
inline Floats exp(Floats x) {
    Floats clamped = x < -87.0f ? spread(-87.0f) : x;
    clamped = clamped > 88.0f ? spread(88.0f) : clamped;
    const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number in the low bits
    Floats n = clamped * 1.44269504f + shift;
    Ints exponent = reinterpret_cast<Ints>(n) << 23;
    n -= shift;
    Floats r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
    Floats p = spread(1.0f / 720);
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    Floats scaled = reinterpret_cast<Floats>(reinterpret_cast<Ints>(p) + exponent);
    return x < -87.0f ? spread(0) : scaled;
}

inline Floats reciprocal(Floats x) {
#if defined(__AVX512F__)
    Floats r = reinterpret_cast<Floats>(_mm512_rcp14_ps(reinterpret_cast<__m512>(x)));
    return r * (2.0f - x * r);  // one step of Newton: 14 right bits become 28
#else
    return 1.0f / x;
#endif
}

inline Floats sigmoid(Floats x) { return reciprocal(1.0f + exp(-x)); }

// Memory of one thread that outlives a call, so that no call pays for fresh pages. Contents are undefined.
class Scratch {
   public:
    // Room for `count` values of T, aligned to a cache line; slots are independent of each other.
    template <class T>
    static T* get(int slot, std::size_t count) {
        thread_local Scratch slots[16];
        return static_cast<T*>(slots[slot].reserve((count + LANES) * sizeof(T)));
    }
    ~Scratch() { std::free(memory_); }

   private:
    static constexpr std::size_t HUGE_PAGE = std::size_t(2) << 20;

    void* reserve(std::size_t bytes) {
        if (bytes > size_) {
            std::free(memory_);
            const std::size_t unit = bytes < HUGE_PAGE ? 4096 : HUGE_PAGE;
            size_ = (bytes + unit - 1) / unit * unit;
            memory_ = std::aligned_alloc(unit, size_);
#if defined(__linux__)
            if (unit == HUGE_PAGE) madvise(memory_, size_, MADV_HUGEPAGE);
#endif
        }
        return memory_;
    }
    void* memory_ = nullptr;
    std::size_t size_ = 0;
};

inline int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

}  // namespace glasklar
