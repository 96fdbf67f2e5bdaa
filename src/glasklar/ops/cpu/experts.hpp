// Mixture-of-experts feed-forward without copies of tokens: rows are gathered while they are multiplied, the SwiGLU between
// the two products happens in the cache, and tokens add up their experts' results in a fixed order.
#pragma once

#include "pointwise.hpp"
#include "product.hpp"

namespace glasklar {

struct ExpertShape {
    int64_t T, A, E, D, F;
    int64_t rows() const { return T * A; }
};

constexpr int TOKEN_BLOCK = 48;   // rows of one expert that go through both products together
constexpr int WEIGHT_BLOCK = 128;  // rows that one update of a weight gradient takes in
constexpr int WEIGHT_ROWS = 192;   // rows of a weight gradient that are made together at most

// Choices in the order of their experts; ties keep the order of tokens. Without `choice` there is one expert that sees all
// tokens in their order with weight 1: a dense feed-forward.
struct Plan {
    int32_t* choice;  // [rows] index into ids [T, A]
    int32_t* place;   // [T, A] row of each choice
    int32_t* start;   // [E + 1]

    int64_t token(int64_t row, int64_t active) const { return choice ? choice[row] / active : row; }
    float weight(const float* weights, int64_t row) const { return choice ? weights[choice[row]] : 1.0f; }
};

inline void plan_rows(const ExpertShape& s, const int64_t* ids, Plan plan) {
    std::fill(plan.start, plan.start + s.E + 1, 0);
    for (int64_t i = 0; i < s.rows(); ++i) ++plan.start[ids[i] + 1];
    for (int64_t e = 0; e < s.E; ++e) plan.start[e + 1] += plan.start[e];
    int32_t* next = Scratch::get<int32_t>(15, s.E);
    std::copy(plan.start, plan.start + s.E, next);
    for (int64_t i = 0; i < s.rows(); ++i) {
        plan.place[i] = next[ids[i]]++;
        plan.choice[plan.place[i]] = int32_t(i);
    }
}

// A block of one expert's rows.
struct Block {
    int expert, first, count;
};

inline int64_t count_blocks(const ExpertShape& s, const int32_t* start) {
    int64_t total = 0;
    for (int64_t e = 0; e < s.E; ++e) total += (start[e + 1] - start[e] + TOKEN_BLOCK - 1) / TOKEN_BLOCK;
    return total;
}

inline Block find_block(const int32_t* start, int64_t index) {
    int e = 0;
    for (;; ++e) {
        int64_t blocks = (start[e + 1] - start[e] + TOKEN_BLOCK - 1) / TOKEN_BLOCK;
        if (index < blocks) break;
        index -= blocks;
    }
    int first = start[e] + int(index) * TOKEN_BLOCK;
    return {e, first, std::min(TOKEN_BLOCK, start[e + 1] - first)};
}

template <class T>
struct ExpertTypes {
    using unit = typename Unit<T>::type;
    static constexpr int size = Unit<T>::size;
    using Element = std::conditional_t<size == 2, bf16, float>;

    // Rows of `width` elements as the left side of a product: whole units of the same kind.
    static LeftSide<unit> rows(const Element* p, int width) {
        return {reinterpret_cast<const unit*>(p), width / size, 1};
    }
};

// Copies rows as elements of units, padded with zeros to `width`.
template <class T, class Row>
inline void copy_block(typename ExpertTypes<T>::Element* out, int width, int numbers, int count, Row row) {
    for (int m = 0; m < count; ++m) {
        const T* source = row(m);
        if constexpr (std::is_same_v<T, typename ExpertTypes<T>::Element>) {
            std::memcpy(out + std::size_t(m) * width, source, numbers * sizeof(T));
            std::memset(out + std::size_t(m) * width + numbers, 0, (width - numbers) * sizeof(T));
        } else {
            each_vector(numbers, [&](int i, int n) { store(out + std::size_t(m) * width + i, take(source + i, n)); });
        }
    }
}

// hidden [rows, 2F] (gate and up before SwiGLU, kept for the backward pass; may be null) and results [rows, D].
template <class T>
void experts_forward_block(const ExpertShape& s, Plan plan, Block block, const T* x, const float* weights,
                           const Packed<T>& gate_up, const Packed<T>& down, T* hidden, T* results) {
    using Types = ExpertTypes<T>;
    using Element = typename Types::Element;
    const int D = int(s.D), F = int(s.F), d_width = round_up(D, LANES), f_width = round_up(F, LANES);
    const int u_width = round_up(2 * F, LANES) + LANES;
    Element* rows = Scratch::get<Element>(0, std::size_t(TOKEN_BLOCK) * d_width);
    float* up = Scratch::get<float>(1, std::size_t(TOKEN_BLOCK) * u_width);
    Element* gated = Scratch::get<Element>(2, std::size_t(TOKEN_BLOCK) * f_width);
    copy_block<T>(rows, d_width, D, block.count, [&](int m) { return x + plan.token(block.first + m, s.A) * s.D; });
    product<T>(block.count, Types::rows(rows, d_width), gate_up, 0,
               gate_up.columns, 0, gate_up.depth,
               [&](int m, int n, Floats sums) { store(up + std::size_t(m) * u_width + n, sums); });
    for (int m = 0; m < block.count; ++m) {
        const float* row = up + std::size_t(m) * u_width;
        const float weight = plan.weight(weights, block.first + m);
        if (hidden)
            each_vector(2 * F, [&](int i, int n) { give(hidden + (block.first + m) * 2 * s.F + i, take(row + i, n), n); });
        each_vector(F, [&](int i, int n) {
            Floats gate = take(row + i, n);
            store(gated + std::size_t(m) * f_width + i, gate * sigmoid(gate) * take(row + F + i, n) * weight);
        });
    }
    product<T>(block.count, Types::rows(gated, f_width), down, 0,
               down.columns, 0, down.depth, [&](int m, int n, Floats sums) {
                   give(results + (block.first + m) * s.D + n, sums, std::min(LANES, D - n));
               });
}

// Gradients of gate and up [rows, 2F], of the gate's weights [T, A] and of the rows themselves [rows, D]; `gated` [rows, F]
// is the input of the down-projection made again, for the gradient of its weights.
template <class T>
void experts_backward_block(const ExpertShape& s, Plan plan, Block block, const float* weights, const T* hidden,
                            const T* grad, const Packed<T>& gate_up, const Packed<T>& down, T* grad_hidden, T* gated,
                            float* grad_weights, T* grad_rows) {
    using Types = ExpertTypes<T>;
    using Element = typename Types::Element;
    const int D = int(s.D), F = int(s.F), d_width = round_up(D, LANES), f_width = round_up(F, LANES);
    const int u_width = round_up(2 * F, LANES) + LANES;
    Element* rows = Scratch::get<Element>(0, std::size_t(TOKEN_BLOCK) * d_width);
    float* grad_gated = Scratch::get<float>(1, std::size_t(TOKEN_BLOCK) * f_width);
    Element* grad_up = Scratch::get<Element>(2, std::size_t(TOKEN_BLOCK) * u_width);
    copy_block<T>(rows, d_width, D, block.count, [&](int m) { return grad + plan.token(block.first + m, s.A) * s.D; });
    product<T>(block.count, Types::rows(rows, d_width), down, 0,
               down.columns, 0, down.depth,
               [&](int m, int n, Floats sums) { store(grad_gated + std::size_t(m) * f_width + n, sums); });
    for (int m = 0; m < block.count; ++m) {
        const T* row = hidden + (block.first + m) * 2 * s.F;
        const float weight = plan.weight(weights, block.first + m);
        Floats dot{};
        each_vector(F, [&](int i, int n) {
            Floats gate = take(row + i, n), up = take(row + F + i, n), plain = gate * sigmoid(gate) * up;
            Floats g = take(grad_gated + std::size_t(m) * f_width + i, n), grad_gate, grad_value;
            dot += g * plain;
            swiglu_gradient(gate, up, g * weight, grad_gate, grad_value);
            give(gated + (block.first + m) * s.F + i, plain * weight, n);
            give(grad_hidden + (block.first + m) * 2 * s.F + i, grad_gate, n);
            give(grad_hidden + (block.first + m) * 2 * s.F + F + i, grad_value, n);
        });
        if (plan.choice) grad_weights[plan.choice[block.first + m]] = sum(dot);
    }
    copy_block<T>(grad_up, u_width, 2 * F, block.count, [&](int m) { return grad_hidden + (block.first + m) * 2 * s.F; });
    product<T>(block.count, Types::rows(grad_up, u_width), gate_up, 0,
               gate_up.columns, 0, gate_up.depth, [&](int m, int n, Floats sums) {
                   give(grad_rows + (block.first + m) * s.D + n, sums, std::min(LANES, D - n));
               });
}

// Rows [m_from, m_to) of one expert's gradient left^T right [m, n], a sum over the expert's rows: `left(row)` -> m numbers,
// `right(row)` -> n numbers.
template <class T, class Left, class Right>
void weight_gradient(int first, int last, int m_from, int m_to, int n, Left left, Right right, T* out) {
    using unit = typename Unit<T>::type;
    constexpr int size = Unit<T>::size;
    const int m = m_to - m_from, n_width = round_up(n, LANES), m_width = round_up(m, LANES);
    float* total = Scratch::get<float>(0, std::size_t(m) * n_width);
    std::fill(total, total + std::size_t(m) * n_width, 0.0f);
    unit* left_memory = Scratch::get<unit>(1, std::size_t(WEIGHT_BLOCK) * m_width);
    unit* right_memory = Scratch::get<unit>(2, Packed<T>::units(WEIGHT_BLOCK, n));
    for (int r = first; r < last; r += WEIGHT_BLOCK) {
        const int count = std::min(WEIGHT_BLOCK, last - r);
        Packed<T> packed(right_memory, count, n);
        packed.stack(count, n, [&](int i) { return right(r + i); });
        for (int k = 0; k < packed.depth; ++k) {
            const T* one = left(r + k * size) + m_from;
            const T* two = size == 2 && k * size + 1 < count ? left(r + k * size + 1) + m_from : nullptr;
            each_vector(m, [&](int i, int lanes) {
                Unit<T>::store(left_memory + std::size_t(k) * m_width + i,
                               Unit<T>::join(one + i, two ? two + i : nullptr, lanes));
            });
        }
        product<T>(m, LeftSide<unit, Neighbours>{left_memory, {}, m_width}, packed, 0, n_width, 0, packed.depth,
                   [&](int i, int c, Floats sums) {
                       float* p = total + std::size_t(i) * n_width + c;
                       store(p, load(p) + sums);
                   });
    }
    for (int i = 0; i < m; ++i)
        each_vector(n, [&](int c, int lanes) {
            give(out + std::size_t(m_from + i) * n + c, load(total + std::size_t(i) * n_width + c), lanes);
        });
}

// Rows of a weight gradient that one thread makes at a time: few enough that all threads have work. Sums do not depend on it.
inline int weight_rows(int64_t m, int64_t matrices, int threads) {
    const int share = round_up(int((m + threads - 1) / threads), 24);
    return matrices >= 4 * threads ? WEIGHT_ROWS : std::min(WEIGHT_ROWS, share);
}

// y [T, D]: each token's A rows added up in fp32, in the order of its choices.
template <class T>
void join_row(const ExpertShape& s, const int32_t* place, const T* rows, int64_t t, T* y) {
    each_vector(int(s.D), [&](int i, int n) {
        Floats total{};
        for (int64_t a = 0; a < s.A; ++a) total += take(rows + place[t * s.A + a] * s.D + i, n);
        give(y + t * s.D + i, total, n);
    });
}

}  // namespace glasklar
