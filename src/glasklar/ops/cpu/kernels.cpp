// The C interface: plain pointers and sizes, one function for each operation and number type. Nothing of torch is linked;
// the OpenMP calls find the runtime that torch has loaded, so that both use the same threads.

#include <type_traits>

#include "attention.hpp"
#include "linear.hpp"

using namespace glasklar;

namespace {

// With `added` [rows, D] x + added is what is normalised; it is written to `total`.
template <class T>
void rms_norm_forward(const T* x, int64_t stride, const T* added, T* total, const T* weight, float eps, T* y, float* inverse,
                      int64_t rows, int64_t D, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < rows; ++i) {
        const T* row = x + i * stride;
        if (added) {
            add_row(row, added + i * D, total + i * D, int(D));
            row = total + i * D;
        }
        rms_norm_forward_row(row, weight, eps, y + i * D, inverse + i, int(D));
    }
}

// work(row, total) for all rows, in parts that do not depend on the number of threads; `total` [numbers] gathers a gradient
// over each part's rows in `partial` [CHUNKS, numbers], and all of them are added up into `out`.
template <class T, class Work>
void sum_over_rows(int64_t rows, int64_t numbers, float* partial, T* out, int threads, Work work) {
#pragma omp parallel for num_threads(threads)
    for (int c = 0; c < CHUNKS; ++c) {
        float* total = partial + c * numbers;
        std::fill(total, total + numbers, 0.0f);
        for (int64_t i = rows * c / CHUNKS; i < rows * (c + 1) / CHUNKS; ++i) work(i, total);
    }
    for (int64_t i = 0; i < numbers; ++i) {
        float total = 0;
        for (int c = 0; c < CHUNKS; ++c) total += partial[c * numbers + i];
        put(out + i, total);
    }
}

// `other` [rows, D]: a gradient that is added to that of x; may be null.
template <class T>
void rms_norm_backward(const T* x, int64_t stride, const T* weight, const float* inverse, const T* grad, const T* other,
                       T* grad_x, float* partial, T* grad_weight, int64_t rows, int64_t D, int threads) {
    sum_over_rows(rows, D, partial, grad_weight, threads, [&](int64_t i, float* total) {
        rms_norm_backward_row(x + i * stride, weight, inverse[i], grad + i * D, other ? other + i * D : nullptr, grad_x + i * D,
                              total, int(D));
    });
}

template <class T>
void gate_forward(const T* x, const float* weight, float* logits, int64_t rows, int64_t D, int64_t E, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < rows; ++i) gate_forward_row(x + i * D, weight, logits + i * E, int(D), int(E));
}

template <class T>
void gate_backward(const T* x, const float* weight, const float* grad, T* grad_x, float* partial, float* grad_weight,
                   int64_t rows, int64_t D, int64_t E, int threads) {
    sum_over_rows(rows, E * D, partial, grad_weight, threads, [&](int64_t i, float* total) {
        gate_backward_row(x + i * D, weight, grad + i * E, grad_x + i * D, total, int(D), int(E));
    });
}

// own [rows, H, X], shared [rows, R], keys [rows, H, N + R]; shape: rows, H, X, N, R.
template <class T>
void join_keys(const T* own, const T* shared, T* keys, const int64_t* shape, int threads) {
    const int H = int(shape[1]), X = int(shape[2]), N = int(shape[3]), R = int(shape[4]);
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < shape[0]; ++i)
        join_keys_row(own + i * H * X, shared + i * R, keys + i * H * (N + R), H, X, N, R);
}

template <class T>
void split_keys(const T* grad_keys, T* grad_own, T* grad_shared, const int64_t* shape, int threads) {
    const int H = int(shape[1]), X = int(shape[2]), N = int(shape[3]), R = int(shape[4]);
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < shape[0]; ++i)
        split_keys_row(grad_keys + i * H * (N + R), grad_own + i * H * X, grad_shared + i * R, H, X, N, R);
}

// x [B, T, H, K] with strides, of which the last R values are turned; angles [B, T, R/2] with strides, y contiguous.
template <class T>
void rotate(const T* x, const int64_t* x_strides, const float* cosine, const float* sine, const int64_t* angle_strides,
            float direction, int interleave, T* y, const int64_t* shape, int threads) {
    const int64_t B = shape[0], length = shape[1], H = shape[2], K = shape[3], R = shape[4];
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < B * length; ++i) {
        int64_t b = i / length, t = i % length, angle = b * angle_strides[0] + t * angle_strides[1];
        const Turn turn(cosine + angle, sine + angle, direction, interleave != 0, int(R));
        for (int64_t h = 0; h < H; ++h) {
            const T* from = x + b * x_strides[0] + t * x_strides[1] + h * x_strides[2];
            T* to = y + (i * H + h) * K;
            std::memcpy(to, from, (K - R) * sizeof(T));
            turn.row(from + K - R, to + K - R);
        }
    }
}

template <class T>
void logprobs_forward(const T* logits, const int64_t* targets, float* logprobs, float* entropy, float* log_sums,
                      int64_t rows, int64_t W, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < rows; ++i)
        logprob_forward_row(logits + i * W, targets[i], logprobs + i, entropy + i, log_sums + i, int(W));
}

template <class T>
void logprobs_backward(const T* logits, const int64_t* targets, const float* log_sums, const float* grad, T* grad_logits,
                       int64_t rows, int64_t W, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < rows; ++i)
        logprob_backward_row(logits + i * W, targets[i], log_sums[i], grad[i], grad_logits + i * W, int(W));
}

template <class T>
Heads<T> heads(T* data, const int64_t* strides) {
    return {data, strides[0], strides[1], strides[2]};
}

// Neighbouring items for one thread, so that it can ask for the next one's rows; enough shares to keep threads even.
int64_t items_together(const AttentionShape& s, int threads) {
    return std::max<int64_t>(1, s.items() / (16 * int64_t(threads)));
}

// strides: [tensor][batch, head, position] in the order of the tensors. `spans` [B, T] is written for the backward pass.
template <class T>
void attention_forward(const T* q, const T* k, const T* v, const T* mask, float scale, T* out, float* log_sums,
                       Span* spans, const int64_t* shape, const int64_t* strides, int threads) {
    const AttentionShape s{shape[0], shape[1], shape[2], shape[3], shape[4], shape[5], shape[6]};
    find_spans(s.B * s.T, s.S, mask, spans, threads);
    const int64_t together = items_together(s, threads);
#pragma omp parallel for schedule(dynamic, together) num_threads(threads)
    for (int64_t item = 0; item < s.items(); ++item)
        attention_forward_item<T>(
            {s, heads(q, strides), heads(k, strides + 3), heads(v, strides + 6), mask, spans, scale, item},
            heads(out, strides + 9), log_sums);
}

template <class T>
void attention_backward(const T* q, const T* k, const T* v, const T* mask, float scale, const T* out, const T* grad,
                        const float* log_sums, const Span* spans, T* grad_q, T* grad_k, T* grad_v, const int64_t* shape,
                        const int64_t* strides, int threads) {
    const AttentionShape s{shape[0], shape[1], shape[2], shape[3], shape[4], shape[5], shape[6]};
    const int64_t together = items_together(s, threads);
#pragma omp parallel for schedule(dynamic, together) num_threads(threads)
    for (int64_t item = 0; item < s.items(); ++item)
        AttentionBackward<T>(
            {s, heads(q, strides), heads(k, strides + 3), heads(v, strides + 6), mask, spans, scale, item},
            heads(out, strides + 9), heads(grad, strides + 12), log_sums)
            .run(heads(grad_q, strides + 15), heads(grad_k, strides + 18), heads(grad_v, strides + 21));
}

// Weights of all experts laid out for products: `across` sums over a matrix's columns (x W^T), otherwise over its rows.
// The memory is the calling thread's scratch `slot`.
template <class T>
struct ExpertWeights {
    using unit = typename Unit<T>::type;
    ExpertWeights(const T* data, int64_t E, int64_t rows, int64_t columns, bool across, int slot, int threads)
        : numbers(int(across ? columns : rows)), results(int(across ? rows : columns)),
          units(Packed<T>::units(numbers, results)), memory(Scratch::get<unit>(slot, units * E)) {
        constexpr int PARTS = 4;
#pragma omp parallel for num_threads(threads)
        for (int64_t i = 0; i < E * PARTS; ++i) {
            const int64_t e = i / PARTS, part = i % PARTS;
            auto row = [&](int r) { return data + (e * rows + r) * columns; };
            Packed<T> packed = (*this)[int(e)];
            const int vectors = packed.columns / LANES, from = int(vectors * part / PARTS), to = int(vectors * (part + 1) / PARTS);
            if (across) packed.transpose(results, numbers, row, from * LANES, to * LANES);
            else packed.stack(numbers, results, row, int(packed.depth * part / PARTS), int(packed.depth * (part + 1) / PARTS));
        }
    }
    Packed<T> operator[](int e) const { return Packed<T>(memory + e * units, numbers, results); }

    int numbers, results;
    std::size_t units;
    unit* memory;
};

template <class T>
void experts_forward(const T* x, const int64_t* ids, const float* weights, const T* gate_up, const T* down, T* y,
                     T* hidden, int32_t* choice, int32_t* place, int32_t* start, const int64_t* shape, int threads) {
    const ExpertShape s{shape[0], shape[1], shape[2], shape[3], shape[4]};
    T* results = choice ? Scratch::get<T>(5, s.rows() * s.D) : y;
    const Plan plan{choice, place, start};
    if (choice) plan_rows(s, ids, plan);
    const ExpertWeights<T> up(gate_up, s.E, 2 * s.F, s.D, true, 3, threads), out(down, s.E, s.D, s.F, true, 4, threads);
    const int64_t blocks = count_blocks(s, start);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t i = 0; i < blocks; ++i) {
        Block block = find_block(start, i);
        experts_forward_block(s, plan, block, x, weights, up[block.expert], out[block.expert], hidden, results);
    }
    if (!choice) return;
#pragma omp parallel for num_threads(threads)
    for (int64_t t = 0; t < s.T; ++t) join_row(s, place, results, t, y);
}

template <class T>
void experts_backward(const T* x, const float* weights, const T* gate_up, const T* down, const T* hidden,
                      const T* grad, T* grad_x, float* grad_weights, T* grad_gate_up, T* grad_down, int32_t* choice,
                      int32_t* place, int32_t* start, const int64_t* shape, int threads) {
    const ExpertShape s{shape[0], shape[1], shape[2], shape[3], shape[4]};
    T* grad_rows = choice ? Scratch::get<T>(5, s.rows() * s.D) : grad_x;
    T* grad_hidden = Scratch::get<T>(6, s.rows() * 2 * s.F);
    T* gated = Scratch::get<T>(7, s.rows() * s.F);
    const Plan plan{choice, place, start};
    {
        const ExpertWeights<T> up(gate_up, s.E, 2 * s.F, s.D, false, 3, threads), out(down, s.E, s.D, s.F, false, 4, threads);
        const int64_t blocks = count_blocks(s, start);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
        for (int64_t i = 0; i < blocks; ++i) {
            Block block = find_block(start, i);
            experts_backward_block(s, plan, block, weights, hidden, grad, up[block.expert], out[block.expert],
                                   grad_hidden, gated, grad_weights, grad_rows);
        }
    }
    const int up_rows = weight_rows(2 * s.F, s.E, threads), down_rows = weight_rows(s.D, s.E, threads);
    const int up_parts = int((2 * s.F + up_rows - 1) / up_rows), down_parts = int((s.D + down_rows - 1) / down_rows);
#pragma omp parallel num_threads(threads)
    {
        if (choice) {
#pragma omp for nowait
            for (int64_t t = 0; t < s.T; ++t) join_row(s, place, grad_rows, t, grad_x);
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < s.E * (up_parts + down_parts); ++i) {
            const int64_t e = i / (up_parts + down_parts);
            const int part = int(i % (up_parts + down_parts)) - down_parts;
            if (part < 0) {
                const int from = (part + down_parts) * down_rows, to = std::min(from + down_rows, int(s.D));
                weight_gradient(start[e], start[e + 1], from, to, int(s.F),
                                [&](int r) { return grad + plan.token(r, s.A) * s.D; },
                                [&](int r) { return gated + r * s.F; }, grad_down + e * s.D * s.F);
            } else {
                const int from = part * up_rows, to = std::min(from + up_rows, int(2 * s.F));
                weight_gradient(start[e], start[e + 1], from, to, int(s.D),
                                [&](int r) { return grad_hidden + r * 2 * s.F; },
                                [&](int r) { return x + plan.token(r, s.A) * s.D; }, grad_gate_up + e * 2 * s.F * s.D);
            }
        }
    }
}

// A dense feed-forward is one expert for all tokens.
template <class T>
void feed_forward_forward(const T* x, const T* gate_up, const T* down, T* y, T* hidden, const int64_t* shape, int threads) {
    const int64_t expert[] = {shape[0], 1, 1, shape[1], shape[2]};
    int32_t start[] = {0, int32_t(shape[0])};
    experts_forward<T>(x, nullptr, nullptr, gate_up, down, y, hidden, nullptr, nullptr, start, expert, threads);
}

template <class T>
void feed_forward_backward(const T* x, const T* gate_up, const T* down, const T* hidden, const T* grad, T* grad_x,
                           T* grad_gate_up, T* grad_down, const int64_t* shape, int threads) {
    const int64_t expert[] = {shape[0], 1, 1, shape[1], shape[2]};
    int32_t start[] = {0, int32_t(shape[0])};
    experts_backward<T>(x, nullptr, gate_up, down, hidden, grad, grad_x, nullptr, grad_gate_up, grad_down, nullptr,
                        nullptr, start, expert, threads);
}

// x [T, K], weight [N, K] -> y [T, N]; shape: T, K, N.
template <class T>
void linear_forward(const T* x, const T* weight, T* y, const int64_t* shape, int threads) {
    const int64_t rows = shape[0];
    const int K = int(shape[1]), N = int(shape[2]);
    const ExpertWeights<T> across(weight, 1, N, K, true, 3, threads);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t r = 0; r < rows; r += TOKEN_BLOCK)
        linear_block(x, across[0], y, r, int(std::min<int64_t>(TOKEN_BLOCK, rows - r)), K, N);
}

template <class T>
void linear_backward(const T* x, const T* weight, const T* grad, T* grad_x, T* grad_weight, const int64_t* shape, int threads) {
    const int64_t rows = shape[0];
    const int K = int(shape[1]), N = int(shape[2]), together = weight_rows(N, 1, threads), parts = (N + together - 1) / together;
    const int64_t blocks = (rows + TOKEN_BLOCK - 1) / TOKEN_BLOCK;
    const ExpertWeights<T> down(weight, 1, N, K, false, 3, threads);
    // The long shares first, so that the short ones even the threads out.
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t i = 0; i < parts + blocks; ++i) {
        if (i < parts) {
            const int from = int(i) * together, to = std::min(from + together, N);
            weight_gradient(0, int(rows), from, to, K, [&](int r) { return grad + int64_t(r) * N; },
                            [&](int r) { return x + int64_t(r) * K; }, grad_weight);
        } else {
            const int64_t r = (i - parts) * TOKEN_BLOCK;
            linear_block(grad, down[0], grad_x, r, int(std::min<int64_t>(TOKEN_BLOCK, rows - r)), N, K);
        }
    }
}

RouteShape route_shape(const int64_t* s, float scaling) {
    return {int(s[0]), int(s[1]), int(s[2]), int(s[3]), s[4] != 0, s[5] != 0, scaling};
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Whether this machine can run what this file was compiled for.
EXPORT int glasklar_level() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
        return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}

// What this build is for, in the numbers of glasklar_level: builds of one source must not be taken for each other.
#if defined(__AVX512BF16__)
#define BUILT_FOR 3
#elif defined(__AVX512F__)
#define BUILT_FOR 2
#elif defined(__AVX2__)
#define BUILT_FOR 1
#else
#define BUILT_FOR 0
#endif
EXPORT int glasklar_built_for() { return BUILT_FOR; }

EXPORT void route_forward(const float* logits, const float* bias, int64_t* ids, float* weights, float* scores,
                          int64_t rows, const int64_t* shape, float scaling, int threads) {
    const RouteShape r = route_shape(shape, scaling);
#pragma omp parallel for num_threads(threads)
    for (int64_t t = 0; t < rows; ++t)
        route_forward_row(r, logits + t * r.experts, bias, ids + t * r.active, weights + t * r.active, scores + t * r.experts);
}

EXPORT void route_backward(const int64_t* ids, const float* scores, const float* grad_weights, const float* grad_scores,
                           float* grad_logits, int64_t rows, const int64_t* shape, float scaling, int threads) {
    const RouteShape r = route_shape(shape, scaling);
#pragma omp parallel for num_threads(threads)
    for (int64_t t = 0; t < rows; ++t)
        route_backward_row(r, ids + t * r.active, scores + t * r.experts, grad_weights + t * r.active,
                           grad_scores ? grad_scores + t * r.experts : nullptr, grad_logits + t * r.experts);
}

// matrices [n, R, C], R <= C, in place.
EXPORT void orthogonalise(float* matrices, int64_t n, int64_t R, int64_t C, const float* factors, int steps, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t i = 0; i < n; ++i) orthogonalise_matrix(matrices + i * R * C, int(R), int(C), factors, steps);
}

#define EXPORT_FOR(T, suffix)                                                                                            \
    EXPORT void rms_norm_forward_##suffix(const T* x, int64_t stride, const T* added, T* total, const T* w, float eps, T* y,\
                                          float* inverse, int64_t rows, int64_t D, int threads) {                        \
        rms_norm_forward(x, stride, added, total, w, eps, y, inverse, rows, D, threads);                                 \
    }                                                                                                                    \
    EXPORT void rms_norm_backward_##suffix(const T* x, int64_t stride, const T* w, const float* inverse, const T* g,     \
                                           const T* other, T* gx, float* partial, T* gw, int64_t rows, int64_t D,        \
                                           int threads) {                                                                \
        rms_norm_backward(x, stride, w, inverse, g, other, gx, partial, gw, rows, D, threads);                           \
    }                                                                                                                    \
    EXPORT void gate_forward_##suffix(const T* x, const float* w, float* logits, int64_t rows, int64_t D, int64_t E,     \
                                      int threads) {                                                                     \
        gate_forward(x, w, logits, rows, D, E, threads);                                                                 \
    }                                                                                                                    \
    EXPORT void gate_backward_##suffix(const T* x, const float* w, const float* g, T* gx, float* partial, float* gw,     \
                                       int64_t rows, int64_t D, int64_t E, int threads) {                                \
        gate_backward(x, w, g, gx, partial, gw, rows, D, E, threads);                                                    \
    }                                                                                                                    \
    EXPORT void join_keys_##suffix(const T* own, const T* shared, T* keys, const int64_t* shape, int threads) {          \
        join_keys(own, shared, keys, shape, threads);                                                                    \
    }                                                                                                                    \
    EXPORT void split_keys_##suffix(const T* grad, T* grad_own, T* grad_shared, const int64_t* shape, int threads) {     \
        split_keys(grad, grad_own, grad_shared, shape, threads);                                                         \
    }                                                                                                                    \
    EXPORT void rotate_##suffix(const T* x, const int64_t* xs, const float* c, const float* s, const int64_t* as,        \
                                float direction, int interleave, T* y, const int64_t* shape, int threads) {              \
        rotate(x, xs, c, s, as, direction, interleave, y, shape, threads);                                               \
    }                                                                                                                    \
    EXPORT void logprobs_forward_##suffix(const T* logits, const int64_t* targets, float* logprobs, float* entropy,      \
                                          float* log_sums, int64_t rows, int64_t W, int threads) {                       \
        logprobs_forward(logits, targets, logprobs, entropy, log_sums, rows, W, threads);                                \
    }                                                                                                                    \
    EXPORT void logprobs_backward_##suffix(const T* logits, const int64_t* targets, const float* log_sums,               \
                                           const float* grad, T* grad_logits, int64_t rows, int64_t W, int threads) {    \
        logprobs_backward(logits, targets, log_sums, grad, grad_logits, rows, W, threads);                               \
    }                                                                                                                    \
    EXPORT void attention_forward_##suffix(const T* q, const T* k, const T* v, const T* mask, float scale, T* out,       \
                                           float* log_sums, Span* spans, const int64_t* shape, const int64_t* strides,     \
                                           int threads) {                                                                \
        attention_forward(q, k, v, mask, scale, out, log_sums, spans, shape, strides, threads);                          \
    }                                                                                                                    \
    EXPORT void attention_backward_##suffix(const T* q, const T* k, const T* v, const T* mask, float scale,              \
                                            const T* out, const T* g, const float* log_sums, const Span* spans, T* gq,   \
                                            T* gk, T* gv, const int64_t* shape, const int64_t* strides, int threads) {   \
        attention_backward(q, k, v, mask, scale, out, g, log_sums, spans, gq, gk, gv, shape, strides, threads);          \
    }                                                                                                                    \
    EXPORT void experts_forward_##suffix(const T* x, const int64_t* ids, const float* w, const T* gu, const T* d, T* y,  \
                                         T* hidden, int32_t* choice, int32_t* place, int32_t* start,                     \
                                         const int64_t* shape, int threads) {                                            \
        experts_forward(x, ids, w, gu, d, y, hidden, choice, place, start, shape, threads);                              \
    }                                                                                                                    \
    EXPORT void experts_backward_##suffix(const T* x, const float* w, const T* gu, const T* d, const T* hidden,          \
                                          const T* g, T* gx, float* gw, T* ggu, T* gd, int32_t* choice, int32_t* place,  \
                                          int32_t* start, const int64_t* shape, int threads) {                           \
        experts_backward(x, w, gu, d, hidden, g, gx, gw, ggu, gd, choice, place, start, shape, threads);                 \
    }                                                                                                                    \
    EXPORT void feed_forward_forward_##suffix(const T* x, const T* gu, const T* d, T* y, T* hidden, const int64_t* shape, \
                                              int threads) {                                                             \
        feed_forward_forward(x, gu, d, y, hidden, shape, threads);                                                       \
    }                                                                                                                    \
    EXPORT void feed_forward_backward_##suffix(const T* x, const T* gu, const T* d, const T* hidden, const T* g, T* gx,  \
                                               T* ggu, T* gd, const int64_t* shape, int threads) {                       \
        feed_forward_backward(x, gu, d, hidden, g, gx, ggu, gd, shape, threads);                                         \
    }                                                                                                                    \
    EXPORT void linear_forward_##suffix(const T* x, const T* w, T* y, const int64_t* shape, int threads) {               \
        linear_forward(x, w, y, shape, threads);                                                                         \
    }                                                                                                                    \
    EXPORT void linear_backward_##suffix(const T* x, const T* w, const T* g, T* gx, T* gw, const int64_t* shape,         \
                                         int threads) {                                                                  \
        linear_backward(x, w, g, gx, gw, shape, threads);                                                                \
    }

EXPORT_FOR(float, f32)
EXPORT_FOR(bf16, bf16)
