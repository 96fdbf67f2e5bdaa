// Products of weight matrices with rows of activations.
#pragma once

#include <type_traits>

#include "matrix.hpp"

namespace glasklar {

// Tiles that are read side by side, and how many bytes ahead. Measured on two cores of an Ice Lake Xeon: 27 GB/s, a plain sum 22.
// With AVX2 one after the other: two cores of a Zen 4 read 29 to 46 GB/s so, a plain sum 32 to 57, eight streams 24 to 38.
constexpr int STREAMS = 8;
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int AHEAD = 2048;
#else
constexpr int AHEAD = 512;
#endif

// How many groups before its use one is asked for.
template <int KIND>
constexpr int EARLY = (AHEAD + group_bytes(KIND) - 1) / group_bytes(KIND);

// A row of activations as weights of a kind meet it: values, or groups.
template <int KIND>
using Element = std::conditional_t<KIND == FLOAT, float, std::conditional_t<KIND == BF16, Narrow, std::conditional_t<KIND == INT8, Sixteens, Eights>>>;
template <int KIND>
inline const Element<KIND>* row_of(const Rows& a, int64_t row) {
    if constexpr (KIND == FLOAT) return a.wide + row * a.width;
    else if constexpr (KIND == BF16) return a.narrow + row * a.width;
    else if constexpr (KIND == INT8 && !EIGHTS_FOR_INT8) return a.sixteens + row * a.groups();
    else return a.eights + row * a.groups();
}

// Up to STREAMS tiles of a matrix, and where those begin that will be read after them.
struct Tiles {
    int count = 0, which[STREAMS];
    const uint8_t *now[STREAMS], *next[STREAMS];

    void add(int tile, const uint8_t* here, const uint8_t* then) { which[count] = tile, now[count] = here, next[count++] = then; }
};

}  // namespace glasklar

// multiply_rows<KIND, M>(tiles, far, groups, a, rows, out): products of tiles with M rows, which may be wider than the matrix, as
// out[tile][row]; M up to MOST_ROWS. `far`: the tiles come from memory, not from a cache; then what is read AHEAD bytes later is asked
// for, as the processor's own reading ahead ends with each page (of integers in plain C++ only the next tiles).
#if defined(__AVX2__) && !defined(__AVX512F__)
#include "product_avx2.hpp"
#else
#include "product_lanes.hpp"
#endif

namespace glasklar {

typedef void (*MultiplyRows)(const Tiles& tiles, bool far, int groups, const Rows& a, const int64_t* rows, Floats* out);

// Out of line: one copy of each product serves all callers. `rows`: how many it takes; no more than `left`, or with the
// others repeated.
template <int KIND>
inline MultiplyRows choose_product(int left, int& rows) {
    // Of some rows more than one call takes, each takes half.
    rows = left <= MOST_ROWS || left > 3 * MOST_ROWS / 2 ? std::min(left, MOST_ROWS) : (left + 1) / 2;
    if constexpr (MOST_ROWS == 8) {
        if (rows > 6) {
            rows = 8;
            return multiply_rows<KIND, 8>;
        }
        if (rows > 4) return rows == 6 ? multiply_rows<KIND, 6> : multiply_rows<KIND, 5>;
    }
    return rows == 4 ? multiply_rows<KIND, 4> : rows == 3 ? multiply_rows<KIND, 3> : rows == 2 ? multiply_rows<KIND, 2> : multiply_rows<KIND, 1>;
}
inline MultiplyRows choose_product(int kind, int left, int& rows) {
    return kind == INT4 ? choose_product<INT4>(left, rows) : kind == INT8 ? choose_product<INT8>(left, rows)
         : kind == BF16 ? choose_product<BF16>(left, rows) : choose_product<FLOAT>(left, rows);
}

inline Floats bias_of(const Matrix& w, int copy, int tile) {
    Floats bias{};
    std::memcpy(&bias, w.bias + int64_t(copy) * w.outputs + tile * TILE, 4 * std::min(TILE, w.outputs - tile * TILE));
    return bias;
}

// emit(i, j, outputs of the j-th tile) for the activation rows rows[0..count), bias added.
template <class Emit>
inline void multiply(const Matrix& w, int copy, const Tiles& tiles, bool far, const Rows& a, const int64_t* rows, int count, Emit emit) {
    for (int first = 0, at_once; first < count; first += at_once) {
        Floats out[STREAMS * MOST_ROWS];
        int64_t list[MOST_ROWS];
        const MultiplyRows product = choose_product(w.kind, count - first, at_once);
        for (int m = 0; m < at_once; ++m) list[m] = rows[std::min(first + m, count - 1)];
        product(tiles, far, w.groups(), a, list, out);
        for (int m = 0; m < std::min(at_once, count - first); ++m)
            for (int j = 0; j < tiles.count; ++j) {
                const Floats v = out[j * at_once + m];
                emit(first + m, j, w.bias ? v + bias_of(w, copy, tiles.which[j]) : v);
            }
    }
}

// The same for the tiles [first, last), set by set: emit(i, tile, its outputs). `after`: where the tiles begin that will be read
// then, if not the following ones.
template <class Emit>
inline void multiply_all(const Matrix& w, int copy, int first, int last, const uint8_t* after, bool far, const Rows& a, const int64_t* rows, int count, Emit emit) {
    const int64_t size = tile_bytes(w.kind, w.inputs);
    for (int t = first; t < last; t += STREAMS) {
        Tiles tiles;
        const uint8_t* then = t + STREAMS < last || !after ? w.tile(copy, t + STREAMS) : after;
        for (int j = 0; j < std::min(STREAMS, last - t); ++j) tiles.add(t + j, w.tile(copy, t + j), then + j * size);
        multiply(w, copy, tiles, far, a, rows, count, [&](int i, int j, Floats v) { emit(i, t + j, v); });
    }
}

}  // namespace glasklar
