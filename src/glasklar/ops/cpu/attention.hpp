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
    int64_t items() const { return B * G; }
};

constexpr int QUERY_BLOCK = 24;                 // a multiple of every tile_rows()
constexpr int QUERIES_TOGETHER = 11 * QUERY_BLOCK;  // rows whose weights the backward pass keeps at a time
constexpr int KEY_BLOCK = 48;                   // keys whose gradients are summed over the same rows

// What a query sees: keys [from, to) hold all that are visible, and `clear` says that the mask is zero throughout. The
// mask is the same for all heads, so it is read once before them.
struct Span {
    int32_t from, to, clear;
};

template <class T>
void find_spans(int64_t rows, int64_t keys, const T* mask, Span* spans, int threads) {
    constexpr float NEVER = -std::numeric_limits<float>::infinity();
#pragma omp parallel for num_threads(threads)
    for (int64_t t = 0; t < rows; ++t) {
        const T* row = mask + t * keys;
        auto hidden = [&](int i) { return value(row[i]) == NEVER; };
        auto all_hidden = [&](int i) { return largest(load(row + i)) == NEVER; };
        int from = 0, to = int(keys);
        while (from + LANES <= to && all_hidden(from)) from += LANES;
        while (from < to && hidden(from)) ++from;
        while (to - LANES >= from && all_hidden(to - LANES)) to -= LANES;
        while (to > from && hidden(to - 1)) --to;
        Floats most{};
        each_vector(to - from, [&](int i, int n) {
            Floats x = take(row + from + i, n);
            most = larger(most, larger(x, -x));
        });
        spans[t] = {from, to, largest(most) == 0.0f};
    }
}

// Where row `i` of a group stands, counted on from row to row: divisions would take longer than a row of scores.
struct Place {
    Place(int64_t length, int i) : length(int(length)), head(i / int(length)), position(i % int(length)) {}
    void next() {
        if (++position == length) position = 0, ++head;
    }
    int length, head, position;
};

// Some rows of a group, whose heads' queries stand one after another: where each stands, and the keys that they see.
struct QueryBlock {
    QueryBlock(const AttentionShape& s, const Span* spans, int64_t b, int64_t g, int first, int count)
        : first(first), count(count) {
        int low = int(s.S), high = 0;
        clear_from = 0, clear_to = int(s.S);
        Place place(s.T, first);
        for (int m = 0; m < count; ++m, place.next()) {
            head[m] = g * (s.H / s.G) + place.head;
            position[m] = place.position;
            const Span& span = spans[b * s.T + position[m]];
            low = std::min(low, int(span.from));
            high = std::max(high, int(span.to));
            clear_from = std::max(clear_from, span.clear ? int(span.from) : int(s.S));
            clear_to = std::min(clear_to, int(span.to));
        }
        from = std::min(low, high) / LANES * LANES;
        to = round_up(high, LANES);
    }

    int first, count;
    int from, to;              // keys that any of the rows sees, in whole vectors
    int clear_from, clear_to;  // keys that all of them see, with nothing added to their scores
    int64_t head[QUERY_BLOCK], position[QUERY_BLOCK];
};

// What one thread needs for one (sequence, key/value head).
template <class T>
struct AttentionWork {
    using U = Unit<T>;
    using unit = typename U::type;
    using Element = std::conditional_t<U::size == 2, bf16, float>;  // numbers laid out as units
    // Where units are floats, what is computed from scores takes their place, and nothing is copied.
    static constexpr bool IN_PLACE = U::size == 1;

    AttentionWork(const AttentionShape& s, Heads<const T> q, Heads<const T> k, Heads<const T> v, const T* mask,
                  const Span* spans, float scale, int64_t item)
        : s(s), q(q), k(k), v(v), mask(mask), spans(spans), scale(scale), b(item / s.G), g(item % s.G),
          rows(int(s.H / s.G * s.T)), keys(round_up(int(s.S), LANES)),
          k_width(round_up(int(s.K), LANES)), v_width(round_up(int(s.V), LANES)),
          keys_across(Scratch::get<unit>(0, Packed<T>::units(int(s.K), int(s.S))), int(s.K), int(s.S)),
          scores(Scratch::get<float>(1, std::size_t(QUERY_BLOCK) * keys)),
          weights(place_weights()),
          queries(Scratch::get<Element>(3, std::size_t(QUERY_BLOCK) * k_width)) {
        keys_across.transpose(int(s.S), int(s.K), [&](int i) { return this->k.row(b, g, i); });
    }

    Element* place_weights() {
        if constexpr (IN_PLACE) return scores;
        else return Scratch::get<Element>(2, std::size_t(QUERY_BLOCK) * keys);
    }

    QueryBlock block(int first, int last) const {
        return QueryBlock(s, spans, b, g, first, std::min(QUERY_BLOCK, last - first));
    }

    const T* row(const Heads<const T>& source, const QueryBlock& block, int m) const {
        return source.row(b, block.head[m], block.position[m]);
    }

    static LeftSide<unit> left(const Element* data, int width) {
        return {reinterpret_cast<const unit*>(data), width / U::size, 1};
    }

    void copy_rows(Element* out, int width, int numbers, const Heads<const T>& source, const QueryBlock& block) const {
        for (int m = 0; m < block.count; ++m) {
            const T* from = row(source, block, m);
            each_vector(numbers, [&](int i, int n) { store(out + m * width + i, take(from + i, n)); });
        }
    }

    // Heads lie apart in memory, which hardware does not foresee: while a block is worked on, the rows in its place of
    // the next item are asked for.
    void prefetch(const Heads<const T>& source, int64_t heads, int64_t length, int width, int from, int count) const {
        const int64_t next = b * s.G + g + 1, group = heads / s.G;
        if (next == s.items()) return;
        const int last = std::min(from + count, int(group * length));
        const T* start = source.row(next / s.G, next % s.G * group, 0);
        Place place(length, from);
        for (int i = from; i < last; ++i, place.next()) {
            const T* row = start + place.head * source.head + place.position * source.position;
            for (int byte = 0; byte < width * int(sizeof(T)); byte += 64)
                __builtin_prefetch(reinterpret_cast<const char*>(row) + byte, 0, 2);
        }
    }
    void prefetch_inputs(int from, int count) const {
        prefetch(q, s.H, s.T, int(s.K), from, count);
        prefetch(k, s.G, s.S, int(s.K), from, count);
        prefetch(v, s.G, s.S, int(s.V), from, count);
    }

    // handle(row in block, key, scaled and masked scores of LANES keys)
    template <class Handle>
    void each_score(const QueryBlock& block, Handle handle) const {
        copy_rows(queries, k_width, int(s.K), q, block);
        const T* added[QUERY_BLOCK];
        for (int m = 0; m < block.count; ++m) added[m] = mask + (b * s.T + block.position[m]) * s.S;
        auto part = [&](int from, int to, auto masked) {
            product<T>(block.count, left(queries, k_width), keys_across, from, to, 0, keys_across.depth,
                       [&](int m, int n, Floats sums) {
                           Floats x = sums * scale;
                           if (masked)
                               x += take(added[m] + n, std::min(LANES, int(s.S) - n),
                                         -std::numeric_limits<float>::infinity());
                           handle(m, n, x);
                       });
        };
        const int from = std::min(round_up(block.clear_from, LANES), block.to);
        const int to = std::max(block.clear_to / LANES * LANES, from);
        part(block.from, from, std::true_type());
        part(from, to, std::false_type());
        part(to, block.to, std::true_type());
    }

    const AttentionShape& s;
    Heads<const T> q, k, v;
    const T* mask;
    const Span* spans;
    float scale;
    int64_t b, g;
    int rows, keys, k_width, v_width;
    Packed<T> keys_across;
    float* scores;
    Element* weights;
    Element* queries;
};

template <class T>
void attention_forward_item(AttentionWork<T> work, Heads<T> out, float* log_sums) {
    using unit = typename Unit<T>::type;
    constexpr int size = Packed<T>::size;
    const AttentionShape& s = work.s;
    Packed<T> values(Scratch::get<unit>(4, Packed<T>::units(work.keys, int(s.V))), work.keys, int(s.V));
    values.stack(int(s.S), int(s.V), [&](int i) { return work.v.row(work.b, work.g, i); });
    for (int r = 0; r < work.rows; r += QUERY_BLOCK) {
        const QueryBlock block = work.block(r, work.rows);
        work.prefetch_inputs(r, QUERY_BLOCK);
        T* results[QUERY_BLOCK];
        float inverse[QUERY_BLOCK];
        work.each_score(block, [&](int m, int n, Floats x) { store(work.scores + m * work.keys + n, x); });
        for (int m = 0; m < block.count; ++m) {
            const float* row = work.scores + m * work.keys;
            Floats top = spread(-std::numeric_limits<float>::infinity()), total{};
            for (int n = block.from; n < block.to; n += LANES) top = larger(top, load(row + n));
            const float peak = largest(top);
            for (int n = block.from; n < block.to; n += LANES) {
                Floats e = exp(load(row + n) - peak);
                total += e;
                store(work.weights + m * work.keys + n, e);
            }
            const float mass = sum(total);
            inverse[m] = 1.0f / mass;
            results[m] = out.row(work.b, block.head[m], block.position[m]);
            if (log_sums) log_sums[(work.b * s.H + block.head[m]) * s.T + block.position[m]] = peak + std::log(mass);
        }
        product<T>(block.count, work.left(work.weights + block.from, work.keys), values, 0, values.columns,
                   block.from / size, block.to / size, [&](int m, int n, Floats sums) {
                       give(results[m] + n, sums * inverse[m], std::min(LANES, int(s.V) - n));
                   });
    }
}

// Gradients of one (sequence, key/value head). Weights and score gradients of QUERIES_TOGETHER rows are kept in pairs of
// rows, so that the sums over queries for keys and values are products too; they gather in fp32 until all rows are done.
template <class T>
class AttentionBackward {
    using unit = typename Unit<T>::type;
    using Element = typename AttentionWork<T>::Element;
    static constexpr int size = Packed<T>::size;
    static constexpr bool IN_PLACE = AttentionWork<T>::IN_PLACE;

   public:
    AttentionBackward(AttentionWork<T> work, Heads<const T> out, Heads<const T> grad, const float* log_sums)
        : work(work), s(work.s), out(out), grad(grad), log_sums(log_sums), keys(work.keys), K(int(s.K)), V(int(s.V)),
          values_across(Scratch::get<unit>(4, Packed<T>::units(V, keys)), V, keys),
          keys_down(Scratch::get<unit>(5, Packed<T>::units(keys, K)), keys, K),
          sum_k(Scratch::get<float>(6, std::size_t(keys) * work.k_width)),
          sum_v(Scratch::get<float>(7, std::size_t(keys) * work.v_width)),
          grads(Scratch::get<Element>(8, std::size_t(QUERY_BLOCK) * work.v_width)),
          grad_scores(Scratch::get<float>(9, std::size_t(QUERY_BLOCK) * keys)),
          paired_weights(Scratch::get<unit>(10, std::size_t(QUERIES_TOGETHER) * keys)),
          paired_scores(Scratch::get<unit>(11, std::size_t(QUERIES_TOGETHER) * keys)),
          stacked(Scratch::get<unit>(12, Packed<T>::units(QUERIES_TOGETHER, std::max(K, V)))) {
        values_across.transpose(int(s.S), V, [&](int i) { return this->work.v.row(this->work.b, this->work.g, i); });
        keys_down.stack(int(s.S), K, [&](int i) { return this->work.k.row(this->work.b, this->work.g, i); });
        std::fill(sum_k, sum_k + std::size_t(keys) * work.k_width, 0.0f);
        std::fill(sum_v, sum_v + std::size_t(keys) * work.v_width, 0.0f);
    }

    void run(Heads<T> grad_q, Heads<T> grad_k, Heads<T> grad_v) {
        for (int r = 0; r < work.rows; r += QUERIES_TOGETHER) {
            const int last = std::min(r + QUERIES_TOGETHER, work.rows);
            for (int i = r; i < last; i += QUERY_BLOCK) {
                const QueryBlock block = work.block(i, last);
                work.prefetch_inputs(i, QUERY_BLOCK);
                work.prefetch(out, s.H, s.T, V, i, QUERY_BLOCK);
                work.prefetch(grad, s.H, s.T, V, i, QUERY_BLOCK);
                if constexpr (IN_PLACE) {
                    work.scores = paired_weights + std::size_t(i - r) * keys;
                    work.weights = grad_scores = paired_scores + std::size_t(i - r) * keys;
                }
                make_scores(block);
                if constexpr (!IN_PLACE) pair_rows(block, (i - r) / size);
                ranges[(i - r) / QUERY_BLOCK] = {block.from, block.to, 0};
                T* results[QUERY_BLOCK];
                for (int m = 0; m < block.count; ++m) results[m] = grad_q.row(work.b, block.head[m], block.position[m]);
                product<T>(block.count, work.left(work.weights + block.from, keys), keys_down, 0, work.k_width,
                           block.from / size, block.to / size, [&](int m, int n, Floats sums) {
                               give(results[m] + n, sums, std::min(LANES, K - n));
                           });
            }
            add_over_rows(paired_weights, grad, V, r, last, sum_v);
            add_over_rows(paired_scores, work.q, K, r, last, sum_k);
        }
        for (int i = 0; i < int(s.S); ++i) {
            write_row(sum_k + i * work.k_width, K, grad_k.row(work.b, work.g, i));
            write_row(sum_v + i * work.v_width, V, grad_v.row(work.b, work.g, i));
        }
    }

   private:
    // Weights into `scores`, gradients of the scores into `grad_scores` and, as elements, into `work.weights`.
    void make_scores(const QueryBlock& block) {
        float log_sum[QUERY_BLOCK], delta[QUERY_BLOCK];
        for (int m = 0; m < block.count; ++m) {
            const T *result = work.row(out, block, m), *g = work.row(grad, block, m);
            log_sum[m] = log_sums[(work.b * s.H + block.head[m]) * s.T + block.position[m]];
            Floats dot{};
            each_vector(V, [&](int i, int n) { dot += take(result + i, n) * take(g + i, n); });
            delta[m] = sum(dot);
        }
        work.each_score(block, [&](int m, int n, Floats x) { store(work.scores + m * keys + n, exp(x - log_sum[m])); });
        work.copy_rows(grads, work.v_width, V, grad, block);
        product<T>(block.count, work.left(grads, work.v_width), values_across, block.from, block.to, 0,
                   values_across.depth, [&](int m, int n, Floats sums) {
                       Floats x = load(work.scores + m * keys + n) * (sums - delta[m]) * work.scale;
                       store(grad_scores + m * keys + n, x);
                       if constexpr (!IN_PLACE) store(work.weights + m * keys + n, x);
                   });
    }

    void pair_rows(const QueryBlock& block, int step) {
        for (int m = 0; m < block.count; m += size) {
            const bool whole = m + size <= block.count;
            auto join = [&](const float* x, unit* y) {
                y += std::size_t(step + m / size) * keys;
                for (int n = block.from; n < block.to; n += LANES) {
                    Floats second = whole ? load(x + (m + size - 1) * keys + n) : Floats{};
                    Unit<T>::store(y + n, Unit<T>::join(load(x + m * keys + n), second));
                }
            };
            join(work.scores, paired_weights);
            join(grad_scores, paired_scores);
        }
    }

    // total[key] += sum over rows [first, last) of paired[row][key] * source[row].
    void add_over_rows(const unit* paired, const Heads<const T>& source, int width, int first, int last, float* total) {
        Packed<T> right(stacked, last - first, width);
        const T* start = source.row(work.b, work.g * (s.H / s.G), 0);
        Place place(s.T, first);
        right.stack(last - first, width, [&](int) {  // asks for each row once, in their order
            const T* row = start + place.head * source.head + place.position * source.position;
            place.next();
            return row;
        });
        const int blocks = (last - first + QUERY_BLOCK - 1) / QUERY_BLOCK;
        for (int key = 0; key < keys; key += KEY_BLOCK) {
            const int count = std::min(KEY_BLOCK, keys - key);
            for (int b = 0; b < blocks;) {
                // Runs of blocks that have written all of these keys; a block that wrote only some comes alone.
                const int from = std::max(key, ranges[b].from), to = std::min(key + count, ranges[b].to);
                int end = b + 1;
                while (end < blocks && std::max(key, ranges[end].from) == from && std::min(key + count, ranges[end].to) == to)
                    ++end;
                if (from < to) {
                    const int begin = b * QUERY_BLOCK / size;
                    const int stop = std::min(end * QUERY_BLOCK / size, right.depth);
                    product<T>(to - from, LeftSide<unit, Neighbours>{paired + std::size_t(begin) * keys + from, {}, keys},
                               right, 0, right.columns, begin, stop, [&](int i, int n, Floats sums) {
                                   float* p = total + (from + i) * right.columns + n;
                                   store(p, load(p) + sums);
                               });
                }
                b = end;
            }
        }
    }

    static void write_row(const float* total, int width, T* row) {
        each_vector(width, [&](int n, int lanes) { give(row + n, load(total + n), lanes); });
    }

    AttentionWork<T> work;
    const AttentionShape& s;
    Heads<const T> out, grad;
    const float* log_sums;
    int keys, K, V;
    Packed<T> values_across, keys_down;
    float *sum_k, *sum_v;
    Element* grads;
    float* grad_scores;
    unit *paired_weights, *paired_scores, *stacked;
    Span ranges[QUERIES_TOGETHER / QUERY_BLOCK];
};

}  // namespace glasklar
