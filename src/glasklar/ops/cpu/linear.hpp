// Linear maps y = x W^T, and the orthogonalisation of small matrices, on the packed products.
#pragma once

#include "experts.hpp"

namespace glasklar {

// Rows [first, first + count) of x [rows, K] times packed columns, into y [rows, N].
template <class T>
void linear_block(const T* x, const Packed<T>& weights, T* y, int64_t first, int count, int K, int N) {
    using Element = typename ExpertTypes<T>::Element;
    const int width = round_up(K, LANES);
    Element* rows = Scratch::get<Element>(0, std::size_t(TOKEN_BLOCK) * width);
    copy_block<T>(rows, width, K, count, [&](int m) { return x + (first + m) * K; });
    product<T>(count, ExpertTypes<T>::rows(rows, width), weights, 0, weights.columns, 0, weights.depth,
               [&](int m, int n, Floats sums) { give(y + (first + m) * N + n, sums, std::min(LANES, N - n)); });
}

// Newton-Schulz on one matrix x [R, C], R <= C, in place: U S V^T becomes about U V^T (`orthogonalise` in reference.py).
// All that it needs stays in the near cache between the steps.
inline void orthogonalise_matrix(float* x, int R, int C, const float* factors, int steps) {
    const float a = factors[0], b = factors[1], c = factors[2];
    const int rows = round_up(R, 24), c_width = round_up(C, LANES), r_width = round_up(R, LANES);  // 24: of all tile_rows()
    float* now = Scratch::get<float>(0, std::size_t(rows) * c_width);
    float* gram = Scratch::get<float>(1, std::size_t(rows) * r_width);
    float* mixed = Scratch::get<float>(2, std::size_t(rows) * r_width);
    Packed<float> across(Scratch::get<float>(3, Packed<float>::units(C, R)), C, R);
    Packed<float> squared(Scratch::get<float>(4, Packed<float>::units(R, R)), R, R);
    Packed<float> down(Scratch::get<float>(5, Packed<float>::units(R, C)), R, C);
    Floats squares{};
    for (int r = 0; r < R; ++r) each_vector(C, [&](int i, int n) { Floats v = take(x + r * C + i, n); squares += v * v; });
    const float scale = 1.0f / std::max(std::sqrt(sum(squares)), 1e-7f);
    for (int r = 0; r < R; ++r)
        each_vector(C, [&](int i, int n) { store(now + r * c_width + i, take(x + r * C + i, n) * scale); });
    auto left = [](const float* data, int width) { return LeftSide<float>{data, width, 1}; };
    for (int step = 0; step < steps; ++step) {
        across.transpose(R, C, [&](int r) { return now + r * c_width; });
        product<float>(R, left(now, c_width), across, 0, across.columns, 0, C,
                       [&](int m, int n, Floats sums) { store(gram + m * r_width + n, sums); });
        squared.stack(R, R, [&](int r) { return gram + r * r_width; });
        product<float>(R, left(gram, r_width), squared, 0, squared.columns, 0, R, [&](int m, int n, Floats sums) {
            store(mixed + m * r_width + n, load(gram + m * r_width + n) * b + sums * c);
        });
        down.stack(R, C, [&](int r) { return now + r * c_width; });
        product<float>(R, left(mixed, r_width), down, 0, down.columns, 0, R, [&](int m, int n, Floats sums) {
            float* p = now + m * c_width + n;
            store(p, load(p) * a + sums);
        });
    }
    for (int r = 0; r < R; ++r)
        each_vector(C, [&](int i, int n) { give(x + r * C + i, load(now + r * c_width + i), n); });
}

}  // namespace glasklar
