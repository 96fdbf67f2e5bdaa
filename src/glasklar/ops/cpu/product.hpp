// Small matrix products: a packed right side, a left side read in place, an epilogue that takes the sums.
//
// A product's sum runs over *units*. With AVX512-BF16 a unit of bf16 numbers is a pair of them, multiplied and summed by
// one instruction; everywhere else a unit is one float.
#pragma once

#include "vector.hpp"

namespace glasklar {

template <class T>
struct Unit {
    using type = float;
    static constexpr int size = 1;
    static float make(float a, float) { return a; }
    static Floats multiply_add(Floats total, float a, Floats b) { return total + a * b; }
    static Floats load(const float* p) { return glasklar::load(p); }
    // Two rows of numbers as a row of units; the second one may be missing.
    static Floats join(Floats a, Floats) { return a; }
    static Floats join(const T* a, const T*, int lanes) { return take(a, lanes); }
    static void store(float* p, Floats v) { glasklar::store(p, v); }
};

#if defined(__AVX512BF16__)
template <>
struct Unit<bf16> {
    using type = uint32_t;
    static constexpr int size = 2;
    static uint32_t make(float a, float b) {
        bf16 low, high;
        put(&low, a);
        put(&high, b);
        return low.bits | uint32_t(high.bits) << 16;
    }
    static Floats multiply_add(Floats total, uint32_t a, __m512i b) {
        return reinterpret_cast<Floats>(_mm512_dpbf16_ps(
            reinterpret_cast<__m512>(total), reinterpret_cast<__m512bh>(_mm512_set1_epi32(int(a))),
            reinterpret_cast<__m512bh>(b)));
    }
    static __m512i load(const uint32_t* p) { return _mm512_loadu_si512(p); }
    static Words join(Floats a, Floats b) { return round_bf16(a) | round_bf16(b) << 16; }
    static Words join(const bf16* a, const bf16* b, int lanes) {
        if (lanes == LANES) return b ? widen(a) | widen(b) << 16 : widen(a);
        return join(take(a, lanes), b ? take(b, lanes) : Floats{});
    }
    static void store(uint32_t* p, Words v) { std::memcpy(p, &v, sizeof v); }
};
#endif

// Column panels as wide as the registers allow: panel after panel, each [depth][width].
constexpr int PANEL_VECTORS = REGISTERS == 32 ? 4 : 2;
constexpr int PANEL = PANEL_VECTORS * LANES;

// Rows whose sums fit into registers beside `vectors` columns of the right side.
constexpr int tile_rows(int vectors) {
    return REGISTERS == 32 ? (vectors == 4 ? 6 : vectors == 3 ? 8 : 12) : (vectors == 2 ? 6 : 8);
}

template <class T>
class Packed {
   public:
    using unit = typename Unit<T>::type;
    static constexpr int size = Unit<T>::size;

    // `numbers` values in each sum, `columns` results; both are padded with zeros.
    Packed(unit* memory, int numbers, int columns)
        : data(memory), depth((numbers + size - 1) / size), columns(round_up(columns, LANES)) {}

    static std::size_t units(int numbers, int columns) {
        return std::size_t((numbers + size - 1) / size) * round_up(columns, LANES);
    }

    int width(int column) const { return std::min(PANEL, columns - column / PANEL * PANEL); }

    unit* at(int step, int column) const {
        int panel = column / PANEL * PANEL;
        return data + std::size_t(panel) * depth + std::size_t(step) * width(column) + (column - panel);
    }

    // Column c holds row c of the source: `row(c)` -> its numbers. Columns [from, to), whole vectors.
    template <class Row>
    void transpose(int given, int numbers, Row row, int from, int to) {
        const int whole = numbers / size;
        for (int c = from; c < to; c += LANES) {
            const int stride = width(c), valid = std::min(LANES, given - c);
            unit* out = at(0, c);
            int done = 0;
#if defined(__AVX512F__)
            if (valid == LANES) {
                const T* sources[LANES];
                for (int j = 0; j < LANES; ++j) sources[j] = row(c + j);
                for (; done + LANES <= whole; done += LANES) {
                    Floats square[LANES];
                    for (int j = 0; j < LANES; ++j) square[j] = read_vector(sources[j] + done * size);
                    transpose_square(square);
                    for (int k = 0; k < LANES; ++k) std::memcpy(out + std::size_t(done + k) * stride, &square[k], sizeof(Floats));
                }
            }
#endif
            for (int j = 0; j < LANES; ++j) {
                if (j >= valid) {
                    for (int k = done; k < depth; ++k) out[std::size_t(k) * stride + j] = 0;
                    continue;
                }
                if (done == depth) break;
                const T* source = row(c + j);
                for (int k = done; k < whole; ++k) out[std::size_t(k) * stride + j] = read(source + k * size);
                if (whole < depth) out[std::size_t(whole) * stride + j] = Unit<T>::make(value(source[whole * size]), 0);
            }
        }
    }
    template <class Row>
    void transpose(int given, int numbers, Row row) {
        transpose(given, numbers, row, 0, columns);
    }

    // The sum runs over the rows of the source: `row(r)` -> its `given` columns. Rows from `numbers` on count as zero.
    // Steps [from, to).
    template <class Row>
    void stack(int numbers, int given, Row row, int from, int to) {
        for (int k = from; k < to; ++k) {
            const T* first = k * size < numbers ? row(k * size) : nullptr;
            const T* second = size == 2 && k * size + 1 < numbers ? row(k * size + 1) : nullptr;
            for (int c = 0; c < columns; c += LANES) {
                int lanes = std::max(0, std::min(LANES, given - c));
                if (first) Unit<T>::store(at(k, c), Unit<T>::join(first + c, second ? second + c : nullptr, lanes));
                else Unit<T>::store(at(k, c), Unit<T>::join(Floats{}, Floats{}));
            }
        }
    }
    template <class Row>
    void stack(int numbers, int given, Row row) {
        stack(numbers, given, row, 0, depth);
    }

    unit* data;
    int depth, columns;

   private:
    static unit read(const T* p) {
        if constexpr (size == 2) {
            unit u;
            std::memcpy(&u, p, sizeof u);
            return u;
        } else {
            return value(*p);
        }
    }
    static Floats read_vector(const T* p) {
        if constexpr (size == 2) {
            Floats units;
            std::memcpy(&units, p, sizeof units);
            return units;
        } else {
            return glasklar::load(p);
        }
    }
};

// The left side of a product: unit k of row m lies at data[m * row + k * step]. `Row` is a constant where rows are
// neighbours, so that a tile needs one pointer. Rows are read in whole tiles: what lies behind the last one is read (and
// not used), so there must be memory.
template <class U, class Row = std::ptrdiff_t>
struct LeftSide {
    const U* data;
    Row row;
    std::ptrdiff_t step;
};
using Neighbours = std::integral_constant<std::ptrdiff_t, 1>;

// Sums of one tile into out[tile_rows][VECTORS]. A function of its own with its loops unrolled by force: only then do
// compilers keep all sums in registers.
template <class T, int VECTORS, class Row>
__attribute__((noinline)) void tile_sums(int steps, LeftSide<typename Unit<T>::type, Row> left,
                                         const typename Unit<T>::type* right, std::ptrdiff_t right_step, Floats* out) {
    constexpr int ROWS = tile_rows(VECTORS);
    Floats total[ROWS][VECTORS];
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; ++j) total[i][j] = Floats{};
    const auto* a = left.data;
    for (int k = 0; k < steps; ++k, a += left.step, right += right_step) {
        decltype(Unit<T>::load(right)) columns[VECTORS];
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; ++j) columns[j] = Unit<T>::load(right + j * LANES);
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; ++i) {
            const auto x = a[i * left.row];
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; ++j) total[i][j] = Unit<T>::multiply_add(total[i][j], x, columns[j]);
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; ++j) out[i * VECTORS + j] = total[i][j];
}

template <class T, int VECTORS, class Row, class Store>
inline void product_columns(int rows, int steps, LeftSide<typename Unit<T>::type, Row> left,
                            const typename Unit<T>::type* right, std::ptrdiff_t right_step, int column, Store store) {
    constexpr int ROWS = tile_rows(VECTORS);
    Floats sums[ROWS * VECTORS];
    for (int m = 0; m < rows; m += ROWS) {
        tile_sums<T, VECTORS, Row>(steps, {left.data + m * left.row, left.row, left.step}, right, right_step, sums);
        const int valid = std::min(ROWS, rows - m);
        for (int i = 0; i < valid; ++i)
            for (int j = 0; j < VECTORS; ++j) store(m + i, column + j * LANES, sums[i * VECTORS + j]);
    }
}

// For rows [0, rows) and packed columns [from, to): sums over units [first, last), handed to store(row, column, sums).
// `left` begins at the unit that meets `first`.
template <class T, class Row, class Store>
inline void product(int rows, LeftSide<typename Unit<T>::type, Row> left, const Packed<T>& right, int from, int to, int first,
                    int last, Store store) {
    for (int n = from; n < to;) {
        int width = right.width(n), room = std::min(width - n % PANEL, to - n) / LANES;
        const auto* b = right.at(first, n);
        auto run = [&](auto vectors) {
            product_columns<T, decltype(vectors)::value>(rows, last - first, left, b, width, n, store);
        };
        if (PANEL_VECTORS >= 4 && room >= 4) run(std::integral_constant<int, std::min(4, PANEL_VECTORS)>());
        else if (PANEL_VECTORS >= 3 && room == 3) run(std::integral_constant<int, std::min(3, PANEL_VECTORS)>());
        else if (room >= 2) run(std::integral_constant<int, 2>());
        else run(std::integral_constant<int, 1>());
        n += std::min(room, PANEL_VECTORS) * LANES;
    }
}

}  // namespace glasklar
