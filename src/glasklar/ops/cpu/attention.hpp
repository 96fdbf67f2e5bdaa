// Attention for training and short contexts: blocks of queries against the keys that they may see.
//
// Keys outside the first and last visible one of a block are never touched, which halves the work of causal attention and
// makes packed documents cost their own lengths. Weights are not kept: the backward pass makes them again from the
// logarithm of each row's sum (arXiv 2205.14135).
#pragma once

#include "product.hpp"

namespace glasklar {

// A tensor [B, heads, positions, width] whose last axis is contiguous; strides in elements.
template <class T>
struct Heads {
    T* data;
    int64_t batch, head, position;
    T* row(int64_t b, int64_t h, int64_t t) const { return data + b * batch + h * head + t * position; }
};

struct AttentionShape {
    int64_t B, H, G, T, S, K, V;
};

constexpr int QUERY_BLOCK = 24;  // a multiple of every tile_rows()

// First and last-plus-one key that a query may see. The mask is the same for all heads, so it is read once before them.
struct Span {
    int32_t from, to;
};

template <class T>
const Span* visible_spans(const AttentionShape& s, const T* mask, int threads) {
    Span* spans = Scratch::get<Span>(13, s.B * s.T);
#pragma omp parallel for num_threads(threads)
    for (int64_t t = 0; t < s.B * s.T; ++t) {
        const T* row = mask + t * s.S;
        int32_t from = 0, to = int32_t(s.S);
        while (from < to && value(row[from]) == -std::numeric_limits<float>::infinity()) ++from;
        while (to > from && value(row[to - 1]) == -std::numeric_limits<float>::infinity()) --to;
        spans[t] = {from, to};
    }
    return spans;
}

// What one thread needs for one (sequence, key/value head). Query rows of a group's heads stand one after another.
template <class T>
struct AttentionWork {
    using U = Unit<T>;
    using unit = typename U::type;
    using Element = std::conditional_t<U::size == 2, bf16, float>;  // numbers laid out as units

    AttentionWork(const AttentionShape& s, Heads<const T> q, Heads<const T> k, Heads<const T> v, const T* mask,
                  const Span* spans, float scale, int64_t item)
        : s(s), q(q), k(k), v(v), mask(mask), spans(spans), scale(scale), b(item / s.G), g(item % s.G),
          rows(int(s.H / s.G * s.T)), keys(round_up(int(s.S), LANES)),
          k_width(round_up(int(s.K), LANES)), v_width(round_up(int(s.V), LANES)),
          keys_across(Scratch::get<unit>(0, Packed<T>::units(int(s.K), int(s.S))), int(s.K), int(s.S)),
          scores(Scratch::get<float>(1, std::size_t(QUERY_BLOCK) * keys)),
          weights(Scratch::get<Element>(2, std::size_t(QUERY_BLOCK) * keys)),
          queries(Scratch::get<Element>(3, std::size_t(QUERY_BLOCK) * k_width)) {
        keys_across.transpose(int(s.S), int(s.K), [&](int i) { return this->k.row(b, g, i); });
    }

    int64_t head(int row) const { return g * (s.H / s.G) + row / s.T; }
    int64_t position(int row) const { return row % s.T; }
    const T* mask_row(int row) const { return mask + (b * s.T + position(row)) * s.S; }

    // Keys that any of the block's rows may see, in whole vectors.
    void find_range(int first_row, int count) {
        int low = int(s.S), high = 0;
        for (int m = 0; m < count; ++m) {
            const Span& span = spans[b * s.T + position(first_row + m)];
            low = std::min(low, int(span.from));
            high = std::max(high, int(span.to));
        }
        from = std::min(low, high) / LANES * LANES;
        to = round_up(high, LANES);
    }

    void copy_rows(Element* out, int width, int numbers, const Heads<const T>& source, int first_row, int count) {
        for (int m = 0; m < count; ++m) {
            const T* row = source.row(b, head(first_row + m), position(first_row + m));
            each_vector(numbers, [&](int i, int n) { store(out + m * width + i, take(row + i, n)); });
        }
    }

    // handle(row in block, key, scaled and masked scores of LANES keys)
    template <class Handle>
    void each_score(int first_row, int count, Handle handle) {
        copy_rows(queries, k_width, int(s.K), q, first_row, count);
        auto left = [&](int m) { return reinterpret_cast<const unit*>(queries + m * k_width); };
        product<T>(count, left, 1, keys_across, from, to, 0, keys_across.depth, [&](int m, int n, Floats sums) {
            Floats added = take(mask_row(first_row + m) + n, std::min(LANES, int(s.S) - n),
                                -std::numeric_limits<float>::infinity());
            handle(m, n, sums * scale + added);
        });
    }

    const AttentionShape& s;
    Heads<const T> q, k, v;
    const T* mask;
    const Span* spans;
    float scale;
    int64_t b, g;
    int rows, keys, k_width, v_width;
    int from = 0, to = 0;
    Packed<T> keys_across;
    float* scores;
    Element* weights;
    Element* queries;
};

template <class T>
void attention_forward_item(AttentionWork<T> work, Heads<T> out, float* log_sums) {
    using unit = typename Unit<T>::type;
    const AttentionShape& s = work.s;
    Packed<T> values(Scratch::get<unit>(4, Packed<T>::units(work.keys, int(s.V))), work.keys, int(s.V));
    values.stack(int(s.S), int(s.V), [&](int i) { return work.v.row(work.b, work.g, i); });
    for (int r = 0; r < work.rows; r += QUERY_BLOCK) {
        int count = std::min(QUERY_BLOCK, work.rows - r);
        float inverse[QUERY_BLOCK];
        work.find_range(r, count);
        work.each_score(r, count, [&](int m, int n, Floats x) { store(work.scores + m * work.keys + n, x); });
        for (int m = 0; m < count; ++m) {
            const float* row = work.scores + m * work.keys;
            Floats top = spread(-std::numeric_limits<float>::infinity()), total{};
            for (int n = work.from; n < work.to; n += LANES) top = larger(top, load(row + n));
            float peak = largest(top);
            for (int n = work.from; n < work.to; n += LANES) {
                Floats e = exp(load(row + n) - peak);
                total += e;
                store(work.weights + m * work.keys + n, e);
            }
            inverse[m] = 1.0f / sum(total);
            if (log_sums) log_sums[(work.b * s.H + work.head(r + m)) * s.T + work.position(r + m)] = peak + std::log(sum(total));
        }
        constexpr int size = Packed<T>::size;
        auto left = [&](int m) { return reinterpret_cast<const unit*>(work.weights + m * work.keys + work.from); };
        product<T>(count, left, 1, values, 0, values.columns, work.from / size, work.to / size,
                   [&](int m, int n, Floats sums) {
                       T* row = out.row(work.b, work.head(r + m), work.position(r + m));
                       give(row + n, sums * inverse[m], std::min(LANES, int(s.V) - n));
                   });
    }
}

// Gradients of one (sequence, key/value head): sums over queries are kept in fp32 until all queries are done.
template <class T>
void attention_backward_item(AttentionWork<T> work, Heads<const T> out, Heads<const T> grad, const float* log_sums,
                             Heads<T> grad_q, Heads<T> grad_k, Heads<T> grad_v) {
    using unit = typename Unit<T>::type;
    using Element = typename AttentionWork<T>::Element;
    constexpr int size = Packed<T>::size;
    const AttentionShape& s = work.s;
    const int keys = work.keys, K = int(s.K), V = int(s.V), k_width = work.k_width, v_width = work.v_width;
    auto key_row = [&](int i) { return work.k.row(work.b, work.g, i); };
    auto value_row = [&](int i) { return work.v.row(work.b, work.g, i); };

    Packed<T> values_across(Scratch::get<unit>(4, Packed<T>::units(V, keys)), V, keys);
    values_across.transpose(int(s.S), V, value_row);
    Packed<T> keys_down(Scratch::get<unit>(5, Packed<T>::units(keys, K)), keys, K);
    keys_down.stack(int(s.S), K, key_row);
    float* sum_k = Scratch::get<float>(6, std::size_t(keys) * k_width);
    float* sum_v = Scratch::get<float>(7, std::size_t(keys) * v_width);
    std::fill(sum_k, sum_k + std::size_t(keys) * k_width, 0.0f);
    std::fill(sum_v, sum_v + std::size_t(keys) * v_width, 0.0f);
    Element* grads = Scratch::get<Element>(8, std::size_t(QUERY_BLOCK) * v_width);
    float* grad_scores = Scratch::get<float>(9, std::size_t(QUERY_BLOCK) * keys);
    unit* paired_weights = Scratch::get<unit>(10, std::size_t(QUERY_BLOCK) * keys);
    unit* paired_scores = Scratch::get<unit>(11, std::size_t(QUERY_BLOCK) * keys);
    unit* block_memory = Scratch::get<unit>(12, Packed<T>::units(QUERY_BLOCK, std::max(K, V)));

    for (int r = 0; r < work.rows; r += QUERY_BLOCK) {
        const int count = std::min(QUERY_BLOCK, work.rows - r);
        float log_sum[QUERY_BLOCK], delta[QUERY_BLOCK];
        auto at = [&](auto& heads, int m) { return heads.row(work.b, work.head(r + m), work.position(r + m)); };
        for (int m = 0; m < count; ++m) {
            log_sum[m] = log_sums[(work.b * s.H + work.head(r + m)) * s.T + work.position(r + m)];
            Floats dot{};
            each_vector(V, [&](int i, int n) { dot += take(at(out, m) + i, n) * take(at(grad, m) + i, n); });
            delta[m] = sum(dot);
        }
        work.find_range(r, count);
        const int from = work.from, to = work.to;
        work.each_score(r, count, [&](int m, int n, Floats x) {
            store(work.scores + m * keys + n, exp(x - log_sum[m]));
        });
        work.copy_rows(grads, v_width, V, grad, r, count);
        auto grad_row = [&](int m) { return reinterpret_cast<const unit*>(grads + m * v_width); };
        product<T>(count, grad_row, 1, values_across, from, to, 0, values_across.depth, [&](int m, int n, Floats sums) {
            Floats x = load(work.scores + m * keys + n) * (sums - delta[m]) * work.scale;
            store(grad_scores + m * keys + n, x);
            store(work.weights + m * keys + n, x);
        });
        for (int m = 0; m < count; m += size) {
            const bool pair = m + size <= count;
            for (int n = from; n < to; n += LANES) {
                auto join = [&](const float* x, unit* y) {
                    Floats second = pair ? load(x + (m + size - 1) * keys + n) : Floats{};
                    Unit<T>::store(y + m / size * keys + n, Unit<T>::join(load(x + m * keys + n), second));
                };
                join(work.scores, paired_weights);
                join(grad_scores, paired_scores);
            }
        }
        Packed<T> block_grads(block_memory, count, V);
        block_grads.stack(count, V, [&](int m) { return at(grad, m); });
        auto weights_down = [&](int i) { return paired_weights + from + i; };
        product<T>(to - from, weights_down, keys, block_grads, 0, v_width, 0, block_grads.depth,
                   [&](int i, int n, Floats sums) {
                       float* p = sum_v + (from + i) * v_width + n;
                       store(p, load(p) + sums);
                   });
        Packed<T> block_queries(block_memory, count, K);
        block_queries.stack(count, K, [&](int m) { return at(work.q, m); });
        auto scores_down = [&](int i) { return paired_scores + from + i; };
        product<T>(to - from, scores_down, keys, block_queries, 0, k_width, 0, block_queries.depth,
                   [&](int i, int n, Floats sums) {
                       float* p = sum_k + (from + i) * k_width + n;
                       store(p, load(p) + sums);
                   });
        auto scores_row = [&](int m) { return reinterpret_cast<const unit*>(work.weights + m * keys + from); };
        product<T>(count, scores_row, 1, keys_down, 0, k_width, from / size, to / size, [&](int m, int n, Floats sums) {
            give(at(grad_q, m) + n, sums, std::min(LANES, K - n));
        });
    }
    for (int i = 0; i < int(s.S); ++i) {
        each_vector(K, [&](int n, int lanes) { give(grad_k.row(work.b, work.g, i) + n, load(sum_k + i * k_width + n), lanes); });
        each_vector(V, [&](int n, int lanes) { give(grad_v.row(work.b, work.g, i) + n, load(sum_v + i * v_width + n), lanes); });
    }
}

}  // namespace glasklar
