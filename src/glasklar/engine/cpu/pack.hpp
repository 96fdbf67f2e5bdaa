// From a matrix as a checkpoint has it ([outputs, inputs], float or bf16) to the tiles of matrix.hpp.
#pragma once

#include "matrix.hpp"

namespace glasklar {

inline uint16_t to_half(float x) {
#if defined(__F16C__)
    return uint16_t(_cvtss_sh(x, 0));
#else
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint32_t sign = bits >> 16 & 0x8000;
    float a = std::fabs(x);
    if (!(a < 65520)) return uint16_t(sign | (a != a ? 0x7e00 : 0x7c00));
    int exponent = std::max(-14, a > 0 ? std::ilogb(a) : -14);
    uint32_t whole = uint32_t(std::nearbyint(std::ldexp(a, 10 - exponent)));  // up to 2048: carries into the exponent
    return uint16_t(sign | (uint32_t(exponent + 14) * 1024 + whole));
#endif
}
inline float from_half(uint16_t h) {
    uint16_t all[LANES] = {h};
    return half_scales(reinterpret_cast<const uint8_t*>(all))[0];
}

// Values of one group in [-limit - 1 (int4) or -limit (int8), limit] and its scale, as stored.
struct Quantised {
    int8_t values[GROUP];
    uint16_t scale;
};

inline void round_to(const float* x, float inverse, int low, int high, int8_t* q) {
    for (int i = 0; i < GROUP; ++i) q[i] = int8_t(std::min(high, std::max(low, int(std::nearbyint(x[i] * inverse)))));
}

inline Quantised quantise8(const float* x) {
    Quantised out;
    float top = 0;
    for (int i = 0; i < GROUP; ++i) top = std::max(top, std::fabs(x[i]));
    out.scale = to_half(top / 127);
    float scale = from_half(out.scale);
    round_to(x, scale > 0 ? 1 / scale : 0, -127, 127, out.values);
    return out;
}

// Scales around the one that puts the largest value at -8 are tried, each refitted to its rounded values by least squares. (Plain
// squares: to weigh large values more was worse on finished models, docs/lab/2026-11-26-cache.md.)
inline Quantised quantise4(const float* x) {
    float extreme = 0;
    for (int i = 0; i < GROUP; ++i)
        if (std::fabs(x[i]) > std::fabs(extreme)) extreme = x[i];
    Quantised out{};
    if (extreme == 0) return out;
    const Floats a = load(x), b = load(x + LANES);
    const float magic = 12582912.0f;  // adding 1.5 * 2^23 rounds
    constexpr int STEPS = 15;
    Floats cross[LANES] = {}, own[LANES] = {};
    for (int step = 0; step < STEPS; ++step) {
        const float inverse = -(8 + 0.125f * (step - 7)) / extreme;
        auto rounded = [&](Floats v) {
            Floats q = v * inverse + magic - magic;
            q = q < -8.0f ? spread(-8) : q;
            return q > 7.0f ? spread(7) : q;
        };
        Floats qa = rounded(a), qb = rounded(b);
        cross[step] = a * qa + b * qb, own[step] = qa * qa + qb * qb;
    }
    const Floats crosses = sums(cross), owns = sums(own);
    float best = -1, scale = 0;
    for (int step = 0; step < STEPS; ++step)
        if (owns[step] > 0 && crosses[step] * crosses[step] > best * owns[step])
            best = crosses[step] * crosses[step] / owns[step], scale = crosses[step] / owns[step];
    out.scale = to_half(scale);
    scale = from_half(out.scale);
    round_to(x, scale != 0 ? 1 / scale : 0, -8, 7, out.values);
    return out;
}

// One tile: source rows first .. first + 15, of which `outputs` exist in all.
template <class T>
inline void pack_tile(int kind, const T* source, int64_t stride, int first, int outputs, int inputs, uint8_t* tile) {
    for (int g = 0; g < round_up(inputs, GROUP) / GROUP; ++g) {
        uint8_t* out = tile + g * tile_bytes(kind, GROUP);
        if (kind >= INT8) std::memset(out, 0, tile_bytes(kind, GROUP));
        for (int row = 0; row < TILE; ++row) {
            float x[GROUP] = {};
            if (first + row < outputs)
                for (int i = 0; i < GROUP && g * GROUP + i < inputs; ++i) x[i] = value(source[(first + row) * stride + g * GROUP + i]);
            if (kind == FLOAT) {
                for (int i = 0; i < GROUP; ++i) std::memcpy(out + (i * TILE + row) * 4, x + i, 4);
            } else if (kind == BF16) {
                for (int i = 0; i < GROUP; ++i) {
                    bf16 narrowed = narrow(x[i]);
                    std::memcpy(out + ((i / 2 * TILE + row) * 2 + i % 2) * 2, &narrowed, 2);
                }
            } else {
                Quantised q = kind == INT8 ? quantise8(x) : quantise4(x);
                for (int i = 0; i < GROUP; ++i) {
                    int byte = row * 4 + i % 4, quad = i / 4, stored = q.values[i] + offset_of(kind);
                    if (kind == INT8) out[quad * 64 + byte] = uint8_t(stored);
                    else out[quad % 4 * 64 + byte] |= uint8_t(quad < 4 ? stored : stored << 4);
                }
                std::memcpy(out + tile_bytes(kind, GROUP) - 2 * TILE + 2 * row, &q.scale, 2);
            }
        }
    }
}

// The value at (row, input) as the products see it: for tests.
inline float unpacked(const Matrix& w, int copy, int row, int input) {
    const uint8_t* group = w.tile(copy, row / TILE) + input / GROUP * tile_bytes(w.kind, GROUP);
    int r = row % TILE, i = input % GROUP;
    if (w.kind == FLOAT) return load_as<float>(group + (i * TILE + r) * 4);
    if (w.kind == BF16) return value(load_as<bf16>(group + ((i / 2 * TILE + r) * 2 + i % 2) * 2));
    float scale = from_half(load_as<uint16_t>(group + tile_bytes(w.kind, GROUP) - 2 * TILE + 2 * r));
    int quad = i / 4, byte = r * 4 + i % 4;
    int stored = w.kind == INT8 ? group[quad * 64 + byte] : (quad < 4 ? group[quad * 64 + byte] & 15 : group[quad % 4 * 64 + byte] >> 4);
    return float(stored - offset_of(w.kind)) * scale;
}

}  // namespace glasklar
